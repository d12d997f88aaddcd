"""From a scene to its map: every way it can go, and every way it can fail."""
# ruff: noqa: F401, F811 - fixtures are imported

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
from mapping import BANDS, CLASSES, CONFIG, NORM, model, scene, write_scene
from rasterio.transform import Affine
from typer.testing import CliRunner

from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import PretrainConfig
from model.encoder import RingMoE
from ringmoe_cli import console
from ringmoe_cli.app import app
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.maps import output_path


@pytest.fixture(autouse=True)
def _talkative():
    console.State.quiet = False


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)


def test_command_writes_a_map_of_the_scene(model, scene):
    done = run(scene, "--model", model)
    out = scene.with_name("scene_segmentation.tif")
    assert done.exit_code == 0
    assert done.stdout == f"{out}\n"
    with rasterio.open(out) as got, rasterio.open(scene) as src:
        assert (got.crs, got.transform, got.shape) == (src.crs, src.transform, src.shape)
        classes = got.read(1)
        assert (classes == 255).sum() == 20 * 30
        assert set(np.unique(classes)) <= {0, 1, 2, 255}
        assert (classes[:20, :30] == 255).all()
        assert got.colormap(1)[2] == (200, 180, 120, 255)
        assert got.tags(1)["CLASS_0"] == "water"
    assert sorted(p.name for p in scene.parent.iterdir()) == [
        "scene.tif", "scene_segmentation.tif", "scene_segmentation.tif.aux.xml",
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 31)])
def test_scenes_smaller_than_a_window_work(model, tmp_path, size):
    path = write_scene(tmp_path / "small.tif", *size, hole=False)
    done = run(path, "--model", model)
    assert done.exit_code == 0
    with rasterio.open(done.stdout.strip()) as got:
        assert got.shape == size
        assert (got.read(1) != 255).all()


def test_json_says_what_happened_with_geodesic_areas(model, scene):
    done = run(scene, "--model", model, "--json")
    said = json.loads(done.stdout)
    assert set(said["classes"]) == set(CLASSES)
    pixels = sum(c["pixels"] for c in said["classes"].values())
    area = sum(c["area_m2"] for c in said["classes"].values())
    assert pixels == 70 * 100 - 20 * 30
    assert area == pytest.approx(pixels * 100 / 0.9996**2, rel=1e-5)  # UTM's central meridian
    assert said["nodata_share"] == pytest.approx(600 / 7000, abs=1e-6)
    assert 1 / 3 < said["mean_confidence"] < 1


def test_probabilities_agree_with_the_classes(model, scene, tmp_path):
    done = run(scene, "-m", model, "-o", tmp_path / "maps" / "m.tif", "--probabilities", "--json")
    said = json.loads(done.stdout)
    with rasterio.open(said["output"]) as c, rasterio.open(said["more"]["probabilities"]) as p:
        classes, steps = c.read(1), p.read()
        assert p.descriptions == CLASSES
    valid = classes != 255
    assert (steps[:, ~valid] == 255).all()
    chosen = np.take_along_axis(steps, np.minimum(classes, 2)[None].astype(int), 0)[0]
    assert (chosen >= steps.max(0))[valid].all()
    assert abs(steps[:, valid].astype(int).sum(0) - 254).max() <= 2


def test_bands_are_matched_by_name(model, tmp_path):
    """A scene with more bands in another order gives the same map."""
    plain = write_scene(tmp_path / "a.tif")
    with rasterio.open(plain) as src:
        values, profile = src.read(), src.profile
    with rasterio.open(tmp_path / "b.tif", "w", **{**profile, "count": 5}) as dst:
        dst.write(np.stack([values[3], values[2], values[2] * 0 + 7, values[1], values[0]]))
        dst.descriptions = ("nir", "red", "rededge1", "green", "blue")
        dst.scales = (1e-4,) * 5
    maps = [run(tmp_path / n, "-m", model).stdout.strip() for n in ("a.tif", "b.tif")]
    first, second = (rasterio.open(m).read(1) for m in maps)
    np.testing.assert_array_equal(first, second)


