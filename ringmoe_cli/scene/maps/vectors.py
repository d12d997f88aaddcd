"""Boxes, tracks, tiles and regions on the ground: GeoParquet, GeoJSON, GeoPackage, MOT text.

The suffix of a path decides its format. GeoJSON is written in longitude and latitude (RFC 7946),
the others in the scene's own coordinate system; scenes that nothing places give pixels.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.boxes import Boxes
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.writer import failures_named, sync

FORMATS = (".parquet", ".geojson", ".json", ".gpkg")
"""Suffixes that can be written."""
DEGREES = "EPSG:4326"
DIGITS = 8
"""Decimals of a degree in GeoJSON: a millimetre."""


def write_boxes(path: Path, boxes: Boxes, grid: Grid, classes: Sequence[str]) -> None:
    """Boxes as polygons with class, score and, where they have one, track.

    Args:
        path: .parquet, .geojson or .gpkg; appears when whole.
        boxes: in pixels of the grid.
        grid: of the scene.
        classes: names in index order.

    Raises:
        RingmoeError: for another suffix, or a disk that is full.
    """
    import shapely

    corners = on_ground(boxes.polygons().double().numpy(), grid)
    fields: dict[str, Any] = {
        "class": [classes[i] for i in boxes.labels.tolist()],
        "score": boxes.scores.double().numpy().round(4),
    }
    if (boxes.tracks >= 0).any():
        fields["track"] = boxes.tracks.numpy()
    save(path, shapely.polygons(corners) if len(boxes) else [], fields, grid, "Polygon")


def write_mot(path: Path, frames: Mapping[int, Boxes]) -> None:
    """Tracks as MOTChallenge text: frame, id, left, top, width, height, score, class, -1.

    Identities and classes count from 1.
    """
    with whole(path) as part, part.open("w", encoding="ascii") as file:
        for frame, boxes in sorted(frames.items()):
            for n in range(len(boxes)):
                x0, y0, x1, y1 = boxes.corners()[n].tolist()
                place = f"{x0:.2f},{y0:.2f},{x1 - x0:.2f},{y1 - y0:.2f}"
                name = f"{int(boxes.tracks[n]) + 1},{place},{float(boxes.scores[n]):.4f}"
                file.write(f"{frame},{name},{int(boxes.labels[n]) + 1},-1\n")


def write_tracks(
    path: Path, frames: Mapping[int, Boxes], grid: Grid, classes: Sequence[str]
) -> None:
    """Tracks as lines with class, first and last frame, and length in metres or pixels."""
    import shapely

    places: dict[int, list[tuple[float, float]]] = {}
    seen: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for frame, boxes in sorted(frames.items()):
        for track, label, (x, y) in zip(
            boxes.tracks.tolist(),
            boxes.labels.tolist(),
            boxes.geometry[:, :2].tolist(),
            strict=True,
        ):
            places.setdefault(track, []).append((x, y))
            seen.setdefault(track, []).append(frame)
            names[track] = classes[label]
    lines = [on_ground(np.array(p if len(p) > 1 else p * 2), grid) for p in places.values()]
    fields = {
        "track": list(places),
        "class": [names[t] for t in places],
        "first": [seen[t][0] for t in places],
        "last": [seen[t][-1] for t in places],
        "length": [round(length(line, grid), 2) for line in lines],
    }
    save(path, [shapely.LineString(line) for line in lines], fields, grid, "LineString")


def write_tiles(
    path: Path,
    windows: Sequence[Window],
    scores: NDArray[np.float32],
    grid: Grid,
    classes: Sequence[str],
) -> None:
    """A vector grid: every window as a polygon with its class and the probability of each.

    Args:
        path: .parquet, .geojson or .gpkg.
        windows: N windows of the grid; overhang is cut off.
        scores: (N, K) probabilities.
        grid: of the scene.
        classes: K names.
    """
    import shapely

    inside = [grid.clip(w) for w in windows]
    corners = np.array(
        [[(c, r), (c + w, r), (c + w, r + h), (c, r + h)] for r, c, h, w in inside],
        float,
    ).reshape(-1, 4, 2)
    best = scores.argmax(1) if len(scores) else np.zeros(0, int)
    fields: dict[str, Any] = {"class": [classes[i] for i in best]}
    fields |= {f"p_{name}": scores[:, k].round(4) for k, name in enumerate(classes)}
    save(path, shapely.polygons(on_ground(corners, grid)), fields, grid, "Polygon")


def write_regions(path: Path, class_map: Path, classes: Sequence[str], skip: int = 0) -> int:
    """The connected regions of a class map as polygons with class and geodesic area.

    Args:
        path: .parquet, .geojson or .gpkg.
        class_map: a raster of class numbers.
        classes: names in index order.
        skip: class that makes no polygons (no change, background).

    Returns:
        How many regions there are.
    """
    import rasterio
    import shapely
    from rasterio.features import shapes

    from ringmoe_cli.scene.raster import grid_of

    with rasterio.open(class_map) as source:
        numbers, grid = source.read(1), grid_of(source)
    chosen = (numbers != skip) & (numbers < len(classes))
    found = [(shapely.geometry.shape(g), int(v)) for g, v in shapes(numbers, mask=chosen)]
    outlines = [shapely.transform(g, lambda xy: on_ground(xy, grid)) for g, _ in found]
    fields: dict[str, Any] = {"class": [classes[v] for _, v in found]}
    if grid.is_placed:
        fields["area_m2"] = [round(area(g, grid), 2) for g in outlines]
    else:
        fields["pixels"] = [round(g.area) for g, _ in found]
    save(path, outlines, fields, grid, "Polygon")
    return len(found)


def on_ground(xy: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Pixel positions (..., 2) x, y as ground coordinates; unplaced scenes keep pixels.

    Scenes placed by control points or RPCs alone go through GDAL's transformers.
    """
    col, row = xy[..., 0], xy[..., 1]
    if grid.has_transform:
        x, y = grid.xy(row, col)
        return np.stack([x, y], -1)
    if not grid.gcps and not grid.rpcs:
        return np.asarray(xy, np.float64)
    with transformer_of(grid) as transformer:
        x, y = transformer.xy(row.ravel(), col.ravel(), offset="ul")
    return np.stack([np.reshape(x, row.shape), np.reshape(y, row.shape)], -1)


