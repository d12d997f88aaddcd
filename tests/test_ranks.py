"""Starting processes and finding others, without training anything."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringmoe_cli.ranks import first_host, free_port, launched, meet_on_slurm, wait_for_all

SLURM = ("SLURM_PROCID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SLURM, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu003", "gpu003"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("gpu[12],cpu1", "gpu12"),
        ("a100-[1,3-5]", "a100-1"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_srun_says_where_to_meet_and_a_user_may_say_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not launched()
    meet_on_slurm()
    assert "MASTER_ADDR" not in os.environ
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert not launched()  # the batch script itself, not a task of srun
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[003-004]")
    monkeypatch.setenv("SLURM_JOB_ID", "1234567")
    assert launched()
    monkeypatch.setenv("MASTER_PORT", "")  # restored after the test
    monkeypatch.delenv("MASTER_PORT")
    monkeypatch.setenv("MASTER_ADDR", "head")
    meet_on_slurm()
    assert os.environ["MASTER_ADDR"] == "head"
    assert os.environ["MASTER_PORT"] == "30067"


def test_ports_are_free() -> None:
    assert 1024 < int(free_port()) < 65536


def children(*codes: str) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", code]) for code in codes]


def test_all_well_is_0_and_the_first_failure_is_the_status() -> None:
    assert wait_for_all(children("", "")) == 0
    assert wait_for_all(children("", "import sys; sys.exit(3)")) == 3


def test_others_are_ended_when_one_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringmoe_cli.ranks.GRACE_SECONDS", 0.2)
    running = children("import time; time.sleep(60)", "import time; time.sleep(60)")
    running[1].send_signal(signal.SIGKILL)
    start = time.monotonic()
    assert wait_for_all(running) == 1
    assert time.monotonic() - start < 30


def test_recipes_for_slurm_are_valid_shell_and_name_real_options() -> None:
    scripts = sorted((Path(__file__).parent.parent / "recipes" / "slurm").glob("*.sbatch"))
    assert scripts
    for script in scripts:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
        text = script.read_text()
        assert text.startswith("#!/bin/bash\n#SBATCH")
        assert "--signal=" in text, "SLURM must ask for a stop before it kills"
