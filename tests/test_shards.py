"""Chunks that share files: what zarr and xarray read is what the scene holds."""

import numpy as np
import pytest
import rioxarray  # noqa: F401 - gives xarray its .rio
import xarray as xr
import zarr
from rasterio.transform import Affine
from rasters import noise, write_raster

from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store import layout
from ringmoe_cli.scene.store.chunks import ChunkCache, ChunkedArray
from ringmoe_cli.scene.store.shards import RUN
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # rioxarray's
@pytest.mark.parametrize(("height", "width"), [(300, 350), (90, 2100)])
def test_shards_hold_the_same_scene_in_fewer_files(tmp_path, height, width):
    values = noise(3, height, width, "uint8")
    path = write_raster(tmp_path / "s.tif", values, photometric="RGB", nodata=7)
    scene = open_scene(path)
    plain = tile_scenes([Labelled(scene)], tmp_path / "v2.zarr", Settings(tile=64))
    stored = tile_scenes([Labelled(scene)], tmp_path / "v3.zarr", Settings(tile=64, shards=True))
    assert stored.scenes[0].statistics == plain.scenes[0].statistics
    for window in (Window(0, 0, height, width), Window(-9, 40, 130, width)):
        for ours, theirs in zip(
            stored.scenes[0].read(window), plain.scenes[0].read(window), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    files = [p for p in (tmp_path / "v3.zarr" / "s" / "image").iterdir() if p.name[0] == "c"]
    assert len(files) == -(-height // 64) * -(-width // (64 * RUN))
    with xr.open_zarr(
        tmp_path / "v3.zarr" / "s", consolidated=False, decode_coords="all", mask_and_scale=False
    ) as got:
        np.testing.assert_array_equal(got["image"], values)
        assert got["image"].dims == ("band", "y", "x")
        assert list(got["band"].values) == ["red", "green", "blue"]
        assert got.rio.crs == scene.grid.crs
        image = got["image"].isel(band=0)
        assert image.rio.transform() == Affine(*scene.grid.transform)


def test_shards_are_read_as_zarr_reads_them_and_damage_is_said(tmp_path):
    group = zarr.create_group(tmp_path, zarr_format=3)
    array = layout.add(group, "a", ("y", "x"), (40, 700), "complex64", (32, 32), shards=True)
    ours, values = ChunkedArray.of(tmp_path, "a"), noise(1, 40, 700)[0].astype("complex64")
    ours.write(0, 0, values)
    np.testing.assert_array_equal(array[:], values)
    np.testing.assert_array_equal(ours.read(3, 5, 37, 600), values[3:, 5:605])
    array[:] = values + 1
    np.testing.assert_array_equal(
        ChunkedArray(ours.folder, cache=ChunkCache(0)).read(0, 0, 40, 700), values + 1
    )
    torn = ours.folder / "c.0.0"
    torn.write_bytes(torn.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"c\.0\.0: the shard's index is damaged"):
        ChunkedArray(ours.folder, cache=ChunkCache(0)).read(0, 0, 9, 9)
