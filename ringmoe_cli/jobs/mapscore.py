"""Scores of a class map on disk against reference labels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.metrics import IGNORE, ConfusionMatrix
from ringmoe_cli.errors import LabelError
from ringmoe_cli.jobs.scores import write_evaluation
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labels import Wanted, open_labels
from ringmoe_cli.scene.raster import grid_of, open_raster

ROWS = 1024
"""Rows compared at a time."""


def score_map(path: Path, labels: Path, classes: str | None, output: Path) -> dict[str, Any]:
    """Compare a map with labels on the map's own grid, classes by name.

    The pixels are those of `evaluate` on windows. The numbers differ only where the map blends
    what overlapping windows say; with --overlap 0 at prediction they are the same.

    Raises:
        LabelError: if the labels miss the map, or share no class with it.
    """
    with open_raster(str(path)) as file:
        grid = grid_of(file)
    mapped = open_labels(path, grid, Wanted("segmentation"))
    truth = open_labels(labels, grid, Wanted("segmentation", classes))
    names = tuple(dict.fromkeys([*truth.layer.classes, *mapped.layer.classes]))
    if not set(truth.layer.classes) & set(mapped.layer.classes):
        raise LabelError(
            f"{path} maps {', '.join(mapped.layer.classes)}; {labels} has "
            f"{', '.join(truth.layer.classes)}; say the labels' names with --classes"
        )
    confusion = ConfusionMatrix(len(names))
    for top in range(0, grid.height, ROWS):
        rows = Window(top, 0, min(ROWS, grid.height - top), grid.width)
        answer = indices(mapped.read(rows), mapped.layer.classes, names)
        said = indices(truth.read(rows), truth.layer.classes, names)
        confusion.update(answer, said.masked_fill(answer == IGNORE, IGNORE))
    scores = {**confusion.compute(), "task": "segmentation", "map": str(path), "class_names": names}
    write_evaluation(output, scores, names, confusion)
    return scores


def indices(raw: NDArray[Any], own: tuple[str, ...], names: tuple[str, ...]) -> torch.Tensor:
    """Class indices under a common list of names."""
    table = np.full(IGNORE + 1, IGNORE, np.int64)
    table[: len(own)] = [names.index(n) for n in own]
    return torch.from_numpy(table[raw])
