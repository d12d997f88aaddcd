"""Vectors of tiles as GeoParquet: a polygon and a vector per row."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.writer import failures_named, sync

RowOfTiles = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Vectors (C, 1, columns) and which of them say something (1, columns)."""


def write_tiles(path: Path, grid: Grid, side: int, rows: Iterable[RowOfTiles]) -> None:
    """Write the tiles that hold a valid pixel: row, column, polygon and vector.

    Polygons are in the scene's coordinate system, or in pixels (x = column, y = row) without one.

    Args:
        path: a .parquet file; it appears when it is whole.
        grid: the scene's.
        side: of a tile in pixels; tiles are counted from the scene's origin.
        rows: row after row of tiles.
    """
    import geopandas

    places, vectors = [], []
    for row, (dense, valid) in enumerate(rows):
        for column in np.flatnonzero(valid[0]):
            places.append((row, int(column)))
            vectors.append(dense[:, 0, column])
    table = geopandas.GeoDataFrame(
        {
            "row": np.array([r * side for r, _ in places], np.int64),
            "col": np.array([c * side for _, c in places], np.int64),
            "vector": vectors,
        },
        geometry=[polygon(grid, row * side, column * side, side) for row, column in places],
        crs=grid.crs if grid.has_transform else None,
    )
    fresh = path.with_name(path.name + ".new")
    with failures_named(path):
        table.to_parquet(fresh, index=False, compression="zstd")
        sync(fresh)
        fresh.replace(path)


def polygon(grid: Grid, row: int, col: int, side: int) -> object:
    """Outline of a tile, cut at the scene's edge."""
    from shapely.geometry import Polygon

    bottom, right = min(row + side, grid.height), min(col + side, grid.width)
    corners = ((row, col), (row, right), (bottom, right), (bottom, col))
    return Polygon([grid.xy(r, c) for r, c in corners])
