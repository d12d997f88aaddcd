"""What can be done with imported weights: training them, and features once their input is known."""

import pytest
from small_runs import simulated_store
from transformers import Swinv2Config, Swinv2Model
from typer.testing import CliRunner

from model.checkpoint import read_config
from ringmoe_cli.app import app


def ringmoe(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swin")
    config = Swinv2Config(
        image_size=32, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=4,
    )  # fmt: skip
    Swinv2Model(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return simulated_store(tmp_path_factory.mktemp("simulated"), 128)


def converted(*words):
    made = ringmoe("convert", *words)
    assert made.exit_code == 0, made.exception


def test_imported_weights_are_trained_and_embed_once_statistics_are_known(swin, store, tmp_path):
    up, modalities = tmp_path / "up", ("--modality", "opt=3,ms=4")
    converted(swin, *modalities, "-o", up)

    height = next(store.parent.rglob("height.tif"))
    wanted = ("--modality", "opt,ms", "--init", up, "--steps", 1, "--set", "train.batch_size=2")
    data = ("--task", "depth", "--labels", height)
    tuned = ringmoe("finetune", store, *data, *wanted, "-o", tmp_path / "depth")
    assert tuned.exit_code == 0, tuned.exception
    assert "opt: " in tuned.stderr
    assert "names no bands and no normalisation" in " ".join(tuned.stderr.split())
    own = read_config(tmp_path / "depth").normalisation
    assert own["opt"].bands == ("red", "green", "blue")

    scene = next(store.parent.rglob("ms.tif"))
    refused = ringmoe("embed", scene, "--model", up, "-o", tmp_path / "e.parquet")
    assert refused.exit_code == 1
    assert "--statistics" in str(refused.exception)
    converted(swin, *modalities, "--statistics", store, "--overwrite", "-o", up)
    known = read_config(up)
    assert known.normalisation["ms"].bands == ("blue", "green", "red", "nir")
    assert known.gsd == {"opt": 5.0, "ms": 5.0}
    asked = ("--modality", "ms", "--stage", 3, "-o", tmp_path / "e.parquet")
    assert ringmoe("embed", scene, "--model", up, *asked).exit_code == 0


def test_statistics_that_do_not_fit_are_refused(swin, store, tmp_path):
    for modalities, words in (("ms=5", "ms has 4 bands in"), ("thermal=1", "reads thermal")):
        wanted = ("--modality", modalities, "--statistics", store, "-o", tmp_path / "up")
        refused = ringmoe("convert", swin, *wanted)
        assert refused.exit_code == 1
        assert words in str(refused.exception)
        assert not (tmp_path / "up").exists()
    unmeant = ringmoe("convert", "--random", "nano", "--statistics", store, "-o", tmp_path / "up")
    assert unmeant.exit_code == 2
