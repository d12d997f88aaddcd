"""Polygon labels: burnt onto the scene's grid, window by window."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labels import Wanted, bounds, said_classes
from ringmoe_cli.scene.tiles import IGNORE, LabelLayer

FIELDS = ("class", "class_name", "classname", "label", "category", "name", "type")
"""Fields looked for when no attribute is named."""


@dataclass(frozen=True)
class PolygonLabels:
    """Polygons in the scene's coordinates; where several overlap, the last one wins."""

    grid: Grid
    """The scene's grid."""
    layer: LabelLayer
    """What the labels mean."""
    shapes: NDArray[np.object_]
    """Shapely geometries."""
    indexes: NDArray[np.int64]
    """Class of each."""
    outside: int = IGNORE
    """Class of pixels outside all polygons."""

    def read(self, window: Window) -> NDArray[Any]:
        """Labels (h, w) of a window: a pixel belongs to a polygon if its centre lies inside."""
        import shapely
        from rasterio.features import rasterize
        from rasterio.transform import Affine

        part = self.grid.crop(window)
        # cropping an unplaced grid keeps the identity: its polygons are in pixels
        a, b, _, d, e, _ = self.grid.transform
        x, y = self.grid.xy(window.row, window.col)
        part_bounds = (
            bounds(part) if part.has_transform else (x, y, x + part.width, y + part.height)
        )
        near = np.sort(self.tree.query(shapely.box(*part_bounds), predicate="intersects"))
        if not near.size:
            return np.full((window.height, window.width), self.outside, np.uint8)
        burnt = rasterize(
            list(zip(self.shapes[near], self.indexes[near].tolist(), strict=True)),
            out_shape=(window.height, window.width),
            transform=Affine(a, b, x, d, e, y),
            fill=self.outside,
            dtype="uint8",
        )
        return np.asarray(burnt)

    @cached_property
    def tree(self) -> Any:
        """The polygons by place."""
        import shapely

        return shapely.STRtree(self.shapes)

    def identity(self) -> list[object]:
        """A digest of the polygons, and what they mean."""
        import shapely

        whole = hashlib.sha256(b"".join(shapely.to_wkb(self.shapes)))
        whole.update(self.indexes.tobytes())
        return [whole.hexdigest(), self.layer.classes, self.outside]


def open_polygons(path: Path, grid: Grid, wanted: Wanted) -> PolygonLabels:
    """Polygons of a vector file with their classes.

    Raises:
        LabelError: if the file cannot be read, has no polygons over the scene, or no class field.
    """
    if wanted.task == "depth":
        raise LabelError(f"{path}: depth labels must be a raster")
    if grid.gcps and not grid.has_transform:
        raise LabelError(f"{path}: a scene with control points only takes labels on its own pixels")
    table = read_table(path)
    field = class_field(table, wanted, path)
    table = on_grid(table, grid)
    table = table[table.geom_type.isin(["Polygon", "MultiPolygon"])]
    check_cover(table, grid, path)
    names = table[field].astype(str).tolist() if field else ["object"] * len(table)
    classes = polygon_classes(names, wanted, path)
    alone = len(classes) == 1 and not wanted.background
    background = wanted.background or ("background" if alone else None)
    if background:
        classes = (background, *(c for c in classes if c != background))
    return PolygonLabels(
        grid,
        LabelLayer(wanted.task, classes),
        np.asarray(table.geometry.values, dtype=object),
        np.array([classes.index(n) for n in names], np.int64),
        outside=0 if background else IGNORE,
    )


def read_table(path: Path) -> Any:
    """The file as a GeoDataFrame.

    Raises:
        LabelError: if it cannot be read or is empty.
    """
    import geopandas

    try:
        if path.suffix.lower() == ".parquet":
            table = geopandas.read_parquet(path)
        else:
            table = geopandas.read_file(path, engine="pyogrio")
    except Exception as error:  # pyogrio, pyarrow and shapely each raise their own kinds
        raise LabelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if "geometry" not in table or table.geometry.isna().all():
        raise LabelError(f"{path} holds no geometries")
    return table[~table.geometry.isna()]


def class_field(table: Any, wanted: Wanted, path: Path) -> str | None:
    """The field that holds the class; None if there is none and nobody asked.

    Raises:
        LabelError: if the named attribute is missing.
    """
    fields = [c for c in table.columns if c != "geometry"]
    if wanted.attribute:
        if wanted.attribute not in fields:
            raise LabelError(f"{path} has no field {wanted.attribute}; it has {', '.join(fields)}")
        return wanted.attribute
    lower = {str(f).lower(): str(f) for f in fields}
    return next((lower[f] for f in FIELDS if f in lower), None)


def on_grid(table: Any, grid: Grid) -> Any:
    """Geometries in the scene's coordinates (pixels, where nothing places the scene)."""
    if grid.crs is None or not grid.has_transform or table.crs is None:
        return table
    return table.to_crs(grid.crs)


def check_cover(table: Any, grid: Grid, path: Path) -> None:
    """Refuse polygons that lie elsewhere.

    Raises:
        LabelError: with both extents.
    """
    import shapely

    here = bounds(grid)
    if len(table) and shapely.intersects(table.geometry.values, shapely.box(*here)).any():
        return
    where = [f"{v:.6g}" for v in table.total_bounds] if len(table) else ["no polygons"]
    raise LabelError(
        f"{path} misses the scene: it covers {', '.join(where)}; the scene "
        f"{', '.join(f'{v:.6g}' for v in here)} (left, bottom, right, top)"
    )


def polygon_classes(names: list[str], wanted: Wanted, path: Path) -> tuple[str, ...]:
    """Class names in order: as said, else sorted.

    Raises:
        LabelError: if polygons have classes that `--classes` does not name.
    """
    present = sorted(set(names))
    if not wanted.classes:
        return tuple(present)
    said = tuple(c.name for c in said_classes(wanted.classes, range(0), path))
    unknown = [n for n in present if n not in said]
    if unknown:
        raise LabelError(f"{path} has classes {', '.join(unknown)} that --classes does not name")
    return said
