"""Outlines of objects from COCO files, drawn as the class map of an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.json_file import read_json
from ringmoe_cli import console
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Window

PLACES = ("", "annotations", "JSON")
"""Folders that the label file of a split may lie in."""


@dataclass(frozen=True)
class Outlines:
    """The objects of one image, all of class 1; the rest is class 0."""

    rings: tuple[tuple[float, ...], ...]
    """x, y, x, y … of every ring, in pixels; rings inside others are holes."""

    def drawn(self, window: Window) -> NDArray[np.int64]:
        """Classes (h, w) of a window: pixels whose centre lies in an odd number of rings."""
        from rasterio.features import rasterize

        row, col, height, width = window
        count = np.zeros((height, width), np.int64)
        for ring in self.rings:
            corners = [(x - col, y - row) for x, y in zip(ring[::2], ring[1::2], strict=True)]
            shape = {"type": "Polygon", "coordinates": [[*corners, corners[0]]]}
            count += rasterize([shape], (height, width), dtype="uint8")
        return np.asarray(count % 2)


def coco_file(root: Path, name: str) -> Path | None:
    """The label file of a split, wherever the download keeps it."""
    return next((p for f in PLACES if (p := root / f / f"{name}.json").is_file()), None)


def coco_outlines(path: Path) -> dict[str, Outlines]:
    """Stem of the image -> its outlines; images without an object have none.

    Raises:
        LabelError: if the file is no COCO file.
    """
    try:
        content = read_json(path)
        stems = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
        rows = [(stems[a["image_id"]], a["segmentation"]) for a in content["annotations"]]
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        raise LabelError(f"{path} is no COCO file of outlines: {damage!r}") from damage
    rings: dict[str, list[tuple[float, ...]]] = {stem: [] for stem in stems.values()}
    encoded = sum(isinstance(outline, Mapping) for _, outline in rows)
    if encoded:
        console.warn(f"{path}: {encoded} object(s) without an outline (run lengths) are left out")
    for stem, outline in rows:
        rings[stem] += rings_of(outline)
    return {stem: Outlines(tuple(found)) for stem, found in rings.items()}


def rings_of(outline: Any) -> list[tuple[float, ...]]:
    """The rings of an annotation that have three corners or more."""
    if isinstance(outline, Mapping):
        return []
    return [tuple(map(float, ring)) for ring in outline if len(ring) >= 6 and not len(ring) % 2]
