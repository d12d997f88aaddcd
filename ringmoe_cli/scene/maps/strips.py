"""A scene as the network wants it: normalised rows, each read once, cut into batches of windows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from model.normalisation import Normalisation
from ringmoe_cli.errors import BadBlockError, SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.stitch import Lattice

PIECE = 2048
"""Columns read and normalised at a time: a multiple of usual block widths, small beside a strip."""
SMALLEST_BAD = 64
"""Side in pixels down to which unreadable places are narrowed."""


class Readable(Protocol):
    """What can be predicted: a `SceneReader` of a file, a `StoredScene`, an array in a test."""

    @property
    def scene(self) -> Scene:
        """What is known about it."""

    def physical(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Physical channels (C, h, w) and validity (h, w) of a window that may overhang."""


@dataclass(frozen=True)
class Normalised:
    """Co-registered readers and what normalises them."""

    dates: Sequence[Mapping[str, Readable]]
    """One mapping modality -> reader per date; one date, or two for change."""
    normalisation: Mapping[str, Normalisation]
    """modality -> how its physical values become input."""

    def __post_init__(self) -> None:
        grids = [reader.scene.grid for date in self.dates for reader in date.values()]
        for grid in grids[1:]:
            if (grid.height, grid.width) != (grids[0].height, grids[0].width):
                raise SceneError(
                    f"scenes of one place must have the same pixels: {grids[0].height} x "
                    f"{grids[0].width} and {grid.height} x {grid.width}; warp one to the other"
                )

    @property
    def grid(self) -> Grid:
        """The grid of all readers."""
        return next(iter(self.dates[0].values())).scene.grid

    @property
    def modalities(self) -> tuple[str, ...]:
        """What is read, in order."""
        return tuple(self.dates[0])

    @cached_property
    def measured(self) -> dict[str, NDArray[np.bool_]]:
        """Modality -> which channels come from measured bands (C,), where not all do."""
        found = {}
        for modality, reader in self.dates[0].items():
            missing = {b.name for b in reader.scene.bands if not b.measured}
            if missing:
                names = self.normalisation[modality].bands
                found[modality] = np.array([n.split("_")[0] not in missing for n in names])
        return found

    def read(self, window: Window) -> "Strip":
        """Normalised values and validity of a window."""
        images, valid = {}, {}
        for modality in self.modalities:
            norm = self.normalisation[modality]
            parts = [date[modality].physical(window) for date in self.dates]
            images[modality] = stacked([norm.apply(v, ok[None]) for v, ok in parts])
            valid[modality] = stacked([ok for _, ok in parts])
        return Strip(images, valid)


