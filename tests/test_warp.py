"""Maps in another coordinate system, of scenes placed by a transform, by points, or by RPCs."""
# ruff: noqa: F401, F811 - fixtures are imported

import json
import math
import warnings

import numpy as np
import pytest
import rasterio
from mapping import BANDS, CLASSES, CONFIG, model, scene, write_scene
from pyproj import Geod, Transformer
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.transform import Affine
from typer.testing import CliRunner

from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import TaskConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import TaskNetwork
from ringmoe_cli.app import app

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
STEP = 1e-4
"""Degrees per pixel of the RPC scene."""


def run(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def unplaced(path, **place):
    """The scene of `write_scene` with its transform replaced."""
    plain = write_scene(path.with_name("plain.tif"))
    with rasterio.open(plain) as src:
        values, profile = src.read(), src.profile
    del profile["crs"], profile["transform"]
    rpcs = place.pop("rpcs", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile, **place) as dst:
            dst.write(values)
            dst.descriptions = BANDS
            dst.scales = (1e-4,) * 4
            if rpcs:
                dst.rpcs = rpcs
    return path


def corner_points(height=70, width=100):
    places = [(r, c) for r in (0, height / 2, height) for c in (0, width / 2, width)]
    return [GroundControlPoint(r, c, 500000 + 10 * c, 5000000 - 10 * r, 0.0) for r, c in places]


def vertical_rpcs(height_off=0.0, lean=0.0):
    """A camera whose pixels are STEP degrees wide; height moves places east by `lean` pixels/m."""
    lines, samples = np.zeros((2, 20))
    lines[2], samples[1], samples[3] = -1, 1, lean * 1000 / 50  # terms: 1, lon, lat, height, …
    one = [1.0, *[0.0] * 19]
    return RPC(
        err_bias=0.0, err_rand=0.0, height_off=height_off, height_scale=1000.0,
        lat_off=45.0, lat_scale=35 * STEP, line_den_coeff=one, line_num_coeff=lines.tolist(),
        line_off=34.5, line_scale=35.0, long_off=3.0, long_scale=50 * STEP, samp_den_coeff=one,
        samp_num_coeff=samples.tolist(), samp_off=49.5, samp_scale=50.0,
    )  # fmt: skip


def classes_at(path, columns, rows):
    """Class numbers of a warped map at the middles of the scene's pixels."""
    with rasterio.open(path) as src:
        x, y = 500005 + 10 * columns, 4999995 - 10 * rows
        lines, samples = rasterio.transform.rowcol(src.transform, x.ravel(), y.ravel())
        return src.read(1)[np.array(lines), np.array(samples)].reshape(rows.shape)


def test_control_points_are_copied_or_followed(model, tmp_path):
    """The map of a scene with points has them; with --warp it lies where they say."""
    path = unplaced(tmp_path / "gcp.tif", gcps=corner_points(), crs="EPSG:32630")
    same = run(path, "-m", model, "--json", "--gsd", 10)
    said = json.loads(same.stdout)
    assert "area_m2" not in said["classes"]["water"]
    with rasterio.open(said["output"]) as got:
        classes, points = got.read(1), got.gcps[0]
        assert got.gcps[1].to_epsg() == 32630
    assert [(p.row, p.col, p.x, p.y) for p in points] == [
        (p.row, p.col, p.x, p.y) for p in corner_points()
    ]
    moved = run(path, "-m", model, "--json", "-o", tmp_path / "w.tif", "--warp", "EPSG:32630")
    said = json.loads(moved.stdout)
    with rasterio.open(tmp_path / "w.tif") as got:
        assert got.crs.to_epsg() == 32630
        assert not got.gcps[0]
        assert got.res == pytest.approx((10, 10), rel=0.02)
        assert got.tags(1)["CLASS_1"] == CLASSES[1]
        assert got.colormap(1)[2] == (200, 180, 120, 255)
        assert got.overviews(1) or max(got.shape) <= 512
    columns, rows = np.meshgrid(np.arange(2, 98), np.arange(2, 68))
    at = classes_at(tmp_path / "w.tif", columns, rows)
    assert (at == classes[2:68, 2:98]).mean() > 0.97  # half a pixel of the new grid's phase
    total = sum(c["area_m2"] for c in said["classes"].values())
    assert total == pytest.approx((7000 - 600) * 100, rel=0.02)


def test_rpcs_are_copied_or_followed_over_a_dem(model, tmp_path):
    """Without heights at the RPCs' own, with a DEM where the ground is."""
    rpcs = vertical_rpcs(height_off=300.0, lean=0.01)
    path = unplaced(tmp_path / "rpc.tif", rpcs=rpcs)
    kept = run(path, "-m", model, "--gsd", 10)
    assert kept.exit_code == 0
    with rasterio.open(kept.stdout.strip()) as got:
        assert got.crs is None
        assert got.rpcs.samp_num_coeff == rpcs.samp_num_coeff
        assert (got.rpcs.line_off, got.rpcs.height_off) == (34.5, 300.0)
    dem = tmp_path / "dem.tif"
    with rasterio.open(
        dem, "w", driver="GTiff", height=60, width=60, count=1, dtype="float32", crs="EPSG:4326",
        transform=Affine(5e-4, 0, 2.985, 0, -5e-4, 45.015),
    ) as dst:  # fmt: skip
        dst.write(np.full((1, 60, 60), 1300, np.float32))
    lefts = []
    for name, more in (("mean", ()), ("high", ("--dem", dem))):
        out = tmp_path / f"{name}.tif"
        assert run(path, "-m", model, "-o", out, "--warp", "EPSG:4326", *more).exit_code == 0
        with rasterio.open(out) as got:
            assert got.crs.to_epsg() == 4326
            assert got.res == pytest.approx((STEP, STEP), rel=0.05)
            lefts.append(got.bounds.left)
    assert lefts[0] == pytest.approx(3.0 - 50 * STEP, abs=2 * STEP)
    assert lefts[1] - lefts[0] == pytest.approx(-10 * STEP, abs=2 * STEP)  # 1000 m · 0.01 pixels/m


def test_probabilities_are_bilinear_and_classes_nearest(model, scene, tmp_path):
    out = tmp_path / "w.tif"
    done = run(scene, "-m", model, "-o", out, "--probabilities", "--warp", "EPSG:3857", "--json")
    assert done.exit_code == 0, done.exception
    said = json.loads(done.stdout)
    with rasterio.open(out) as c, rasterio.open(said["more"]["probabilities"]) as p:
        assert (c.crs.to_epsg(), c.transform, c.shape) == (3857, p.transform, p.shape)
        classes, steps = c.read(1), p.read()
    assert set(np.unique(classes)) <= {0, 1, 2, 255}
    both = (classes != 255) & (steps[0] != 255)
    assert both.sum() > 0.9 * (classes != 255).sum()
    assert abs(steps[:, both].astype(int).sum(0) - 254).max() <= 4
    area = sum(c["area_m2"] for c in said["classes"].values())
    assert area == pytest.approx(6400 * 100 / 0.9996**2, rel=1e-5)


def test_an_impossible_warp_is_clear(model, scene, tmp_path):
    def failure(*arguments):
        done = run(*arguments)
        assert done.exit_code == 1
        return str(done.exception)

    assert "say EPSG:32630" in failure(scene, "-m", model, "--warp", "EPSG:999999")
    assert "does not exist" in failure(scene, "-m", model, "--warp", "EPSG:3857", "--dem", "no.tif")
    nowhere = unplaced(tmp_path / "nowhere.tif")
    assert "lies somewhere" in failure(nowhere, "-m", model, "--warp", "EPSG:3857")
    assert run(scene, "-m", model, "--dem", "x.tif").exit_code == 2


def test_a_real_radar_scene_with_control_points(tmp_path, data_dir):
    """Sentinel-1 GRD over the Bay of Bengal: 210 points, no transform."""
    path = data_dir / "03_sar_amplitude" / "s1_grd_gcps.tif"
    config = type(CONFIG).from_dict({**CONFIG.to_dict(), "channels": {"sar-l2": 1}})
    task = TaskConfig("segmentation", CLASSES, (), ("sar-l2",), window=32, channels=16)
    norm = Normalisation(("vv",), (20.0,), (5.0,))
    about = CheckpointConfig(config, "task", {"sar-l2": norm}, {"sar-l2": 200.0}, task)
    save_checkpoint(tmp_path / "m", about, disk_tensors(TaskNetwork(RingMoE(config), task)))
    options = ("-m", tmp_path / "m", "--bands", "vv", "--scale", "amplitude", "--batch", "256")
    done = run(path, *options, "-o", tmp_path / "w.tif", "--warp", "EPSG:32644", "--json")
    assert done.exit_code == 0, done.exception
    with rasterio.open(tmp_path / "w.tif") as got, rasterio.open(path) as src:
        points = src.gcps[0]
        east, north = Transformer.from_crs(4326, 32644, always_xy=True).transform(
            [p.x for p in points], [p.y for p in points]
        )
        assert got.bounds.left == pytest.approx(min(east), abs=3000)
        assert got.bounds.top == pytest.approx(max(north), abs=3000)
    areas = sum(c["area_m2"] for c in json.loads(done.stdout)["classes"].values())
    outline = [(points[i].x, points[i].y) for i in (0, 20, -1, -21)]
    outline_area, _ = Geod(ellps="WGS84").polygon_area_perimeter(*zip(*outline, strict=True))
    assert areas == pytest.approx(abs(outline_area), rel=0.1)
    assert math.isfinite(areas)
