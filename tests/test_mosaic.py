"""Several scenes as one job: their mosaic, their STAC items, and what a second run does."""
# ruff: noqa: F401, F811 - fixtures are imported

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
from mapping import CLASSES, model, scene, write_scene
from rasterio.transform import Affine
from rio_cogeo import cog_validate
from shapely.geometry import box, shape
from typer.testing import CliRunner

from ringmoe_cli import console
from ringmoe_cli.app import app
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.maps import stac
from ringmoe_cli.scene.maps.mosaic import common_grid


@pytest.fixture(autouse=True)
def _talkative():
    console.State.quiet = False


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def neighbours(tmp_path):
    """Two scenes of 70 x 100 pixels; the second lies 60 columns east and 30 rows south."""
    first = write_scene(tmp_path / "a_20210527.tif", seed=1)
    second = write_scene(tmp_path / "b_20210601T112111.tif", seed=2)
    with rasterio.open(second, "r+") as dst:
        dst.transform = Affine(10, 0, 500600, 0, -10, 4999700)
    return first, second


def pasted(layers, fill):
    """What the mosaic must hold, the slow way: places of two maps on the common grid."""
    out = np.full((2, *layers[0].shape[:-2], 100, 160), fill, np.float64)
    out[0, ..., :70, :100] = layers[0]
    out[1, ..., 30:, 60:] = layers[1]
    return out


def test_classes_of_the_earlier_map_count(model, tmp_path):
    scenes = neighbours(tmp_path)
    done = run(*scenes, "-m", model, "-o", tmp_path / "maps", "--mosaic", tmp_path / "all.tif")
    assert done.exit_code == 0, done.exception
    *maps, joint = done.stdout.split()
    assert joint == str(tmp_path / "all.tif")
    assert cog_validate(joint)[0]
    with rasterio.open(joint) as got:
        assert got.bounds == (500000, 4999000, 501600, 5000000)
        assert got.tags(1)["CLASS_0"] == "water"
        assert got.colormap(1)[2] == (200, 180, 120, 255)
        classes = got.read(1)
    first, second = pasted([rasterio.open(m).read(1) for m in maps], 255)
    np.testing.assert_array_equal(classes, np.where(first != 255, first, second))
    assert not (tmp_path / "all.tif.part").exists()


def test_probabilities_are_averaged_where_maps_overlap(model, tmp_path):
    scenes = neighbours(tmp_path)
    joint = tmp_path / "all.tif"
    options = ("-m", model, "-o", tmp_path / "maps", "--probabilities", "--json")
    done = run(*scenes, *options, "--mosaic", joint)
    *maps, said = map(json.loads, done.stdout.splitlines())
    read = [rasterio.open(m["more"]["probabilities"]).read() for m in maps]
    steps = pasted(read, 255)
    count = (steps != 255).sum(0)
    mean = np.where(steps == 255, 0, steps / 254).sum(0) / np.maximum(count, 1)
    with rasterio.open(joint) as c, rasterio.open(tmp_path / "all_probabilities.tif") as p:
        classes, got = c.read(1), p.read()
    nothing = count[0] == 0
    np.testing.assert_array_equal(classes == 255, nothing)
    np.testing.assert_allclose(got[:, ~nothing], 254 * mean[:, ~nothing], atol=0.51)
    sure = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2] > 1e-3
    np.testing.assert_array_equal(classes[sure], mean.argmax(0)[sure])
    area = sum(c["area_m2"] for c in said["classes"].values())
    assert area == pytest.approx((~nothing).sum() * 100 / 0.9996**2, rel=1e-5)


def test_other_systems_are_warped_to_the_first(model, tmp_path):
    first = write_scene(tmp_path / "a.tif", seed=1)
    second = write_scene(tmp_path / "b.tif", seed=2)
    with rasterio.open(second, "r+") as dst:
        dst.crs = "EPSG:32631"  # the same numbers one zone further
        dst.transform = Affine(10, 0, 29000, 0, -10, 5013000)
    done = run(first, second, "-m", model, "--mosaic", tmp_path / "all.tif")
    assert done.exit_code == 0, done.exception
    with rasterio.open(tmp_path / "all.tif") as got:
        assert got.crs.to_epsg() == 32630
        classes = got.read(1)
    assert (classes != 255).sum() == pytest.approx(2 * 6400, rel=0.02)


