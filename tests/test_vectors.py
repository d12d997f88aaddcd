"""Vector results: where things lie on the ground, in which format, whole or not at all."""

import json
import math

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch
from pyproj import CRS, Geod
from rasterio.transform import Affine

from model.boxes import Boxes
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import ControlPoint, Grid, Window
from ringmoe_cli.scene.labelled.box_formats import parse_mot, parse_vector
from ringmoe_cli.scene.labelled.boxes_io import boxes_of
from ringmoe_cli.scene.maps import vectors

UTM = CRS.from_epsg(32633).to_wkt()
GRID = Grid(100, 120, UTM, (2.0, 0.0, 500_000.0, 0.0, -2.0, 5_400_000.0))
TURNED = Grid(100, 120, UTM, (0.5, 1.9, 500_000.0, 1.9, -0.5, 5_400_000.0))
BARE = Grid(100, 120)
BOXES = Boxes(
    torch.tensor([[30.0, 40, 20, 10, 0.4], [80, 20, 8, 8, 0]]),
    labels=torch.tensor([1, 0]),
    scores=torch.tensor([0.9, 0.25]),
)
NAMES = ("car", "ship")


@pytest.mark.parametrize("grid", [GRID, TURNED], ids=["north up", "turned"])
@pytest.mark.parametrize("suffix", [".parquet", ".geojson", ".gpkg"])
def test_boxes_come_back_where_they_were(tmp_path, grid, suffix):
    path = tmp_path / f"boxes{suffix}"
    vectors.write_boxes(path, BOXES, grid, NAMES)
    back, _ = boxes_of(parse_vector(path, grid), NAMES, True, (grid.height, grid.width))
    torch.testing.assert_close(back.geometry[:, :4], BOXES.geometry[:, :4], atol=2e-2, rtol=0)
    assert float(back.geometry[0, 4]) == pytest.approx(0.4, abs=1e-2)
    assert back.labels.tolist() == [1, 0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_boxes_by_hand(tmp_path):
    vectors.write_boxes(tmp_path / "b.parquet", BOXES, GRID, NAMES)
    table = geopandas.read_parquet(tmp_path / "b.parquet")
    assert table.crs == CRS.from_epsg(32633)
    assert table["class"].tolist() == ["ship", "car"]
    assert table["score"].tolist() == [0.9, 0.25]
    assert table.geometry[1].bounds == (500_152, 5_399_952, 500_168, 5_399_968)
    assert table.geometry[0].area == pytest.approx(200 * 4)


def test_geojson_is_in_degrees(tmp_path):
    vectors.write_boxes(tmp_path / "b.geojson", BOXES, GRID, NAMES)
    content = json.loads((tmp_path / "b.geojson").read_text())
    lon, lat = content["features"][1]["geometry"]["coordinates"][0][0]
    assert (lon, lat) == pytest.approx((15.0, 48.75), abs=0.01)
    assert content["name"] == "b"


def test_scenes_that_nothing_places_give_pixels(tmp_path):
    vectors.write_boxes(tmp_path / "b.geojson", BOXES, BARE, NAMES)
    table = geopandas.read_file(tmp_path / "b.geojson")
    assert table.geometry[1].bounds == (76, 16, 84, 24)


def test_control_points_place_boxes(tmp_path):
    rows, cols = (0.0, 0.0, 100.0, 100.0, 50.0), (0.0, 120.0, 0.0, 120.0, 60.0)
    points = tuple(ControlPoint(r, c, *GRID.xy(r, c)) for r, c in zip(rows, cols, strict=True))
    grid = Grid(100, 120, UTM, gcps=points)
    vectors.write_boxes(tmp_path / "a.parquet", BOXES, grid, NAMES)
    vectors.write_boxes(tmp_path / "b.parquet", BOXES, GRID, NAMES)
    ours, affine = (geopandas.read_parquet(tmp_path / f"{n}.parquet").geometry for n in "ab")
    assert shapely.hausdorff_distance(ours.values, affine.values).max() < 1e-3


def test_rpcs_place_boxes(tmp_path):
    """The middle of the image lies at the middle of the coefficients."""
    one, line, sample = [1.0] + [0.0] * 19, [0.0] * 20, [0.0] * 20
    line[2], sample[1] = -1.0, 1.0  # row falls with latitude, column grows with longitude
    text = {k: " ".join(map(str, v)) for k, v in (
        ("LINE_NUM_COEFF", line), ("LINE_DEN_COEFF", one),
        ("SAMP_NUM_COEFF", sample), ("SAMP_DEN_COEFF", one))}  # fmt: skip
    offsets = {"LINE_OFF": 50.0, "SAMP_OFF": 60.0, "LAT_OFF": 48.0, "LONG_OFF": 15.0,
               "HEIGHT_OFF": 0.0, "LINE_SCALE": 50.0, "SAMP_SCALE": 60.0, "LAT_SCALE": 0.01,
               "LONG_SCALE": 0.02, "HEIGHT_SCALE": 100.0}  # fmt: skip
    grid = Grid(100, 120, rpcs={**text, **{k: str(v) for k, v in offsets.items()}})
    middle = Boxes.from_corners([[60, 50, 90, 75]])
    vectors.write_boxes(tmp_path / "b.parquet", middle, grid, NAMES)
    table = geopandas.read_parquet(tmp_path / "b.parquet")
    assert table.crs == CRS.from_epsg(4326)
    west, south, east, north = table.geometry[0].bounds
    assert (east - west, north - south) == pytest.approx((0.01, 0.005), rel=1e-3)
    assert (west, north) == pytest.approx((15, 48), abs=2e-4)


@pytest.mark.parametrize("suffix", [".parquet", ".geojson", ".gpkg"])
def test_no_boxes_are_a_table_without_rows(tmp_path, suffix):
    path = tmp_path / f"b{suffix}"
    vectors.write_boxes(path, Boxes.empty(), GRID, NAMES)
    table = geopandas.read_parquet(path) if suffix == ".parquet" else geopandas.read_file(path)
    assert len(table) == 0
    if suffix != ".geojson":
        assert {"class", "score"} <= set(table.columns)


def tracks():
    one = Boxes.from_corners([[10, 10, 20, 16], [50, 50, 60, 60]], tracks=torch.tensor([0, 4]))
    two = Boxes.from_corners([[13, 14, 23, 20]], tracks=torch.tensor([0]), labels=torch.tensor([1]))
    return {3: one, 5: two}


def test_mot_text_comes_back(tmp_path):
    vectors.write_mot(tmp_path / "t.txt", tracks())
    back = parse_mot(tmp_path / "t.txt", NAMES)
    assert sorted(back) == [3, 5]
    assert [(m.track, m.name, m.shape) for m in back[3]] == [
        (1, "car", (10, 10, 20, 16)), (5, "car", (50, 50, 60, 60)),
    ]  # fmt: skip
    assert back[5][0].name == "ship"
    assert (tmp_path / "t.txt").read_text().splitlines()[
        0
    ] == "3,1,10.00,10.00,10.00,6.00,1.0000,1,-1"


def test_track_lines(tmp_path):
    vectors.write_tracks(tmp_path / "t.parquet", tracks(), GRID, NAMES)
    table = geopandas.read_parquet(tmp_path / "t.parquet")
    assert table["track"].tolist() == [0, 4]
    assert table[["first", "last"]].values.tolist() == [[3, 5], [3, 3]]
    scale = 0.9996  # of UTM on its central meridian
    assert table["length"].tolist() == pytest.approx([10 / scale, 0], abs=0.01)
    vectors.write_tracks(tmp_path / "p.parquet", tracks(), BARE, NAMES)
    assert geopandas.read_parquet(tmp_path / "p.parquet")["length"][0] == 5


def test_tiles_cover_the_scene(tmp_path):
    windows = list(GRID.windows(64))
    scores = np.eye(2, dtype=np.float32)[np.arange(len(windows)) % 2]
    vectors.write_tiles(tmp_path / "t.parquet", windows, scores, GRID, NAMES)
    table = geopandas.read_parquet(tmp_path / "t.parquet")
    assert table.geometry.area.sum() == pytest.approx(100 * 120 * 4)
    assert table.geometry.union_all().area == pytest.approx(100 * 120 * 4)
    assert table["class"].tolist() == ["car", "ship"] * 2
    assert table["p_car"].tolist() == [1, 0] * 2
    assert windows[0] == Window(0, 0, 64, 64)


def test_regions_of_a_class_map(tmp_path):
    numbers = np.zeros((100, 120), np.uint8)
    numbers[10:30, 10:40] = 1
    numbers[15:20, 15:20] = 0
    numbers[60:70, 60:70] = 1
    numbers[90:, 90:] = 255
    with rasterio.open(
        tmp_path / "map.tif", "w", driver="GTiff", height=100, width=120, count=1, dtype="uint8",
        crs=UTM, transform=Affine(*GRID.transform), nodata=255,
    ) as out:  # fmt: skip
        out.write(numbers, 1)
    count = vectors.write_regions(tmp_path / "r.geojson", tmp_path / "map.tif", ("no", "changed"))
    table = geopandas.read_file(tmp_path / "r.geojson").sort_values("area_m2")
    assert count == len(table) == 2
    assert set(table["class"]) == {"changed"}
    for outline, metres in zip(table.geometry, table["area_m2"], strict=True):
        expected, _ = Geod(ellps="WGS84").geometry_area_perimeter(shapely.force_2d(outline))
        assert metres == pytest.approx(abs(expected), rel=1e-3)
    assert table["area_m2"].max() == pytest.approx((20 * 30 - 25) * 4 / 0.9996**2, rel=1e-3)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(RingmoeError, match=r"vector results are \.parquet"):
        vectors.write_boxes(tmp_path / "b.shp", BOXES, GRID, NAMES)


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail():
        with vectors.whole(tmp_path / "t.txt") as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_same_input_same_bytes(tmp_path):
    for suffix in (".parquet", ".geojson"):
        for folder in ("a", "b"):
            vectors.write_boxes(tmp_path / folder / f"x{suffix}", BOXES, GRID, NAMES)
        first, second = ((tmp_path / f / f"x{suffix}").read_bytes() for f in "ab")
        assert first == second
    assert math.isclose(float(BOXES.area[0]), 200)
