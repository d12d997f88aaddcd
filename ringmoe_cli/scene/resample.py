"""Scenes of another ground sampling distance: read at the model's, their maps at their own.

Both ways use a triangle filter, widened where pixels become coarser (so that nothing aliases), with
taps counted from the scene's origin: the same pixel gets the same value whatever is read around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.product import Rows
from ringmoe_cli.scene.maps.strips import Readable
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.stitch import Lattice

TOLERATED = 1.5
"""Ratio of ground sampling distances up to which a model takes a scene as it is."""


@dataclass(frozen=True)
class Axis:
    """How `target` pixels are made of `source` pixels along one axis."""

    source: int
    target: int

    @property
    def step(self) -> float:
        """Source pixels per target pixel."""
        return self.source / self.target

    @property
    def reach(self) -> float:
        """Half the filter's width in source pixels."""
        return max(1.0, self.step)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Source pixels that target pixels start..stop-1 are made of."""
        first = floor((start + 0.5) * self.step - 0.5 - self.reach) + 1
        last = ceil((stop - 0.5) * self.step - 0.5 + self.reach)
        return max(0, min(first, self.source - 1)), min(self.source, max(last, 1))

    def complete(self, rows: int) -> int:
        """Target rows that the first `rows` source rows make complete."""
        if rows >= self.source:
            return self.target
        count = floor((rows - self.reach + 0.5) / self.step + 0.5)
        while count > 0 and self.span(count - 1, count)[1] > rows:
            count -= 1
        return max(count, 0)

    def taps(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Source pixels (n, t) of target pixels start..stop-1 and their weights (n, t), sum 1."""
        centres = (np.arange(start, stop) + 0.5) * self.step - 0.5
        first = np.floor(centres - self.reach).astype(np.int64) + 1
        index = first[:, None] + np.arange(ceil(2 * self.reach))
        weight = np.maximum(0, 1 - np.abs(index - centres[:, None]) / self.reach)
        weight[(index < 0) | (index >= self.source)] = 0
        weight /= weight.sum(1, keepdims=True)
        return np.clip(index, 0, self.source - 1), weight.astype(np.float32)

    def apply(
        self, values: NDArray[np.float32], axis: int, start: int, stop: int, origin: int
    ) -> NDArray[np.float32]:
        """Target pixels start..stop-1 from values whose first pixel along the axis is `origin`."""
        index, weight = self.taps(start, stop)
        shape = [1] * values.ndim
        shape[axis] = stop - start
        out: NDArray[np.float32] | None = None
        last = values.shape[axis] - 1
        for at, share in zip(index.T, weight.T, strict=True):
            part = values.take(np.clip(at - origin, 0, last), axis) * share.reshape(shape)
            out = part if out is None else np.add(out, part, out=out)
        assert out is not None
        return out


class Resampled:
    """A scene read on a coarser or finer grid; reads like the reader it wraps."""

    def __init__(self, reader: Readable, height: int, width: int) -> None:
        """Wrap a reader.

        Raises:
            SceneError: for complex SAR, whose speckle no interpolation survives.
        """
        scene = reader.scene
        if scene.quantity == "complex":
            raise SceneError(
                f"{scene.name}: complex SAR cannot be resampled to the model's ground sampling "
                "distance; pass --gsd with the model's to use it as it is"
            )
        self.reader = reader
        self.rows, self.columns = Axis(scene.grid.height, height), Axis(scene.grid.width, width)
        self.scene: Scene = replace(scene, grid=scene.grid.resized(height, width))

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels and validity; a pixel is valid if half of its filter is."""
        inside = self.scene.grid.clip(window)
        top, bottom = self.rows.span(inside.row, inside.row + inside.height)
        left, right = self.columns.span(inside.col, inside.col + inside.width)
        values, valid = self.reader.physical(Window(top, left, bottom - top, right - left))
        linear = to_linear(np.where(valid, values, 0), self.reader.scene)
        stack = np.concatenate([np.where(valid, linear, np.float32(0)), valid[None]])
        stack = stack.astype(np.float32, copy=False)
        stack = self.rows.apply(stack, 1, inside.row, inside.row + inside.height, top)
        stack = self.columns.apply(stack, 2, inside.col, inside.col + inside.width, left)
        share = stack[-1]
        mean = from_linear(stack[:-1] / np.maximum(share, np.float32(1e-6)), self.reader.scene)
        return padded(mean, share >= 0.5, inside, window)

    def close(self) -> None:
        """Close the reader."""
        self.reader.close()  # type: ignore[attr-defined]


def to_linear(values: NDArray[np.float32], scene: Scene) -> NDArray[np.float32]:
    """What may be averaged: backscatter as power instead of decibels, ratios left out."""
    if scene.modality != "sar-l2":
        return values
    return np.float32(10) ** (values[: len(scene.bands)] / np.float32(10))


def from_linear(values: NDArray[np.float32], scene: Scene) -> NDArray[np.float32]:
    """Inverse of `to_linear`."""
    if scene.modality != "sar-l2":
        return values
    decibels = np.float32(10) * np.log10(np.maximum(values, np.float32(1e-10)))
    if len(scene.channels) == len(decibels):
        return decibels
    return np.concatenate([decibels, decibels[:1] - decibels[1:]])


def padded(
    values: NDArray[np.float32], valid: NDArray[np.bool_], inside: Window, window: Window
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Values of the inner window in a window that may overhang; zero and invalid outside."""
    if inside == window:
        return values, valid
    top, left = inside.row - window.row, inside.col - window.col
    bottom, right = window.height - top - inside.height, window.width - left - inside.width
    around = ((top, bottom), (left, right))
    return np.pad(values, ((0, 0), *around)), np.pad(valid, around)


