"""Every kind of product, read from imitations that GDAL's own drivers open, or from real files."""

import numpy as np
import pytest
import rasterio
from products import SIDE, landsat, planet, s1_calibration, sentinel1, sentinel2, zipped
from rasterio.shutil import copy
from rasters import noise, write_raster

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.bands import SENTINEL2
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.products.plain import Said
from ringmoe_cli.scene.radiometry import span_db, to_physical
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene, open_scenes
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes


def whole(scene):
    with SceneReader(scene) as reader:
        return reader.read(Window(0, 0, scene.grid.height, scene.grid.width))


@pytest.fixture(scope="module")
def level2(tmp_path_factory):
    root = tmp_path_factory.mktemp("s2")
    counts = sentinel2(root)
    return next(root.glob("*.SAFE")), counts


def test_sentinel2_has_its_bands_on_one_grid_with_the_stated_offset(level2):
    folder, counts = level2
    scene = open_scene(folder)
    assert scene.band_names == (
        "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16",
        "swir22",
    )  # fmt: skip
    assert (scene.grid.height, scene.gsd, scene.date) == (SIDE, 10.0, "2023-08-23")
    raw, valid = whole(scene)
    assert valid.all()
    np.testing.assert_array_equal(raw[0], counts["B02"])
    np.testing.assert_array_equal(raw[3], counts["B05"].repeat(2, 0).repeat(2, 1))
    want = (counts["B02"].astype(float) - 1000) / 10000
    np.testing.assert_allclose(to_physical(raw, scene)[0], want, atol=1e-6)


def test_gdals_own_driver_reads_the_same_sentinel2(level2):
    folder, _ = level2
    scene = open_scene(folder)
    raw, _ = whole(scene)
    path = f"SENTINEL2_L2A:{folder / 'MTD_MSIL2A.xml'}:10m:EPSG_32630"
    with rasterio.open(path) as theirs:
        names = {theirs.tags(i)["BANDNAME"].lower(): i for i in theirs.indexes}
        for band in ("b2", "b3", "b4", "b8"):
            ours = raw[scene.band_names.index(SENTINEL2[band])]
            np.testing.assert_array_equal(ours, theirs.read(names[band]))
        assert theirs.transform[:6] == scene.grid.transform


def test_bands_of_a_product_are_chosen_by_name(level2):
    folder, counts = level2
    scene = open_scene(folder / "MTD_MSIL2A.xml", bands=["nir", "coastal"])
    raw, _ = whole(scene)
    np.testing.assert_array_equal(raw[0], counts["B08"])
    np.testing.assert_array_equal(raw[1], counts["B01"].repeat(6, 0).repeat(6, 1))
    assert scene.bands[1].wavelength == 450
    with pytest.raises(SceneError, match="has no band cirrus"):
        open_scene(folder, bands=["cirrus"])