@dataclass(frozen=True)
class Strip:
    """Rows of a scene, ready for the network."""

    images: dict[str, NDArray[np.float32]]
    """modality -> (T, C, h, w)."""
    valid: dict[str, NDArray[np.bool_]]
    """modality -> (T, h, w)."""

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Where every date has a measurement of some modality, (h, w)."""
        some = stacked(list(self.valid.values()))  # (M, T, h, w)
        return np.asarray(some.any(axis=0).all(axis=0))

    def rows_from(self, top: int) -> "Strip":
        """The rows from `top` on, as views."""
        return Strip(
            {m: x[..., top:, :] for m, x in self.images.items()},
            {m: x[..., top:, :] for m, x in self.valid.items()},
        )

    def fill(self, top: int, left: int, part: "Strip") -> None:
        """Put a smaller strip in its place."""
        for mine, its in ((self.images, part.images), (self.valid, part.valid)):
            for m, values in its.items():
                height, width = values.shape[-2:]
                mine[m][..., top : top + height, left : left + width] = values


@dataclass(frozen=True)
class Windows:
    """Some windows of a scene on their way through the network."""

    places: list[tuple[int, int]]
    """(row, column) of each window in the lattice; of empty ones too."""
    full: list[int]
    """Which of them hold a valid pixel: those in `batch`, in order."""
    batch: Batch | None
    """Their images; None if all are empty."""
    finished: dict[int, NDArray[np.bool_]]
    """Rows of windows that are complete with this batch -> validity of the rows they finish."""


def window_batches(
    source: Normalised, lattice: Lattice, size: int, first: int, stop: int, skip: "SkipBad"
) -> Iterator[Windows]:
    """Windows of the lattice's rows first..stop-1, and of the rows before that reach into them.

    The scene is read once, strip by strip; whole batches as cut from the scene's origin.
    """
    strips = Rows(source, lattice, skip)
    begin = max(0, first - lattice.reach)
    for places in lattice.batches(size, begin, stop):
        cut = [strips.window(row, column) for row, column in places]
        full = [i for i, part in enumerate(cut) if part.seen.any()]
        last = places[-1]
        ends = last[1] == lattice.columns - 1
        complete = range(max(first, places[0][0]), min(stop, last[0] + ends))
        finished = {row: strips.seen(row) for row in complete}
        batch = collate([cut[i] for i in full], source.measured) if full else None
        yield Windows(places, full, batch, finished)


class Rows:
    """The rows of windows in use, each a strip of the scene `window` pixels high."""

    def __init__(self, source: Normalised, lattice: Lattice, skip: "SkipBad") -> None:
        self.source, self.lattice, self.skip = source, lattice, skip
        self.strips: dict[int, Strip] = {}
        self.validity: dict[int, NDArray[np.bool_]] = {}

    def window(self, row: int, column: int) -> Strip:
        """One window of the lattice, as views."""
        if row not in self.strips:
            self.load(row)
        left = column * self.lattice.stride
        columns = slice(left, left + self.lattice.window)
        strip = self.strips[row]
        return Strip(
            {m: x[..., columns] for m, x in strip.images.items()},
            {m: x[..., columns] for m, x in strip.valid.items()},
        )

    def load(self, row: int) -> None:
        """Read what the strip does not share with the one above, and let that one go."""
        lattice = self.lattice
        strip = empty_strip(self.source, lattice.window, lattice.padded_width)
        above = self.strips.pop(row - 1, None)
        known = lattice.overlap if above else 0
        if above and known:
            strip.fill(0, 0, above.rows_from(lattice.stride))
        top = row * lattice.stride + known
        for left in range(0, lattice.padded_width, PIECE):
            width = min(PIECE, lattice.padded_width - left)
            window = Window(top, left, lattice.window - known, width)
            strip.fill(known, left, self.skip.read(self.source, window))
        self.strips = {row: strip}
        start, end = lattice.finished(row)
        self.validity[row] = strip.seen[: end - start, : lattice.width]

    def seen(self, row: int) -> NDArray[np.bool_]:
        """Validity of the scene rows that a row of windows finishes."""
        return self.validity.pop(row)


class SkipBad:
    """What to do about blocks that cannot be decoded: fail, or leave them out and count them."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.skipped: list[str] = []

    def read(self, source: Normalised, window: Window) -> Strip:
        """Read a window; unreadable places become invalid if skipping.

        Raises:
            BadBlockError: if not skipping.
        """
        try:
            return source.read(window)
        except BadBlockError as error:
            if not self.skip:
                raise
            if max(window.height, window.width) <= SMALLEST_BAD:
                self.skipped.append(str(error))
                return empty_strip(source, window.height, window.width)
        return join_halves(window, *(self.read(source, half) for half in halves(window)))


def empty_strip(source: Normalised, height: int, width: int) -> Strip:
    """An invalid strip of the right shape."""
    dates = len(source.dates)
    images, valid = {}, {}
    for m in source.modalities:
        channels = len(source.normalisation[m].bands)
        images[m] = np.zeros((dates, channels, height, width), np.float32)
        valid[m] = np.zeros((dates, height, width), np.bool_)
    return Strip(images, valid)


def stacked(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """Arrays along a new first axis; a single one is not copied."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def halves(window: Window) -> tuple[Window, Window]:
    """A window cut in two across its longer side."""
    row, col, height, width = window
    if height > width:
        half = height // 2
        return Window(row, col, half, width), Window(row + half, col, height - half, width)
    half = width // 2
    return Window(row, col, height, half), Window(row, col + half, height, width - half)


def join_halves(window: Window, first: Strip, second: Strip) -> Strip:
    """Inverse of `halves` for what was read."""
    axis = -2 if window.height > window.width else -1
    return Strip(
        {m: np.concatenate([x, second.images[m]], axis) for m, x in first.images.items()},
        {m: np.concatenate([x, second.valid[m]], axis) for m, x in first.valid.items()},
    )


def collate(parts: list[Strip], measured: Mapping[str, NDArray[np.bool_]]) -> Batch:
    """Windows as one batch; validity and channels are named only where something is missing."""
    images, valid = {}, {}
    for m in parts[0].images:
        images[m] = torch.from_numpy(np.stack([p.images[m] for p in parts]))
        if not all(p.valid[m].all() for p in parts):
            mask = np.stack([p.valid[m] for p in parts])
            valid[m] = torch.from_numpy(mask[:, :, None])
    channels = {m: torch.from_numpy(np.stack([c] * len(parts))) for m, c in measured.items()}
    return Batch(images=images, valid=valid, channels=channels)
