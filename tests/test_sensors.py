"""What a file says about itself decides; where it says nothing, the user must."""

import numpy as np
import pytest
from rasters import noise, write_raster

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.bands import canonical, modality_of
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Red", "red"), ("RED band", "red"), ("B04", "b4"), ("band_8a", "b8a"), ("NIR1", "nir"),
        ("Near-Infrared", "nir"), ("red edge 1", "rededge1"), ("coastal_blue", "coastal"),
        ("VV", "vv"), ("T12_imag.bin", "t12_im"), ("C11", "c11"), ("T23_real", "t23_re"),
        ("SWIR 2", "swir22"), ("My thing", "my_thing"), ("green_i", "green_i"),
    ],
)  # fmt: skip
def test_one_spelling_per_band(written, meant):
    assert canonical(written) == meant


@pytest.mark.parametrize(
    ("names", "is_complex", "modality"),
    [
        (["red", "green", "blue"], False, "opt"),
        (["blue", "green", "red"], False, "opt"),
        (["blue", "green", "red", "nir"], False, "ms"),
        (["red", "nir"], False, "ms"),
        (["vv", "vh"], False, "sar-l2"),
        (["hh"], True, "sar-l1"),
        (["red"], True, None),
        (["red", "slope"], False, None),
        (["b1", "b2", "b3"], False, None),
    ],
)
def test_names_make_a_modality_or_none(names, is_complex, modality):
    assert modality_of(names, is_complex) == modality


def raster(tmp_path, bands, dtype="uint16", **about):
    return write_raster(tmp_path / "s.tif", noise(bands, 8, 9, dtype), **about)


def test_plain_rgb_is_optical(tmp_path):
    scene = open_scene(raster(tmp_path, 3, "uint8", photometric="RGB"))
    assert (scene.modality, scene.band_names) == ("opt", ("red", "green", "blue"))
    assert (scene.quantity, scene.gsd) == ("dn", 10.0)


def test_descriptions_name_bands_and_scales_make_reflectance(tmp_path):
    path = raster(tmp_path, 4, names=("B2", "B3", "B4", "B8A"), scales=(1e-4,) * 4)
    scene = open_scene(path)
    assert scene.band_names == ("blue", "green", "red", "nir08")
    assert scene.quantity == "reflectance"
    assert scene.bands[3].wavelength == 865


def test_numbered_bands_of_an_unknown_sensor_are_not_guessed(tmp_path):
    path = raster(tmp_path, 4, names=("B1", "B2", "B3", "B4"))
    with pytest.raises(SceneError, match="do not tell the modality"):
        open_scene(path)
    assert open_scene(path, modality="ms").band_names == ("b1", "b2", "b3", "b4")


@pytest.mark.parametrize(
    ("bands", "dtype"), [(1, "uint8"), (3, "uint8"), (4, "uint8"), (4, "uint16")]
)
def test_bands_without_names_are_refused_or_numbered(tmp_path, bands, dtype):
    path = raster(tmp_path, bands, dtype, photometric="MINISBLACK")
    with pytest.raises(SceneError, match=r"without names; pass --bands"):
        open_scene(path)
    scene = open_scene(path, modality="ms", unnamed="number")
    assert not scene.named
    assert scene.band_names == tuple(f"band_{i + 1}" for i in range(bands))
    wanted = ("red", "green", "blue", "nir")[:bands]
    assert scene.for_channels(wanted).band_names == wanted


def test_the_user_names_bands_and_skips_some(tmp_path):
    path = raster(tmp_path, 4)
    scene = open_scene(path, bands=["b", "-", "Red", "NIR"])
    assert scene.band_names == ("blue", "red", "nir")
    assert [b.index for b in scene.bands] == [1, 3, 4]
    with pytest.raises(SceneError, match="has 4 bands, but --bands names 2"):
        open_scene(path, bands=["red", "nir"])
    with pytest.raises(SceneError, match="several bands called red"):
        open_scene(path, bands=["red", "r", "nir", "blue"])
    with pytest.raises(SceneError, match="skips every band"):
        open_scene(path, bands=["-"] * 4)


