"""Starting a run on several processes of this machine, and finding the others on a cluster."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PORT = 29500
"""Where the processes of a SLURM job meet: this plus the last digits of the job's number."""
GRACE_SECONDS = 30.0
"""For the other processes to end by themselves when one has failed."""
PARENT_DEATH_SIGNAL = 1
"""Option of Linux's prctl."""


def launched() -> bool:
    """Whether torchrun or srun has started this process as one of several."""
    return "RANK" in os.environ or slurm_task(os.environ)


def slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script has the job's variables but no step."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment


def meet_on_slurm() -> None:
    """Set MASTER_ADDR and MASTER_PORT from what srun says; a user's own values win."""
    if "RANK" in os.environ or not slurm_task(os.environ):
        return
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(PORT + job % 1000))


def first_host(nodes: str) -> str:
    """First machine of a SLURM list: `gpu[003-007,012],login1` -> `gpu003`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    if found is None:
        return "127.0.0.1"
    return found[1] + (found[2] or "")


def launch(processes: int, words: Sequence[str]) -> int:
    """Run `ringmoe` with these words on several processes of this machine.

    Ctrl-C and SIGTERM reach them all; they save and stop. If one fails, the others are ended.

    Returns:
        Exit status: that of the first to fail, 130 after a signal.
    """
    program = Path(sys.executable).with_name("ringmoe")
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    running = [
        subprocess.Popen(
            [program, *words],
            env={**threads, **os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n)},
            preexec_fn=end_with_parent,
        )
        for n in range(processes)
    ]
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for child in running:
            child.terminate()

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = wait_for_all(running)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if asked else status


def wait_for_all(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes, or end the others soon after one failed; the first failure."""
    failed, since = 0, 0.0
    while True:
        codes = [child.poll() for child in running]
        if not failed:
            failed, since = next(filter(None, codes), 0), time.monotonic()
        if None not in codes:
            return 1 if failed < 0 else failed
        if failed and time.monotonic() - since > GRACE_SECONDS:
            for child in running:
                child.kill()
        time.sleep(0.1)


def end_with_parent() -> None:
    """In a child, on Linux: SIGTERM when the parent dies, so that nobody trains on alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
