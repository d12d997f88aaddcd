"""Features without a head: vectors per tile, dense maps, principal components."""
# ruff: noqa: F401, F811 - fixtures are imported

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import rioxarray
import torch
import xarray
from mapping import BANDS, CONFIG, NORM, model, normalised, scene, write_scene
from PIL import Image
from rasterio.warp import transform_bounds
from rio_cogeo import cog_validate
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from ringmoe_cli.app import app
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.embedding import load_embedder, principal_components
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.strips import SkipBad
from ringmoe_cli.scene.maps.zarrmap import ZarrWriter
from ringmoe_cli.scene.writer import Layer


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A bare encoder with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    net = RingMoE(CONFIG)
    named = (("encoder." + name, tensor) for name, tensor in disk_tensors(net))
    save_checkpoint(folder, CheckpointConfig(CONFIG, "encoder", {"ms": NORM}, {"ms": 10.0}), named)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["embed", *map(str, arguments)])


def features_of(encoder, path, window, stage):
    """The obvious way: one window through the encoder."""
    strip = SkipBad().read(normalised(path), window)
    valid = torch.from_numpy(strip.valid["ms"][:, None])
    with torch.inference_mode():
        encoding = RingMoE.from_pretrained(encoder).encode(
            {"ms": torch.from_numpy(strip.images["ms"])},
            valid=None if valid.all() else {"ms": valid},
        )
    return encoding.features["ms"][stage][0].numpy()


def test_vectors_are_tile_means_with_polygons_on_the_ground(encoder, scene):
    done = run(scene, "-m", encoder, "--json")
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    table = geopandas.read_parquet(said["output"])
    assert said["tiles"] == len(table) == 12
    assert table.crs.to_epsg() == 32630
    assert table.total_bounds.tolist() == [500000, 5000000 - 700, 500000 + 1000, 5000000]
    tile = table[(table.row == 32) & (table.col == 64)].iloc[0]
    assert tile.geometry.bounds == (500640.0, 4999360.0, 500960.0, 4999680.0)
    expected = features_of(encoder, scene, Window(32, 64, 32, 32), 3).mean((1, 2))
    np.testing.assert_allclose(tile.vector, expected, atol=1e-5)


def test_empty_tiles_have_no_vector(encoder, tmp_path):
    path = write_scene(tmp_path / "s.tif", 64, 64, hole=False)
    with rasterio.open(path, "r+") as dst:
        dst.write(np.zeros((4, 32, 64), np.uint16), window=((0, 32), (0, 64)))
    table = geopandas.read_parquet(run(path, "-m", encoder).stdout.strip())
    assert table.row.tolist() == [32, 32]


def test_dense_map_has_the_features_where_one_window_sees_them(encoder, scene):
    done = run(scene, "-m", encoder, "--dense", "--stage", "2", "--overlap", "0")
    with rasterio.open(done.stdout.strip()) as got:
        assert got.res == (80, 80)
        assert got.shape == (9, 13)
        assert got.count == 16
        values = got.read()
    assert cog_validate(done.stdout.strip())[0]
    expected = features_of(encoder, scene, Window(32, 32, 32, 32), 1)
    np.testing.assert_allclose(values[:, 4:8, 4:8], expected, rtol=2e-3, atol=2e-3)
    assert np.isnan(values[:, :2, :3]).all()


def test_int8_is_within_a_step(encoder, scene, tmp_path):
    options = ("-m", encoder, "--dense", "--stage", "1")
    full = run(scene, *options, "-o", tmp_path / "f.tif").stdout.strip()
    short = run(scene, *options, "-o", tmp_path / "i.tif", "--dtype", "int8").stdout.strip()
    with rasterio.open(full) as f, rasterio.open(short) as i:
        assert i.dtypes[0] == "int8"
        floats, steps, scales = f.read(), i.read(), np.array(i.scales)[:, None, None]
    held = ~np.isnan(floats) & (np.abs(steps) < 127)
    error = np.abs(floats - steps * scales) / scales
    assert error[held].max() < 0.6
    np.testing.assert_array_equal(steps == -128, np.isnan(floats))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_zarr_holds_the_same_numbers_and_opens_everywhere(encoder, scene, tmp_path, dtype):
    options = (scene, "-m", encoder, "--dense", "--stage", "1", "--dtype", dtype)
    cog = run(*options, "-o", tmp_path / "f.tif").stdout.strip()
    store = run(*options, "-o", tmp_path / "f.zarr").stdout.strip()
    assert store == str(tmp_path / "f.zarr")
    with rasterio.open(cog) as c, rasterio.open(f"ZARR:{store}:/features") as z:
        assert (z.crs, z.transform, z.shape) == (c.crs, c.transform, c.shape)
        flat, stored, scales = c.read(), z.read(), c.scales
    np.testing.assert_allclose(stored, flat, rtol=1e-3, atol=1e-6)
    opened = xarray.open_zarr(store, decode_coords="all", mask_and_scale=False)
    assert opened.features.dtype == dtype
    assert opened.rio.crs.to_epsg() == 32630
    np.testing.assert_array_equal(opened.features.astype("float32"), stored)
    if dtype == "int8":
        np.testing.assert_allclose(opened.scale, scales)
    named = run(*options, "--zarr", "-o", tmp_path / "maps", "--quicklook", tmp_path / "q.png")
    assert named.stdout.strip() == str(tmp_path / "maps/scene_embedding.zarr")
    assert run(*options, "-o", store).exit_code == 1
    assert run(*options, "-o", store, "--overwrite").exit_code == 0


