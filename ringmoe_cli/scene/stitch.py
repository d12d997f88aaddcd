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

    def shrunk(self, cell: int) -> "Lattice":
        """The same windows in cells of `cell` x `cell` pixels, which must divide its stride.

        Raises:
            ValueError: if cells and windows do not fit together.
        """
        if self.window % cell or self.overlap % cell:
            raise ValueError(
                f"window {self.window} and overlap {self.overlap} must be multiples of {cell}"
            )
        height, width = ceil(self.height / cell), ceil(self.width / cell)
        return Lattice(height, width, self.window // cell, self.overlap // cell)

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

    The scene is cut into bands of `stride` rows, of which row of windows i completes the i-th. Only
    bands that a window has begun and none has completed are in memory: channels x window x width
    float32, rounded up to whole bands.
    """

    def __init__(self, lattice: Lattice, channels: int, first: int = 0) -> None:
        """Start at a row of windows; earlier bands count as given out."""
        self.lattice = lattice
        self.channels = channels
        self.row = first
        self.bands: dict[int, NDArray[np.float32]] = {}
        self.scratch: NDArray[np.float32] = np.empty((lattice.window,) * 2, np.float32)
        self.taper_cache: dict[tuple[bytes, bytes], NDArray[np.float32]] = {}

    def add(self, row: int, column: int, values: NDArray[np.float32]) -> None:
        """Blend in the window at (row, column) of the lattice; values are (K, window, window).

        A window of a row before the current one adds only its part that is not yet given out.
        """
        stride, window = self.lattice.stride, self.lattice.window
        weights = self.weights(row, column)
        columns = slice(column * stride, column * stride + window)
        for band in range(max(row, self.row), row + self.lattice.reach + 1):
            inside = slice((band - row) * stride, min((band - row + 1) * stride, window))
            part = self.scratch[inside]
            target = self.band(band)[:, : len(part), columns]
            for channel, value in zip(target, values, strict=True):  # stays in the CPU's cache
                np.multiply(value[inside], weights[inside], out=part)
                np.add(channel, part, out=channel)

    def band(self, number: int) -> NDArray[np.float32]:
        """Sums of a band of rows, (K, stride, padded width)."""
        if number not in self.bands:
            shape = (self.channels, self.lattice.stride, self.lattice.padded_width)
            self.bands[number] = np.zeros(shape, np.float32)
        return self.bands[number]

    def weights(self, row: int, column: int) -> NDArray[np.float32]:
        """The taper of one window, (window, window)."""
        down, across = (axis[i] for axis, i in zip(self.lattice.tapers, (row, column), strict=True))
        key = down.tobytes(), across.tobytes()
        if key not in self.taper_cache:
            self.taper_cache[key] = np.outer(down, across)
        return self.taper_cache[key]

    def finish(self) -> NDArray[np.float32]:
        """Scene rows that the current row of windows completes, (K, rows, width); moves on."""
        start, stop = self.lattice.finished(self.row)
        last = self.row == self.lattice.rows - 1
        numbers = range(self.row, self.row + (self.lattice.reach if last else 0) + 1)
        done = [self.band(number) for number in numbers]
        for number in numbers:
            del self.bands[number]
        self.row += 1
        whole = done[0] if len(done) == 1 else np.concatenate(done, axis=1)
        return whole[:, : stop - start, : self.lattice.width]
