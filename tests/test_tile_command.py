"""`ringmoe tile` from the shell: lists on stdin, results on stdout, nothing half-finished."""

import json

import pytest
from rasters import noise, write_calibrated, write_raster
from typer.testing import CliRunner

from ringmoe_cli.app import app
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.sensors import open_scene


@pytest.fixture
def scene(tmp_path):
    return open_scene(write_calibrated(tmp_path / "scene.tif"))


def ringmoe(*arguments, stdin=""):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def test_the_command_tiles_a_list_from_stdin(scene, tmp_path):
    paths = []
    for i in range(2):
        values = noise(3, 70, 80, "uint8", seed=i)
        paths.append(write_raster(tmp_path / f"rgb{i}.tif", values, photometric="RGB"))
    out = tmp_path / "t.zarr"
    done = ringmoe("tile", "-", "-o", out, "--json", stdin="\n".join(map(str, paths)) + "\n")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [s["modality"] for s in said["scenes"]] == ["opt", "opt"]
    assert said["path"] == str(out)
    plain = ringmoe("tile", scene.bands[0].path)
    assert plain.stdout.strip() == str(tmp_path / "scene.zarr")


def test_a_command_that_fails_leaves_nothing_finished(tmp_path):
    done = ringmoe("tile", tmp_path / "none.tif", "-o", tmp_path / "t.zarr")
    assert isinstance(done.exception, RingmoeError)
    assert "does not exist" in str(done.exception)
    assert not list(tmp_path.iterdir())
    assert isinstance(ringmoe("tile", "-", stdin="").exception, RingmoeError)