def transformer_of(grid: Grid) -> Any:
    """A polynomial through the control points, or the RPCs at height 0."""
    from rasterio.control import GroundControlPoint
    from rasterio.rpc import RPC
    from rasterio.transform import GCPTransformer, RPCTransformer

    if grid.gcps:
        return GCPTransformer([GroundControlPoint(*p) for p in grid.gcps])
    return RPCTransformer(RPC.from_gdal(dict(grid.rpcs or {})))


def system_of(grid: Grid) -> str | None:
    """Coordinate system of what `on_ground` gives; RPCs speak degrees."""
    by_rpcs = grid.rpcs and not grid.has_transform and not grid.gcps
    return DEGREES if by_rpcs else grid.crs


def length(line: NDArray[np.float64], grid: Grid) -> float:
    """Geodesic length in metres; in pixels, where nothing places the scene."""
    if not grid.is_placed:
        return float(np.hypot(*np.diff(line, axis=0).T).sum())
    lon, lat, geod = degrees(line, grid)
    return float(geod.line_length(lon, lat))


def area(outline: Any, grid: Grid) -> float:
    """Geodesic area in m² of a polygon in the grid's coordinates."""
    import shapely

    def ring(xy: Any) -> float:
        lon, lat, geod = degrees(np.asarray(xy), grid)
        return float(abs(geod.polygon_area_perimeter(lon, lat)[0]))

    holes = sum(ring(shapely.get_coordinates(r)) for r in outline.interiors)
    return ring(shapely.get_coordinates(outline.exterior)) - holes


def degrees(xy: NDArray[np.float64], grid: Grid) -> tuple[Any, Any, Any]:
    """Longitudes, latitudes and the ellipsoid of ground coordinates."""
    from pyproj import CRS, Transformer

    system = CRS.from_user_input(grid.crs)
    to_degrees = Transformer.from_crs(system, system.geodetic_crs, always_xy=True)
    lon, lat = to_degrees.transform(xy[:, 0], xy[:, 1])
    return lon, lat, system.get_geod()


def save(
    path: Path, geometries: Sequence[Any], fields: Mapping[str, Any], grid: Grid, kind: str
) -> None:
    """Write a table of geometries; the file appears when it is whole."""
    import geopandas

    check_format(path)
    suffix = path.suffix.lower()
    table = geopandas.GeoDataFrame(dict(fields), geometry=list(geometries), crs=system_of(grid))
    with whole(path) as part:
        if suffix == ".parquet":
            table.to_parquet(part, index=False)
            return
        options: dict[str, Any] = {"layer": path.stem, "geometry_type": kind}
        if suffix != ".gpkg":
            options |= {"driver": "GeoJSON", "COORDINATE_PRECISION": DIGITS}
            table = table.to_crs(DEGREES) if table.crs else table
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'crs' was not provided", UserWarning)
            table.to_file(part, engine="pyogrio", **options)


def check_format(path: Path) -> None:
    """Refuse a suffix that cannot be written.

    Raises:
        RingmoeError: naming those that can.
    """
    if path.suffix.lower() not in FORMATS:
        raise RingmoeError(f"-o {path}: vector results are {', '.join(FORMATS)}")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it once the block is through."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with failures_named(path):
            yield part
            sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
