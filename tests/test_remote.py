"""Scenes behind http:// and s3://: read by ranges if allowed, untouched if not, secrets kept."""
# ruff: noqa: F401, F811 - fixtures are imported

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import rasterio
import rasterio.shutil
from mapping import model, write_scene

from ringmoe_cli.app import main

PASSWORD, KEY = "hunter22hunter22", "wJalrXUtnFEMIK7MDENGbPxRfiCY"


@dataclass
class Store:
    """A folder that a server of its own shows."""

    place: str
    """Host and port."""
    log: Path
    """What was asked for."""

    @property
    def seen(self) -> list[list[str]]:
        """Path and range of every request."""
        return [line.split(" ") for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    served, log = folder / "served", folder / "log"
    served.mkdir()
    log.touch()
    plain = write_scene(folder / "plain.tif", 300, 300)
    rasterio.shutil.copy(plain, served / "scene.tif", driver="COG", COMPRESS="NONE", BLOCKSIZE=128)
    command = [sys.executable, str(Path(__file__).with_name("range_server.py")), served, log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield Store(f"127.0.0.1:{process.stdout.readline().strip()}", log)
        process.terminate()


@pytest.fixture
def store(server):
    server.log.write_text("")
    return server


@pytest.fixture
def predict(store, model, monkeypatch, capfd):
    """The whole program: exit code, and all that it printed on either stream."""
    environment = {
        "AWS_S3_ENDPOINT": store.place, "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES", "AWS_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments):
        given = ["ringmoe", "predict", *map(str, arguments), "-m", str(model)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return ended.value.code, said.out, said.err

    return run


@pytest.mark.parametrize("url", ["http://{}/scene.tif", "/vsicurl/http://{}/scene.tif"])
def test_a_scene_behind_a_url_is_not_touched_unless_allowed(store, predict, tmp_path, url):
    code, _, err = predict(url.format(store.place), "-o", tmp_path / "m.tif")
    assert code == 1
    assert "is remote; pass --allow-remote" in err
    assert err.count("\n") == 1
    assert not store.seen
    assert not (tmp_path / "m.tif").exists()


@pytest.mark.parametrize("url", ["http://{}/scene.tif", "s3://bucket/scene.tif"])
def test_an_allowed_scene_is_read_by_ranges_and_gives_the_same_map(store, predict, tmp_path, url):
    here, there = tmp_path / "here.tif", tmp_path / "there.tif"
    assert predict(store.log.with_name("served") / "scene.tif", "-o", here)[0] == 0
    assert not store.seen
    code, out, err = predict(url.format(store.place), "-o", there, "--allow-remote", "--json")
    assert code == 0, err
    assert here.read_bytes() == there.read_bytes()
    assert json.loads(out)["output"] == str(there)
    assert sum(bool(span) and path.endswith("scene.tif") for path, span in store.seen) > 1


@pytest.mark.parametrize("allowed", [(), ("--allow-remote",)])
@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{PASSWORD}@{{}}/missing.tif",
        f"http://{{}}/missing.tif?X-Amz-Credential=AKIA&X-Amz-Signature={KEY}",
        f"http://{{}}/scene.tif?sig={KEY}",
        "s3://bucket/missing.tif",
    ],
)
def test_what_lets_one_in_is_never_printed(store, predict, tmp_path, monkeypatch, url, allowed):
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "NO")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    code, out, err = predict(url.format(store.place), "-o", tmp_path / "m.tif", "--json", *allowed)
    assert PASSWORD not in out + err
    assert KEY not in out + err
    assert "tif" in out + err
    assert code == (0 if allowed and "scene" in url else 1), err
