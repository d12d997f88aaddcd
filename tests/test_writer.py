"""Maps on disk: everything the scene says about itself survives, and nothing is half-written."""

import resource
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rio_cogeo import cog_validate

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene import writer
from ringmoe_cli.scene.grid import ControlPoint, Grid
from ringmoe_cli.scene.writer import MapWriter, class_layer, probability_layer, value_layer

UTM = CRS.from_epsg(32630).to_wkt()
NAMES = ("water", "trees & shrubs", "bare")
COLOURS = ((0, 0, 255), (0, 128, 0), (200, 180, 120))


def write(tmp_path, layer, grid, rows, options=None, step=100):
    out = tmp_path / "map.tif"
    with MapWriter(out, layer, grid, tmp_path, options) as target:
        for at in range(0, grid.height, step):
            target.write(rows[:, at : at + step])
    return out


@pytest.fixture
def grid():
    return Grid(700, 1100, UTM, (10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0))


@pytest.fixture
def classes(grid):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (1, grid.height, grid.width)).astype(np.uint8)
    rows[:, :50, :80] = 255
    return rows


def test_class_map_is_a_valid_cog_with_names_colours_and_place(tmp_path, grid, classes):
    out = write(tmp_path, class_layer(NAMES, COLOURS), grid, classes)
    valid, errors, warnings = cog_validate(out)
    assert (valid, errors, warnings) == (True, [], [])
    with rasterio.open(out) as src:
        np.testing.assert_array_equal(src.read(), classes)
        assert src.crs == CRS.from_epsg(32630)
        assert tuple(src.transform)[:6] == grid.transform
        assert src.nodata == 255
        assert src.overviews(1)
        assert src.colormap(1)[1] == (0, 128, 0, 255)
        assert src.tags(1)["CLASS_1"] == "trees & shrubs"
        assert src.descriptions == ("class",)
        overview = src.read(1, out_shape=(src.height // 2, src.width // 2))
    assert set(np.unique(overview)) <= {0, 1, 2, 255}
    names = ET.parse(writer.sidecar(out)).findall(".//CategoryNames/Category")
    assert [n.text for n in names] == list(NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml"]


def test_same_rows_give_the_same_bytes_however_they_arrive(tmp_path, grid, classes):
    layer = class_layer(NAMES, COLOURS)
    for folder, step in (("a", 100), ("b", 37)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, layer, grid, classes, step=step)
    assert (tmp_path / "a/map.tif").read_bytes() == (tmp_path / "b/map.tif").read_bytes()


def test_probabilities_carry_class_names_and_scale(tmp_path, grid):
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], (700, 1100)).transpose(2, 0, 1)
    rows = writer.quantise(probabilities.astype(np.float32))
    out = write(tmp_path, probability_layer(NAMES), grid, rows)
    assert cog_validate(out)[0]
    with rasterio.open(out) as src:
        assert src.descriptions == NAMES
        got = src.read() * np.array(src.scales)[:, None, None]
    np.testing.assert_allclose(got, probabilities, atol=0.5 / 254 + 1e-6)


def test_values_keep_unit_and_nodata(tmp_path, grid):
    rows = np.random.default_rng(0).random((1, 700, 1100), np.float32)
    rows[:, 3] = np.nan
    out = write(tmp_path, value_layer("height", "m"), grid, rows)
    with rasterio.open(out) as src:
        np.testing.assert_array_equal(src.read(), rows)
        assert src.units == ("m",)
        assert np.isnan(src.nodata)


def test_pixel_is_point_rotation_and_no_crs_survive(tmp_path):
    rows = np.zeros((1, 40, 30), np.uint8)
    rotated = (0.0, 2.5, 500000.0, 2.5, 0.0, 5000000.0)
    out = write(tmp_path, class_layer(NAMES, ()), Grid(40, 30, UTM, rotated, (), None, True), rows)
    with rasterio.open(out) as src:
        assert src.tags()["AREA_OR_POINT"] == "Point"
        assert tuple(src.transform)[:6] == rotated
    out = write(tmp_path, class_layer(NAMES, ()), Grid(40, 30), rows)
    with pytest.warns(NotGeoreferencedWarning):
        src = rasterio.open(out)
    assert src.crs is None
    assert src.transform.is_identity
    src.close()


def test_ground_control_points_survive(tmp_path):
    points = tuple(
        ControlPoint(r, c, 10 + c / 100, 50 - r / 100, 7.0) for r in (0, 40) for c in (0, 30)
    )
    wgs84 = CRS.from_epsg(4326)
    grid = Grid(40, 30, wgs84.to_wkt(), gcps=points)
    out = write(tmp_path, class_layer(NAMES, COLOURS), grid, np.zeros((1, 40, 30), np.uint8))
    with rasterio.open(out) as src:
        got, crs = src.gcps
    assert crs == wgs84
    assert [(p.row, p.col, p.x, p.y, p.z) for p in got] == [tuple(p) for p in points]
    assert isinstance(got[0], GroundControlPoint)


def test_rational_polynomials_survive(tmp_path):
    coefficients = " ".join(str(i / 7) for i in range(20))
    rpcs = {
        "LINE_OFF": "20", "SAMP_OFF": "15", "LAT_OFF": "44.5", "LONG_OFF": "5.25",
        "HEIGHT_OFF": "500", "LINE_SCALE": "20", "SAMP_SCALE": "15", "LAT_SCALE": "0.1",
        "LONG_SCALE": "0.1", "HEIGHT_SCALE": "500", "LINE_NUM_COEFF": coefficients,
        "LINE_DEN_COEFF": coefficients, "SAMP_NUM_COEFF": coefficients,
        "SAMP_DEN_COEFF": coefficients,
    }  # fmt: skip
    grid = Grid(40, 30, rpcs=rpcs)
    out = write(tmp_path, class_layer(NAMES, COLOURS), grid, np.zeros((1, 40, 30), np.uint8))
    with rasterio.open(out) as src:
        assert src.rpcs.lat_off == 44.5
        np.testing.assert_allclose(src.rpcs.line_num_coeff, [i / 7 for i in range(20)])


def test_nothing_appears_when_the_work_fails(tmp_path, grid, classes):
    def work():
        with MapWriter(tmp_path / "m.tif", class_layer(NAMES, COLOURS), grid, tmp_path) as target:
            target.write(classes[:, :100])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert list(tmp_path.iterdir()) == []


def test_missing_rows_are_an_error(tmp_path, grid, classes):
    layer = class_layer(NAMES, COLOURS)
    with (
        pytest.raises(RingmoeError, match="100 of 700 rows"),
        MapWriter(tmp_path / "m.tif", layer, grid, tmp_path) as target,
    ):
        target.write(classes[:, :100])
    assert list(tmp_path.iterdir()) == []


def test_creation_options_reach_the_driver_or_are_refused(tmp_path, grid, classes):
    options = writer.parse_options(["compress=LZW", "BLOCKSIZE=256"])
    out = write(tmp_path, class_layer(NAMES, COLOURS), grid, classes, options)
    with rasterio.open(out) as src:
        assert src.profile["compress"] == "lzw"
        assert src.block_shapes == [(256, 256)]
    for bad in ("LZW", "COMPRES=LZW"):
        with pytest.raises(RingmoeError, match="--co"):
            writer.parse_options([bad])


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.writer import MapWriter, probability_layer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
rows = np.random.default_rng(0).integers(0, 255, (3, 700, 700)).astype(np.uint8)
folder = Path(sys.argv[1])
try:
    layer = probability_layer(("a", "b", "c"))
    with MapWriter(folder / "m.tif", layer, Grid(700, 700), folder) as target:
        target.write(rows)
except RingmoeError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs file size limits")
def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("cannot write")
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert "no space left" in writer.failure_line(tmp_path / "x.tif", OSError("GDAL said no"))
