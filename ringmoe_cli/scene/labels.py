"""Labels on a scene's grid: rasters and polygons, from their own grid or coordinate system."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import LabelError, SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labelled.categories import Category, read_categories
from ringmoe_cli.scene.raster import SAFE_OPTIONS, file_stamp, grid_of, open_raster
from ringmoe_cli.scene.tiles import IGNORE, LabelLayer

VECTORS = (".geojson", ".json", ".gpkg", ".shp", ".fgb", ".parquet", ".kml", ".gml")
"""Endings of files that are read as polygons."""

RASTER_TASKS = ("segmentation", "depth", "change")
"""Tasks whose labels are one number per pixel."""


class LabelSource(Protocol):
    """Labels that can be read window by window; it can be pickled."""

    @property
    def layer(self) -> LabelLayer:
        """What the labels mean."""

    def read(self, window: Window) -> NDArray[Any]:
        """Labels (h, w) of a window of the scene, in the layer's type."""

    def identity(self) -> list[object]:
        """Plain values that differ where the labels do."""


@dataclass(frozen=True)
class Wanted:
    """What the user says about a label file."""

    task: str
    """One of `RASTER_TASKS`."""
    classes: str | None = None
    """`water,forest` in index order, or `1=water,2=forest` by value."""
    attribute: str | None = None
    """Field of a vector file that holds the class."""
    background: str | None = None
    """Class of pixels outside all polygons; without it they are ignored."""
    unit: str = "m"
    """Unit of depth values."""


def open_labels(path: str | Path, grid: Grid, wanted: Wanted) -> LabelSource:
    """Labels of a file, ready to be read on a scene's grid.

    Raises:
        LabelError: if the file cannot be read, misses the scene, or its classes are unclear.
    """
    path = Path(path)
    if wanted.task not in RASTER_TASKS:
        raise LabelError(
            f"--task {wanted.task} has no per-pixel labels; choose {', '.join(RASTER_TASKS)}"
        )
    if not path.exists():
        raise LabelError(f"{path} does not exist")
    if path.suffix.lower() in VECTORS:
        from ringmoe_cli.scene.labelled.polygons import open_polygons

        return open_polygons(path, grid, wanted)
    return open_label_raster(path, grid, wanted)


