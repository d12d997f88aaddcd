"""Manners of the program: streams, exit codes, one clear line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).parent / "ringmoe")


def ringmoe(*words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *words], capture_output=True, text=True, timeout=60, check=False, **more
    )


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "--preset", "huge"], ["huge", "nano", "14b"]),
        (["inspect", "nowhere.tif"], ["nowhere.tif"]),
        (["inspect", __file__], ["test_cli.py"]),
    ],
)
def test_bad_input_is_one_line_and_exit_1(words: list[str], said: list[str]) -> None:
    assert_one_line_error(ringmoe(*words), *said)


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--nope"], ["nope"]])
def test_wrong_usage_is_exit_2(words: list[str]) -> None:
    done = ringmoe(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_json_is_one_object_on_stdout_and_nothing_else() -> None:
    done = ringmoe("inspect", "--preset", "14b", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    assert json.loads(done.stdout)["embed_dim"] == 448


def test_a_closed_pipe_is_silence() -> None:
    line = f"{PROGRAM} inspect --preset nano | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_pipes_get_no_colour_even_when_forced() -> None:
    done = ringmoe("inspect", "--preset", "nano", env={"FORCE_COLOR": "1", "PATH": "/usr/bin"})
    assert "\x1b" not in done.stdout
