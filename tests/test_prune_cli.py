"""`ringmoe prune` from the shell: exit codes, streams, names of outputs."""

import json

import pytest
import torch
from rasters import noise, write_raster
from typer.testing import CliRunner

from model.checkpoint import CheckpointConfig, disk_tensors, read_config, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE
from model.integrate import FitSettings
from model.normalisation import Normalisation
from model.prune import sub_model
from ringmoe_cli.app import app
from ringmoe_cli.jobs.calibration import chips_within_memory
from ringmoe_cli.jobs.prune_report import kept_words
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes

SMALL = ModelConfig(
    embed_dim=8, depths=(1, 1), num_heads=(1, 2), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    net = RingMoE(SMALL)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    save_checkpoint(tmp_path / "pre", CheckpointConfig(SMALL), tensors)
    return tmp_path / "pre"


def run(*arguments, **environment):
    arguments = [str(a) for a in arguments]
    return CliRunner(env=environment).invoke(app, ["prune", *arguments])


def test_the_bare_form_takes_the_model_of_the_environment(model):
    result = run("--target", "1b", RINGMOE_MODEL=str(model))
    assert result.exit_code == 0
    assert result.stdout.strip() == str(model.with_name("pre-1b"))
    config = read_config(model.with_name("pre-1b")).model
    assert (config.specialised, config.collaborative, config.shared) == (0, 0, 1)
    assert set(config.modalities) == {"opt", "ms"}
    assert "every layer of" in result.stderr


def test_without_a_model_the_demo_is_named():
    result = run("--target", "1b", RINGMOE_MODEL="")
    assert result.exit_code == 2
    assert "ringmoe demo" in result.stderr


def test_a_dry_run_writes_nothing(model):
    result = run(model, "--modality", "opt", "--target", "40%", "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["parameters_after"] <= 0.4 * facts["parameters_before"]
    assert facts["experts"]["0.0"]["collaborative"][1] == 4
    assert [p.name for p in model.parent.iterdir()] == ["pre"]


def test_a_finished_output_is_not_replaced_unasked(model):
    assert run(model, "--modality", "opt").exit_code == 0
    again = run(model, "--modality", "opt")
    assert again.exit_code == 1
    assert "--overwrite" in str(again.exception)
    assert run(model, "--modality", "opt", "--overwrite").exit_code == 0


def test_other_folders_are_never_replaced(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    for output, words in ((tmp_path / "home", "no checkpoint"), (model, "model to prune")):
        result = run(model, "--modality", "opt", "-o", output, "--overwrite")
        assert words in str(result.exception)
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    assert read_config(model).model == SMALL


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modality", "sar-l1"], "no modality 'sar-l1'"),
        (["--target", "3b"], "above the model's"),
        ([], "nothing to prune"),
        (["--target", "1b", "--method", "zz"], "unknown method 'zz'"),
    ],
)
def test_bad_requests_are_explained(model, arguments, words):
    result = run(model, *arguments)
    assert result.exit_code == 1
    assert words in str(result.exception)


def test_a_damaged_shard_is_named(model):
    shard = next(model.glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run(model, "--modality", "opt")
    assert result.exit_code == 1
    assert f"{shard} is truncated" in str(result.exception)
    assert [p.name for p in model.parent.iterdir()] == ["pre"]


# --- with calibration tiles ---------------------------------------------------------------------


@pytest.fixture
def calibrated(tmp_path):
    """A model with a normalisation, and a store of its modalities."""
    write_raster(tmp_path / "opt.tif", noise(3, 90, 80, "uint8"), photometric="RGB")
    names = ("blue", "green", "red", "nir")
    write_raster(tmp_path / "ms.tif", noise(4, 80, 90), names=names)
    scenes = [Labelled(open_scene(tmp_path / n)) for n in ("opt.tif", "ms.tif")]
    tile_scenes(scenes, tmp_path / "cal.zarr", Settings(tile=64))
    torch.manual_seed(0)
    net = RingMoE(SMALL)
    norms = {
        "opt": Normalisation(("red", "green", "blue"), (128.0,) * 3, (70.0,) * 3),
        "ms": Normalisation(names, (2000.0,) * 4, (1000.0,) * 4),
    }
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    save_checkpoint(tmp_path / "pre", CheckpointConfig(SMALL, normalisation=norms), tensors)
    return tmp_path / "pre", ["--tiles", tmp_path / "cal.zarr", "--chips", 16]


def test_tiles_make_a_fitted_distilled_reported_model(calibrated, tmp_path, monkeypatch):
    monkeypatch.setattr("model.calibration.FitSettings", lambda: FitSettings(steps=3, tokens=64))
    model, tiles = calibrated
    for kind in ("json", "html", "png"):
        out, report = tmp_path / kind, tmp_path / f"r.{kind}"
        arguments = ["--modality", "opt", "--target", "1b", "--distill", 2, "--report", report]
        result = run(model, *arguments, *tiles, "-o", out)
        assert result.exit_code == 0, result.exception
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["method"] == "fit"
    assert [row["layer"] for row in told["layers"]] == ["0.0", "1.0"]
    assert all(row["error"] < 1 for row in told["layers"])
    assert told["layers"][0]["branches"]["collaborative"]["kept"] == []
    assert sum(told["layers"][0]["branches"]["collaborative"]["mass"]) == pytest.approx(1, abs=1e-3)
    assert told["speed"]["after"] > 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64" in page
    for words in ("encoder parameters", "multiply-adds", "chips per second", "<td>1.0</td>"):
        assert words in page
    assert f"{told['layers'][0]['error']:.4f}" in page
    assert read_config(tmp_path / "json").provenance["distilled"] == 2


def test_tiles_decide_which_experts_stay(calibrated):
    model, tiles = calibrated
    result = run(model, "--target", "60%", "--dry-run", "--json", *tiles)
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout)["method"] is None


def test_tiles_of_another_modality_are_refused(calibrated, tmp_path):
    model, _ = calibrated
    scenes = [Labelled(open_scene(tmp_path / "opt.tif"))]
    tile_scenes(scenes, tmp_path / "opt.zarr", Settings(tile=64))
    result = run(model, "--modality", "ms", "--target", "1b", "--tiles", tmp_path / "opt.zarr")
    assert result.exit_code == 1
    assert "holds opt" in str(result.exception)


def test_learning_needs_tiles(model, tmp_path):
    for arguments in (["--method", "fit"], ["--distill", 5]):
        result = run(model, "--modality", "opt", "--target", "1b", *arguments)
        assert "--tiles" in str(result.exception)
    result = run(model, "--modality", "opt", "--report", tmp_path / "r.doc")
    assert ".html" in str(result.exception)
    result = run(model, "--modality", "opt", "--report", tmp_path / "nowhere" / "r.html")
    assert "no folder" in str(result.exception)
    assert not model.with_name("pre-opt").exists()


def test_chips_of_a_large_model_are_fewer():
    large = ModelConfig.preset("14b")
    assert chips_within_memory(SMALL, 512) == 512
    both = chips_within_memory(large, 512)
    one = chips_within_memory(sub_model(large, ("opt",)), 512)
    assert 2 <= both < one < 512


def test_a_report_names_kept_experts_with_their_mass():
    branch = {"kept": [0, 2], "mass": [0.4, 0.1, 0.3, 0.2]}
    assert kept_words(branch) == "0 (40%), 2 (30%)"
    assert kept_words({"kept": [], "mass": []}) == "none"
