"""Run folders: who may write where, what may be resumed, and how a run is asked to stop."""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.checkpoint import write_text
from model.json_file import read_json
from model.state import TrainingState
from ringmoe_cli import console
from ringmoe_cli.errors import OutputExistsError, RingmoeError

FACTS = "run.json"
"""What decides a run, written before its first step."""

HARMLESS = {
    "step", "save_every", "keep_last", "keep_every", "log_every", "skip_nan", "recompute", "ep",
}  # fmt: skip
"""Settings that may change between two parts of one run."""


def claim_run(output: Path, facts: Mapping[str, Any], steps: int, overwrite: bool) -> int:
    """Make a run folder, or take up an unfinished run of the same settings.

    Args:
        output: the folder.
        facts: what decides the run, in plain JSON values.
        steps: length of the run.
        overwrite: replace a finished run, or one with other settings.

    Returns:
        Updates already done.

    Raises:
        OutputExistsError: if a finished run or something else is in the way.
        RingmoeError: if an unfinished run has other settings; names the first that differs.
    """
    found = output / FACTS
    hold(found)
    if output.exists() and not found.is_file() and (output.is_file() or any(output.iterdir())):
        raise OutputExistsError(output)
    done = TrainingState(output / "state").latest() if found.is_file() else 0
    if done:
        difference = first_difference(read_json(found), dict(facts))
        if not difference and done < steps:
            console.say(f"{output}: going on after step {done} of {steps}")
            return done
        if difference and done < steps and not overwrite:
            raise RingmoeError(
                f"{output} holds a run with {difference}; "
                "repeat its command, choose another -o, or pass --overwrite"
            )
        if not overwrite:
            raise OutputExistsError(output)
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(found, json.dumps(facts, indent=1) + "\n")
    hold(found)
    return 0


def hold(facts: Path) -> None:
    """Keep other processes out of a run folder until this one ends.

    Raises:
        RingmoeError: if another process is training there.
    """
    if not facts.is_file():
        return
    path = facts.resolve()
    if path in HELD:
        os.close(HELD.pop(path))
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        HELD[path] = handle
    except BlockingIOError:
        os.close(handle)
        raise RingmoeError(f"another process is training in {facts.parent}") from None
    except OSError:  # a file system without locks
        os.close(handle)


HELD: dict[Path, int] = {}
"""Locks of this process, one open file each."""


def first_difference(before: Any, now: Any, where: str = "") -> str:
    """`key a, not b` of the first setting that decides the run and differs; empty if none."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        same = json.dumps(before, default=str) == json.dumps(now, default=str)
        return "" if same else f"{where} {before}, not {now}"
    for key in sorted((before.keys() | now.keys()) - HARMLESS):
        inner = f"{where}.{key}" if where else key
        found = first_difference(before.get(key), now.get(key), inner)
        if found:
            return found
    return ""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask for a stop after the step in progress; Ctrl-C again stops at once.

    Yields:
        asked(): whether to save and stop.
    """
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) == 1:
            console.say("stopping after this step; Ctrl-C to stop at once")

    before = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