def test_scene_classes_mask_clouds(level2):
    folder, counts = level2
    (scene,) = open_scenes(folder, Said(scl=(3, 8, 9, 10)))
    _, valid = whole(scene)
    np.testing.assert_array_equal(valid, (counts["SCL"] != 9).repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("offset", [None, -1000])
def test_level_1c_takes_its_offset_from_the_metadata_alone(tmp_path, offset):
    counts = sentinel2(tmp_path, "1C", offset)
    folder = next(tmp_path.glob("*.SAFE"))
    scene = open_scene(folder, bands=["red", "cirrus"])
    assert scene.bands[0].offset == (offset or 0) / 10000
    raw, _ = whole(scene)
    np.testing.assert_array_equal(raw[0], counts["B04"])
    with pytest.raises(SceneError, match="needs Level-2A"):
        open_scenes(folder, Said(scl=(3,)))


def test_nodata_and_saturation_of_sentinel2_are_invalid(tmp_path):
    sentinel2(tmp_path)
    folder = next(tmp_path.glob("*.SAFE"))
    path = next(folder.rglob("*_B04_10m.jp2"))
    values = noise(1, SIDE, SIDE) + 1000
    values[0, 3, 4], values[0, 5, 6] = 0, 65535
    with rasterio.open(path) as source:
        profile = source.profile
    path.unlink()
    with rasterio.open(path, "w", **profile, QUALITY=100, REVERSIBLE="YES") as out:
        out.write(values)
    _, valid = whole(open_scene(folder))
    assert not valid[3, 4]
    assert not valid[5, 6]
    assert valid.sum() == SIDE * SIDE - 2


def test_an_archive_is_read_in_place(level2):
    folder, _ = level2
    archive = zipped(folder)
    first, second = open_scene(folder), open_scene(archive)
    assert first.name == second.name
    for ours, theirs in zip(whole(first), whole(second), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_broken_products_are_named(tmp_path):
    sentinel2(tmp_path)
    folder = next(tmp_path.glob("*.SAFE"))
    next(folder.rglob("*_B03_10m.jp2")).unlink()
    with pytest.raises(SceneError, match=r"lacks GRANULE/.*_B03_10m\.jp2"):
        open_scene(folder)
    metadata = folder / "MTD_MSIL2A.xml"
    metadata.write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>")
    with pytest.raises(SceneError, match="declares entities"):
        open_scene(folder)
    metadata.write_text("<a>")
    with pytest.raises(SceneError, match="no valid XML"):
        open_scene(folder)
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(SceneError):
        open_scene(tmp_path / "x.zip")


def test_metadata_cannot_lead_out_of_a_product(tmp_path):
    sentinel2(tmp_path)
    folder = next(tmp_path.glob("*.SAFE"))
    secret = write_raster(tmp_path / "secret.tif", noise(1, 10, 10))
    image = next(folder.rglob("*_B03_10m.jp2"))
    image.unlink()
    image.symlink_to(secret)
    with pytest.raises(SceneError, match="leads outside"):
        open_scene(folder)


def divisor(rows, cols):
    """The imitation's table, written out: 300 at pixel 0, 330 at 40, 350 at the end, + line."""
    return np.interp(cols, [0, 40, 79], [300, 330, 350])[None] + rows[:, None]


def test_sentinel1_grd_is_calibrated_with_its_table_and_keeps_its_points(tmp_path):
    counts = sentinel1(tmp_path, "GRD", {"IW": ("vh", "vv")})
    scene = open_scene(tmp_path / "S1A_GRD.SAFE")
    assert (scene.modality, scene.quantity) == ("sar-l2", "sigma0")
    assert scene.channels == ("vv", "vh", "vv/vh")
    assert (scene.gsd, scene.date, len(scene.grid.gcps)) == (8.0, "2021-04-01", 60)
    raw, valid = whole(scene)
    table = divisor(np.arange(90), np.arange(80))
    for i, polarisation in enumerate(("vv", "vh")):
        want = (counts["IW", polarisation] / table) ** 2
        np.testing.assert_allclose(raw[i], want, rtol=1e-5)
    assert not valid[:, :5].any()
    assert valid[:, 5:].all()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_gdals_own_driver_reads_the_same_sentinel1(tmp_path):
    """It offers counts only, so its counts over the table written out are compared with ours."""
    sentinel1(tmp_path, "GRD", {"IW": ("vh", "vv")})
    sentinel1(tmp_path, "SLC", {"IW1": ("vv",)})
    table = divisor(np.arange(90), np.arange(80))
    for kind, part in (("GRD", "IW_VV:AMPLITUDE"), ("SLC", "IW1_VV:COMPLEX")):
        folder = tmp_path / f"S1A_{kind}.SAFE"
        raw, _ = whole(open_scene(folder).select(("vv",)))
        path = f"SENTINEL1_CALIB:UNCALIB:{folder}/manifest.safe:{part}"
        with rasterio.open(path) as theirs:
            counts = theirs.read(1)
        want = (counts / table) ** 2 if kind == "GRD" else counts / table
        np.testing.assert_allclose(raw[0], want, rtol=1e-5)


def test_sentinel1_slc_is_read_burst_by_burst(tmp_path):
    counts = sentinel1(tmp_path, "SLC", {"IW1": ("vv", "vh"), "IW2": ("vv", "vh")}, bursts=3)
    folder = tmp_path / "S1A_SLC.SAFE"
    scenes = open_scenes(folder)
    assert [s.name for s in scenes][:2] == ["S1A_SLC_IW1_burst1", "S1A_SLC_IW1_burst2"]
    assert len(scenes) == 6
    (second,) = open_scenes(f"{folder}:IW2_burst2")
    assert (second.grid.height, second.corner) == (30, (30, 0))
    assert second.notes == ("hh, hv not measured: zeros",)
    raw, valid = whole(second)
    table = divisor(np.arange(30, 60), np.arange(80))
    np.testing.assert_allclose(raw[3], counts["IW2", "vv"][30:60] / table, rtol=1e-5)
    np.testing.assert_allclose(raw[2], counts["IW2", "vh"][30:60] / table, rtol=1e-5)
    assert not raw[:2].any()
    assert valid.all()
    assert second.gsd == pytest.approx((4 / np.sin(np.radians(30)) + 12) / 2)
    assert all(p.y == pytest.approx(45 - (p.row + 30) * 1e-4) for p in second.grid.gcps)
    with pytest.raises(SceneError, match="holds 6 scenes"):
        open_scene(folder)
    with pytest.raises(SceneError, match="no part IW9"):
        open_scenes(f"{folder}:IW9")


def test_a_stripmap_slc_is_one_scene_and_the_store_is_calibrated(tmp_path):
    counts = sentinel1(tmp_path, "SLC", {"S3": ("hh", "hv")})
    scene = open_scene(tmp_path / "S1A_SLC.SAFE")
    stored = tile_scenes([Labelled(scene)], tmp_path / "t.zarr", Settings(tile=32)).scenes[0]
    raw, _ = stored.read(Window(0, 0, 90, 80))
    table = divisor(np.arange(90), np.arange(80))
    np.testing.assert_allclose(raw[0], counts["S3", "hh"] / table, rtol=1e-5)
    power = np.abs(counts["S3", "hh"]) ** 2 + np.abs(counts["S3", "hv"]) ** 2
    want = 10 * np.log10(power / table**2)
    assert stored.statistics["power_db"]["mean"] == pytest.approx(want.mean(), abs=1e-3)
    assert stored.grid == scene.grid
    assert len(stored.grid.gcps) == 60


def test_a_product_without_its_table_is_refused(tmp_path):
    sentinel1(tmp_path, "GRD", {"IW": ("vv",)})
    table = next((tmp_path / "S1A_GRD.SAFE").glob("annotation/calibration/*"))
    table.write_text(s1_calibration(90, 80).replace("calibrationVector>", "x>"))
    with pytest.raises(SceneError, match="no calibration vectors"):
        open_scene(tmp_path / "S1A_GRD.SAFE")
    table.unlink()
    with pytest.raises(SceneError, match="lacks annotation/calibration"):
        open_scene(tmp_path / "S1A_GRD.SAFE")


@pytest.mark.parametrize("craft", ["LANDSAT_8", "LANDSAT_7"])
def test_landsat_has_the_scale_of_its_level(tmp_path, craft):
    counts = landsat(tmp_path, craft)
    scene = open_scene(next(tmp_path.iterdir()))
    named = ("coastal", "blue", "green", "red", "nir", "swir16", "swir22")
    older = ("blue", "green", "red", "nir", "swir16", "swir22")
    assert scene.band_names == (named if craft == "LANDSAT_8" else older)
    raw, valid = whole(scene)
    want = counts["1"] * 2.75e-5 - 0.2
    np.testing.assert_allclose(to_physical(raw, scene)[0], want, atol=1e-6)
    assert not valid[:3].any()
    assert valid[3:].all()
    assert scene.date == "2021-06-01"


def test_landsat_level_1_says_what_it_is(tmp_path):
    landsat(tmp_path, level="L1TP")
    folder = next(tmp_path.iterdir())
    assert "top of atmosphere" in open_scene(folder).notes[0]
    metadata = next(folder.glob("*_MTL.txt"))
    metadata.write_text(metadata.read_text().replace("COLLECTION_NUMBER = 02", "X = 1"))
    with pytest.raises(SceneError, match="not a Collection 2"):
        open_scene(folder)


@pytest.mark.parametrize(("bands", "surface"), [(4, True), (8, True), (4, False), (8, False)])
def test_planetscope_bands_and_reflectance(tmp_path, bands, surface):
    counts = planet(tmp_path / "p", bands, surface)
    scene = open_scene(tmp_path / "p")
    assert scene.band_names[-1] == "nir"
    assert ("yellow" in scene.band_names) == (bands == 8)
    raw, valid = whole(scene)
    factor = 1e-4 if surface else 2e-5
    np.testing.assert_allclose(to_physical(raw, scene)[1], counts[1] * factor, rtol=1e-5)
    assert valid.all()
    image = next((tmp_path / "p").glob("*.tif"))
    assert open_scene(image).bands == scene.bands
    next((tmp_path / "p").glob("*.xml")).unlink()
    with pytest.raises(SceneError, match="without names"):
        open_scene(image)


def test_a_stack_of_single_band_files(tmp_path):
    names = ("blue", "green", "red", "nir")
    values = noise(4, 20, 30)
    for name, band in zip(names, values, strict=True):
        write_raster(tmp_path / f"site_2020_{name}_v1.tif", band[None])
    scene = open_scene(tmp_path)
    assert scene.band_names == ("blue", "green", "nir", "red")
    raw, _ = whole(scene.select(names))
    np.testing.assert_array_equal(raw, values)
    with pytest.raises(SceneError, match="has 4 files, but --bands names 1"):
        open_scene(tmp_path, bands=["red"])
    write_raster(tmp_path / "site_2020_swir16_v1.tif", noise(1, 10, 15))
    with pytest.raises(SceneError, match="has other pixels than"):
        open_scene(tmp_path)


def test_a_quad_pol_set_and_a_matrix_folder_are_complex_sar(tmp_path):
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(2, 4, 20, 30))
    echo = (parts[0] + 1j * parts[1]).astype(np.complex64)
    for name, band in zip(("HH", "HV", "VH", "VV"), echo, strict=True):
        write_raster(tmp_path / f"slc_{name}.tif", band[None])
    scene = open_scene(tmp_path)
    assert scene.band_names == ("hh", "hv", "vh", "vv")
    np.testing.assert_array_equal(whole(scene)[0], echo)
    folder = tmp_path / "C3"
    folder.mkdir()
    names = ("C11", "C12_imag", "C12_real", "C13_imag", "C13_real", "C22", "C23_imag", "C23_real",
             "C33")  # fmt: skip
    for i, name in enumerate(names):
        write_raster(
            folder / f"{name}.bin", np.full((1, 9, 8), i + 1, np.float32), crs=None,
            transform=None, driver="ENVI",
        )  # fmt: skip
    matrix = open_scene(folder)
    assert (matrix.modality, matrix.quantity) == ("sar-l1", "coherency")
    assert matrix.band_names[:3] == ("c11", "c12_re", "c12_im")
    raw, _ = whole(matrix)
    assert raw[:, 0, 0].tolist() == [1, 3, 2, 5, 4, 6, 8, 7, 9]
    power = span_db(to_physical(raw, matrix), matrix)
    np.testing.assert_allclose(power, 10 * np.log10(1 + 6 + 9), rtol=1e-6)


FORMATS = {
    "GTiff": ("tif", {}),
    "COG": ("tif", {}),
    "JP2OpenJPEG": ("jp2", {"QUALITY": 100, "REVERSIBLE": "YES"}),
    "ENVI": ("dat", {}),
    "HFA": ("img", {}),
    "NITF": ("ntf", {}),
    "PNG": ("png", {}),
}


@pytest.mark.parametrize("driver", FORMATS)
def test_raster_formats(tmp_path, driver):
    suffix, options = FORMATS[driver]
    values = noise(3, 50, 60, "uint8")
    place = {"crs": "EPSG:4326", "transform": rasterio.Affine(0.1, 0, 5, 0, -0.1, 50)}
    plain = write_raster(tmp_path / "plain.tif", values, **place)
    path = tmp_path / f"scene.{suffix}"
    with rasterio.open(plain) as source:
        kept = {"driver": driver, **options}
        copy(source, path, **kept)
    scene = open_scene(path, bands=["red", "green", "blue"])
    np.testing.assert_array_equal(whole(scene)[0], values)
    if driver != "PNG":
        assert scene.grid.transform == pytest.approx(tuple(place["transform"])[:6], abs=1e-4)


def test_real_sets(data_dir):
    t3 = open_scene(data_dir / "04_sar_complex/airsar_sf_T3/strip0")
    assert (t3.modality, len(t3.bands), t3.grid.height) == ("sar-l1", 9, 900)
    quad = open_scene(data_dir / "04_sar_complex/capella_quadpol_slc")
    raw, valid = whole(quad)
    for i, name in enumerate(("hh", "hv", "vh", "vv")):
        with rasterio.open(
            data_dir / f"04_sar_complex/capella_quadpol_slc/sar_{name}.tif"
        ) as source:
            np.testing.assert_array_equal(raw[i], source.read(1))
    assert valid.mean() > 0.99
    stack = open_scene(data_dir / "02_multispectral/s2_l1c_8files")
    assert stack.band_names[:4] == ("coastal", "blue", "green", "red")
    landsat5 = open_scene(
        data_dir / "02_multispectral/landsat5_nbar_6files",
        bands=["blue", "green", "red", "nir", "swir16", "swir22", "-"],
    )
    _, valid = whole(landsat5)
    assert 0 < valid.mean() <= 1
