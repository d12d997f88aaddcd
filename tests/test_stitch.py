"""Blending: a partition of unity, whatever the scene's size and wherever the run starts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringmoe_cli.scene.stitch import Lattice, Stitcher


@st.composite
def lattices(draw):
    window = draw(st.integers(2, 12))
    overlap = draw(st.integers(0, window - 1))
    return Lattice(draw(st.integers(1, 30)), draw(st.integers(1, 30)), window, overlap)


def pad(image, lattice):
    """The image with zeros up to the end of the last windows."""
    rows = (lattice.rows - 1) * lattice.stride + lattice.window - lattice.height
    return np.pad(image, ((0, 0), (0, rows), (0, lattice.padded_width - lattice.width)))


def cut(image, lattice, row, column):
    top, left = row * lattice.stride, column * lattice.stride
    return image[:, top : top + lattice.window, left : left + lattice.window]


def stitch(lattice, channels, window_at, first=0, batch=5):
    stitcher = Stitcher(lattice, channels, first)
    todo = [
        w for b in lattice.batches(batch, max(0, first - lattice.reach), lattice.rows) for w in b
    ]
    rows = []
    for row in range(stitcher.row, lattice.rows):
        while todo and todo[0][0] <= row:
            at = todo.pop(0)
            values = window_at(*at)
            if values is None:
                stitcher.skip(*at, 1)
            else:
                stitcher.add(*at, values[None])
        done = stitcher.finish().copy()
        rows += [done] if row >= first else []
    return np.concatenate(rows, axis=1)


def full_accumulator(lattice, window_at):
    """The obvious way: sums of weighted windows over sums of weights."""
    hann = np.sin(np.pi * (np.arange(lattice.window) + 0.5) / lattice.window) ** 2
    weight = np.outer(hann, hann)
    shape = ((lattice.rows - 1) * lattice.stride + lattice.window, lattice.padded_width)
    total, norm = np.zeros((1, *shape)), np.zeros(shape)
    for row in range(lattice.rows):
        for column in range(lattice.columns):
            cut(total, lattice, row, column)[...] += window_at(row, column) * weight
            cut(norm[None], lattice, row, column)[...] += weight
    return (total / norm)[:, : lattice.height, : lattice.width]


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(0, 2**32 - 1))
def test_stitching_tiles_gives_the_image_back(lattice, seed):
    image = np.random.default_rng(seed).random((2, lattice.height, lattice.width), np.float32)
    padded = pad(image, lattice)
    out = stitch(lattice, 2, lambda r, c: cut(padded, lattice, r, c))
    np.testing.assert_allclose(out, image, atol=2e-6)


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(0, 2**32 - 1))
def test_disagreeing_windows_blend_as_in_a_full_accumulator(lattice, seed):
    values = np.random.default_rng(seed).random(
        (lattice.rows, lattice.columns, 1, lattice.window, lattice.window), np.float32
    )
    ours = stitch(lattice, 1, lambda r, c: values[r, c])
    np.testing.assert_allclose(
        ours, full_accumulator(lattice, lambda r, c: values[r, c]), atol=1e-5
    )


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(0, 2**32 - 1), st.data())
def test_starting_later_gives_the_same_bits(lattice, seed, data):
    values = np.random.default_rng(seed).random(
        (lattice.rows, lattice.columns, 3, lattice.window, lattice.window), np.float32
    )
    first = data.draw(st.integers(0, lattice.rows - 1))
    whole = stitch(lattice, 3, lambda r, c: values[r, c])
    part = stitch(lattice, 3, lambda r, c: values[r, c], first)
    np.testing.assert_array_equal(part, whole[:, lattice.finished(first)[0] :])


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(0, 2**32 - 1))
def test_neighbours_at_once_give_the_same_bits(lattice, seed):
    values = np.random.default_rng(seed).random(
        (lattice.rows, lattice.columns, 2, lattice.window, lattice.window), np.float32
    )
    stitcher, rows = Stitcher(lattice, 2), []
    for row in range(lattice.rows):
        half = lattice.columns // 2
        if half:
            stitcher.add(row, 0, values[row, :half])
        stitcher.add(row, half, values[row, half:])
        rows.append(stitcher.finish().copy())
    one_by_one = stitch(lattice, 2, lambda r, c: values[r, c])
    np.testing.assert_array_equal(np.concatenate(rows, axis=1), one_by_one)


def test_silent_windows_are_zeros_whatever_the_memory_held_before():
    lattice = Lattice(40, 40, 8, 2)
    values = np.random.default_rng(0).random((lattice.rows, lattice.columns, 1, 8, 8), np.float32)
    silent = {(2, 1), (3, 0), (4, lattice.columns - 1)}
    told = stitch(lattice, 1, lambda r, c: None if (r, c) in silent else values[r, c])
    for at in silent:
        values[at] = 0
    np.testing.assert_array_equal(told, stitch(lattice, 1, lambda r, c: values[r, c]))


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(1, 9))
def test_every_window_is_in_exactly_one_batch(lattice, size):
    batches = list(lattice.batches(size, 0, lattice.rows))
    windows = [w for batch in batches for w in batch]
    assert windows == [(r, c) for r in range(lattice.rows) for c in range(lattice.columns)]
    assert all(len(batch) == size for batch in batches[:-1])


@settings(deadline=None, max_examples=50)
@given(lattices(), st.integers(1, 9), st.data())
def test_batches_of_some_rows_are_batches_of_the_scene(lattice, size, data):
    first = data.draw(st.integers(0, lattice.rows - 1))
    stop = data.draw(st.integers(first + 1, lattice.rows))
    some = list(lattice.batches(size, first, stop))
    assert all(batch in list(lattice.batches(size, 0, lattice.rows)) for batch in some)
    got = {w for batch in some for w in batch}
    assert {(r, c) for r in range(first, stop) for c in range(lattice.columns)} <= got


@settings(deadline=None, max_examples=50)
@given(lattices())
def test_finished_rows_cover_the_scene_once(lattice):
    bands = [lattice.finished(row) for row in range(lattice.rows)]
    assert bands[0][0] == 0
    assert bands[-1][1] == lattice.height
    assert all(above[1] == below[0] for above, below in pairwise(bands))
    assert all(start < stop for start, stop in bands)


def test_no_seams_where_windows_disagree_slowly():
    """Neighbours that differ by one step everywhere leave no jump larger than the taper's slope."""
    lattice = Lattice(64, 400, 64, 32)
    out = stitch(lattice, 1, lambda r, c: np.full((1, 64, 64), c % 2, np.float32))[0, 0]
    assert np.abs(np.diff(out)).max() < 0.06
    assert np.ptp(out) > 0.99


def test_overlap_must_be_smaller_than_the_window():
    with pytest.raises(ValueError, match="overlap 8"):
        Lattice(10, 10, 8, 8)
