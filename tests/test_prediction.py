"""From windows to the bands of a map: blending, nodata, interruptions, resampling."""
# ruff: noqa: F401, F811 - fixtures are imported

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from mapping import (
    NORM,
    TASK,
    Brightness,
    Constant,
    Stops,
    mapped,
    model,
    normalised,
    outputs,
    scene,
    whole,
    write_scene,
)

from model.batch import Prediction
from model.normalisation import Normalisation
from ringmoe_cli.errors import BadBlockError, RingmoeError
from ringmoe_cli.jobs.answers import Settings, predict_rows
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.maps.product import ClassMap, counts_in_cells, most_probable
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.resample import Resampled
from ringmoe_cli.scene.sensors import open_scene


def test_answers_are_blended_back_to_what_each_pixel_says(scene):
    source = normalised(scene)
    dense, valid = whole(Brightness(), source)
    with rasterio.open(scene) as src:
        raw = src.read(1)
    expected = 1 / (1 + np.exp(-((raw * np.float32(1e-4) - 0.1) / 0.05)))
    np.testing.assert_array_equal(valid, raw != 0)
    np.testing.assert_allclose(dense[1][valid], expected[valid], atol=1e-5)


def test_a_constant_model_makes_a_constant_map(scene):
    dense, valid = whole(Constant(), normalised(scene))
    assert np.ptp(dense[:, valid], axis=1).max() < 1e-6
    np.testing.assert_allclose(dense[:, valid].mean(1, dtype=float), [0.2, 0.7, 0.1], atol=1e-6)


def test_normalisation_is_the_checkpoints_on_physical_values(model, scene):
    """What predict feeds the network is what the loader's functions make of the same window."""
    seen = []

    class Watch(Constant):
        def predict(self, batch):
            seen.append(batch)
            return super().predict(batch)

    whole(Watch(), normalised(scene), batch=1)
    reader = SceneReader(open_scene(scene))
    values, valid = reader.physical(next(open_scene(scene).grid.windows(32, 24)))
    np.testing.assert_array_equal(seen[0].images["ms"][0, 0], NORM.apply(values, valid[None]))
    np.testing.assert_array_equal(seen[0].valid["ms"][0, 0, 0], valid)


def test_most_probable_classes_and_their_counts_are_numpys():
    rng = np.random.default_rng(0)
    probabilities = rng.integers(0, 4, (5, 300, 700)).astype(np.float32) / 4  # many ties
    classes, best = most_probable(probabilities)
    np.testing.assert_array_equal(classes, probabilities.argmax(0))
    np.testing.assert_array_equal(best, probabilities.max(0))
    classes[:7, :9] = 255
    cells = [classes[:, at : at + 256] for at in (0, 256, 512)]
    expected = [np.bincount(cell.ravel(), minlength=256)[:5] for cell in cells]
    np.testing.assert_array_equal(counts_in_cells(classes, 5, 256), expected)


def test_empty_windows_are_not_computed(tmp_path):
    path = write_scene(tmp_path / "s.tif", 96, 96, hole=False)
    with rasterio.open(path, "r+") as dst:
        dst.write(np.zeros((4, 64, 96), np.uint16), window=((0, 64), (0, 96)))
    network = Brightness()
    _, valid = whole(network, normalised(path), overlap=0, batch=1)
    assert network.calls == 3
    assert valid.sum() == 32 * 96


@pytest.mark.parametrize("after", [0, 1, 3, 5])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_an_interrupted_map_is_continued_to_the_same_bytes(tmp_path, scene, after, batch):
    settings, product = Settings(32, 8, batch), ClassMap(TASK)
    (tmp_path / "a").mkdir()
    source = normalised(scene)
    mapped(Brightness(), source, product, outputs(tmp_path / "a"), settings)
    try:
        mapped(Stops(after), source, product, outputs(tmp_path), settings)
    except KeyboardInterrupt:
        assert not (tmp_path / "m.tif").exists()
        assert (tmp_path / "m.tif.part").is_dir()
    else:
        return
    report = mapped(Brightness(), source, product, outputs(tmp_path), settings)
    assert (tmp_path / "m.tif").read_bytes() == (tmp_path / "a/m.tif").read_bytes()
    assert not (tmp_path / "m.tif.part").exists()
    assert report.resumed_rows > 0 or after * batch < 5


