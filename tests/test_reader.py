"""Windows read in any way are slices of the whole raster."""

import threading
import warnings

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasters import noise, write_raster

from ringmoe_cli.errors import BadBlockError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Band, Calibration
from ringmoe_cli.scene.sensors import open_scene

NAMES = ("blue", "green", "red", "nir")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    values = noise(4, 150, 210)
    values[:, 40:60, 10:30] = 0
    path = tmp_path_factory.mktemp("r") / "scene.tif"
    write_raster(path, values, names=NAMES, nodata=0, tiled=True, blockxsize=64, blockysize=64)
    return path, values


@given(st.integers(-90, 220), st.integers(-90, 220), st.integers(1, 90), st.integers(1, 90))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_window_is_a_slice_of_the_padded_scene(tiled, row, col, height, width):
    path, values = tiled
    padded = np.pad(values, ((0, 0), (100, 400), (100, 400)))
    with SceneReader(open_scene(path)) as reader:
        got, valid = reader.read(Window(row, col, height, width))
    want = padded[:, 100 + row : 100 + row + height, 100 + col : 100 + col + width]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(valid, (want != 0).all(0))


def test_bands_come_in_the_order_wanted(tiled):
    path, values = tiled
    scene = open_scene(path).select(("nir", "red", "blue"))
    with SceneReader(scene) as reader:
        got, _ = reader.read(Window(0, 0, 20, 20))
    np.testing.assert_array_equal(got, values[[3, 2, 0], :20, :20])


def test_alpha_masks_and_side_masks_hide_pixels(tmp_path):
    values = noise(4, 40, 40, "uint8")
    values[3] = 255
    values[3, :10] = 0
    path = write_raster(tmp_path / "rgba.tif", values, photometric="RGB", alpha="YES")
    scene = open_scene(path)
    assert scene.band_names == ("red", "green", "blue")
    with SceneReader(scene) as reader:
        _, valid = reader.read(Window(0, 0, 40, 40))
    assert not valid[:10].any()
    assert valid[10:].all()
    path = write_raster(tmp_path / "rgb.tif", values[:3], photometric="RGB")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as out:
        out.write_mask(values[3])
    with SceneReader(open_scene(path)) as reader:
        _, valid = reader.read(Window(-5, 0, 45, 40))
    assert not valid[:15].any()
    assert valid[15:].all()


def test_coarser_bands_are_repeated_whatever_the_window(tmp_path):
    fine, coarse = noise(1, 60, 80), noise(1, 20, 27, seed=1)
    paths = [
        str(write_raster(tmp_path / n, v)) for n, v in (("fine.tif", fine), ("coarse.tif", coarse))
    ]
    base = open_scene(paths[0], modality="ms", bands=["red"])
    bands = (base.bands[0], Band("nir09", paths[1], 1, zoom=3))
    scene = type(base)(**{**base.__dict__, "bands": bands})
    whole = coarse[0].repeat(3, 0).repeat(3, 1)[:60, :80]
    with SceneReader(scene) as reader:
        for window in (Window(0, 0, 60, 80), Window(7, 11, 20, 31), Window(59, 79, 1, 1)):
            row, col, height, width = window
            got, _ = reader.read(window)
            np.testing.assert_array_equal(got[1], whole[row : row + height, col : col + width])


def test_calibrated_bands_come_calibrated_on_the_products_own_lines(tmp_path):
    counts = noise(1, 50, 60)
    counts[0, :5] = 0
    path = write_raster(tmp_path / "grd.tif", counts, names=("VV",))
    base = open_scene(path)
    table = Calibration((0.0, 49.0), (0.0, 59.0), ((200.0, 260.0), (300.0, 340.0)))
    band = Band("vv", str(path), 1, calibration=table)
    fields = {**base.__dict__, "bands": (band,), "dtype": "float32", "quantity": "sigma0"}
    with SceneReader(type(base)(**fields)) as reader:
        got, valid = reader.read(Window(2, 10, 30, 40))
    divisor = table.divisor(np.arange(2, 32), np.arange(10, 50))
    np.testing.assert_allclose(got[0], (counts[0, 2:32, 10:50] / divisor) ** 2, rtol=1e-5)
    assert not valid[:3].any()
    assert valid[3:].all()


def test_threads_have_handles_of_their_own(tiled):
    path, values = tiled
    wrong = []
    with SceneReader(open_scene(path)) as reader:

        def read(number: int) -> None:
            rng = np.random.default_rng(number)
            for row, col in rng.integers(0, 100, (20, 2)).tolist():
                got, _ = reader.read(Window(row, col, 50, 50))
                if not (got == values[:, row : row + 50, col : col + 50]).all():
                    wrong.append((row, col))

        threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_reader_can_be_sent_to_another_process(tiled, elsewhere):
    path, values = tiled
    with SceneReader(open_scene(path)) as reader:
        reader.read(Window(0, 0, 5, 5))
        got, _ = elsewhere(reader.read, Window(0, 0, 5, 5))
    np.testing.assert_array_equal(got, values[:, :5, :5])


def test_a_block_that_cannot_be_decoded_is_named(tmp_path):
    values = noise(3, 128, 128, "uint8")
    path = write_raster(
        tmp_path / "cut.tif",
        values,
        photometric="RGB",
        tiled=True,
        blockxsize=64,
        blockysize=64,
        compress="deflate",
    )
    path.write_bytes(path.read_bytes()[:-5000])
    with SceneReader(open_scene(path)) as reader:
        reader.read(Window(0, 0, 32, 32))
        with pytest.raises(BadBlockError, match=r"cut\.tif: band 1, 2, 3, rows 64-128, columns 64"):
            reader.read(Window(64, 64, 64, 64))


def test_nothing_warns_about_a_scene_without_a_place(tmp_path):
    path = write_raster(
        tmp_path / "plain.png", noise(3, 20, 20, "uint8"), crs=None, transform=None, driver="PNG"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SceneReader(open_scene(path)) as reader:
            assert reader.read(Window(0, 0, 20, 20))[1].all()
