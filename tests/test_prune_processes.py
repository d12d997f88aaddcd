"""`ringmoe prune` as processes see it: kill -9, a full disk, and what other commands do after."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from rasters import noise, write_raster

from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from ringmoe_cli.scene.simulate import simulate_scene, write_scene

SMALL = ModelConfig(
    embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip
FAST = [x for c in ("task.channels=8", "train.batch_size=2") for x in ("--set", c)]
RINGMOE = [sys.executable, "-m", "ringmoe_cli"]
KILLED = """
import os, signal, sys
from model import rewrite
limit, honest, made = int(sys.argv.pop(1)), rewrite.made, []
def counted(*arguments):
    if len(made) == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(1)
    return honest(*arguments)
rewrite.made = counted
from ringmoe_cli.app import main
main()
"""
"""`ringmoe` that dies of signal 9 while it writes the tensor after so many."""


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    norm = Normalisation(("red", "green", "blue"), (128.0,) * 3, (70.0,) * 3)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(RingMoE(SMALL))]
    about = CheckpointConfig(SMALL, normalisation={"opt": norm})
    save_checkpoint(tmp_path / "pre", about, tensors)
    return tmp_path / "pre"


@pytest.fixture
def tiles(tmp_path):
    write_raster(tmp_path / "opt.tif", noise(3, 90, 80, "uint8"), photometric="RGB")
    run("tile", tmp_path / "opt.tif", "-o", tmp_path / "cal.zarr", "--tile-size", 64)
    return ["--tiles", tmp_path / "cal.zarr", "--chips", 8]


def run(*words, how=RINGMOE, code=0, limit=None):
    """A command in a process of its own; its stdout."""

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    found = subprocess.run(
        [*how, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=small_files if limit else None,
    )
    assert found.returncode == code, found.stderr
    return found.stdout if code == 0 else found.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_kill_9_and_the_same_command_again(model, tmp_path):
    words = ["prune", model, "--modality", "opt", "--target", "1b", "-o"]
    run(*words, tmp_path / "whole")
    dying = [sys.executable, "-c", KILLED]
    for limit in (40, 20):  # the second time, work of the first is there
        run(limit, *words, tmp_path / "out", how=dying, code=-signal.SIGKILL)
        assert not (tmp_path / "out").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.part").glob("model-*")}
    assert finished  # how many depends on the disk, which settles one shard while the next is made
    run(*words, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("model-*")}
    assert finished.items() <= after.items()
    assert not (tmp_path / "out.part").exists()


def test_kill_9_of_a_calibrated_pruning(model, tiles, tmp_path):
    words = ["prune", model, "--modality", "opt", "--target", "1b", *tiles, "-o"]
    run(*words, tmp_path / "whole")
    run(40, *words, tmp_path / "out", how=[sys.executable, "-c", KILLED], code=-signal.SIGKILL)
    assert (tmp_path / "out.part" / ".calibration").is_file()
    run(*words, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_is_one_line_and_nothing_is_lost(model, tmp_path):
    words = ["prune", model, "--modality", "opt", "--target", "1b", "-o"]
    run(*words, tmp_path / "whole")
    said = run(*words, tmp_path / "out", code=1, limit=10_000)
    assert "out.part" in said
    assert len(said.strip().splitlines()[-1]) < 300
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    run(*words, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_inspect_finetune_predict_and_prune_after_pruning(model, tmp_path):
    scene = write_scene(simulate_scene(3, 96), tmp_path / "scene")
    store, dense, tuned = (tmp_path / name for name in ("tiles.zarr", "dense", "tuned"))
    run("tile", scene["opt"], "-o", store, "--labels", scene["labels"], "--tile-size", 64)
    run("prune", model, "--modality", "opt", "--target", "60%", "-o", tmp_path / "less")
    run("prune", tmp_path / "less", "--target", "1b", "--method", "ka", "-o", dense)
    assert json.loads(run("inspect", dense, "--json"))["bands"] == {"opt": ["red", "green", "blue"]}
    run("finetune", store, "--init", dense, "-o", tuned, "--steps", 1, *FAST)
    run("predict", scene["opt"], "-m", tuned, "-o", tmp_path / "map.tif")
    assert (tmp_path / "map.tif").stat().st_size > 0
    run("prune", tuned, "--method", "ks", "-o", tmp_path / "again")
    assert "segmentation" in run("inspect", tmp_path / "again", "--json")
