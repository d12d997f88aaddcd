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

    @cached_property
    def rows(self) -> int:
        """Rows of windows; the last one may overhang the scene."""
        return len(starts(self.height, self.window, self.stride))

    @cached_property
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

    The taper is the product of one along the columns and one along the rows. Windows are first
    blended with their neighbours in the row, into a strip of the scene; a finished strip is then
    blended with the strips above. Most of a window has weight one and is only copied. In memory are
    one strip, channels x window x width float32, and the rows that it shares with the one above.
    """

    def __init__(self, lattice: Lattice, channels: int, first: int = 0) -> None:
        """Start so that the rows which row of windows `first` completes come whole.

        Windows of `lattice.reach` rows before it are needed, too.
        """
        self.lattice = lattice
        self.channels = channels
        self.row = max(0, first - lattice.reach)
        self.begun = False
        self.strip = np.zeros((channels, lattice.window, lattice.padded_width), np.float32)
        self.above = np.zeros((channels, lattice.overlap, lattice.padded_width), np.float32)

    def add(self, row: int, column: int, windows: NDArray[np.float32]) -> None:
        """Blend neighbouring windows into their row; columns come in order, each once.

        Args:
            row: of the lattice, the current one; those above are of no more use.
            column: of the lattice, where the first window stands.
            windows: (n, K, window, window).
        """
        if row < self.row:
            return
        for number, values in enumerate(windows, column):
            self.add_one(number, values)

    def add_one(self, column: int, values: NDArray[np.float32]) -> None:
        """Blend a window (K, window, window) into the current row."""
        left, stride = column * self.lattice.stride, self.lattice.stride
        target = self.strip[:, :, left : left + self.lattice.window]
        weights = self.lattice.tapers[1][column]
        known = self.lattice.overlap if column else 0  # columns that the windows before have begun
        shared = max(known, stride)  # columns that the next ones will add to
        target[:, :, known:shared] = values[:, :, known:shared]
        np.multiply(values[:, :, shared:], weights[shared:], out=target[:, :, shared:])
        target[:, :, :known] += values[:, :, :known] * weights[:known]

    def skip(self, row: int, column: int, count: int) -> None:
        """Pass over neighbouring windows that say nothing: they count as zeros."""
        if row < self.row:
            return
        lattice = self.lattice
        begin = column * lattice.stride + (lattice.overlap if column else 0)
        end = (column + count - 1) * lattice.stride + lattice.window
        self.strip[:, :, begin:end] = 0

    def finish(self) -> NDArray[np.float32]:
        """Scene rows that the current row of windows completes, (K, rows, width); moves on.

        They are valid until windows are added again: memory is used again.
        """
        lattice, strip = self.lattice, self.strip
        start, stop = lattice.finished(self.row)
        weigh_rows(strip, lattice.tapers[0][self.row])
        if self.begun:
            np.add(strip[:, : lattice.overlap], self.above, out=strip[:, : lattice.overlap])
        np.copyto(self.above, strip[:, lattice.stride :])
        self.row, self.begun = self.row + 1, True
        return strip[:, : stop - start, : lattice.width]


def weigh_rows(strip: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
    """Multiply the rows of a strip (K, n, W) by weights (n,), leaving out those of weight one."""
    (counted,) = np.nonzero(weights != 1)
    for run in np.split(counted, np.nonzero(np.diff(counted) > 1)[0] + 1):
        if len(run):
            part = slice(run[0], run[-1] + 1)
            np.multiply(strip[:, part], weights[part, None], out=strip[:, part])
