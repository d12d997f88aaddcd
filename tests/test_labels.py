"""Labels end up on the scene's pixels, whatever grid or coordinates they come in."""

import json
from operator import attrgetter

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine
from rasters import noise, write_raster

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labels import Wanted, open_labels
from ringmoe_cli.scene.products.plain import Said
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store.intake import gather, split_task
from ringmoe_cli.scene.tiling import Settings, tile_scenes

SEGMENTATION = Wanted("segmentation", "land,water,town")
WHOLE = Window(0, 0, 60, 80)


@pytest.fixture
def scene(tmp_path):
    return open_scene(write_raster(tmp_path / "s.tif", noise(3, 60, 80), names=("b", "g", "r")))


def classes(height=60, width=80, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 3, (1, height // 10, width // 10)).repeat(10, 1).repeat(10, 2)


def test_a_raster_on_the_same_grid_is_read_as_it_is(scene, tmp_path):
    truth = classes().astype("uint8")
    truth[0, 0, 0] = 255
    path = write_raster(tmp_path / "l.tif", truth)
    labels = open_labels(path, scene.grid, SEGMENTATION)
    np.testing.assert_array_equal(labels.read(WHOLE), truth[0])
    np.testing.assert_array_equal(labels.read(Window(13, 7, 20, 9)), truth[0, 13:33, 7:16])
    assert labels.layer.classes == ("land", "water", "town")


def test_a_raster_on_another_grid_is_warped_by_nearest(scene, tmp_path):
    """Labels of twice the size of pixels, from 3 scene pixels west and north of the scene."""
    coarse = classes(40, 50)[:, ::2, ::2].astype("uint8")
    place = Affine(20, 0, 500000 - 30, 0, -20, 6000000 + 30)
    path = write_raster(tmp_path / "l.tif", coarse, transform=place)
    got = open_labels(path, scene.grid, SEGMENTATION).read(WHOLE)
    rows, cols = np.mgrid[0:60, 0:80]
    r, c = ((rows + 0.5) * 10 + 30) // 20, ((cols + 0.5) * 10 + 30) // 20
    inside = (r < coarse.shape[1]) & (c < coarse.shape[2])
    want = np.full((60, 80), 255)
    want[inside] = coarse[0][r[inside].astype(int), c[inside].astype(int)]
    np.testing.assert_array_equal(got, want)


def test_windows_of_warped_labels_are_slices_of_the_whole(scene, tmp_path):
    truth = classes(80, 100).astype("int16")
    path = write_raster(
        tmp_path / "l.tif",
        truth,
        crs="EPSG:4326",
        transform=Affine(1e-4, 0, -3.001, 0, -1e-4, 54.145),
    )
    labels = open_labels(path, scene.grid, SEGMENTATION)
    whole = labels.read(WHOLE)
    assert 0 < (whole == 255).mean() < 1
    np.testing.assert_array_equal(labels.read(Window(20, 30, 17, 23)), whole[20:37, 30:53])


def test_heights_are_interpolated_and_their_gaps_are_nan(scene, tmp_path):
    rows, cols = np.mgrid[0:30, 0:40]
    heights = (rows * 2.0 + cols)[None].astype("float32")
    heights[0, :5] = -9999
    path = write_raster(
        tmp_path / "h.tif", heights, transform=Affine(20, 0, 500000, 0, -20, 6000000), nodata=-9999
    )
    labels = open_labels(path, scene.grid, Wanted("depth"))
    got = labels.read(WHOLE)
    assert labels.layer.unit == "m"
    assert np.isnan(got[:8]).all()
    r, c = np.mgrid[20:40, 20:60]
    want = ((r + 0.5) / 2 - 0.5) * 2 + ((c + 0.5) / 2 - 0.5)
    np.testing.assert_allclose(got[20:40, 20:60], want, atol=1e-3)


def test_names_come_from_attribute_tables_tags_and_values(scene, tmp_path):
    truth = classes().astype("uint8") + 1
    path = write_raster(tmp_path / "l.tif", truth)
    assert open_labels(path, scene.grid, Wanted("segmentation")).layer.classes == (
        "class_1", "class_2", "class_3",
    )  # fmt: skip
    rows = "".join(
        f"<Row index='{i}'><F>{v}</F><F>{n}</F><F>{i * 9}</F><F>1</F><F>2</F></Row>"
        for i, (v, n) in enumerate([(1, "sand"), (2, "rock"), (3, "ice")])
    )
    fields = "".join(
        f"<FieldDefn index='{i}'><Name>{n}</Name><Type>0</Type><Usage>{u}</Usage></FieldDefn>"
        for i, (n, u) in enumerate([("Value", 5), ("Class", 2), ("R", 6), ("G", 7), ("B", 8)])
    )
    side = path.with_name("l.tif.aux.xml")
    side.write_text(
        "<PAMDataset><PAMRasterBand band='1'><GDALRasterAttributeTable>"
        f"{fields}{rows}</GDALRasterAttributeTable></PAMRasterBand></PAMDataset>"
    )
    layer = open_labels(path, scene.grid, Wanted("segmentation")).layer
    assert layer.classes == ("sand", "rock", "ice")
    assert layer.colours == ((0, 1, 2), (9, 1, 2), (18, 1, 2))
    side.unlink()
    tagged = write_raster(
        tmp_path / "t.tif", truth - 1, tags={"CLASS_NAMES": json.dumps(["a", "b", "c"])}
    )
    assert open_labels(tagged, scene.grid, Wanted("segmentation")).layer.classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("said", "values", "expected"),
    [
        ("x,y,z", [0, 1, 2], [0, 1, 2]),
        ("x,y,z", [10, 20, 30], [0, 1, 2]),
        ("30=x,10=y,20=z", [10, 20, 30], [1, 2, 0]),
        ("10=x,20=x,30=z", [10, 20, 30], [0, 0, 1]),
        ("1=x,2=y", [0, 1, 2], [255, 0, 1]),
        ("x,y", [-1, 0, 1], [255, 0, 1]),
    ],
)
def test_classes_as_said(scene, tmp_path, said, values, expected):
    truth = np.asarray(values, "int16")[classes()]
    path = write_raster(tmp_path / "l.tif", truth)
    got = open_labels(path, scene.grid, Wanted("segmentation", said)).read(WHOLE)
    np.testing.assert_array_equal(got, np.asarray(expected)[classes()[0]])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255)])
