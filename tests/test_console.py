"""Results on stdout, talk on stderr, progress that says rate and time left."""

import json
from pathlib import Path

import numpy as np
import pytest

from ringmoe_cli import console


def test_results_and_talk_take_different_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console.result(Path("map.tif"))
    console.say("reading")
    console.warn("no CRS")
    shown = capsys.readouterr()
    assert shown.out == "map.tif\n"
    assert shown.err == "reading\nwarning: no CRS\n"


def test_credentials_of_urls_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn(
        "https://ann:pass@host/a.tif?x=1&X-Amz-Signature=0f3&sig=ab%2Fc is far; a?b=c, a@b"
    )
    console.result({"scene": "https://host/a.tif?token=t0k3n"})
    shown = capsys.readouterr()
    assert shown.err == "warning: https://***@host/a.tif?x=1&***&*** is far; a?b=c, a@b\n"
    assert json.loads(shown.out) == {"scene": "https://host/a.tif?***"}


def test_json_knows_numpy_and_paths(capsys: pytest.CaptureFixture[str]) -> None:
    console.result({"area": np.float32(2.5), "counts": np.arange(2), "path": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"area": 2.5, "counts": [0, 1], "path": "a"}


def test_quiet_silences_talk_but_not_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.State, "quiet", True)
    console.say("reading")
    console.warn("no CRS")
    assert capsys.readouterr().err == "warning: no CRS\n"


def test_only_rank_0_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    console.result("map.tif")
    console.warn("no CRS")
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_progress_in_a_pipe_is_plain_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress(100, "tiling", "tiles") as advance:
        advance(5)
        advance(5)
        advance(5)
    assert capsys.readouterr().err == "tiling: 10/100 tiles, 0.5 tiles/s, 180 s left\n"