@dataclass(frozen=True)
class Bands:
    """Which rows of the map a row of windows completes, when map and windows differ in grid."""

    lattice: Lattice
    """Windows on the grid that is read."""
    grid: Grid
    """Grid of the map."""

    @property
    def same(self) -> bool:
        """Whether the map is on the grid that is read."""
        return (self.lattice.height, self.lattice.width) == (self.grid.height, self.grid.width)

    @cached_property
    def rows(self) -> Axis:
        """Map rows from read rows."""
        return Axis(self.lattice.height, self.grid.height)

    @cached_property
    def columns(self) -> Axis:
        """Map columns from read columns."""
        return Axis(self.lattice.width, self.grid.width)

    def of(self, row: int) -> tuple[int, int]:
        """First and last+1 map row that a row of windows completes (may be none)."""
        start, stop = self.lattice.finished(row)
        if self.same:
            return start, stop
        return self.rows.complete(start), self.rows.complete(stop)

    def begin(self, row: int) -> int:
        """The row of windows to begin with, for the map rows of `row` and all after."""
        if self.same:
            return row
        first, _ = self.rows.span(self.of(row)[0], self.of(row)[0] + 1)
        return min(row, first // self.lattice.stride)

    def regrid(self, rows: Iterator[Rows], first: int) -> Iterator[Rows]:
        """Rows on the read grid -> rows of the map, from those of window row `first` on."""
        held: Rows | None = None
        number = self.begin(first)
        for fresh in rows:
            held = join(held, fresh)
            start, stop = self.of(number)
            if number >= first and stop > start:
                held = from_row(held, self.rows.span(start, stop)[0])
                yield self.resampled(held, start, stop)
            number += 1

    def resampled(self, held: Rows, start: int, stop: int) -> Rows:
        """Map rows start..stop-1; their validity is for the caller to say."""
        dense = self.rows.apply(held.dense, 1, start, stop, held.start)
        dense = self.columns.apply(dense, 2, 0, self.grid.width, 0)
        return Rows(start, dense, np.ones(dense.shape[1:], np.bool_))


def join(above: Rows | None, below: Rows) -> Rows:
    """Two neighbouring bands as one."""
    if above is None:
        return Rows(below.start, below.dense.copy(), below.valid)
    dense: NDArray[Any] = np.concatenate([above.dense, below.dense], axis=1)
    return Rows(above.start, dense, np.concatenate([above.valid, below.valid]))


def from_row(rows: Rows, start: int) -> Rows:
    """A band without the rows above `start`."""
    skip = max(0, start - rows.start)
    return Rows(rows.start + skip, rows.dense[:, skip:], rows.valid[skip:])


def model_size(scene: Scene, wanted: float | None) -> tuple[int, int] | None:
    """Height and width of a scene at a model's ground sampling distance; None: as it is."""
    if not wanted or not scene.gsd:
        return None
    ratio = scene.gsd / wanted
    if 1 / TOLERATED <= ratio <= TOLERATED:
        return None
    return max(1, round(scene.grid.height * ratio)), max(1, round(scene.grid.width * ratio))