def test_other_settings_start_anew(tmp_path, scene):
    source, product = normalised(scene), ClassMap(TASK)
    with pytest.raises(KeyboardInterrupt):
        mapped(Stops(6), source, product, outputs(tmp_path), Settings(32, 8, 1))
    report = mapped(Brightness(), source, product, outputs(tmp_path), Settings(32, 4, 1))
    assert report.resumed_rows == 0


def test_two_runs_do_not_write_one_output(tmp_path, scene):
    from ringmoe_cli.scene.maps.part import Part

    with Part(tmp_path / "m.tif", {}), pytest.raises(RingmoeError, match="another run"):
        mapped(
            Brightness(), normalised(scene), ClassMap(TASK), outputs(tmp_path), Settings(32, 8, 1)
        )


class Damaged:
    """A scene with one block that cannot be decoded."""

    def __init__(self, reader):
        self.reader, self.scene = reader, reader.scene

    def physical(self, window):
        row, col, height, width = window
        if row < 45 and row + height > 40 and col < 95 and col + width > 90:
            raise BadBlockError("block at row 40, column 90")
        return self.reader.physical(window)


def test_a_bad_block_is_an_error_or_nodata_as_told(scene):
    good = normalised(scene)
    bad = Normalised([{"ms": Damaged(good.dates[0]["ms"])}], good.normalisation)
    settings = Settings(32, 8, 2)
    with pytest.raises(BadBlockError, match="row 40"):
        list(predict_rows(Brightness(), bad, settings, 3))
    skip = SkipBad(True)
    rows = list(predict_rows(Brightness(), bad, settings, 3, skip=skip))
    valid = np.concatenate([r.valid for r in rows])
    assert not valid[40:45, 90:95].any()
    assert skip.skipped
    assert valid[:, :20].sum() == whole(Brightness(), good)[1][:, :20].sum()


def test_flips_average_the_mirror_images(scene):
    class Left(Constant):
        """Says class 0 in the left half of its window."""

        def predict(self, batch):
            b, _, _, h, w = batch.images["ms"].shape
            left = (torch.arange(w) < w // 2).float().expand(b, 1, h, w)
            return Prediction(dense=torch.cat([left, 1 - left, left * 0], 1))

    dense, valid = whole(Left(), normalised(scene), flips=True)
    np.testing.assert_allclose(dense[:2, valid], 0.5, atol=1e-6)


def test_scenes_of_one_place_must_have_the_same_pixels(tmp_path):
    readers = [SceneReader(open_scene(write_scene(tmp_path / f"{h}.tif", h, 50))) for h in (40, 41)]
    with pytest.raises(RingmoeError, match="same pixels"):
        Normalised([{"ms": readers[0]}, {"ms": readers[1]}], {"ms": NORM})


def regridded(tmp_path, network):
    """A scene of 20 m pixels for a network of 10 m; map on the scene's grid."""
    source = normalised(write_scene(tmp_path / "coarse.tif", 35, 50))
    fine = Normalised([{"ms": Resampled(source.dates[0]["ms"], 70, 100)}], source.normalisation)
    return mapped(
        network, fine, ClassMap(TASK), outputs(tmp_path), Settings(32, 8, 3), original=source
    )


def test_resampled_scenes_give_maps_on_their_own_grid_and_resume(tmp_path):
    (tmp_path / "a").mkdir()
    regridded(tmp_path / "a", Brightness())
    with pytest.raises(KeyboardInterrupt):
        regridded(tmp_path, Stops(3))
    assert regridded(tmp_path, Brightness()).resumed_rows > 0
    assert (tmp_path / "m.tif").read_bytes() == (tmp_path / "a/m.tif").read_bytes()
    with rasterio.open(tmp_path / "m.tif") as got, rasterio.open(tmp_path / "coarse.tif") as src:
        assert got.shape == src.shape
        np.testing.assert_array_equal(got.read(1) == 255, src.read(1) == 0)


def test_channels_that_were_not_measured_are_named(tmp_path):
    """A dual-pol complex scene: the other polarisations are zeros, and the network is told."""
    names = [f"{p}_{part}" for p in ("hh", "hv", "vh", "vv") for part in ("re", "im")]
    norm = Normalisation(tuple(names), (0.0,) * 8, (1.0,) * 8)
    path = tmp_path / "slc.tif"
    values = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.complex64)
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=40, count=2, dtype="complex64",
        crs="EPSG:32630", transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
    ) as dst:  # fmt: skip
        dst.write(values)
        dst.descriptions = ("VH", "VV")
    source = Normalised([{"sar-l1": SceneReader(open_scene(path))}], {"sar-l1": norm})
    seen = []

    class Watch:
        def predict(self, batch):
            seen.append(batch)
            return Prediction(dense=torch.ones(len(batch.images["sar-l1"]), 3, 32, 32))

    list(predict_rows(Watch(), source, Settings(32, 8, 2), 3))
    assert seen[0].channels["sar-l1"].tolist() == [[False] * 4 + [True] * 4] * 2
    np.testing.assert_array_equal(seen[0].images["sar-l1"][0, 0, 4], values[0, :32, :32].real)