def test_zarr_rows_may_come_in_any_portions(tmp_path):
    layer, grid = Layer("features", "int8", -128, 3, descriptions=("a", "b", "c")), Grid(1100, 40)
    values = np.random.default_rng(0).integers(-127, 127, (3, 1100, 40)).astype(np.int8)
    with ZarrWriter(tmp_path / "f.zarr", layer, grid, tmp_path) as target:
        for top, stop in ((0, 1), (1, 700), (700, 1100)):
            target.write(values[:, top:stop])
    np.testing.assert_array_equal(xarray.open_zarr(tmp_path / "f.zarr").features.values, values)
    with (
        pytest.raises(RingmoeError, match="5 of 1100 rows"),
        ZarrWriter(tmp_path / "g.zarr", layer, grid, tmp_path) as target,
    ):
        target.write(values[:, :5])
    assert [p.name for p in tmp_path.iterdir()] == ["f.zarr"]


def test_components_are_those_of_scikit_learn():
    samples = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.arange(1.0, 13)
    )
    ours = principal_components(samples, 4)
    theirs = PCA(4).fit(samples.numpy()).components_
    np.testing.assert_allclose(np.abs((ours.axes.numpy() * theirs).sum(1)), 1, atol=1e-4)


def test_components_become_bands_and_a_picture(encoder, scene, tmp_path):
    picture = tmp_path / "look.png"
    done = run(
        scene, "-m", encoder, "--dense", "--pca", "3", "--stage", "1", "--quicklook", picture
    )
    with rasterio.open(done.stdout.strip()) as got:
        assert got.count == 3
        spread = np.nanstd(got.read(), axis=(1, 2))
    assert spread[0] > spread[2]
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (18, 25, 3)
    assert (pixels[:4, :6] == 0).all()


def test_similar_tiles_are_found(tmp_path, encoder):
    """The example of the README: pick a tile, find its like."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, (6, 6))
    noise = rng.integers(0, 100, (4, 192, 192))
    values = 300 + 2500 * kind.repeat(32, 0).repeat(32, 1)[None] + noise
    path = write_scene(tmp_path / "s.tif", 192, 192, hole=False)
    with rasterio.open(path, "r+") as dst:
        dst.write(values.astype(np.uint16))
    tiles = geopandas.read_parquet(run(path, "-m", encoder).stdout.strip())
    vectors = np.stack(tiles["vector"])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors[7]
    found = kind.ravel()[np.argsort(-likeness)][: (kind == kind.ravel()[7]).sum()]
    assert (found == kind.ravel()[7]).all()


def test_a_task_checkpoint_has_features_too(model, scene):
    assert run(scene, "-m", model).exit_code == 0


def test_interrupted_vectors_continue(encoder, scene, monkeypatch):
    embedder = load_embedder(encoder, Wish(), batch=2)
    whole = scene.with_name("scene_embedding.parquet")
    embedder.vectors(str(scene))
    first = whole.read_bytes()
    whole.unlink()
    calls = []
    encode = RingMoE.encode

    def stops(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(RingMoE, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        load_embedder(encoder, Wish(), batch=2).vectors(str(scene))
    assert not whole.exists()
    monkeypatch.setattr(RingMoE, "encode", encode)
    load_embedder(encoder, Wish(), batch=2).vectors(str(scene))
    assert whole.read_bytes() == first


@pytest.mark.parametrize("asked", [(), ("--dense",), ("--dense", "--zarr")])
def test_a_stac_item_tells_where_the_features_are(encoder, scene, asked):
    done = run(scene, "-m", encoder, "--stac", "--json", *asked)
    said = json.loads(done.stdout)
    item = json.loads(Path(said["stac"]).read_text())
    (asset,) = item["assets"].values()
    assert Path(said["stac"]).parent / asset["href"] == Path(said["output"])
    assert item["properties"]["ringmoe:task"] == "embedding"
    with rasterio.open(scene) as src:
        west, south, east, north = transform_bounds(src.crs, "EPSG:4326", *src.bounds)
    cells = 4e-3  # the last ones hang over the scene
    np.testing.assert_allclose(item["bbox"], [west, south, east, north], atol=cells)


def failure(*arguments):
    done = run(*arguments)
    assert done.exit_code == 1
    return str(done.exception)


def test_impossible_wishes_are_clear(encoder, scene, tmp_path):
    assert "1 to 4" in failure(scene, "-m", encoder, "--stage", "5")
    assert "multiple of 32" in failure(scene, "-m", encoder, "--window", "40")
    assert "not opt" in failure(scene, "-m", encoder, "--modality", "opt")
    assert "components" in failure(scene, "-m", encoder, "--dense", "--stage", "1", "--pca", "99")
    net = RingMoE(CONFIG)
    save_checkpoint(tmp_path / "bare", CheckpointConfig(CONFIG), disk_tensors(net))
    assert "normalised" in failure(scene, "-m", tmp_path / "bare")
    config = ModelConfig.from_dict({**CONFIG.to_dict(), "channels": {"ms": 4, "opt": 3}})
    norms = {"ms": NORM, "opt": Normalisation(BANDS[:3], (0.1,) * 3, (0.1,) * 3)}
    save_checkpoint(tmp_path / "two", CheckpointConfig(config, "encoder", norms), [])
    assert "--modality" in failure(scene, "-m", tmp_path / "two")
    assert run(scene, "-m", encoder, "--pca", "3").exit_code == 2
    assert run(scene).exit_code == 2
