"""The unit of tiling: one region of one scene, read once, written once, and summed up."""

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import BadBlockError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labels import LabelSource
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.store.chunks import ChunkedArray
from ringmoe_cli.scene.store.layout import VALID_RUN
from ringmoe_cli.scene.store.shards import RUN
from ringmoe_cli.scene.store.statistics import region_moments

REGION_BYTES = 16 * 2**20
"""Raw bytes of a region: large enough to amortise reading, small enough for many at once."""

STRIP_BYTES = 64 * 2**20
"""Raw bytes of a row of tiles above which it is cut, though its strips are then read again."""

LARGEST_UNIT = 2048
"""Regions are aligned to a file's blocks up to this side; larger blocks would cost memory."""


@dataclass(frozen=True)
class Source:
    """Where a scene's pixels and labels come from and where they go."""

    scene: Scene
    """As it is read."""
    folder: Path
    """Its group in the store that is being written."""
    tile: int
    """Side of a chunk."""
    labels: Mapping[str, LabelSource] = field(default_factory=dict)
    """By task."""
    skip_bad: bool = False
    """Mark blocks that cannot be decoded invalid instead of failing."""
    allow_remote: bool = False
    """Let GDAL use the network."""
    gdal: Mapping[str, str] = field(default_factory=dict)
    """GDAL's settings in the environment of whoever started the run."""
    shards: bool = False
    """Zarr v3, several chunks a file."""
    run: str = ""
    """Names the run: handles that a process keeps open belong to one run only."""


GDAL_SETTINGS = ("GDAL_", "CPL_", "VSI_", "AWS_")
"""Environment variables that travel to workers begin so; a worker's own come first."""