class Neighbours:
    """A network that looks around: a 5 x 5 mean as probability of class 1."""

    def predict(self, batch):
        x = torch.sigmoid(batch.images["ms"][:, 0, :1])
        x = torch.nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
        return Prediction(dense=torch.cat([1 - x, x, x * 0], 1))


class Part:
    """Rows of a scene as a scene of its own."""

    def __init__(self, reader, top, height):
        self.reader, self.top = reader, top
        grid = reader.scene.grid
        self.scene = replace(reader.scene, grid=grid.crop(Window(top, 0, height, grid.width)))

    def physical(self, window):
        inside = self.scene.grid.clip(window)
        values, valid = self.reader.physical(window._replace(row=window.row + self.top))
        valid[inside.row - window.row + inside.height :] = False
        return values, valid


def test_one_piece_equals_two_halves_read_with_context(tmp_path):
    path = write_scene(tmp_path / "s.tif", 200, 90, hole=False)
    settings = {"window": 64, "overlap": 32}
    source = normalised(path)
    full, _ = whole(Neighbours(), source, **settings)
    reader, context = source.dates[0]["ms"], 32
    halves = []
    for top, height, keep in (
        (0, 96 + context, slice(0, 96)),
        (96 - context, 104 + context, slice(context, None)),
    ):
        half = Normalised([{"ms": Part(reader, top, height)}], source.normalisation)
        halves.append(whole(Neighbours(), half, **settings)[0][:, keep])
    np.testing.assert_allclose(np.concatenate(halves, 1), full, atol=1e-3)


def test_no_window_grid_shows_in_the_gradient(tmp_path):
    """Steps at window borders are no larger than elsewhere, for a network that sees its borders."""

    class Edges:
        def predict(self, batch):
            b = len(batch.images["ms"])
            far = torch.linspace(0, 1, 32).expand(b, 1, 32, 32)
            return Prediction(dense=torch.cat([1 - far, far, far * 0], 1))

    path = write_scene(tmp_path / "s.tif", 60, 200, hole=False)
    smooth, _ = whole(Edges(), normalised(path), overlap=16)
    seamed, _ = whole(Edges(), normalised(path), overlap=0)
    step = np.abs(np.diff(smooth[1, :, 16:-16], axis=1))
    assert step.max() < 0.1
    assert np.abs(np.diff(seamed[1], axis=1)).max() > 0.9
