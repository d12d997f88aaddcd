"""Pictures of scenes, stores and runs, for `ringmoe inspect`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.journal import Journal
from ringmoe_cli import console
from ringmoe_cli.errors import CheckpointError, RingmoeError
from ringmoe_cli.scene import picture
from ringmoe_cli.scene.grid import Grid, Window

MOST_SCENES = 8
"""Panels of a store's quicklook."""


class Readable(Protocol):
    """A stored scene or a scene's reader."""

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels (C, h, w) and validity (h, w)."""


def look(source: Readable, grid: Grid, channels: Sequence[str]) -> picture.Image:
    """A scene as an (H, W, 3) picture, read in strips so that its size does not matter."""
    step = max(1, -(-max(grid.height, grid.width) // picture.MOST_PIXELS))
    rows = max(step, 256 // step * step)
    shown = shown_channels(channels)
    values, valid = [], []
    for row in range(0, grid.height, rows):
        window = Window(row, 0, min(rows, grid.height - row), grid.width)
        strip, seen = source.physical(window)
        values.append(picture_channels(strip, shown)[:, ::step, ::step])
        valid.append(seen[::step, ::step])
    return picture.quicklook(np.concatenate(values, axis=1), np.concatenate(valid, axis=0))


def shown_channels(channels: Sequence[str]) -> list[int]:
    """Indices of red, green, blue where they exist; all of complex SAR; else the first three."""
    names = list(channels)
    if {"red", "green", "blue"} <= set(names):
        return [names.index(colour) for colour in ("red", "green", "blue")]
    return (
        list(range(len(names))) if any("_re" in n for n in names) else list(range(len(names)))[:3]
    )


def picture_channels(strip: NDArray[np.float32], shown: Sequence[int]) -> NDArray[np.float32]:
    """Channels to draw: as they are, or the power of interleaved re, im in dB."""
    chosen = strip[list(shown)]
    if len(shown) <= 3:
        return chosen
    power = chosen[0::2] ** 2 + chosen[1::2] ** 2
    return np.asarray(10 * np.log10(power + 1e-12), np.float32)


def draw_quicklook(target: str, path: Path, allow_remote: bool = False) -> None:
    """Draw a scene, or the first scenes of a store, into a PNG."""
    from ringmoe_cli.scene.tiles import is_store, open_store

    if is_store(Path(target)):
        scenes = open_store(target).scenes[:MOST_SCENES]
        panels = {s.name: look(s, s.grid, s.scene.channels) for s in scenes}
    else:
        from ringmoe_cli.scene.reader import SceneReader
        from ringmoe_cli.scene.sensors import open_scene

        scene = open_scene(target, allow_remote=allow_remote)
        panels = {scene.name: look(SceneReader(scene), scene.grid, scene.channels)}
    picture.save_panels(path, panels)


def draw_curves(run: str, path: Path) -> None:
    """Draw every number a run has logged; below, of a pre-training run, what it fills in."""
    from model.checkpoint import read_config
    from ringmoe_cli.jobs.reconstruction import reconstructions

    rows = rows_of(run, "metrics.jsonl")
    filled = None
    if read_config(run).pretraining is not None:
        try:
            filled = reconstructions(Path(run))
        except CheckpointError as error:
            console.warn(f"no reconstructions: {error}")
    picture.save_curves(path, rows, filled)


def draw_routing(run: str, path: Path) -> None:
    """Draw the latest routing of a run: branch × modality, layers × experts."""
    latest = rows_of(run, "routing.jsonl")[-1]
    shares: dict[str, dict[str, NDArray[Any]]] = {}
    for branch, by_modality in latest["shares"].items():
        shares[branch] = {m: np.asarray(layers) for m, layers in by_modality.items()}
    picture.save_routing(path, shares)


def rows_of(run: str, name: str) -> Sequence[Mapping[str, Any]]:
    """The lines of one of a run's journals.

    Raises:
        RingmoeError: if the run has none.
    """
    path = Path(run) / name
    if not path.is_file() or not (rows := Journal(path).rows()):
        raise RingmoeError(f"{run} has no {name}: it is not a run of ringmoe pretrain or finetune")
    return rows