def test_grids_keep_the_first_ones_phase():
    first = Grid(10, 20, "EPSG:32630", (10.0, 0.0, 3.0, 0.0, -10.0, 7.0))
    other = Grid(10, 20, "EPSG:32630", (10.0, 0.0, -41.0, 0.0, -10.0, 30.0))
    whole = common_grid([first, other])
    assert whole.transform == (10.0, 0.0, -47.0, 0.0, -10.0, 37.0)
    assert (whole.height, whole.width) == (13, 25)


def test_no_mosaic_of_failures_and_the_same_command_goes_on(model, tmp_path):
    first, second = neighbours(tmp_path)
    whole = second.read_bytes()
    second.write_bytes(whole[:400])
    options = (first, second, "-m", model, "--mosaic", tmp_path / "all.tif")
    done = run(*options)
    assert done.exit_code == 1
    assert "no mosaic" in done.stderr
    assert not (tmp_path / "all.tif").exists()
    second.write_bytes(whole)
    again = run(*options)
    assert again.exit_code == 0
    assert "left as it is" in again.stderr
    assert len(again.stdout.splitlines()) == 2  # the second scene and the mosaic
    assert run(*options).exit_code == 1  # now the mosaic itself is in the way


def test_items_say_where_when_and_what(model, tmp_path):
    first, second = neighbours(tmp_path)
    done = run(first, second, "-m", model, "-o", tmp_path / "maps", "--stac", "--json",
               "--probabilities")  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    items = [json.loads((tmp_path / "maps" / s["stac"]).read_text()) for s in said]
    for item in items:
        assert {"type": "Feature", "stac_version": "1.0.0"}.items() <= item.items()
        assert {"id", "geometry", "bbox", "properties", "links", "assets"} <= set(item)
    assert items[0]["properties"]["datetime"] == "2021-05-27T00:00:00Z"
    assert items[1]["properties"]["datetime"] == "2021-06-01T11:21:11Z"
    place = items[0]["properties"]
    assert place["proj:epsg"] == 32630
    assert place["proj:shape"] == [70, 100]
    assert place["proj:transform"][:6] == [10, 0, 500000, 0, -10, 5000000]
    footprint = shape(items[0]["geometry"])
    assert footprint.exterior.is_ccw
    assert footprint.bounds == pytest.approx(items[0]["bbox"])
    expected = geopandas.GeoSeries([box(500000, 4999300, 501000, 5000000)], crs=32630).to_crs(4326)
    assert footprint.symmetric_difference(expected[0]).area < 1e-3 * footprint.area
    classes = items[0]["assets"]["classes"]
    assert classes["href"] == "./a_20210527_segmentation.tif"
    assert [c["name"] for c in classes["classification:classes"]] == list(CLASSES)
    assert classes["classification:classes"][2]["color_hint"] == "C8B478"
    bands = items[0]["assets"]["probabilities"]["raster:bands"]
    assert [b["name"] for b in bands] == list(CLASSES)
    assert bands[0]["scale"] == pytest.approx(1 / 254)
    assert (bands[0]["data_type"], bands[0]["nodata"]) == ("uint8", 255)
    assert items[0]["links"] == [{"rel": "derived_from", "href": "../a_20210527.tif"}]
    prefixes = {u.split("/")[3] for u in items[0]["stac_extensions"]}
    assert prefixes == {"projection", "raster", "classification", "processing"}


def test_scenes_without_a_date_give_an_interval(model, scene):
    done = run(scene, "-m", model, "--stac", "--json")
    assert "does not say when" in done.stderr
    about = json.loads(Path(json.loads(done.stdout)["stac"]).read_text())["properties"]
    assert about["datetime"] is None
    assert about["start_datetime"] < about["end_datetime"]


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("S2B_MSIL2A_20210527T112111_x.tif", "2021-05-27T11:21:11"),
        ("scene_2021-05-27.tif", "2021-05-27T00:00:00"),
        ("20210527_20210528.tif", ""),
        ("20210231.tif", ""),
        ("120210527.tif", ""),
        ("plain.tif", ""),
    ],
)
def test_dates_in_names(name, date):
    assert stac.date_in_name(name) == date


def test_a_footprint_across_the_date_line_is_cut_there():
    grid = Grid(100, 100, "EPSG:32601", (1000.0, 0.0, 200_000.0, 0.0, -1000.0, 5_100_000.0))
    found = stac.footprint(grid)
    west, _, east, _ = found["bbox"]
    assert west > 170 > -170 > east > -180
    parts = shape(found["geometry"])
    assert parts.geom_type == "MultiPolygon"
    assert sorted(round(p.bounds[i]) for p in parts.geoms for i in (0, 2))[-1] == 180


def test_points_and_nothing_have_footprints_as_they_can():
    assert stac.footprint(Grid(10, 10)) == {"geometry": None}
