"""Creating a store's groups and arrays, with the attributes that GDAL and xarray look for."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.store.chunks import ChunkedArray, codec
from ringmoe_cli.scene.store.shards import RUN
from ringmoe_cli.scene.tiles import SCHEMA, LabelLayer, scene_to_dict

VALID_RUN = 4
"""Chunks of the image, side by side, that share a chunk of the mask: it is mostly constant, and
files cost more to create than to fill. Not where shards do the same."""


def create_scene(
    folder: Path,
    scene: Scene,
    tile: int,
    layers: Mapping[str, LabelLayer],
    shards: bool = False,
) -> None:
    """Create a scene's group with empty arrays; statistics come at the end."""
    import zarr

    group = zarr.create_group(store=folder, zarr_format=3 if shards else 2, overwrite=True)
    grid, place = scene.grid, placement(scene.grid)
    plane = ("y", "x")
    chunk = (tile, tile)
    shape = (grid.height, grid.width)
    image = add(group, "image", ("band", *plane), (len(scene.bands), *shape), scene.dtype,
                (len(scene.bands), *chunk), fill=common_nodata(scene), shards=shards)  # fmt: skip
    image.attrs.update({**place, "long_name": list(scene.band_names)})
    mask = chunk if shards else (tile, tile * VALID_RUN)
    add(group, "valid", plane, shape, "uint8", mask, shards=shards).attrs.update(place)
    tiles = (-(-grid.height // tile), -(-grid.width // tile))
    add(group, "windows", ("tile_y", "tile_x"), tiles, "float32", tiles, shards=shards)
    for layer in layers.values():
        array = add(group, layer.array, plane, shape, layer.dtype, chunk, layer.ignore, shards)
        array.attrs.update({**place, "classes": list(layer.classes), "unit": layer.unit})
    add_coordinates(group, grid, scene.band_names)


def add(
    group: Any,
    name: str,
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: Any,
    chunks: tuple[int, ...],
    fill: float | None = None,
    shards: bool = False,
) -> Any:
    """One empty array with named dimensions, in the group's format."""
    common = {"shape": shape, "dtype": dtype, "chunks": chunks, "fill_value": fill}
    if group.metadata.zarr_format == 2:
        array = group.create_array(name, compressors=[codec()], **common)
        array.attrs["_ARRAY_DIMENSIONS"] = list(dims)
        return array
    from zarr.codecs import BloscCodec

    files = (*chunks[:-1], chunks[-1] * RUN) if shards else None
    return group.create_array(
        name,
        shards=files,
        dimension_names=dims,
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")],
        chunk_key_encoding={"name": "default", "separator": "."},
        **common,
    )


def placement(grid: Grid) -> dict[str, Any]:
    """Attributes that place an array on the ground, for GDAL and CF readers.

    Only rectilinear grids get them: GDAL would read a rotated or GCP-only scene's Zarr as if it
    had no transform, so those keep their georeferencing in the group's attributes.
    """
    if not (grid.is_rectilinear and grid.crs):
        return {}
    return {"grid_mapping": "spatial_ref", "_CRS": {"wkt": grid.crs}}


def add_coordinates(group: Any, grid: Grid, band_names: Sequence[str]) -> None:
    """Band names, pixel-centre x and y, and the CF grid mapping."""
    names = np.array(band_names)
    text = names.dtype if group.metadata.zarr_format == 2 else str  # version 3 has no fixed width
    bands = add(group, "band", ("band",), names.shape, text, names.shape)
    bands[:] = names
    if not grid.is_rectilinear:
        return
    x, _ = grid.xy(0.5, np.arange(grid.width) + 0.5)
    _, y = grid.xy(np.arange(grid.height) + 0.5, 0.5)
    for name, values in (("y", y), ("x", x)):
        add(group, name, (name,), values.shape, "float64", values.shape)[:] = values
    if grid.crs:
        add_grid_mapping(group, grid)


def add_grid_mapping(group: Any, grid: Grid) -> None:
    """The CF variable that names the coordinate system."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    a, b, c, d, e, f = grid.transform
    mapping = group.create_array(
        "spatial_ref", shape=(), dtype="int64", chunks=(), compressors=None, fill_value=0
    )
    about: dict[str, Any] = {"crs_wkt": grid.crs, "spatial_ref": grid.crs}
    with suppress(CRSError):  # systems that PROJ does not know keep their WKT
        about = {**CRS.from_user_input(grid.crs).to_cf(), **about}
    about["GeoTransform"] = f"{c} {a} {b} {f} {d} {e}"
    if group.metadata.zarr_format == 2:
        about["_ARRAY_DIMENSIONS"] = []
    mapping.attrs.update(about)


def common_nodata(scene: Scene) -> float | None:
    """The nodata value that all measured bands share, if they do."""
    values = {b.nodata for b in scene.bands if b.measured}
    value = values.pop() if len(values) == 1 else None
    if value is None or scene.dtype.startswith("complex"):
        return None
    if not scene.dtype.startswith("float") and value != int(value):
        return None
    return value


def finish_scene(
    folder: Path,
    scene: Scene,
    tile: int,
    layers: Mapping[str, LabelLayer],
    statistics: Mapping[str, Mapping[str, float]],
    fractions: Any,
    min_valid: float,
) -> None:
    """Write a scene's statistics, window index and description; consolidate its metadata."""
    import zarr

    group: Any = zarr.open_group(folder, mode="r+")
    ChunkedArray.of(folder, "windows").write(0, 0, np.asarray(fractions, np.float32))
    group.attrs.update(
        {
            "scene": scene_to_dict(scene),
            "tile_size": tile,
            "statistics": statistics,
            "labels": {t: asdict(v) for t, v in layers.items()},
            "min_valid": min_valid,
        }
    )
    consolidate(folder)


def finish_store(folder: Path, names: list[str]) -> None:
    """Name the scenes in the root group and consolidate everything."""
    import zarr

    group = zarr.open_group(folder, mode="r+")
    group.attrs.update({"ringmoe_store": SCHEMA, "scenes": names})
    consolidate(folder)


def consolidate(folder: Path) -> None:
    """Gather a group's metadata in one file, as xarray and GDAL like to find it in version 2."""
    if (folder / "zarr.json").is_file():
        return  # version 3 does not define it
    parts = sorted(p for p in folder.rglob(".z*") if p.name in (".zgroup", ".zarray", ".zattrs"))
    metadata = {str(p.relative_to(folder)): json.loads(p.read_text("utf-8")) for p in parts}
    whole = {"metadata": metadata, "zarr_consolidated_format": 1}
    (folder / ".zmetadata").write_text(json.dumps(whole, indent=1), "utf-8")
