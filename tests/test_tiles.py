"""Other people's readers open a store in place: GDAL through rasterio, xarray, rioxarray, zarr."""

import warnings

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasters import noise, write_raster

from ringmoe_cli.errors import StoreError
from ringmoe_cli.scene.grid import ControlPoint, Grid
from ringmoe_cli.scene.scene import Band, Scene
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store.chunks import ChunkCache, ChunkedArray
from ringmoe_cli.scene.store.layout import add
from ringmoe_cli.scene.tiles import open_store, scene_from_dict, scene_to_dict
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes


def values_of(dtype):
    values = noise(3, 90, 110, "uint8" if dtype == "int8" else "uint16").astype(dtype)
    return values * np.asarray(0.5 + 1.5j, dtype) if dtype.startswith("complex") else values


@pytest.fixture(params=["uint8", "int8", "uint16", "int16", "float32", "float64", "complex64"])
def tiled(request, tmp_path):
    dtype = request.param
    names = ("HH", "HV", "VV") if dtype == "complex64" else ("red", "nir", "swir16")
    values = values_of(dtype)
    about = {} if dtype == "complex64" else {"nodata": 7}
    path = write_raster(tmp_path / "s.tif", values, names=names, **about)
    store = tile_scenes([Labelled(open_scene(path))], tmp_path / "t.zarr", Settings(tile=32))
    if dtype == "complex64":  # the store holds all four polarisations, VH as zeros
        values = np.stack([values[0], values[1], np.zeros_like(values[0]), values[2]])
    return store, values, path


def test_gdal_opens_it(tiled):
    store, values, path = tiled
    with rasterio.open(path) as source, rasterio.open(f'ZARR:"{store.path}":/s/image') as got:
        assert got.driver == "Zarr"
        assert got.crs == source.crs
        assert got.transform == source.transform
        assert got.nodata == source.nodata
        np.testing.assert_array_equal(got.read(), values)
    with rasterio.open(f'ZARR:"{store.path}":/s/valid') as got:
        assert got.transform.a == 10


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_xarray_and_rioxarray_open_it(tiled):
    import rioxarray  # noqa: F401

    store, values, path = tiled
    with rasterio.open(path) as source:
        crs, transform, nodata = source.crs, source.transform, source.nodata
    opened = xr.open_zarr(
        store.path, group="s", decode_coords="all", mask_and_scale=False, chunks=None
    )
    image = opened["image"]
    assert image.dims == ("band", "y", "x")
    np.testing.assert_array_equal(image.values, values)
    assert image.rio.crs == crs
    assert image.rio.transform() == transform
    assert image.rio.nodata == nodata
    assert list(opened["band"].values) == list(store.scenes[0].scene.band_names)
    np.testing.assert_allclose(opened["x"][0], transform.c + 5)
    assert opened["valid"].rio.crs == crs


def test_zarr_opens_it(tiled):
    store, values, _ = tiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(store.path, mode="r")
        np.testing.assert_array_equal(group["s/image"][:], values)


PLACES = {
    "rotated": {"transform": Affine(2.0, 1.5, 5e5, 1.5, -2.0, 6e6)},
    "south-up": {"transform": Affine(10, 0, 5e5, 0, 10, 6e6)},
    "sheared": {"transform": Affine(10, 3, 5e5, 0, -10, 6e6)},
    "nowhere": {"transform": None, "crs": None},
    "antimeridian": {"crs": "EPSG:4326", "transform": Affine(0.1, 0, 178, 0, -0.1, 60)},
    "esri": {"crs": "ESRI:102039"},
    "local": {
        "crs": 'LOCAL_CS["a mine",UNIT["metre",1]]',
    },
}


