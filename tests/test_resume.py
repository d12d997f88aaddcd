"""A run that was stopped, in any way, ends as if it had never been."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file
from training import TIMES

from model.journal import Journal
from model.state import TrainingState


def curve(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without the times."""
    rows = Journal(folder / "metrics.jsonl").rows()
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    state = TrainingState(folder / "state")
    (shard,) = state.path(state.latest()).iterdir()
    return load_file(shard)


def assert_same_run(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training.run(folder, training.settings())
    return folder


@pytest.mark.parametrize("stops", [(1,), (3,), (4, 5), (7,)])
def test_stopped_run_goes_on_bit_for_bit(
    uninterrupted: Path, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    done = 0
    for step in stops:
        seen: list[int] = []
        last = training.run(
            tmp_path,
            training.settings(),
            on_step=lambda report, seen=seen: seen.append(report.step),
            stop=lambda seen=seen, step=step, done=done: done + len(seen) + 1 == step,
        )
        assert last == step
        assert seen == [*range(done + 1, step + 1)]
        done = step
    assert training.run(tmp_path, training.settings()) == 8
    assert_same_run(uninterrupted, tmp_path)


def test_crash_between_saves_loses_the_steps_since_and_no_more(
    uninterrupted: Path, tmp_path: Path
) -> None:
    def crash(report: object) -> None:
        if report.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        training.run(tmp_path, training.settings(), on_step=crash)
    assert [row["step"] for row in curve(tmp_path)] == [1, 2, 3, 4, 5]
    seen: list[int] = []
    training.run(tmp_path, training.settings(), on_step=lambda r: seen.append(r.step))
    assert seen == [4, 5, 6, 7, 8]
    assert_same_run(uninterrupted, tmp_path)


def test_half_written_state_is_never_loaded(uninterrupted: Path, tmp_path: Path) -> None:
    training.run(tmp_path, training.settings(), stop=lambda: True)
    half = tmp_path / "state" / "step-00000009"
    half.mkdir()
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"\x10")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss')
    assert training.run(tmp_path, training.settings()) == 8
    assert_same_run(uninterrupted, tmp_path)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    training.run(tmp_path, training.settings(), stop=lambda: True)
    (shard,) = (tmp_path / "state" / "step-00000001").iterdir()
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000001 cannot be resumed") as refusal:
        training.run(tmp_path, training.settings())
    assert "\n" not in str(refusal.value)


def test_finished_run_does_nothing(uninterrupted: Path) -> None:
    seen: list[object] = []
    assert training.run(uninterrupted, training.settings(), on_step=seen.append) == 8
    assert seen == []


KILLED = """
import os, sys, torch
from pathlib import Path
import training
print("ready", flush=True)
for line in sys.stdin:  # one life per line; torch is imported once, here
    child = os.fork()
    if child == 0:
        training.run(Path(sys.argv[1]), training.settings(steps=100, save_every=10))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    settings = training.settings(steps=100, save_every=10)
    draw = random.Random(0)
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "tests")}
    lives = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment,
    )  # fmt: skip
    assert lives.stdin is not None
    assert lives.stdout is not None
    with lives, lives.stdin as start, lives.stdout as said:
        assert said.readline() == "ready\n"
        kills = 0
        while True:
            print("live", file=start, flush=True)
            child = int(said.readline())
            if kills < 10:
                time.sleep(draw.uniform(0.02, 0.3))
                os.kill(child, signal.SIGKILL)
            status = int(said.readline())
            kills += os.WIFSIGNALED(status)
            if status == 0:
                break
    assert kills == 10
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed lives: sums depend on how they are split
    try:
        training.run(tmp_path / "whole", settings)
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
