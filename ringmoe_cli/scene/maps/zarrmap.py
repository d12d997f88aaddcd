"""Rows of a map become a Zarr group with CF attributes: GDAL, QGIS and xarray open it in place."""

import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.store.layout import add, add_coordinates, consolidate, placement
from ringmoe_cli.scene.writer import Layer, failures_named

CHUNK_BYTES = 2 << 20
"""About what a chunk holds before compression: all bands of a square."""


class ZarrWriter:
    """Takes the rows of one map in order and leaves a Zarr group at `path`, or nothing.

    The layer is an array `(band, y, x)` of its name; `scale`, where it has one, says per band what
    a stored step stands for.

    Raises:
        RingmoeError: if the disk is full or the group cannot be written.
    """

    def __init__(self, path: Path, layer: Layer, grid: Grid, work: Path) -> None:
        """Prepare a map.

        Args:
            path: where the finished group appears.
            layer: what it holds.
            grid: its shape and place.
            work: folder for temporary files, on the same file system as `path`.
        """
        self.path, self.layer, self.grid = path, layer, grid
        self.fresh = work / f"{layer.name}.zarr"
        self.dtype = np.dtype("float16" if layer.nbits == 16 else layer.dtype)
        self.side = chunk_side(layer.bands * self.dtype.itemsize)
        self.row = 0
        self.held: list[NDArray[Any]] = []

    def __enter__(self) -> Self:
        import zarr

        with failures_named(self.fresh):
            shutil.rmtree(self.fresh, ignore_errors=True)
            group: Any = zarr.create_group(store=self.fresh, zarr_format=2)
            shape = (self.layer.bands, self.grid.height, self.grid.width)
            chunks = (self.layer.bands, self.side, self.side)
            self.array = add(
                group, self.layer.name, ("band", "y", "x"), shape, self.dtype, chunks,
                fill=self.layer.nodata,
            )  # fmt: skip
            self.array.attrs.update({**placement(self.grid), "units": self.layer.unit})
            add_coordinates(group, self.grid, self.layer.descriptions)
            if self.layer.scales:
                scales = np.array(self.layer.scales)
                add(group, "scale", ("band",), scales.shape, "float64", scales.shape)[:] = scales
            group.attrs["Conventions"] = "CF-1.11"
        return self

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows, (bands, rows, width); whole rows of chunks go to disk."""
        self.held.append(rows.astype(self.dtype))
        while sum(part.shape[1] for part in self.held) >= self.side:
            joined = np.concatenate(self.held, axis=1)
            self.flush(joined[:, : self.side])
            self.held = [joined[:, self.side :]]

    def flush(self, rows: NDArray[Any]) -> None:
        """Put rows on disk."""
        with failures_named(self.fresh):
            self.array[:, self.row : self.row + rows.shape[1]] = rows
        self.row += rows.shape[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            with suppress(OSError):
                shutil.rmtree(self.fresh)

    def finish(self) -> None:
        """Complete the group and give it its name."""
        if self.held:
            self.flush(np.concatenate(self.held, axis=1))
        if self.row != self.grid.height:
            raise RingmoeError(f"{self.path}: {self.row} of {self.grid.height} rows were written")
        with failures_named(self.path):
            consolidate(self.fresh)
            if self.path.exists():
                shutil.rmtree(self.path)
            self.fresh.replace(self.path)


def chunk_side(bytes_per_pixel: int) -> int:
    """Side of a chunk: the largest power of two, 16 to 512, that keeps it near `CHUNK_BYTES`."""
    side = 512
    while side > 16 and side * side * bytes_per_pixel > CHUNK_BYTES:
        side //= 2
    return side
