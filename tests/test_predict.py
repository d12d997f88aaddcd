"""From a scene to its map: every way it can go, and every way it can fail."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine
from typer.testing import CliRunner

from model.batch import Prediction
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, PretrainConfig, TaskConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.app import app
from ringmoe_cli.errors import BadBlockError, RingmoeError
from ringmoe_cli.maps import output_path
from ringmoe_cli.prediction import Settings, predict_rows, predict_scene
from ringmoe_cli.scene.product import ClassMap
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.resample import Resampled
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.strips import Normalised, SkipBad

BANDS = ("blue", "green", "red", "nir")
NORM = Normalisation(BANDS, (0.1, 0.1, 0.1, 0.3), (0.05, 0.05, 0.05, 0.1))
CLASSES = ("water", "trees", "bare")
COLOURS = ((0, 0, 255), (0, 128, 0), (200, 180, 120))
TASK = TaskConfig("segmentation", CLASSES, COLOURS, ("ms",), window=32, channels=16)
CONFIG = ModelConfig(
    embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
    channels={"ms": 4}, mask_cell=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _talkative():
    console.State.quiet = False


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A segmentation checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = TaskNetwork(RingMoE(CONFIG), TASK)
    config = CheckpointConfig(CONFIG, "task", {"ms": NORM}, {"ms": 10.0}, TASK)
    save_checkpoint(folder, config, disk_tensors(net))
    return folder


def write_scene(path, height=70, width=100, names=BANDS, crs="EPSG:32630", hole=True, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 4000, (len(names), height, width)).astype(np.uint16)
    if hole:
        values[:, :20, :30] = 0
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=len(names), dtype="uint16",
        nodata=0, crs=crs, transform=Affine(10, 0, 500000, 0, -10, 5000000),
    ) as dst:  # fmt: skip
        dst.write(values)
        if all(names):
            dst.descriptions = names
        dst.scales = (1e-4,) * len(names)
    return path


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "scene.tif")


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)


class Brightness:
    """A network whose answer is known: the first band's value as probability of class 1."""

    calls = 0

    def predict(self, batch):
        self.calls += 1
        x = torch.sigmoid(batch.images["ms"][:, 0, :1])
        return Prediction(dense=torch.cat([1 - x, x, x * 0], 1))


class Constant:
    def predict(self, batch):
        b, _, _, h, w = batch.images["ms"].shape
        return Prediction(dense=torch.tensor([0.2, 0.7, 0.1]).view(1, 3, 1, 1).expand(b, 3, h, w))


def normalised(path):
    return Normalised([{"ms": SceneReader(open_scene(path))}], {"ms": NORM})


def whole(network, source, **changes):
    settings = Settings(**{"window": 32, "overlap": 8, "batch": 3, **changes})
    rows = list(predict_rows(network, source, settings, 3))
    dense = np.concatenate([r.dense for r in rows], 1)
    return dense, np.concatenate([r.valid for r in rows])


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


def test_answers_are_blended_back_to_what_each_pixel_says(scene):
    source = normalised(scene)
    dense, valid = whole(Brightness(), source)
    with rasterio.open(scene) as src:
        raw = src.read(1)
    expected = 1 / (1 + np.exp(-((raw * np.float32(1e-4) - 0.1) / 0.05)))
    np.testing.assert_array_equal(valid, raw != 0)
    np.testing.assert_allclose(dense[1][valid], expected[valid], atol=1e-5)


def test_a_constant_model_makes_a_constant_map(scene):
    dense, valid = whole(Constant(), normalised(scene))
    assert np.ptp(dense[:, valid], axis=1).max() < 1e-6
    np.testing.assert_allclose(dense[:, valid].mean(1, dtype=float), [0.2, 0.7, 0.1], atol=1e-6)


def test_normalisation_is_the_checkpoints_on_physical_values(model, scene):
    """What predict feeds the network is what the loader's functions make of the same window."""
    seen = []

    class Watch(Constant):
        def predict(self, batch):
            seen.append(batch)
            return super().predict(batch)

    whole(Watch(), normalised(scene), batch=1)
    reader = SceneReader(open_scene(scene))
    values, valid = reader.physical(next(open_scene(scene).grid.windows(32, 24)))
    np.testing.assert_array_equal(seen[0].images["ms"][0, 0], NORM.apply(values, valid[None]))
    np.testing.assert_array_equal(seen[0].valid["ms"][0, 0, 0], valid)


def test_empty_windows_are_not_computed(tmp_path):
    path = write_scene(tmp_path / "s.tif", 96, 96, hole=False)
    with rasterio.open(path, "r+") as dst:
        dst.write(np.zeros((4, 64, 96), np.uint16), window=((0, 64), (0, 96)))
    network = Brightness()
    _, valid = whole(network, normalised(path), overlap=0, batch=1)
    assert network.calls == 3
    assert valid.sum() == 32 * 96


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


def outputs(tmp_path):
    return {"classes": tmp_path / "m.tif"}


class Stops(Brightness):
    """Fails after some batches, as a machine does."""

    def __init__(self, after):
        self.after = after

    def predict(self, batch):
        if self.calls >= self.after:
            raise KeyboardInterrupt
        return super().predict(batch)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_an_interrupted_map_is_continued_to_the_same_bytes(tmp_path, scene, after, batch):
    settings, product = Settings(32, 8, batch), ClassMap(TASK)
    (tmp_path / "a").mkdir()
    source = normalised(scene)
    predict_scene(Brightness(), source, product, outputs(tmp_path / "a"), settings)
    try:
        predict_scene(Stops(after), source, product, outputs(tmp_path), settings)
    except KeyboardInterrupt:
        assert not (tmp_path / "m.tif").exists()
        assert (tmp_path / "m.tif.part").is_dir()
    else:
        return
    report = predict_scene(Brightness(), source, product, outputs(tmp_path), settings)
    assert (tmp_path / "m.tif").read_bytes() == (tmp_path / "a/m.tif").read_bytes()
    assert not (tmp_path / "m.tif.part").exists()
    assert report.resumed_rows > 0 or after * batch < 5


