"""Every task's recipe runs for two steps on simulated data, from the shell."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ringmoe_cli.app import app
from ringmoe_cli.scene.simulate import simulate_scene, write_scene

SIZES = (
    "model.embed_dim=8", "model.depths=[1,1,1,1]", "model.num_heads=[1,1,1,1]",
    "model.image_size=32", "model.window=4", "model.mask_cell=8", "train.batch_size=4",
)  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    return write_scene(simulate_scene(5, 160), tmp_path_factory.mktemp("simulated"))


@pytest.fixture(scope="session")
def store(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "tiles.zarr"
    labels = [f"{t}={files[n]}" for t, n in (("segmentation", "labels"), ("depth", "height"))]
    made = run("tile", files["opt"], "-o", out, *(x for v in labels for x in ("--labels", v)))
    assert made.exit_code == 0, made.output
    return out


@pytest.fixture(scope="session")
def two_dates(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("stores") / "dates.zarr"
    scenes = (files["opt"], files["opt-after"])
    made = run("tile", *scenes, "-o", out, "--labels", files["change"], "--task", "change")
    assert made.exit_code == 0, made.output
    return out


@pytest.fixture(scope="session")
def chips(tmp_path_factory):
    root = tmp_path_factory.mktemp("chips")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 1), ("bright", 128)):
        (root / name).mkdir()
        for i in range(6):
            pixels = rng.integers(low, low + 120, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    ("task", "data", "score"),
    [
        ("segmentation", "store", "miou"),
        ("depth", "store", "rmse"),
        ("change", "two_dates", "change_f1"),
        ("classification", "chips", "accuracy"),
    ],
)
def test_the_recipe_of_every_task_runs(task, data, score, tmp_path, request):
    changes = [x for c in SIZES for x in ("--set", c)]
    source = request.getfixturevalue(data)
    result = run(
        "finetune", source, "--task", task, "-o", tmp_path / "run", "--steps", 2, *changes, "--json"
    )
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert json.loads(result.stdout)["scores"][score] is not None
    again = run("evaluate", source, "--model", tmp_path / "run", "--json", "--worst", 1)
    assert again.exit_code == 0, again.output + repr(again.exception)
    trained, scored = (json.loads(r.stdout)["scores"][score] for r in (result, again))
    assert scored == pytest.approx(trained)
