"""Overlapping windows become one seamless map, in O(width x window) memory.

Windows stand on a regular lattice that starts at the scene's origin. Each carries a Hann taper
that is normalised so that, at every pixel, the weights of the windows covering it sum to one:
adding weighted windows is then the blend itself, and no sum of weights has to be kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.grid import starts


@dataclass(frozen=True)
class Lattice:
    """Where the windows of a scene stand; pure numbers, the same for every run over the scene."""

    height: int
    """Rows of the scene."""
    width: int
    """Columns of the scene."""
    window: int
    """Side of a window in pixels."""
    overlap: int
    """Pixels shared by neighbouring windows, 0 to window - 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.window:
            raise ValueError(f"overlap {self.overlap} must be 0 to {self.window - 1} pixels")

    @property
    def stride(self) -> int:
        """Distance between the origins of neighbouring windows."""
        return self.window - self.overlap

    @property
    def rows(self) -> int:
        """Rows of windows; the last one may overhang the scene."""
        return len(starts(self.height, self.window, self.stride))

    @property
    def columns(self) -> int:
        """Columns of windows; the last one may overhang the scene."""
        return len(starts(self.width, self.window, self.stride))

    @property
    def padded_width(self) -> int:
        """Columns covered by windows, overhang included."""
        return (self.columns - 1) * self.stride + self.window

    @property
    def reach(self) -> int:
        """Rows of windows before a row that share pixels with what it finishes."""
        return ceil(self.window / self.stride) - 1

    def finished(self, row: int) -> tuple[int, int]:
        """First and last+1 scene row that no window after this row of windows touches."""
        last = row == self.rows - 1
        return row * self.stride, self.height if last else (row + 1) * self.stride

    def batches(self, size: int, first: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """Windows (row, column) of rows first..stop-1 in batches that are the same in every run.

        Batches are cut from the whole scene's list, from its origin; so a run over some of the rows
        gets whole batches, with windows of neighbouring rows at its ends.
        """
        order = list(product(range(self.rows), range(self.columns)))
        begin = first * self.columns // size * size
        for at in range(begin, stop * self.columns, size):
            yield order[at : at + size]

    @cached_property
    def tapers(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weights of the rows of windows (rows, window) and of the columns (columns, window)."""
        return (
            partition(self.height, self.rows, self.window, self.stride),
            partition(self.width, self.columns, self.window, self.stride),
        )


def partition(length: int, count: int, window: int, stride: int) -> NDArray[np.float32]:
    """Hann tapers of windows along one axis, (count, window), normalised to sum to 1 per pixel."""
    hann = np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2
    total = np.zeros((count - 1) * stride + window)
    for i in range(count):
        total[i * stride : i * stride + window] += hann
    shares = [hann / total[i * stride : i * stride + window] for i in range(count)]
    return np.asarray(shares, np.float32)


class Stitcher:
    """Adds windows, row of windows by row of windows, and hands out finished scene rows.

    Memory is one ring of `window` rows: channels x window x width float32.
    """

    def __init__(self, lattice: Lattice, channels: int, first: int = 0) -> None:
        """Start at a row of windows; earlier rows count as given out."""
        self.lattice = lattice
        self.row = first
        shape = (channels, lattice.window, lattice.padded_width)
        self.ring: NDArray[np.float32] = np.zeros(shape, np.float32)
        self.scratch: NDArray[np.float32] = np.empty((lattice.window,) * 2, np.float32)
        self.taper_cache: dict[tuple[bytes, bytes], NDArray[np.float32]] = {}

    def add(self, row: int, column: int, values: NDArray[np.float32]) -> None:
        """Blend in the window at (row, column) of the lattice; values are (K, window, window).

        A window of a row before the current one adds only its part that is not yet given out.
        """
        lattice = self.lattice
        skip = (self.row - row) * lattice.stride
        if skip >= lattice.window:
            return
        weights = self.weights(row, column)
        top, left = row * lattice.stride, column * lattice.stride
        columns = slice(left, left + lattice.window)
        for source, target in ring_slices(skip, lattice.window, top, lattice.window):
            part = self.scratch[: source.stop - source.start]
            for channel, value in zip(self.ring, values, strict=True):
                blended = channel[target, columns]
                np.multiply(value[source], weights[source], out=part)
                np.add(blended, part, out=blended)

    def weights(self, row: int, column: int) -> NDArray[np.float32]:
        """The taper of one window, (window, window)."""
        down, across = (axis[i] for axis, i in zip(self.lattice.tapers, (row, column), strict=True))
        key = down.tobytes(), across.tobytes()
        if key not in self.taper_cache:
            self.taper_cache[key] = np.outer(down, across)
        return self.taper_cache[key]

    def finish(self) -> NDArray[np.float32]:
        """Scene rows that the current row of windows completes, (K, rows, width); moves on."""
        lattice = self.lattice
        start, stop = lattice.finished(self.row)
        done: NDArray[np.float32] = np.empty(
            (len(self.ring), stop - start, lattice.width), np.float32
        )
        for source, target in ring_slices(0, stop - start, start, lattice.window):
            done[:, source] = self.ring[:, target, : lattice.width]
            self.ring[:, target] = 0
        self.row += 1
        return done


def ring_slices(begin: int, end: int, top: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Where rows begin..end-1 of a block whose row 0 is scene row `top` lie in a ring of rows.

    Yields:
        (rows of the block, rows of the ring): one pair, or two where the ring wraps.
    """
    while begin < end:
        at = (top + begin) % size
        n = min(end - begin, size - at)
        yield slice(begin, begin + n), slice(at, at + n)
        begin += n