def test_a_change_mask_has_two_classes(scene, tmp_path, low, high):
    truth = np.where(classes() > 1, high, low).astype("uint8")
    path = write_raster(tmp_path / "m.tif", truth)
    labels = open_labels(path, scene.grid, Wanted("change"))
    assert labels.layer.classes == ("unchanged", "changed")
    np.testing.assert_array_equal(labels.read(WHOLE), (truth[0] > 0).astype(int))


polygon = st.tuples(
    st.integers(-10, 70), st.integers(-10, 50), st.integers(1, 40), st.integers(1, 40)
)


@given(st.lists(polygon, min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 60))
@settings(deadline=None)
def test_polygons_are_burnt_where_pixel_centres_lie_inside(boxes, row, col):
    from ringmoe_cli.scene.grid import Grid
    from ringmoe_cli.scene.labelled.polygons import PolygonLabels
    from ringmoe_cli.scene.tiles import LabelLayer

    grid = Grid(60, 80, "x", (10.0, 0.0, 500.0, 0.0, -10.0, 900.0))
    shapes, want = [], np.full((60, 80), 255)
    for i, (left, top, width, height) in enumerate(boxes):
        x, y = grid.xy(top, left)
        shapes.append(shapely.box(x, y - height * 10, x + width * 10, y))
        want[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = i
    labels = PolygonLabels(
        grid,
        LabelLayer("segmentation", tuple("abcde")),
        np.array(shapes, dtype=object),
        np.arange(len(boxes)),
    )
    got = labels.read(Window(row, col, 20, 20))
    np.testing.assert_array_equal(got, want[row : row + 20, col : col + 20])


def vector(path, shapes, crs="EPSG:32630", **columns):
    gpd.GeoDataFrame({**columns, "geometry": shapes}, crs=crs).to_file(path)
    return path


LEFT, RIGHT = shapely.box(500000, 5999400, 500400, 6e6), shapely.box(500400, 5999400, 500600, 6e6)


@pytest.mark.parametrize("suffix", ["gpkg", "geojson", "shp", "fgb"])
def test_polygon_files_with_a_class_field(scene, tmp_path, suffix, elsewhere):
    path = vector(tmp_path / f"p.{suffix}", [LEFT, RIGHT], kind=["town", "field"])
    labels = open_labels(path, scene.grid, Wanted("segmentation", attribute="kind"))
    got = elsewhere(labels.read, WHOLE)
    assert elsewhere(attrgetter("layer.classes"), labels) == ("field", "town")
    assert (got[:, :40] == 1).all()
    assert (got[:, 40:60] == 0).all()
    assert (got[:, 60:] == 255).all()


def test_polygons_in_another_system_and_with_a_background(scene, tmp_path):
    table = gpd.GeoDataFrame({"geometry": [LEFT]}, crs="EPSG:32630").to_crs(4326)
    table.to_file(tmp_path / "p.geojson")
    labels = open_labels(tmp_path / "p.geojson", scene.grid, Wanted("segmentation"))
    assert labels.layer.classes == ("background", "object")
    got = labels.read(WHOLE)
    assert (got[5:-5, 1:39] == 1).all()
    assert (got[:, 42:] == 0).all()


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_pixel_polygons_label_a_scene_without_a_place(tmp_path):
    path = write_raster(
        tmp_path / "s.png", noise(3, 30, 40, "uint8"), crs=None, transform=None, driver="PNG"
    )
    gpd.GeoDataFrame({"geometry": [shapely.box(5, 10, 15, 20)]}).to_file(tmp_path / "p.gpkg")
    got = open_labels(tmp_path / "p.gpkg", open_scene(path).grid, Wanted("segmentation")).read(
        Window(0, 0, 30, 40)
    )
    want = np.zeros((30, 40))
    want[10:20, 5:15] = 1
    np.testing.assert_array_equal(got, want)


def refuse(scene, path, wanted, match):
    with pytest.raises(LabelError, match=match):
        open_labels(path, scene.grid, wanted)


def test_labels_that_do_not_fit_are_refused(scene, tmp_path):
    truth = classes().astype("uint8")
    far = write_raster(tmp_path / "far.tif", truth, transform=Affine(10, 0, 9e5, 0, -10, 6e6))
    refuse(scene, far, SEGMENTATION, "misses the scene")
    plain = write_raster(tmp_path / "p.tif", truth[:, :50], crs=None, transform=None)
    refuse(scene, plain, SEGMENTATION, "same pixels")
    path = write_raster(tmp_path / "l.tif", truth)
    refuse(scene, path, Wanted("segmentation", "x,y"), "has values 0, 1, 2, but --classes names 2")
    refuse(scene, path, Wanted("segmentation", "one=x,two=y"), "no whole number")
    refuse(scene, path, Wanted("detection"), "no per-pixel labels")
    refuse(scene, tmp_path / "none.tif", SEGMENTATION, "does not exist")
    wild = write_raster(tmp_path / "w.tif", noise(1, 60, 80).astype("float32"))
    refuse(scene, wild, SEGMENTATION, "whole numbers")
    vectors = vector(tmp_path / "v.gpkg", [shapely.box(0, 0, 1, 1)], kind=["a"])
    refuse(scene, vectors, Wanted("segmentation"), "misses the scene")
    refuse(
        scene, vectors, Wanted("segmentation", attribute="nature"), "no field nature; it has kind"
    )
    refuse(scene, vectors, Wanted("depth"), "must be a raster")
    (tmp_path / "bad.geojson").write_text("{")
    refuse(scene, tmp_path / "bad.geojson", Wanted("segmentation"), "cannot be read")


def test_a_store_holds_labels_with_their_counts(scene, tmp_path):
    truth = classes().astype("uint8")
    truth[0, :10] = 255
    heights = classes(seed=1).astype("float32") * 7
    write_raster(tmp_path / "l.tif", truth)
    write_raster(tmp_path / "h.tif", heights)
    labelled = gather(
        [scene.bands[0].path], Said(), [str(tmp_path / "l.tif"), f"depth={tmp_path / 'h.tif'}"],
        SEGMENTATION,
    )  # fmt: skip
    stored = tile_scenes(labelled, tmp_path / "t.zarr", Settings(tile=32)).scenes[0]
    np.testing.assert_array_equal(stored.read_label("segmentation", WHOLE), truth[0])
    np.testing.assert_array_equal(stored.read_label("depth", WHOLE), heights[0])
    over = stored.read_label("segmentation", Window(50, 70, 32, 32))
    assert (over[10:] == 255).all()
    assert np.isnan(stored.read_label("depth", Window(-5, 0, 3, 3))).all()
    layer = stored.labels["segmentation"]
    assert layer.counts == tuple((truth == i).sum() for i in range(3))
    assert stored.labels["depth"].value_range == (0.0, 14.0)
    assert stored.labels["depth"].counts == (4800,)


def test_label_files_go_to_the_scenes_they_cover(scene, tmp_path):
    elsewhere = write_raster(
        tmp_path / "e.tif", noise(3, 60, 80), names=("b", "g", "r"),
        transform=Affine(10, 0, 9e5, 0, -10, 6e6),
    )  # fmt: skip
    label = str(write_raster(tmp_path / "l.tif", classes().astype("uint8")))
    paths = [str(elsewhere), scene.bands[0].path]
    found = gather(paths, Said(), [label], SEGMENTATION)
    assert [sorted(f.labels) for f in found] == [[], ["segmentation"]]
    with pytest.raises(LabelError, match="has segmentation labels already"):
        gather(paths, Said(), [label, label], SEGMENTATION)
    with pytest.raises(LabelError, match="misses"):
        gather(paths[:1], Said(), [label], SEGMENTATION)


def test_a_path_may_name_its_task():
    assert split_task("depth=a=b.tif", "segmentation") == ("a=b.tif", "depth")
    assert split_task("odd=name.tif", "change") == ("odd=name.tif", "change")