def gdal_settings() -> dict[str, str]:
    """GDAL's settings in this process's environment."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(GDAL_SETTINGS)}


@dataclass(frozen=True)
class Region:
    """One task."""

    source: Source
    """What to read and where to write."""
    window: Window
    """A whole number of chunks, clipped to the scene."""


def region_windows(
    grid: Grid, tile: int, pixel_bytes: int, block: tuple[int, int], shards: bool = False
) -> list[Window]:
    """Regions that cover a scene in whole files, shaped after the scene file's blocks.

    Strips are read in full rows where memory allows, since a part costs the whole; tiled files in
    squares aligned to their blocks, since a part of a block costs the whole.

    Args:
        grid: the scene's grid.
        tile: side of a chunk.
        pixel_bytes: bytes of one pixel in all bands.
        block: rows and columns of a block of the scene's file.
        shards: whether chunks share files.
    """
    pixels = REGION_BYTES // pixel_bytes
    run = tile * (RUN if shards else VALID_RUN)
    if block[1] >= grid.width:
        widest = max(1, STRIP_BYTES // (pixel_bytes * tile * run)) * run
        width = min(-(-grid.width // run) * run, widest)
        height = max(1, pixels // (width * tile)) * tile
    else:
        units = [
            (math.lcm(step, side), step) for step, side in zip((tile, run), block, strict=True)
        ]
        down, right = (unit if unit <= LARGEST_UNIT else step for unit, step in units)
        height = max(1, math.isqrt(pixels) // down) * down
        width = max(1, math.isqrt(pixels) // right) * right
    return [
        grid.clip(Window(row, col, height, width))
        for row in range(0, grid.height, height)
        for col in range(0, grid.width, width)
    ]


def unit(step: int, block: int) -> int:
    """The least side that is a multiple of both, unless that is too large: then `step`."""
    both = math.lcm(step, block)
    return both if both <= LARGEST_UNIT else step


def write_region(region: Region) -> dict[str, Any]:
    """Read, check, write and sum up one region; repeating it gives the same bytes.

    Returns:
        One line of the manifest: window, checksums, moments, valid share per tile, label counts.
    """
    source, window = region.source, region.window
    raw, valid, skipped = read_region(source, window)
    arrays = arrays_of(source)
    image = arrays["image"].write(window.row, window.col, raw)
    checks = [image, arrays["valid"].write(window.row, window.col, valid.view(np.uint8))]
    counts: dict[str, Any] = {}
    for task, label in source.labels.items():
        values = label.read(window)
        checks.append(arrays[label.layer.array].write(window.row, window.col, values))
        counts[task] = label_counts(values, len(label.layer.classes))
    return {
        "scene": source.folder.name,
        "window": list(window),
        "checksums": checks,
        "moments": [m.to_list() for m in region_moments(raw, valid, source.scene)],
        "valid": tile_fractions(valid, source.tile).tolist(),
        "labels": counts,
        "skipped": skipped,
    }


def read_region(
    source: Source, window: Window
) -> tuple[NDArray[Any], NDArray[np.bool_], list[Any]]:
    """Raw values and validity; with `skip_bad`, undecodable tiles are zero, invalid and listed."""
    reader = reader_of(source)
    try:
        raw, valid = reader.read(window)
        return raw, valid, []
    except BadBlockError:
        if not source.skip_bad:
            raise
    raw = np.zeros((len(source.scene.bands), window.height, window.width), source.scene.dtype)
    valid = np.zeros((window.height, window.width), np.bool_)
    skipped = []
    side = min(SKIP_SIDE, source.tile)
    for part in source.scene.grid.crop(window).windows(side):
        part = window_inside(part, window)
        rows, cols = slice(part.row, part.row + part.height), slice(part.col, part.col + part.width)
        place = Window(window.row + part.row, window.col + part.col, part.height, part.width)
        try:
            raw[:, rows, cols], valid[rows, cols] = reader.read(place)
        except BadBlockError:
            skipped.append(list(place))
    return raw, valid, skipped


SKIP_SIDE = 64
"""Side of the squares that are given up together around a block that cannot be decoded."""


def window_inside(part: Window, whole: Window) -> Window:
    """A window clipped to another's extent, both counted from the latter's corner."""
    return Grid(whole.height, whole.width).clip(part)


def stored_checksums(region: Region) -> list[int]:
    """The same checksums, of what the store holds: image, validity, labels."""
    names = ("image", "valid", *(v.layer.array for v in region.source.labels.values()))
    arrays = arrays_of(region.source)
    return [arrays[n].checksum(*region.window) for n in names]


def tile_fractions(valid: NDArray[np.bool_], tile: int) -> NDArray[np.float64]:
    """Share of valid pixels per tile, (tiles down, tiles across), of the pixels it really has."""
    rows, cols = range(0, valid.shape[0], tile), range(0, valid.shape[1], tile)
    tiles = [[valid[r : r + tile, c : c + tile] for c in cols] for r in rows]
    return np.array([[np.count_nonzero(t) / t.size for t in row] for row in tiles])


def label_counts(values: NDArray[Any], classes: int) -> list[float]:
    """Pixels per class; for values: how many there are, the lowest and the highest."""
    if classes:
        return [float(n) for n in np.bincount(values.ravel(), minlength=256)[:classes]]
    known = values[np.isfinite(values)]
    return [float(known.size), float(known.min()), float(known.max())] if known.size else [0, 0, 0]


_lock = threading.Lock()


@lru_cache(maxsize=4)
def cached_reader(run: str, scene: Scene, allow_remote: bool) -> SceneReader:
    """One reader per run, scene and process."""
    return SceneReader(scene, allow_remote=allow_remote)


def reader_of(source: Source) -> SceneReader:
    """This process's reader of a scene."""
    for name, value in source.gdal.items():
        os.environ.setdefault(name, value)
    with _lock:
        return cached_reader(source.run, source.scene, source.allow_remote)


@lru_cache(maxsize=4)
def cached_arrays(run: str, folder: Path, names: tuple[str, ...]) -> dict[str, ChunkedArray]:
    """A scene's arrays, opened once per run and process."""
    return {n: ChunkedArray.of(folder, n) for n in names}


def arrays_of(source: Source) -> dict[str, ChunkedArray]:
    """This process's handles of a scene's arrays."""
    labels = (v.layer.array for v in source.labels.values())
    with _lock:
        return cached_arrays(source.run, source.folder, ("image", "valid", *labels))