def test_wavelengths_name_bands(tmp_path):
    path = write_raster(tmp_path / "w.img", noise(3, 8, 9), driver="ENVI")
    header = path.with_suffix(".hdr")
    header.write_text(
        header.read_text() + "wavelength units = Micrometers\nwavelength = {0.49, 0.665, 0.842}\n"
    )
    path.with_name("w.img.aux.xml").unlink(missing_ok=True)
    assert open_scene(path).band_names == ("blue", "red", "nir")


def test_modality_must_fit_the_numbers(tmp_path):
    with pytest.raises(SceneError, match="cannot be sar-l1"):
        open_scene(raster(tmp_path, 2, names=("VV", "VH")), modality="sar-l1")
    with pytest.raises(SceneError, match="choose from opt, ms"):
        open_scene(raster(tmp_path, 2, names=("VV", "VH")), modality="radar")
    path = write_raster(tmp_path / "c.tif", noise(1, 8, 9).astype(np.complex64), names=("HH",))
    with pytest.raises(SceneError, match="cannot be sar-l2"):
        open_scene(path, modality="sar-l2")


@pytest.mark.parametrize(
    ("low", "high", "dtype", "quantity"),
    [(-30, -1, "float32", "db"), (0, 2, "float32", "sigma0"), (1, 900, "uint16", "amplitude")],
)
def test_backscatter_says_what_it_is(tmp_path, low, high, dtype, quantity):
    values = np.random.default_rng(0).uniform(low, high, (2, 8, 9)).astype(dtype)
    scene = open_scene(write_raster(tmp_path / "s1.tif", values, names=("VV", "VH")))
    assert (scene.modality, scene.quantity) == ("sar-l2", quantity)


def test_scale_overrides(tmp_path):
    path = raster(tmp_path, 2, names=("red", "nir"))
    scene = open_scene(path, scale="0.0001,-0.1")
    assert {(b.scale, b.offset) for b in scene.bands} == {(1e-4, -0.1)}
    assert scene.quantity == "reflectance"
    for wrong in ("db", "big", "1,2x"):
        with pytest.raises(SceneError, match="--scale"):
            open_scene(path, scale=wrong)
    values = np.ones((1, 8, 9), np.float32)
    s1 = write_raster(tmp_path / "s1.tif", values, names=("VV",))
    assert open_scene(s1, scale="amplitude").quantity == "amplitude"


def test_missing_polarisations_are_zero_and_said(tmp_path):
    values = (noise(2, 8, 9) + 1j).astype(np.complex64)
    scene = open_scene(write_raster(tmp_path / "slc.tif", values, names=("VV", "VH")))
    assert scene.band_names == ("hh", "hv", "vh", "vv")
    assert [b.measured for b in scene.bands] == [False, False, True, True]
    assert scene.notes == ("hh, hv not measured: zeros",)
    with SceneReader(scene) as reader:
        got, valid = reader.read(Window(0, 0, 8, 9))
    assert not got[:2].any()
    np.testing.assert_array_equal(got[2:], values[::-1])
    assert valid.all()


def test_channels_are_asked_for_by_name(tmp_path):
    scene = open_scene(raster(tmp_path, 4, names=("blue", "green", "red", "nir")))
    assert scene.for_channels(("nir", "red")).band_names == ("nir", "red")
    with pytest.raises(SceneError, match="has no band swir16; it has blue"):
        scene.for_channels(("swir16",))
    slc = open_scene(
        write_raster(tmp_path / "c.tif", noise(1, 4, 4).astype(np.complex64), names=("HH",))
    )
    assert slc.for_channels(slc.channels).channels == slc.channels
    with pytest.raises(SceneError, match="are wanted"):
        slc.for_channels(("hh", "vv"))


def test_a_dual_pol_ratio_is_a_channel(tmp_path):
    scene = open_scene(raster(tmp_path, 2, names=("VV", "VH")))
    assert scene.for_channels(("vv", "vh", "vv/vh")).channels == ("vv", "vh", "vv/vh")
    assert scene.for_channels(("vv",)).channels == ("vv",)
