"""One map of many: the maps of overlapping scenes on a common grid, block by block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.maps.part import part_folder
from ringmoe_cli.scene.maps.product import most_probable
from ringmoe_cli.scene.raster import grid_of
from ringmoe_cli.scene.writer import Layer, MapWriter, quantise

SIDE = 1024
"""Pixels of a block's side."""
Bounds = tuple[float, float, float, float]
"""West, south, east, north."""


@dataclass(frozen=True)
class Sheet:
    """A map that a mosaic is made of."""

    path: Path
    """Its file."""
    grid: Grid
    """Where it lies."""


def write_mosaic(
    outputs: Mapping[str, Path],
    layers: Sequence[Layer],
    sheets: Sequence[Mapping[str, Path]],
    options: Mapping[str, str] | None = None,
) -> None:
    """Join the maps of several scenes, in the first one's coordinate system and pixels.

    Where maps overlap, probabilities and values are averaged and classes follow from the mean
    probabilities; without probabilities the class of the earlier map counts.

    Args:
        outputs: layer -> file of the mosaic.
        layers: what the maps hold.
        sheets: per scene, layer -> file, in order of precedence.
        options: creation options of the COG driver.

    Raises:
        RingmoeError: if a map lies nowhere or is of another kind.
    """
    piles = {x.name: [sheet(files[x.name], x) for files in sheets] for x in layers}
    grid = common_grid([s.grid for s in piles[layers[0].name]])
    work = part_folder(next(iter(outputs.values())))
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = {
            x.name: stack.enter_context(MapWriter(outputs[x.name], x, grid, work, options))
            for x in layers
        }
        for top in range(0, grid.height, SIDE):
            for left in range(0, grid.width, SIDE):
                window = (top, left, min(SIDE, grid.height - top), min(SIDE, grid.width - left))
                for name, values in block(piles, layers, grid, window).items():
                    writers[name].write(values, left)
    work.rmdir()


def sheet(path: Path, layer: Layer) -> Sheet:
    """A map for a mosaic.

    Raises:
        RingmoeError: if it cannot be part of one.
    """
    with rasterio.open(path) as source:
        grid, held = grid_of(source), source.tags().get("RINGMOE_LAYER")
    if not grid.has_transform or not grid.crs:
        raise RingmoeError(f"{path} has no transform and fits in no mosaic; add --warp EPSG:…")
    if held != layer.name:
        raise RingmoeError(f"{path} holds {held or 'no map'}, not {layer.name}; delete it")
    return Sheet(path, grid)


def common_grid(grids: Sequence[Grid]) -> Grid:
    """The first grid, extended to cover all."""
    first = grids[0]
    a, b, c, d, e, f = first.transform
    if b or d:
        raise RingmoeError("the first map is rotated; add --warp EPSG:… for a mosaic")
    bounds = np.array([bounds_in(g, str(first.crs)) for g in grids])
    west, south = bounds[:, :2].min(0)
    east, north = bounds[:, 2:].max(0)
    ys = (north, south) if e < 0 else (south, north)
    left, right = floor((west - c) / a + 1e-6), ceil((east - c) / a - 1e-6)
    top, bottom = floor((ys[0] - f) / e + 1e-6), ceil((ys[1] - f) / e - 1e-6)
    transform = (a, b, c + left * a, d, e, f + top * e)
    return Grid(bottom - top, right - left, first.crs, transform)


def bounds_in(grid: Grid, crs: str) -> Bounds:
    """Bounds of a grid in a coordinate system."""
    corners = [grid.xy(r, c) for r in (0, grid.height) for c in (0, grid.width)]
    (west, south), (east, north) = np.min(corners, 0), np.max(corners, 0)
    if grid.crs == crs:
        return west, south, east, north
    return transform_bounds(grid.crs, crs, west, south, east, north)  # type: ignore[no-any-return]


def block(
    piles: Mapping[str, Sequence[Sheet]],
    layers: Sequence[Layer],
    grid: Grid,
    window: tuple[int, int, int, int],
) -> dict[str, NDArray[Any]]:
    """A block of every layer, (bands, h, w)."""
    by_name = {x.name: x for x in layers}
    if "probabilities" in by_name:
        layer = by_name["probabilities"]
        steps = average(read(piles[layer.name], layer, grid, window), layer, window)
        classes, _ = most_probable(steps)
        nothing = np.isnan(steps[0])
        kept = quantise(np.nan_to_num(steps))
        kept[:, nothing] = 255
        return {"classes": np.where(nothing, np.uint8(255), classes)[None], "probabilities": kept}
    layer = layers[0]
    found = read(piles[layer.name], layer, grid, window)
    if layer.classes:
        return {layer.name: earliest(found, layer, window)}
    return {layer.name: average(found, layer, window)}


def read(
    pile: Sequence[Sheet], layer: Layer, grid: Grid, window: tuple[int, int, int, int]
) -> Iterator[NDArray[Any]]:
    """What each map that reaches into a window has there, (bands, h, w)."""
    top, left, height, width = window
    where = Grid(height, width, grid.crs, (*grid.transform[:2], *moved(grid, top, left)))
    at = Affine(*where.transform)
    kind = Resampling.nearest if layer.classes else Resampling.bilinear
    for one in pile:
        if not overlap(bounds_in(one.grid, str(grid.crs)), bounds_in(where, str(grid.crs))):
            continue
        with (
            rasterio.open(one.path) as source,
            WarpedVRT(
                source, crs=grid.crs, transform=at, height=height, width=width, resampling=kind,
                nodata=layer.nodata,
            ) as warped,
        ):  # fmt: skip
            yield warped.read()


def moved(grid: Grid, top: int, left: int) -> tuple[float, float, float, float]:
    """The rest of a window's transform after a and b."""
    x, y = grid.xy(top, left)
    return float(x), grid.transform[3], grid.transform[4], float(y)


def overlap(one: Bounds, other: Bounds) -> bool:
    """Whether two rectangles share an area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def earliest(
    found: Iterator[NDArray[Any]], layer: Layer, window: tuple[int, int, int, int]
) -> NDArray[Any]:
    """What the first map that says anything says."""
    out = np.full((layer.bands, *window[2:]), layer.nodata, layer.dtype)
    for values in found:
        np.copyto(out, values, where=out == layer.nodata)
    return out


def average(
    found: Iterator[NDArray[Any]], layer: Layer, window: tuple[int, int, int, int]
) -> NDArray[np.float32]:
    """Mean of what the maps say, in the layer's meaning, NaN where none says anything."""
    shape = (layer.bands, *window[2:])
    total, count = np.zeros(shape, np.float32), np.zeros(shape[1:], np.float32)
    scales = np.array(layer.scales or [1] * layer.bands, np.float32)[:, None, None]
    for values in found:
        said = ~np.isnan(values[0]) if np.isnan(layer.nodata) else values[0] != layer.nodata
        np.add(total, values * scales, out=total, where=said)
        count += said
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(count > 0, total / count, np.nan), np.float32)
