"""Prediction as processes see it: pipes, terminals, signals, and workers that share a scene."""
# ruff: noqa: F401, F811 - fixtures are imported

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import rasterio
from mapping import model, scene, write_scene
from typer.testing import CliRunner

from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.app import app

PROGRAM = [sys.executable, "-m", "ringmoe_cli", "predict"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments, stdin=None):
    console.State.quiet = False
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)


@pytest.mark.parametrize("output", ["-", "/vsistdout/"])
def test_pipes_carry_scene_and_map(model, scene, output):
    command = [*PROGRAM, "/vsistdin/", "-m", str(model), "-o", output]
    done = subprocess.run(
        command, input=scene.read_bytes(), capture_output=True, check=True, env=ONE_THREAD
    )
    run(scene, "-m", model)
    assert done.stdout == scene.with_name("scene_segmentation.tif").read_bytes()


def test_an_empty_pipe_is_one_line(model):
    done = run("/vsistdin/", "-m", model, "-o", "-", stdin="")
    assert done.exit_code == 1
    assert "nothing came" in str(done.exception)


def test_a_terminal_gets_no_geotiff(model, scene):
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [*PROGRAM, str(scene), "-m", str(model), "-o", "-"],
        stdout=theirs, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, check=False,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    with suppress(OSError):  # nothing was written: EIO or EAGAIN
        assert os.read(ours, 1) == b""
    os.close(ours)
    assert done.returncode == 1
    assert "terminal" in done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_leaves_a_state_and_says_so(model, scene, monkeypatch):
    run(scene, "-m", model, "--batch", 1)
    out = scene.with_name("scene_segmentation.tif")
    straight = out.read_bytes()
    out.unlink()
    predict, calls = TaskNetwork.predict, []

    def stops(self, batch):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return predict(self, batch)

    monkeypatch.setattr(TaskNetwork, "predict", stops)
    done = run(scene, "-m", model, "--batch", 1)
    assert done.exit_code == 130
    assert f"stopped at {scene}; the same command continues" in done.stderr
    assert not out.exists()
    assert list(out.with_name(f"{out.name}.part").glob("rows-*"))
    monkeypatch.setattr(TaskNetwork, "predict", predict)
    again = run(scene, "-m", model, "--batch", 1)
    assert "continuing" in again.stderr
    assert out.read_bytes() == straight


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_half_way_and_again_gives_the_same_bytes(model, tmp_path, sent):
    path = write_scene(tmp_path / "big.tif", 1500, 1500)
    command = [*PROGRAM, str(path), "-m", str(model), "-o"]
    straight, broken = tmp_path / "straight.tif", tmp_path / "broken.tif"
    subprocess.run([*command, str(straight)], check=True, capture_output=True, env=ONE_THREAD)
    child = subprocess.Popen(
        [*command, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ONE_THREAD,
        text=True,
    )  # fmt: skip
    part = tmp_path / "broken.tif.part"
    half = 1500 // 24 // 2
    while child.poll() is None and len(list(part.glob("rows-*.safetensors"))) < half:
        time.sleep(0.01)
    os.kill(child.pid, sent)
    _, said = child.communicate()
    assert child.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
    assert sent == signal.SIGKILL or "the same command continues" in said
    assert not broken.exists()
    assert len(list(part.glob("rows-*.safetensors"))) >= half
    done = subprocess.run([*command, str(broken)], check=True, capture_output=True, env=ONE_THREAD)
    assert b"continuing" in done.stderr
    assert broken.read_bytes() == straight.read_bytes()


def test_a_damaged_block_is_an_error_or_nodata(model, tmp_path):
    path = tmp_path / "s.tif"
    plain = write_scene(tmp_path / "plain.tif", 256, 256, hole=False)
    with rasterio.open(plain) as src:
        profile = {**src.profile, "tiled": True, "blockxsize": 64, "blockysize": 64,
                   "compress": "deflate", "interleave": "pixel"}  # fmt: skip
        values, names = src.read(), src.descriptions
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(values)
        dst.descriptions, dst.scales = names, (1e-4,) * 4
    with rasterio.open(path) as src:
        at = int(src.get_tag_item("BLOCK_OFFSET_1_2", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 64)
    refused = run(path, "-m", model)
    assert refused.exit_code == 1
    assert "--skip-bad" in str(refused.exception)
    done = run(path, "-m", model, "--skip-bad", "--overwrite")
    assert done.exit_code == 0, done.exception
    assert "left out" in done.stderr
    with rasterio.open(done.stdout.strip()) as got:
        classes = got.read(1)
    assert (classes[128:192, 64:128] == 255).all()
    assert (classes[:, 192:] != 255).all()
    assert (classes[:64] != 255).all()


@pytest.mark.distributed
def test_workers_make_the_same_map(model, tmp_path, scene):
    path = write_scene(tmp_path / "tall.tif", 500, 60)
    one, many = tmp_path / "one.tif", tmp_path / "many.tif"
    command = [*PROGRAM, "-m", str(model)]
    shared = [*command, "--workers", "2"]
    subprocess.run([*command, str(path), "-o", str(one)], check=True, env=ONE_THREAD)
    subprocess.run([*shared, str(path), "-o", str(many)], check=True, env=ONE_THREAD)
    assert one.read_bytes() == many.read_bytes()
    listed = [str(path), str(scene), str(tmp_path / "none.tif")]
    done = subprocess.run(
        [*shared, *listed, "-o", str(tmp_path / "maps"), "--json"],
        check=False, env=ONE_THREAD, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 2
    assert "1 of 3 scenes failed" in done.stderr
    assert (tmp_path / "maps/tall_segmentation.tif").read_bytes() == one.read_bytes()


@pytest.mark.distributed
def test_a_running_scheduler_makes_the_same_map(model, tmp_path):
    from distributed import LocalCluster

    path = write_scene(tmp_path / "tall.tif", 500, 60)
    one, many = tmp_path / "one.tif", tmp_path / "many.tif"
    command = [*PROGRAM, str(path), "-m", str(model), "-o"]
    subprocess.run([*command, str(one)], check=True, env=ONE_THREAD)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tcp://")
        subprocess.run([*command, str(many), "--scheduler", address], check=True, env=ONE_THREAD)
    assert one.read_bytes() == many.read_bytes()
    gone = subprocess.run(
        [*command, str(tmp_path / "x.tif"), "--scheduler", "tcp://127.0.0.1:1"],
        check=False, env=ONE_THREAD, capture_output=True, text=True,
    )  # fmt: skip
    assert gone.returncode == 1
    assert "no Dask scheduler answers" in gone.stderr
