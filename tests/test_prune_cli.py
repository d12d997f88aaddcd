"""`ringmoe prune` from the shell: exit codes, streams, names of outputs."""

import json

import pytest
import torch
from typer.testing import CliRunner

from model.checkpoint import CheckpointConfig, disk_tensors, read_config, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE
from ringmoe_cli.app import app

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
