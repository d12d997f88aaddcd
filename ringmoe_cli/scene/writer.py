"""Rows of a map become a cloud-optimised GeoTIFF, under a temporary name until it is whole.

A COG cannot be written row by row, and GDAL's COG driver holds a scene in memory if asked to
create one; so rows go to a temporary tiled GeoTIFF, which the COG driver then copies.
"""

import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.sax.saxutils import escape

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.transform import Affine
from rasterio.windows import Window

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import Grid

COG_OPTIONS = (
    "BIGTIFF", "BLOCKSIZE", "COMPRESS", "GEOTIFF_VERSION", "LEVEL", "MAX_Z_ERROR", "NBITS",
    "NUM_THREADS", "OVERVIEWS", "OVERVIEW_COMPRESS", "OVERVIEW_COUNT", "OVERVIEW_PREDICTOR",
    "OVERVIEW_QUALITY", "OVERVIEW_RESAMPLING", "PREDICTOR", "QUALITY", "RESAMPLING", "SPARSE_OK",
    "STATISTICS", "TARGET_SRS", "TILING_SCHEME",
)  # fmt: skip
"""What `--co` may set: creation options of GDAL's COG driver."""
NEARLY_FULL = 16 << 20
"""Free bytes below which a failed write is put down to a full disk."""


@dataclass(frozen=True)
class Layer:
    """What a map holds: the type of its numbers and their meaning."""

    name: str
    """classes, probabilities, height, features …"""
    dtype: str
    """numpy name of the type on disk."""
    nodata: float
    """Value of pixels without a statement."""
    bands: int = 1
    """Number of bands."""
    resampling: str = "average"
    """How overviews are made; `nearest` for class numbers, or they would invent classes."""
    classes: tuple[str, ...] = ()
    """Names of the values 0, 1, …, for a class map."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB of the values 0, 1, …, for a class map."""
    descriptions: tuple[str, ...] = ()
    """Names of the bands."""
    scales: tuple[float, ...] = ()
    """Per band, meaning = stored value · scale; empty for 1."""
    nbits: int | None = None
    """Bits on disk, if fewer than the type has: 16 for half precision."""
    unit: str = ""
    """Unit of the meaning."""


def class_layer(classes: tuple[str, ...], colours: tuple[tuple[int, int, int], ...]) -> Layer:
    """A class map: uint8 class numbers with names and colours, 255 where there is nothing."""
    return Layer(
        "classes", "uint8", 255, resampling="nearest", classes=classes, colours=colours,
        descriptions=("class",),
    )  # fmt: skip


def probability_layer(classes: tuple[str, ...]) -> Layer:
    """One band per class, probability in steps of 1/254, 255 where there is nothing."""
    return Layer(
        "probabilities", "uint8", 255, bands=len(classes), descriptions=classes,
        scales=(1 / 254,) * len(classes),
    )  # fmt: skip


def value_layer(name: str, unit: str) -> Layer:
    """A map of one number per pixel, NaN where there is nothing."""
    return Layer(name, "float32", float("nan"), descriptions=(name,), unit=unit)


class MapWriter:
    """Takes the rows of one map in order and leaves a COG at `path`, or nothing.

    Raises:
        RingmoeError: if the disk is full or the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        layer: Layer,
        grid: Grid,
        work: Path,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a map.

        Args:
            path: where the finished file appears.
            layer: what it holds.
            grid: its shape and place.
            work: folder for temporary files, on the same file system as `path`.
            options: creation options of the COG driver.
        """
        self.path, self.layer, self.grid = path, layer, grid
        self.options = dict(options or {})
        self.rows_file = work / f"{layer.name}.rows.tif"
        self.cog_file = work / f"{layer.name}.cog.tif"
        self.temporary: tuple[Path, ...] = (self.rows_file, self.cog_file)
        self.row = 0

    def __enter__(self) -> Self:
        with failures_named(self.rows_file):
            self.dataset = open_rows(self.rows_file, self.layer, self.grid)
            describe(self.dataset, self.layer, self.grid)  # a colour map must precede the pixels
        return self

    def write(self, rows: NDArray[Any], left: int = 0) -> None:
        """Append rows (bands, rows, width), or the part of them from column `left` on."""
        _, height, width = rows.shape
        window = Window(left, self.row, width, height)
        with failures_named(self.rows_file):
            self.dataset.write(rows, window=window)
        self.row += height if left + width == self.grid.width else 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                with suppress(RasterioError, OSError):
                    self.dataset.close()
        finally:
            for file in self.temporary:
                file.unlink(missing_ok=True)
                sidecar(file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Complete the rows, copy them to a COG, check that it is whole, and give it its name."""
        with failures_named(self.rows_file):
            self.dataset.close()
        if self.row != self.grid.height:
            raise RingmoeError(f"{self.path}: {self.row} of {self.grid.height} rows were written")
        with failures_named(self.cog_file):
            copy_to_cog(self.ready(), self.cog_file, self.layer, self.options)
        if sidecar(self.cog_file).exists():
            sidecar(self.cog_file).replace(sidecar(self.path))
        self.cog_file.replace(self.path)

    def ready(self) -> Path:
        """The file that the COG is a copy of."""
        return self.rows_file


def copy_to_cog(rows: Path, cog: Path, layer: Layer, options: Mapping[str, str]) -> None:
    """Copy a finished GeoTIFF of a layer to a COG and check that it is whole and on disk."""
    if layer.classes:
        sidecar(rows).write_text(category_names(layer.classes))
    rasterio.shutil.copy(rows, cog, driver="COG", **cog_options(layer, options))
    check_whole(cog)
    sync(cog)


def open_rows(path: Path, layer: Layer, grid: Grid) -> Any:
    """The temporary GeoTIFF that takes rows: quick to write, quick to copy."""
    place: dict[str, Any] = {}
    if grid.gcps:
        place = {"gcps": [ground_point(p) for p in grid.gcps]}
    elif grid.has_transform:
        place = {"transform": Affine(*grid.transform)}
    return rasterio.open(
        path, "w", driver="GTiff", height=grid.height, width=grid.width, count=layer.bands,
        dtype=layer.dtype, nodata=layer.nodata, crs=grid.crs, tiled=True, blockxsize=512,
        blockysize=512, compress="zstd", zstd_level=1, interleave="band", bigtiff="if_safer",
        **place,
    )  # fmt: skip


def ground_point(p: Any) -> GroundControlPoint:
    """A control point as rasterio has it."""
    return GroundControlPoint(row=p.row, col=p.col, x=p.x, y=p.y, z=p.z)


def describe(dataset: Any, layer: Layer, grid: Grid) -> None:
    """Say what the numbers mean and where the pixels are, in the ways GDAL's readers look for."""
    dataset.update_tags(AREA_OR_POINT="Point" if grid.pixel_is_point else "Area")
    dataset.update_tags(RINGMOE_LAYER=layer.name)
    if grid.rpcs:
        dataset.update_tags(ns="RPC", **{k: gdal_text(v) for k, v in grid.rpcs.items()})
    if layer.classes:
        dataset.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(layer.classes)})
    if layer.colours:
        dataset.write_colormap(1, {i: (*rgb, 255) for i, rgb in enumerate(layer.colours)})
    if layer.descriptions:
        dataset.descriptions = layer.descriptions
    if layer.scales:
        dataset.scales = layer.scales
    if layer.unit:
        dataset.units = (layer.unit,) * layer.bands


