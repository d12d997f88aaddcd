"""STAC items beside outputs: where, when, what the numbers mean (STAC 1.0.0).

Everything about a map is taken from the finished file; what only the scene knows is passed in.
"""

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli import __version__
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.maps.vectors import DEGREES, on_ground, system_of
from ringmoe_cli.scene.raster import grid_of
from ringmoe_cli.scene.writer import failures_named, sync

EXTENSIONS = {
    "proj": "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
    "raster": "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "classification": "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "processing": "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
}
"""Prefix -> schema of the extensions that items may use."""
MEDIA = {
    ".tif": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".tiff": "image/tiff; application=geotiff; profile=cloud-optimized",
    ".parquet": "application/vnd.apache.parquet",
    ".geojson": "application/geo+json",
    ".json": "application/geo+json",
    ".gpkg": "application/geopackage+sqlite3",
    ".zarr": "application/vnd+zarr",
    ".txt": "text/plain",
}
"""Suffix -> media type."""
EDGE_POINTS = 9
"""Points along each edge of a footprint."""
DIGITS = 7
"""Decimals of a degree: a centimetre."""
EARLIEST = "1970-01-01T00:00:00Z"
"""Begin of the interval for scenes that do not say when they were taken."""


def write_item(
    outputs: Mapping[str, Path], scene: Path, grid: Grid, date: str, task: str
) -> tuple[Path, bool]:
    """Write `<output>.stac.json` beside the first output.

    Args:
        outputs: name of an asset -> its file.
        scene: what it was made from.
        grid: the scene's; the footprint of outputs that are no maps.
        date: when the scene was taken, ISO 8601, or empty.
        task: what was asked of the model.

    Returns:
        The item's path, and whether the date is known.
    """
    main = next(iter(outputs.values()))
    assets = {name: asset(path, name) for name, path in outputs.items()}
    spans = time_of(date, scene)
    properties = {**spans, "ringmoe:task": task, "processing:software": {"ringmoe": __version__}}
    on_map = main.suffix in (".tif", ".tiff")
    if on_map:
        grid, placed = projection_of(main)
        properties |= placed
    source = {"rel": "derived_from", "href": relative(scene, main.parent)}
    used = {key.split(":")[0] for part in (properties, *assets.values()) for key in part}
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [url for prefix, url in EXTENSIONS.items() if prefix in used],
        "id": main.stem,
        **footprint(grid),
        "properties": properties,
        "links": [source] if scene.exists() else [],
        "assets": assets,
    }
    path = main.with_name(f"{main.stem}.stac.json")
    fresh = path.with_name(path.name + ".new")
    with failures_named(path):
        fresh.write_text(json.dumps(item, indent=1) + "\n", "utf-8")
        sync(fresh)
        fresh.replace(path)
    return path, spans["datetime"] is not None


def asset(path: Path, name: str) -> dict[str, Any]:
    """One file of an item."""
    about: dict[str, Any] = {"href": f"./{path.name}", "title": name, "roles": ["data"]}
    if path.suffix in MEDIA:
        about["type"] = MEDIA[path.suffix]
    return about | (raster_fields(path) if path.suffix in (".tif", ".tiff") else {})


def raster_fields(path: Path) -> dict[str, Any]:
    """What the bands of a map hold, and its classes."""
    import rasterio

    with rasterio.open(path) as source:
        bands = [band_fields(source, i) for i in source.indexes]
        names = [source.tags(1).get(f"CLASS_{i}") for i in range(256)]
        colours = source.colormap(1) if source.colorinterp[0].name == "palette" else {}
    classes = [
        class_fields(value, name, colours.get(value)) for value, name in enumerate(names) if name
    ]
    return {"raster:bands": bands} | ({"classification:classes": classes} if classes else {})


def band_fields(source: Any, index: int) -> dict[str, Any]:
    """The raster extension's account of one band."""
    n = index - 1
    nodata = source.nodatavals[n]
    about: dict[str, Any] = {"data_type": source.dtypes[n], "sampling": "area"}
    if nodata is not None:
        about["nodata"] = "nan" if np.isnan(nodata) else nodata
    if source.scales[n] != 1:
        about["scale"] = source.scales[n]
    if source.units[n]:
        about["unit"] = source.units[n]
    if source.descriptions[n]:
        about["name"] = source.descriptions[n]
    return about


