"""Runs on several processes: the same losses, and the same end after any accident."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from small_runs import simulated_store

from model.checkpoint import read_config
from model.journal import Journal
from ringmoe_cli.ranks import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PROGRAM = Path(sys.executable).with_name("ringmoe")
SMALL = (
    "model.depths=[1,1,1,1]", "model.embed_dim=8", "model.image_size=32", "model.window=4",
    "model.mask_cell=8", "train.batch_size=8", "train.save_every=5", "train.log_every=5",
    "train.lr=1e-4",
)  # fmt: skip
CHILDREN = "/proc/{0}/task/{0}/children"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated_store(tmp_path_factory.mktemp("simulated"))


def words(store: Path, output: Path, steps: int, *more: str) -> list[str]:
    said = [w for change in (*SMALL, f"train.steps={steps}") for w in ("--set", change)]
    return [str(PROGRAM), "pretrain", str(store), "-o", str(output), *said, *more]


def start(
    command: list[str], said: int | IO[str] = subprocess.PIPE, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=said, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def finish(running: subprocess.Popen[str]) -> None:
    _, err = running.communicate(timeout=2400)
    assert running.returncode == 0, (err or "")[-3000:]


def losses(folder: Path) -> list[float]:
    rows = Journal(folder / "metrics.jsonl").rows()
    assert [row["step"] for row in rows] == [*range(1, len(rows) + 1)]
    return [row["loss"] for row in rows]


def wait_for_steps(folder: Path, steps: int, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while len(Journal(folder / "metrics.jsonl").rows()) < steps:
        assert running.poll() is None, running.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_processes_train_as_one_and_resume_on_another_number(
    store: Path, tmp_path: Path
) -> None:
    finish(start(words(store, tmp_path / "one", 12)))
    running = start(words(store, tmp_path / "two", 12, "--nproc", "2"))
    wait_for_steps(tmp_path / "two", 3, running)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130, err[-3000:]
    assert "Traceback" not in err
    done = int((tmp_path / "two" / "state" / "latest").read_text())
    assert len(losses(tmp_path / "two")) == done
    finish(start(words(store, tmp_path / "two", 12)))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert read_config(tmp_path / "two").provenance["step"] == 12
    assert Journal(tmp_path / "two" / "routing.jsonl").rows()[-1]["step"] == 12


def test_processes_read_their_own_experts_of_a_checkpoint(store: Path, tmp_path: Path) -> None:
    finish(start(words(store, tmp_path / "first", 2)))
    init = ("--init", str(tmp_path / "first"))
    finish(start(words(store, tmp_path / "one", 4, *init)))
    finish(start(words(store, tmp_path / "two", 4, *init, "--nproc", "2", "--set", "train.ep=2")))
    finish(start(words(store, tmp_path / "cut", 4, *init, "--nproc", "2")))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


def test_tasks_of_srun_find_each_other(store: Path, tmp_path: Path) -> None:
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7",
        "MASTER_PORT": free_port(),
    }  # fmt: skip
    tasks = [
        start(words(store, tmp_path, 6), SLURM_PROCID=str(n), SLURM_LOCALID=str(n), **slurm)
        for n in range(2)
    ]
    for task in tasks:
        finish(task)
    assert len(losses(tmp_path)) == 6


def test_failure_of_the_first_process_ends_all_with_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("not a run")
    lost = ("--init", str(tmp_path / "nothing"))
    for folder, more in ((tmp_path, ()), (tmp_path / "run", lost)):
        running = start(words(store, folder, 6, "--nproc", "2", *more))
        _, err = running.communicate(timeout=120)
        assert running.returncode == 1
        assert err.count("error:") == 1, err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def torchrun(restarts: int) -> list[str]:
    return [
        sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "--monitor-interval=0.1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--no-python", "--",
    ]  # fmt: skip


def start_elastic(
    command: list[str], restarts: int, said: int | IO[str] = subprocess.PIPE
) -> subprocess.Popen[str]:
    return start([*torchrun(restarts), *command], said, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


def kill_a_rank(running: subprocess.Popen[str], folder: Path, draw: random.Random) -> int:
    """SIGKILL one of torchrun's children; the steps that this loses."""
    ranks = Path(CHILDREN.format(running.pid)).read_text().split()
    os.kill(int(draw.choice(ranks)), signal.SIGKILL)
    done = len(Journal(folder / "metrics.jsonl").rows())
    return done - int((folder / "state" / "latest").read_text())


def test_killed_ranks_are_restarted_by_torchrun_and_the_end_is_the_same(
    store: Path, tmp_path: Path
) -> None:
    steps, kills, draw = 60, 3, random.Random(1)
    finish(start(words(store, tmp_path / "whole", steps)))
    folder = tmp_path / "killed"
    running = start_elastic(words(store, folder, steps), restarts=10)
    for kill in range(kills):
        wait_for_steps(folder, 12 * (kill + 1), running)
        assert kill_a_rank(running, folder, draw) <= 5
    finish(running)
    assert losses(folder)[-1] == pytest.approx(losses(tmp_path / "whole")[-1], rel=0.02)
    assert len(losses(folder)) == steps


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_2000_steps_with_a_rank_killed_every_20_seconds_end_at_the_same_loss(
    store: Path, tmp_path: Path
) -> None:
    steps, save_every, draw = 2000, 20, random.Random(2)
    often = ("--set", f"train.save_every={save_every}")
    finish(start([*words(store, tmp_path / "whole", steps, "--nproc", "2"), *often]))
    folder, lost = tmp_path / "killed", list[int]()
    with (tmp_path / "said").open("w") as said:  # a pipe that nobody reads would fill up
        running = start_elastic([*words(store, folder, steps), *often], 1000, said)
        while running.poll() is None:
            done = saved(folder)
            time.sleep(20)
            while running.poll() is None and saved(folder) <= done:
                time.sleep(1)  # a life that saves nothing shows nothing
            if running.poll() is None and saved(folder) < steps:
                lost.append(kill_a_rank(running, folder, draw))
        finish(running)
    print(f"{len(lost)} kills lost {lost} steps")  # pytest -s: for benchmarks/pretrain_kills.md
    assert len(lost) >= 3
    assert max(lost) <= save_every
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def saved(folder: Path) -> int:
    """Step of the last saved state."""
    latest = folder / "state" / "latest"
    return int(latest.read_text()) if latest.exists() else 0