def gdal_text(value: Any) -> str:
    """A metadata value as GDAL writes it: lists are separated by blanks."""
    if isinstance(value, str):
        return value
    return " ".join(map(repr, value)) if isinstance(value, list | tuple) else repr(value)


def cog_options(layer: Layer, options: Mapping[str, str]) -> dict[str, str]:
    """Creation options of the COG: good defaults, then the user's."""
    defaults = {
        "COMPRESS": "DEFLATE",
        "PREDICTOR": "YES" if layer.dtype.startswith("float") and not layer.nbits else "NO",
        "OVERVIEW_RESAMPLING": layer.resampling.upper(),
        "BIGTIFF": "IF_SAFER",
        "NUM_THREADS": "ALL_CPUS",
    }
    bits = {"NBITS": str(layer.nbits)} if layer.nbits else {}
    return {**defaults, **bits, **options}


def parse_options(given: list[str]) -> dict[str, str]:
    """`--co NAME=VALUE` options as a mapping.

    Raises:
        RingmoeError: for a form or a name that the COG driver does not know.
    """
    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name.upper() not in COG_OPTIONS:
            known = ", ".join(COG_OPTIONS)
            raise RingmoeError(f"--co {text}: say NAME=VALUE with one of {known}")
        options[name.upper()] = value
    return options


def category_names(classes: tuple[str, ...]) -> str:
    """GDAL's sidecar with class names, which QGIS shows in the legend."""
    names = "".join(f"<Category>{escape(c)}</Category>" for c in classes)
    band = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand>'
    return f"<PAMDataset>{band}</PAMDataset>\n"


def sidecar(path: Path) -> Path:
    """Where GDAL keeps what a TIFF has no tag for."""
    return path.with_name(path.name + ".aux.xml")


def check_whole(path: Path) -> None:
    """Read the last block of every level: a write that failed late shows here.

    Raises:
        RasterioError: if a block is missing.
    """
    with rasterio.open(path) as dataset:
        levels = [-1, *range(len(dataset.overviews(1)))]
    for level in levels:
        extra = {} if level < 0 else {"overview_level": level}
        with rasterio.open(path, **extra) as dataset:
            last = Window(dataset.width - 1, dataset.height - 1, 1, 1)
            dataset.read(window=last)


def sync(path: Path) -> None:
    """Force a file to disk before it gets its final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Turn what GDAL and the system say about a failed write into one line for the user.

    Maps of scenes that lie nowhere are no reason for a warning: their scenes were one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except (RasterioError, OSError) as error:
        raise RingmoeError(failure_line(path, error)) from error


def failure_line(path: Path, error: BaseException) -> str:
    """Why a file could not be written."""
    folder = path.parent
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    if full or (folder.exists() and free < NEARLY_FULL):
        return f"no space left on the disk of {folder}; free some and run again to continue"
    return f"cannot write {path}: {' '.join(str(error).split())}"


def quantise(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities 0..1 as the 255 steps of a probability layer."""
    steps = np.clip(probabilities, 0, 1) * np.float32(254)
    steps += np.float32(0.5)
    return steps.astype(np.uint8)