@dataclass(frozen=True)
class RasterLabels:
    """A label raster, warped to the scene's grid where it has another."""

    path: str
    """The file."""
    grid: Grid
    """The scene's grid."""
    layer: LabelLayer
    """What the labels mean."""
    values: tuple[int, ...] = ()
    """Raw values in class order; the same class may come from several (change)."""
    indexes: tuple[int, ...] = ()
    """Class of each raw value."""
    same_grid: bool = True
    """Whether the pixels coincide with the scene's."""

    def read(self, window: Window) -> NDArray[Any]:
        """Labels (h, w) of a window inside the scene."""
        raw, covered = self._raw(window)
        if not self.layer.classes:
            values = raw.astype(np.float32)
            return np.where(covered & np.isfinite(values), values, np.float32("nan"))
        out = np.full(raw.shape, IGNORE, np.uint8)
        for value, index in zip(self.values, self.indexes, strict=True):
            out[raw == value] = index
        out[~covered] = IGNORE
        return out

    def identity(self) -> list[object]:
        """The file as it is now, and what its values mean."""
        return [self.path, file_stamp(self.path), self.layer.classes, self.values, self.indexes]

    def _raw(self, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.transform import Affine
        from rasterio.vrt import WarpedVRT
        from rasterio.windows import Window as RasterWindow

        part = RasterWindow(window.col, window.row, window.width, window.height)
        with rasterio.Env(**SAFE_OPTIONS), open_raster(self.path) as source:
            if self.same_grid:
                return source.read(1, window=part), source.read_masks(1, window=part) > 0
            how = Resampling.nearest if self.layer.classes else Resampling.bilinear
            options: dict[str, Any] = {"add_alpha": True} if source.nodata is None else {}
            with WarpedVRT(
                source,
                crs=self.grid.crs,
                transform=Affine(*self.grid.transform),
                height=self.grid.height,
                width=self.grid.width,
                resampling=how,
                **options,
            ) as warped:
                if options:  # an alpha band of signed numbers is no mask to GDAL
                    return warped.read(1, window=part), warped.read(2, window=part) > 0
                return warped.read(1, window=part), warped.read_masks(1, window=part) > 0


def open_label_raster(path: Path, grid: Grid, wanted: Wanted) -> RasterLabels:
    """A label raster with its classes or value range known.

    Raises:
        LabelError: if it misses the scene, has another shape, or unclear classes.
    """
    try:
        with open_raster(str(path)) as source:
            same = fits(grid_of(source), grid, path)
            if wanted.task == "depth":
                layer = LabelLayer("depth", unit=wanted.unit)
                return RasterLabels(str(path), grid, layer, same_grid=same)
            present = values_of(source, path)
            found = read_categories(path, source)
    except SceneError as error:
        raise LabelError(str(error)) from error
    categories = choose_classes(present, found, wanted, path)
    classes, colours = names_and_colours(categories)
    indexes = tuple(classes.index(c.name) for c in categories)
    layer = LabelLayer(wanted.task, classes, colours)
    return RasterLabels(
        str(path), grid, layer, tuple(c.value for c in categories), indexes, same_grid=same
    )


def fits(labels: Grid, scene: Grid, path: Path) -> bool:
    """Whether a label grid is the scene's own (True) or must be warped to it (False).

    Raises:
        LabelError: if it is neither.
    """
    same_shape = (labels.height, labels.width) == (scene.height, scene.width)
    placed = labels.crs and scene.crs and labels.has_transform and scene.has_transform
    if not placed:
        if same_shape:
            return True
        raise LabelError(
            f"{path} is {labels.height} x {labels.width}, the scene {scene.height} x "
            f"{scene.width}, and without coordinates on both they must have the same pixels"
        )
    check_overlap(labels, scene, path)
    return same_shape and labels.transform == scene.transform and same_crs(labels, scene)


def same_crs(first: Grid, second: Grid) -> bool:
    """Whether two grids have the same coordinate system."""
    from rasterio.crs import CRS

    return bool(CRS.from_wkt(first.crs) == CRS.from_wkt(second.crs))


def check_overlap(labels: Grid, scene: Grid, path: Path) -> None:
    """Refuse labels that lie elsewhere.

    Raises:
        LabelError: with both extents.
    """
    from rasterio.warp import transform_bounds

    where = transform_bounds(labels.crs, scene.crs, *bounds(labels))
    here = bounds(scene)
    apart = where[0] >= here[2] or where[2] <= here[0] or where[1] >= here[3] or where[3] <= here[1]
    if apart:
        raise LabelError(
            f"{path} misses the scene: it covers x {where[0]:.6g} to {where[2]:.6g}, "
            f"y {where[1]:.6g} to {where[3]:.6g}; the scene x {here[0]:.6g} to {here[2]:.6g}, "
            f"y {here[1]:.6g} to {here[3]:.6g}"
        )


def bounds(grid: Grid) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a grid's corners."""
    corners = [grid.xy(r, c) for r in (0, grid.height) for c in (0, grid.width)]
    xs, ys = zip(*corners, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def values_of(source: Any, path: Path) -> list[int]:
    """The values of a class raster, nodata left out.

    Raises:
        LabelError: if they are not a few whole numbers.
    """
    if np.dtype(source.dtypes[0]).kind not in "iu":
        raise LabelError(f"{path} holds {source.dtypes[0]}; class labels must be whole numbers")
    found: set[int] = set()
    for _, window in source.block_windows(1):
        found.update(np.unique(source.read(1, window=window)).tolist())
        if len(found) > 4096:
            raise LabelError(f"{path} holds thousands of values: it is no class raster")
    if source.nodata is not None:
        found.discard(int(source.nodata))
    return sorted(found)


def choose_classes(
    present: list[int], found: Mapping[int, Category], wanted: Wanted, path: Path
) -> list[Category]:
    """Which raw value is which class: by the user, by the file, or by number.

    Negative values and 255 mean no label.

    Raises:
        LabelError: if names and values do not match.
    """
    if wanted.task == "change":
        names = (wanted.classes or "unchanged,changed").split(",")
        if len(names) != 2:
            raise LabelError(f"--classes {wanted.classes}: change has two classes")
        return [Category(v, names[int(v > 0)]) for v in present]
    present = [v for v in present if v >= 0 and v != IGNORE]
    if wanted.classes:
        return said_classes(wanted.classes, present, path)
    if found:
        kept = [found[v] for v in sorted(found) if v in present or found[v].name]
        missing = [v for v in present if v not in found]
        if missing:
            raise LabelError(f"{path} has values {missing} that its attribute table does not name")
        return [c for c in kept if c.value in present]
    if len(present) > IGNORE:
        raise LabelError(f"{path} has {len(present)} values; at most {IGNORE} classes are possible")
    return [Category(v, f"class_{v}") for v in present]


def said_classes(text: str, present: Sequence[int], path: Path) -> list[Category]:
    """Classes as `--classes` says: names in index order, or value=name pairs.

    Raises:
        LabelError: if they do not fit the values present.
    """
    parts = [p.strip() for p in text.split(",") if p.strip()]
    if all("=" in p for p in parts):
        try:
            return [Category(int(v), n) for v, n in (p.split("=", 1) for p in parts)]
        except ValueError as error:
            raise LabelError(f"--classes {text}: a value is no whole number") from error
    if all(v in range(len(parts)) for v in present):
        return [Category(i, n) for i, n in enumerate(parts)]
    if len(parts) == len(present):
        return [Category(v, n) for v, n in zip(present, parts, strict=True)]
    raise LabelError(
        f"{path} has values {', '.join(map(str, present))}, but --classes names {len(parts)}; "
        "write value=name pairs"
    )


def names_and_colours(
    categories: Sequence[Category],
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Class names in order, and their colours if all have one."""
    classes = tuple(dict.fromkeys(c.name for c in categories))
    colour = {c.name: c.colour for c in categories}
    chosen = tuple(colour[n] for n in classes)
    complete = tuple(c for c in chosen if c is not None)
    return classes, complete if len(complete) == len(chosen) else ()
