"""Other ground sampling distances: exact for what is linear, the same bits from any start."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.product import Rows
from ringmoe_cli.scene.resample import Axis, Bands, Resampled, model_size
from ringmoe_cli.scene.scene import Band, Scene
from ringmoe_cli.scene.stitch import Lattice


class Array:
    """A scene in memory."""

    def __init__(self, values, valid=None, modality="ms", quantity="reflectance", gsd=10.0):
        self.values = values.astype(np.float32)
        self.valid = np.ones(values.shape[1:], bool) if valid is None else valid
        bands = tuple(Band(f"b{i}") for i in range(len(values)))
        self.scene = Scene(
            "array", modality, bands, Grid(*values.shape[1:]), "float32", quantity, gsd=gsd
        )

    def physical(self, window):
        rows = slice(window.row, window.row + window.height)
        cols = slice(window.col, window.col + window.width)
        return self.values[:, rows, cols], self.valid[rows, cols]


axes = st.builds(Axis, st.integers(1, 60), st.integers(1, 60))


@given(axes)
def test_weights_are_an_average(axis):
    index, weight = axis.taps(0, axis.target)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-5)
    assert (weight >= 0).all()
    assert index.min() >= 0
    assert index.max() < axis.source


@given(axes, st.data())
def test_any_part_gives_the_same_bits_from_the_pixels_of_its_span(axis, data):
    values = np.random.default_rng(0).random((axis.source,), np.float32)
    start = data.draw(st.integers(0, axis.target - 1))
    stop = data.draw(st.integers(start + 1, axis.target))
    first, last = axis.span(start, stop)
    part = axis.apply(values[first:last], 0, start, stop, first)
    np.testing.assert_array_equal(part, axis.apply(values, 0, 0, axis.target, 0)[start:stop])


@given(axes)
def test_complete_rows_need_nothing_below(axis):
    for rows in range(axis.source + 1):
        count = axis.complete(rows)
        assert count == 0 or axis.span(count - 1, count)[1] <= rows
    assert axis.complete(axis.source) == axis.target


@pytest.mark.parametrize("target", [7, 20, 33, 100])
def test_a_ramp_stays_a_ramp_to_a_tenth_of_a_pixel(target):
    axis = Axis(40, target)
    ramp = axis.apply(np.arange(40, dtype=np.float32), 0, 0, target, 0)
    centres = (np.arange(target) + 0.5) * axis.step - 0.5
    inner = slice(target // 8 + 1, -target // 8 - 1)
    np.testing.assert_allclose(ramp[inner], centres[inner], atol=0.1)


def test_invalid_pixels_do_not_bleed():
    values = np.full((2, 40, 40), 5.0)
    valid = np.ones((40, 40), bool)
    values[:, :20], valid[:20] = 1e6, False
    got, ok = Resampled(Array(values, valid), 20, 20).physical(Window(0, 0, 20, 20))
    assert not ok[:9].any()
    assert ok[11:].all()
    np.testing.assert_allclose(got[:, ok], 5, rtol=1e-5)


def test_backscatter_is_averaged_as_power():
    values = np.where(np.indices((40, 40)).sum(0) % 2, 0.0, -300.0)[None]
    scene = Array(values, modality="sar-l2", quantity="db")
    got, _ = Resampled(scene, 10, 10).physical(Window(0, 0, 10, 10))
    np.testing.assert_allclose(got[0, 2:-2, 2:-2], 10 * np.log10(0.5), atol=0.05)


def test_windows_may_hang_over_the_edge():
    values = np.random.default_rng(0).random((1, 40, 40))
    reader = Resampled(Array(values), 25, 25)
    whole, _ = reader.physical(Window(0, 0, 25, 25))
    part, ok = reader.physical(Window(20, 18, 10, 12))
    assert part.shape == (1, 10, 12)
    np.testing.assert_array_equal(part[:, :5, :7], whole[:, 20:, 18:])
    assert ok.sum() == 35


def test_complex_sar_is_never_resampled():
    with pytest.raises(SceneError, match="complex"):
        Resampled(Array(np.ones((1, 8, 8)), modality="sar-l1", quantity="complex"), 4, 4)


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 50), st.integers(3, 50), st.integers(2, 12), st.data(), st.floats(0.3, 3.0))
def test_bands_of_the_map_come_once_and_from_any_start(height, width, window, data, factor):
    overlap = data.draw(st.integers(0, window - 1))
    lattice = Lattice(height, width, window, overlap)
    bands = Bands(lattice, Grid(max(1, round(height * factor)), max(1, round(width * factor))))
    dense = np.random.default_rng(0).random((2, height, width), np.float32)

    def stream(first):
        for row in range(first, lattice.rows):
            start, stop = lattice.finished(row)
            yield Rows(start, dense[:, start:stop], np.ones((stop - start, width), bool))

    whole = list(bands.regrid(stream(0), 0))
    spans = [bands.of(r) for r in range(lattice.rows) if bands.of(r)[0] < bands.of(r)[1]]
    assert [(r.start, r.start + r.dense.shape[1]) for r in whole] == spans
    assert spans[0][0] == 0
    assert spans[-1][1] == bands.grid.height
    first = data.draw(st.integers(0, lattice.rows - 1))
    again = list(bands.regrid(stream(bands.begin(first)), first))
    for ours, theirs in zip(again, whole[len(whole) - len(again) :], strict=True):
        np.testing.assert_array_equal(ours.dense, theirs.dense)


def test_sizes_at_the_models_sampling_distance():
    scene = Array(np.ones((1, 100, 60)), gsd=10.0).scene
    assert model_size(scene, 12.0) is None
    assert model_size(scene, None) is None
    assert model_size(scene, 20.0) == (50, 30)
    assert model_size(scene, 5.0) == (200, 120)