def test_other_settings_start_anew(tmp_path, scene):
    source, product = normalised(scene), ClassMap(TASK)
    with pytest.raises(KeyboardInterrupt):
        predict_scene(Stops(6), source, product, outputs(tmp_path), Settings(32, 8, 1))
    report = predict_scene(Brightness(), source, product, outputs(tmp_path), Settings(32, 4, 1))
    assert report.resumed_rows == 0


def test_two_runs_do_not_write_one_output(tmp_path, scene):
    from ringmoe_cli.scene.part import Part

    with Part(tmp_path / "m.tif", {}), pytest.raises(RingmoeError, match="another run"):
        predict_scene(
            Brightness(), normalised(scene), ClassMap(TASK), outputs(tmp_path), Settings(32, 8, 1)
        )


class Damaged:
    """A scene with one block that cannot be decoded."""

    def __init__(self, reader):
        self.reader, self.scene = reader, reader.scene

    def physical(self, window):
        row, col, height, width = window
        if row < 45 and row + height > 40 and col < 95 and col + width > 90:
            raise BadBlockError("block at row 40, column 90")
        return self.reader.physical(window)


def test_a_bad_block_is_an_error_or_nodata_as_told(scene):
    good = normalised(scene)
    bad = Normalised([{"ms": Damaged(good.dates[0]["ms"])}], good.normalisation)
    settings = Settings(32, 8, 2)
    with pytest.raises(BadBlockError, match="row 40"):
        list(predict_rows(Brightness(), bad, settings, 3))
    skip = SkipBad(True)
    rows = list(predict_rows(Brightness(), bad, settings, 3, skip=skip))
    valid = np.concatenate([r.valid for r in rows])
    assert not valid[40:45, 90:95].any()
    assert skip.skipped
    assert valid[:, :20].sum() == whole(Brightness(), good)[1][:, :20].sum()


def test_flips_average_the_mirror_images(scene):
    class Left(Constant):
        """Says class 0 in the left half of its window."""

        def predict(self, batch):
            b, _, _, h, w = batch.images["ms"].shape
            left = (torch.arange(w) < w // 2).float().expand(b, 1, h, w)
            return Prediction(dense=torch.cat([left, 1 - left, left * 0], 1))

    dense, valid = whole(Left(), normalised(scene), flips=True)
    np.testing.assert_allclose(dense[:2, valid], 0.5, atol=1e-6)


def test_scenes_of_one_place_must_have_the_same_pixels(tmp_path):
    readers = [SceneReader(open_scene(write_scene(tmp_path / f"{h}.tif", h, 50))) for h in (40, 41)]
    with pytest.raises(RingmoeError, match="same pixels"):
        Normalised([{"ms": readers[0]}, {"ms": readers[1]}], {"ms": NORM})


def regridded(tmp_path, network):
    """A scene of 20 m pixels for a network of 10 m; map on the scene's grid."""
    source = normalised(write_scene(tmp_path / "coarse.tif", 35, 50))
    fine = Normalised([{"ms": Resampled(source.dates[0]["ms"], 70, 100)}], source.normalisation)
    return predict_scene(
        network, fine, ClassMap(TASK), outputs(tmp_path), Settings(32, 8, 3), original=source
    )


def test_resampled_scenes_give_maps_on_their_own_grid_and_resume(tmp_path):
    (tmp_path / "a").mkdir()
    regridded(tmp_path / "a", Brightness())
    with pytest.raises(KeyboardInterrupt):
        regridded(tmp_path, Stops(3))
    assert regridded(tmp_path, Brightness()).resumed_rows > 0
    assert (tmp_path / "m.tif").read_bytes() == (tmp_path / "a/m.tif").read_bytes()
    with rasterio.open(tmp_path / "m.tif") as got, rasterio.open(tmp_path / "coarse.tif") as src:
        assert got.shape == src.shape
        np.testing.assert_array_equal(got.read(1) == 255, src.read(1) == 0)


def test_other_sampling_distances_are_resampled_or_refused(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 40, 40)
    done = run(path, "-m", model, "--gsd", "20")
    assert done.exit_code == 0
    assert "20 m pixels are read at the model's 10 m" in done.stderr
    with rasterio.open(done.stdout.strip()) as got:
        assert got.shape == (40, 40)
    assert "--no-resample" in failure(path, "-m", model, "--gsd", "20", "--no-resample",
                                      "--overwrite")  # fmt: skip


@pytest.mark.slow
def test_kill_9_and_again_gives_the_same_bytes(model, tmp_path):
    path = write_scene(tmp_path / "big.tif", 1500, 1500)
    command = [sys.executable, "-m", "ringmoe_cli", "predict", str(path), "-m", str(model), "-o"]
    straight, broken = tmp_path / "straight.tif", tmp_path / "broken.tif"
    subprocess.run([*command, str(straight)], check=True, capture_output=True)
    child = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL)
    part = tmp_path / "broken.tif.part"
    while child.poll() is None and len(list(part.glob("rows-*.safetensors"))) < 20:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not broken.exists()
    assert len(list(part.glob("rows-*.safetensors"))) >= 20
    subprocess.run([*command, str(broken)], check=True, capture_output=True)
    assert broken.read_bytes() == straight.read_bytes()