def test_unnamed_bands_are_taken_in_order_with_a_warning(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", names=(None,) * 4)
    done = run(path, "-m", model)
    assert done.exit_code == 0
    assert "taken in order as blue, green, red, nir" in done.stderr


def failure(*arguments):
    done = run(*arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, RingmoeError | ValueError | OSError)
    return " ".join(str(done.exception).split())


def test_wrong_bands_are_one_clear_line(model, tmp_path):
    few = write_scene(tmp_path / "few.tif", names=(None,) * 3)
    assert "3" in failure(few, "-m", model)
    other = write_scene(tmp_path / "other.tif", names=("blue", "green", "red", "swir16"))
    assert "no band nir" in failure(other, "-m", model)


def test_missing_broken_and_foreign_inputs_are_clear(model, tmp_path, scene):
    assert "does not exist" in failure(tmp_path / "none.tif", "-m", model)
    (tmp_path / "text.tif").write_text("hello")
    assert "text.tif" in failure(tmp_path / "text.tif", "-m", model)
    assert "not a checkpoint" in failure(scene, "-m", tmp_path)
    pre = CheckpointConfig(CONFIG, "pretraining", {"ms": NORM}, pretraining=PretrainConfig())
    save_checkpoint(tmp_path / "pre", pre, disk_tensors(RingMoE(CONFIG)))
    assert "finetune" in failure(scene, "-m", tmp_path / "pre")
    assert "overlap" in failure(scene, "-m", model, "--overlap", "32")
    assert "--co" in failure(scene, "-m", model, "--co", "COMPRES=LZW")
    assert not list(tmp_path.glob("*segmentation*"))


def test_no_model_is_a_usage_error_that_names_the_demo(scene, monkeypatch):
    monkeypatch.delenv("RINGMOE_MODEL", raising=False)
    done = run(scene)
    assert done.exit_code == 2
    assert "ringmoe demo" in done.stderr


def test_model_comes_from_the_environment(model, scene, monkeypatch):
    monkeypatch.setenv("RINGMOE_MODEL", str(model))
    assert run(scene).exit_code == 0


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_no_coordinate_system_is_kept_and_said_once(model, tmp_path):
    path = tmp_path / "s.tif"
    values = np.random.default_rng(0).integers(1, 999, (4, 40, 50)).astype(np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=50, count=4, dtype="uint16"
    ) as dst:
        dst.write(values)
    done = run(path, "-m", model, "--bands", "blue,green,red,nir")
    assert done.exit_code == 0
    assert done.stderr.count("no coordinate system") == 1
    with rasterio.open(tmp_path / "s_segmentation.tif") as got:
        assert got.crs is None
        assert got.transform.is_identity


def test_a_scene_without_data_is_a_map_without_statements(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 40, 40, hole=False)
    with rasterio.open(path, "r+") as dst:
        dst.write(np.zeros((4, 40, 40), np.uint16))
    done = run(path, "-m", model, "--json")
    assert json.loads(done.stdout)["nodata_share"] == 1
    assert "no valid pixel" in done.stderr
    with rasterio.open(tmp_path / "s_segmentation.tif") as got:
        assert (got.read(1) == 255).all()


def test_finished_outputs_are_refused_unless_told(model, scene):
    assert run(scene, "-m", model).exit_code == 0
    assert "--overwrite" in failure(scene, "-m", model)
    assert run(scene, "-m", model, "--overwrite").exit_code == 0


def test_same_input_same_bytes(model, scene):
    out = scene.with_name("scene_segmentation.tif")
    run(scene, "-m", model)
    first = out.read_bytes()
    run(scene, "-m", model, "--overwrite")
    assert out.read_bytes() == first


def test_many_scenes_from_a_list_and_one_that_fails(model, tmp_path):
    paths = [write_scene(tmp_path / f"{n}.tif", 40, 40, seed=i) for i, n in enumerate("ab")]
    listed = f"{paths[0]}\n{tmp_path / 'none.tif'}\n\n{paths[1]}\n"
    done = run("-", "-m", model, "--json", "-o", tmp_path / "maps", stdin=listed)
    assert done.exit_code == 1
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["scene"] for s in said] == [str(p) for p in paths]
    assert "1 of 3 scenes failed" in done.stderr
    assert len(list((tmp_path / "maps").glob("*.tif"))) == 2
    again = run(str(tmp_path / "?.tif"), "-m", model, "-o", tmp_path / "globbed")
    assert len(again.stdout.splitlines()) == 2


def test_output_names(tmp_path):
    scene = tmp_path / "s.tif"
    scene.touch()
    assert output_path(str(scene), "s", "change", None) == tmp_path / "s_change.tif"
    assert output_path(str(scene), "s", "change", tmp_path) == tmp_path / "s_change.tif"
    assert output_path(str(scene), "s", "depth", tmp_path / "x.tif") == tmp_path / "x.tif"


def test_other_sampling_distances_are_resampled_or_refused(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 40, 40)
    done = run(path, "-m", model, "--gsd", "20")
    assert done.exit_code == 0
    assert "20 m pixels are read at the model's 10 m" in done.stderr
    with rasterio.open(done.stdout.strip()) as got:
        assert got.shape == (40, 40)
    assert "--no-resample" in failure(path, "-m", model, "--gsd", "20", "--no-resample",
                                      "--overwrite")  # fmt: skip


def test_masked_pixels_become_nodata(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 40, 60, names=(*BANDS, "scl"), hole=False)
    classes = np.random.default_rng(1).integers(1, 12, (40, 60)).astype(np.uint16)
    with rasterio.open(path, "r+") as dst:
        dst.write(classes, 5)
        profile = dst.profile
    coarse = {"count": 1, "height": 20, "width": 30}
    coarse["transform"] = Affine(20, 0, 500000, 0, -20, 5000000)
    with rasterio.open(tmp_path / "clouds.tif", "w", **{**profile, **coarse}) as dst:
        dst.write(np.eye(20, 30, dtype=np.uint16)[None])
    folder = tmp_path / "maps"
    done = [
        run(path, "-m", model, "-o", folder / f"{i}.tif", "--mask", mask)
        for i, mask in enumerate(("scl=3,8", str(tmp_path / "clouds.tif")))
    ]
    assert [d.exit_code for d in done] == [0, 0]
    maps = [rasterio.open(d.stdout.strip()).read(1) for d in done]
    np.testing.assert_array_equal(maps[0] == 255, np.isin(classes, (3, 8)))
    np.testing.assert_array_equal(maps[1] == 255, np.eye(20, 30).repeat(2, 0).repeat(2, 1) == 1)
    assert "neither a file nor a band" in failure(path, "-m", model, "--mask", "cloud")


def test_rio_knows_the_command(model, scene, monkeypatch):
    from click.testing import CliRunner as ClickRunner

    from ringmoe_cli.rio_plugin import ringmoe

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    done = ClickRunner().invoke(ringmoe, ["predict", str(scene), "-m", str(model)])
    assert done.exit_code == 0
    assert done.stdout.strip() == str(scene.with_name("scene_segmentation.tif"))
    assert ClickRunner().invoke(ringmoe, ["predict", "none.tif", "-m", str(model)]).exit_code == 1
