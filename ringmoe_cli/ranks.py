"""Starting a run on several processes of this machine, and finding the others on a cluster."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PORT = 29500
"""Where the processes of a SLURM job meet: this plus the last digits of the job's number."""


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
    """Run `ringmoe` with these words on several processes of this machine, by torchrun.

    Ctrl-C and SIGTERM reach them all; they save and stop.

    Returns:
        Exit status: 130 after a signal.
    """
    program = Path(sys.executable).with_name("ringmoe")
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={processes}", "--no-python", "--", str(program)]
    environment = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": os.devnull, **os.environ}
    running = subprocess.Popen([*torchrun, *words], env=environment, start_new_session=True)
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        os.killpg(running.pid, signal.SIGTERM)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = running.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 130 if asked else min(abs(status), 1)