def class_fields(value: int, name: str, colour: tuple[int, ...] | None) -> dict[str, Any]:
    """The classification extension's account of one class."""
    plain = re.sub(r"[^0-9A-Za-z_-]+", "_", name) or f"class_{value}"
    about: dict[str, Any] = {"value": value, "name": plain, "title": name, "description": name}
    if colour:
        about["color_hint"] = "".join(f"{part:02X}" for part in colour[:3])
    return about


def projection_of(path: Path) -> tuple[Grid, dict[str, Any]]:
    """A map's grid, and the projection extension's account of it."""
    import rasterio

    with rasterio.open(path) as source:
        grid, crs = grid_of(source), source.crs
    about: dict[str, Any] = {
        "proj:epsg": crs.to_epsg() if crs else None,
        "proj:shape": [grid.height, grid.width],
    }
    if crs and about["proj:epsg"] is None:
        about["proj:wkt2"] = crs.to_wkt(version="WKT2_2019")
    if grid.has_transform:
        about["proj:transform"] = list(grid.transform)
    if grid.gsd:
        about["gsd"] = round(grid.gsd, 3)
    return grid, about


def footprint(grid: Grid) -> dict[str, Any]:
    """Outline in longitude and latitude, and its bounds; null where nothing places the scene."""
    system = system_of(grid)
    if system is None or not (grid.is_placed or grid.rpcs):
        return {"geometry": None}
    from pyproj import Transformer

    x, y = on_ground(edge(grid), grid).T
    lon, lat = Transformer.from_crs(system, DEGREES, always_xy=True).transform(x, y)
    ring = np.stack([lon, lat], -1)
    if not np.isfinite(ring).all():
        return {"geometry": None}
    return outline(ring)


def edge(grid: Grid) -> NDArray[np.float64]:
    """Points x, y along the edge of a grid, in pixels, counter-clockwise on the ground, closed."""
    share = np.linspace(0, 1, EDGE_POINTS)[:-1]
    down, along = share * grid.height, share * grid.width
    zero = np.zeros_like(share)
    sides = [
        (zero, down), (along, zero + grid.height), (zero + grid.width, grid.height - down),
        (grid.width - along, zero),
    ]  # fmt: skip
    points = np.concatenate([np.stack(side, -1) for side in sides])
    return np.concatenate([points, points[:1]])


def outline(ring: NDArray[np.float64]) -> dict[str, Any]:
    """GeoJSON of a ring of longitudes and latitudes; one across the date line is cut there."""
    from shapely.affinity import translate
    from shapely.geometry import MultiPolygon, Polygon, box, mapping
    from shapely.geometry.polygon import orient

    west, south = ring.min(0)
    east, north = ring.max(0)
    shape: Any = Polygon(ring)
    if east - west > 180:
        turned = Polygon(np.where(ring[:, :1] < 0, ring + np.array((360.0, 0.0)), ring))
        east_side = turned.intersection(box(0, -90, 180, 90))
        west_side = translate(turned.intersection(box(180, -90, 540, 90)), -360)
        shape = MultiPolygon([orient(east_side), orient(west_side)])
        west, east = east_side.bounds[0], west_side.bounds[2]
    else:
        shape = orient(shape)
    bounds = [round(float(v), DIGITS) for v in (west, south, east, north)]
    return {"geometry": rounded(mapping(shape)), "bbox": bounds}


def rounded(value: Any) -> Any:
    """Coordinates with `DIGITS` decimals."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def time_of(date: str, scene: Path) -> dict[str, str | None]:
    """When a scene was taken: as it says, or as its name does, or at least not after its file."""
    found = date or date_in_name(scene.name)
    if found:
        moment = datetime.fromisoformat(found)
        return {"datetime": zulu(moment if moment.tzinfo else moment.replace(tzinfo=UTC))}
    end = scene.stat().st_mtime if scene.exists() else 0
    latest = zulu(datetime.fromtimestamp(int(end), UTC))
    return {"datetime": None, "start_datetime": EARLIEST, "end_datetime": latest}


def date_in_name(name: str) -> str:
    """The date in a file's name (20210527, 20210527T112111, 2021-05-27), if there is just one."""
    day = r"(?<!\d)(?:19|20)\d\d-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12]\d|3[01])"
    found = set(re.findall(rf"{day}(?:T\d{{6}})?(?!\d)", name))
    if len(found) != 1:
        return ""
    try:
        return datetime.fromisoformat(found.pop()).isoformat()
    except ValueError:
        return ""


def zulu(moment: datetime) -> str:
    """A moment in UTC as STAC writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def relative(path: Path, folder: Path) -> str:
    """A file as seen from a folder."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