@pytest.mark.parametrize("name", PLACES)
def test_every_kind_of_grid_survives(tmp_path, name):
    path = write_raster(tmp_path / "s.tif", noise(1, 40, 50), names=("red",), **PLACES[name])
    scene = open_scene(path, modality="ms")
    store = tile_scenes([Labelled(scene)], tmp_path / "t.zarr", Settings(tile=32))
    assert store.scenes[0].grid == scene.grid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as source, rasterio.open(f'ZARR:"{store.path}":/s/image') as got:
            np.testing.assert_array_equal(got.read(), source.read())
            if scene.grid.is_rectilinear:
                assert got.transform == pytest.approx(source.transform)
                assert got.crs == source.crs
            else:  # GDAL would place it wrongly, so it must not place it at all
                assert got.crs is None


def test_points_polynomials_and_pixel_is_point_survive(tmp_path):
    points = tuple(ControlPoint(r, c, 3 + c / 10, 50 - r / 10, 7.0) for r in (0, 9) for c in (0, 9))
    grid = Grid(
        10, 10, CRS.from_epsg(4326).to_wkt(), gcps=points, rpcs={"LINE_OFF": "5"},
        pixel_is_point=True,
    )  # fmt: skip
    band = Band("vv", "file", 2, nodata=-1.5, scale=0.1)
    scene = Scene(
        "s", "sar-l2", (band, Band("vh", "")), grid, "float32", "sigma0", date="2020-01-02"
    )
    again = scene_from_dict(scene_to_dict(scene))
    assert again.grid == grid
    assert again.grid.rpcs == grid.rpcs
    assert [b.measured for b in again.bands] == [True, False]
    assert again.bands[0].nodata == -1.5
    assert again.date == "2020-01-02"


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    values = noise(2, 70, 90)
    array = add(zarr.create_group(folder, zarr_format=2), "a", ("band", "y", "x"), values.shape,
                "uint16", (2, 32, 32))  # fmt: skip
    ours = ChunkedArray.of(folder, "a")
    ours.write(0, 0, values)
    return values, ours, array


@given(st.data())
@settings(deadline=None)
def test_chunks_read_and_write_as_zarr_does(chunked, data):
    values, ours, array = chunked
    row, col = data.draw(st.integers(0, 69)), data.draw(st.integers(0, 89))
    height, width = data.draw(st.integers(1, 70 - row)), data.draw(st.integers(1, 90 - col))
    got = ours.read(row, col, height, width)
    np.testing.assert_array_equal(got, array[:, row : row + height, col : col + width])
    np.testing.assert_array_equal(got, values[:, row : row + height, col : col + width])


def test_the_cache_forgets_but_does_not_lie(chunked):
    values, ours, _ = chunked
    small = ChunkedArray(ours.folder, cache=ChunkCache(2 * 32 * 32 * 2 * 2))
    for _ in range(2):
        for row in range(0, 64, 16):
            np.testing.assert_array_equal(small.read(row, 0, 16, 90), values[:, row : row + 16])
    assert len(small.cache.kept) <= 2
    assert small.cache.bytes <= small.cache.limit


def test_an_overwritten_store_is_read_anew(tmp_path):
    for value in (1, 2):
        folder = tmp_path / "a.zarr"
        group = zarr.create_group(folder, zarr_format=2, overwrite=True)
        add(group, "a", ("y", "x"), (32, 32), "uint8", (32, 32))
        array = ChunkedArray.of(folder, "a")
        array.write(0, 0, np.full((32, 32), value, np.uint8))
        assert (array.read(0, 0, 32, 32) == value).all()


def test_chunks_never_written_read_as_fill(tmp_path):
    add(zarr.create_group(tmp_path, zarr_format=2), "a", ("y", "x"), (50, 50), "float32", (32, 32),
        fill=float("nan"))  # fmt: skip
    assert np.isnan(ChunkedArray.of(tmp_path, "a").read(10, 10, 30, 30)).all()


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "none.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a tile store"):
        open_store(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=2)
    with pytest.raises(StoreError):
        open_store(tmp_path / "other.zarr")
