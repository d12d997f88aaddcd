"""A scene as the network wants it: normalised rows, each read once, cut into batches of windows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from model.batch import Batch
from model.normalisation import Normalisation
from ringmoe_cli.errors import BadBlockError, SceneError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.stitch import Lattice
from ringmoe_cli.scene.store.ahead import ahead

PIECE = 4096
"""Columns read at a time, a multiple of usual block widths: smaller pieces wake threads more often,
larger ones come too late."""
STRIPS = 2
"""Strips in memory: the one that windows are cut from, and the one above."""
AHEAD = 8
"""Raw pieces that are decoded beforehand: a row of 512 px blocks comes due at once, and is decoded
while windows of several strips are computed."""
CACHED = 1 << 17
"""Numbers that are normalised at a time."""
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

    def found(self, window: Window) -> "Found":
        """What the readers have in a window; of files the raw values, which are smaller."""
        return {m: [found_by(date[m], window) for date in self.dates] for m in self.modalities}

    def put(self, strip: "Strip", found: "Found", top: int, left: int) -> None:
        """Normalise what was found to its place in a strip; some rows at a time stay in cache."""
        for modality, dates in found.items():
            norm = self.normalisation[modality]
            for t, (values, valid) in enumerate(dates):
                height, width = valid.shape
                target = strip.part(slice(top, top + height), slice(left, left + width))
                target.valid[modality][t] = valid
                step = max(1, CACHED // (len(values) * width))
                for first in range(0, height, step):
                    rows = slice(first, first + step)
                    channels = channels_by(self.dates[t][modality], values[:, rows])
                    image = target.images[modality][t, :, rows]
                    norm.apply(channels, valid[None, rows], out=image)


def found_by(reader: Readable, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """What one reader has in a window: raw bands of a file, else physical channels."""
    return reader.read(window) if isinstance(reader, SceneReader) else reader.physical(window)


def channels_by(reader: Readable, values: NDArray[Any]) -> NDArray[np.float32]:
    """The physical channels in what `found_by` gave."""
    return to_physical(values, reader.scene) if isinstance(reader, SceneReader) else values


Found = dict[str, list[tuple[NDArray[Any], NDArray[np.bool_]]]]
"""modality -> per date, raw bands or physical channels (C, h, w) and validity (h, w)."""


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
        some = reduce(np.logical_or, self.valid.values())  # (T, h, w)
        return np.asarray(reduce(np.logical_and, some))

    def part(self, rows: slice, columns: slice) -> "Strip":
        """A part of it, as views."""
        return Strip(
            {m: x[..., rows, columns] for m, x in self.images.items()},
            {m: x[..., rows, columns] for m, x in self.valid.items()},
        )

    def cut(self, lattice: Lattice) -> "Strip":
        """The windows that stand in it, as views with one more axis in front."""
        return Strip(
            {m: each(x, lattice) for m, x in self.images.items()},
            {m: each(x, lattice) for m, x in self.valid.items()},
        )

    def clear(self) -> None:
        """Nothing was measured here."""
        for m, x in self.images.items():
            x[:] = 0
            self.valid[m][:] = False

    def take(self, other: "Strip") -> None:
        """Copy what another strip of the same shape holds."""
        for m, x in other.images.items():
            np.copyto(self.images[m], x)
            np.copyto(self.valid[m], other.valid[m])


@dataclass(frozen=True)
class RowOfWindows:
    """A row of windows of the scene, as views of a strip, and where they hold anything."""

    number: int
    """Row of the lattice."""
    windows: Strip
    """modality -> (columns, T, C, window, window); its memory is used again two rows later."""
    seen: NDArray[np.bool_]
    """`Strip.seen` of the strip, (window, padded width)."""
    whole: dict[str, NDArray[np.bool_]]
    """modality -> which windows are valid in every date and pixel, (columns,)."""
    some: NDArray[np.bool_]
    """Which windows hold a valid pixel, (columns,)."""


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

    The scene is read once, strip by strip, and decoded ahead of the windows; whole batches as cut
    from the scene's origin.
    """
    begin = max(0, first - lattice.reach)
    batches = list(lattice.batches(size, begin, stop))
    if not batches:
        return
    strips = read_strips(source, lattice, batches[0][0][0], batches[-1][-1][0], skip)
    row = next(strips)
    for places in batches:
        gathered = Gathered(source, lattice, len(places))
        finished = {}
        for number, run in groupby(places, key=lambda place: place[0]):
            if number != row.number:
                row = next(strips)
            columns = [column for _, column in run]
            gathered.add(row, columns)
            if columns[-1] == lattice.columns - 1 and first <= number < stop:
                start, end = lattice.finished(number)
                finished[number] = row.seen[: end - start, : lattice.width].copy()
        yield Windows(places, gathered.full, gathered.batch(), finished)


def read_strips(
    source: Normalised, lattice: Lattice, first: int, last: int, skip: "SkipBad"
) -> Iterator[RowOfWindows]:
    """Rows of windows first..last; files are decoded in a thread of their own."""
    spare = [empty_strip(source, lattice.window, lattice.padded_width) for _ in range(STRIPS)]
    views = [strip.cut(lattice) for strip in spare]
    pieces = ahead(read_pieces(source, lattice, first, last, skip), AHEAD)
    for number, parts in groupby(pieces, key=lambda piece: piece[0]):
        strip, above = spare[number % STRIPS], spare[(number - 1) % STRIPS]
        if number > first and lattice.overlap:
            shared, everywhere = slice(lattice.stride, None), slice(None)
            top_rows = strip.part(slice(lattice.overlap), everywhere)
            top_rows.take(above.part(shared, everywhere))
        for _, window, found in parts:
            top, left = window.row - number * lattice.stride, window.col
            if found is None:
                rows, columns = slice(top, top + window.height), slice(left, left + window.width)
                strip.part(rows, columns).clear()
            else:
                source.put(strip, found, top, left)
        yield row_of_windows(number, strip, views[number % STRIPS], lattice)


def row_of_windows(number: int, strip: Strip, windows: Strip, lattice: Lattice) -> RowOfWindows:
    """What is known about the windows that stand in a strip."""
    seen = strip.seen
    whole = {m: np.logical_and.reduce(v, axis=(0, 1)) for m, v in strip.valid.items()}
    return RowOfWindows(
        number,
        windows,
        seen,
        whole={m: np.logical_and.reduce(each(v, lattice), axis=1) for m, v in whole.items()},
        some=np.logical_or.reduce(each(np.logical_or.reduce(seen), lattice), axis=1),
    )


def read_pieces(
    source: Normalised, lattice: Lattice, first: int, last: int, skip: "SkipBad"
) -> Iterator[tuple[int, Window, Found | None]]:
    """What the strips of rows first..last hold, without what they share with the one above."""
    for number in range(first, last + 1):
        known = lattice.overlap if number > first else 0
        for left in range(0, lattice.padded_width, PIECE):
            width = min(PIECE, lattice.padded_width - left)
            top = number * lattice.stride + known
            window = Window(top, left, lattice.window - known, width)
            for part, found in skip.parts(source, window):
                yield number, part, found


class Gathered:
    """Windows on their way into a batch; they are copied at once, as strips are used again."""

    def __init__(self, source: Normalised, lattice: Lattice, count: int) -> None:
        """Make room for `count` windows."""
        self.source = source
        self.offered = 0
        self.full: list[int] = []
        window = lattice.window
        shape = (count, len(source.dates))
        self.images = {
            m: np.empty((*shape, len(source.normalisation[m].bands), window, window), np.float32)
            for m in source.modalities
        }
        self.shape = (*shape, window, window)
        self.valid: dict[str, NDArray[np.bool_]] = {}

    def add(self, row: RowOfWindows, columns: list[int]) -> None:
        """Take the windows at some neighbouring columns of a row, if they hold a valid pixel."""
        some = slice(columns[0], columns[-1] + 1)
        if all(w[some].all() for w in row.whole.values()):
            self.copy(row, some, dict.fromkeys(row.whole, True))
            self.offered += len(columns)
            return
        for column in columns:
            if row.some[column]:
                whole = {m: bool(w[column]) for m, w in row.whole.items()}
                self.copy(row, slice(column, column + 1), whole)
            self.offered += 1

    def copy(self, row: RowOfWindows, some: slice, whole: dict[str, bool]) -> None:
        """Copy neighbouring windows."""
        n, count = len(self.full), some.stop - some.start
        for m in self.images:
            self.images[m][n : n + count] = row.windows.images[m][some]
            if not whole[m]:
                if m not in self.valid:
                    self.valid[m] = np.ones(self.shape, np.bool_)
                self.valid[m][n : n + count] = row.windows.valid[m][some]
        self.full += range(self.offered, self.offered + count)

    def batch(self) -> Batch | None:
        """The batch; validity and channels are named only where something is missing."""
        count = len(self.full)
        if not count:
            return None
        return Batch(
            images={m: torch.from_numpy(x[:count]) for m, x in self.images.items()},
            valid={m: torch.from_numpy(v[:count, :, None]) for m, v in self.valid.items()},
            channels={
                m: torch.from_numpy(np.stack([c] * count)) for m, c in self.source.measured.items()
            },
        )


def each(strip: NDArray[Any], lattice: Lattice) -> NDArray[Any]:
    """Windows along the last axis of a strip as views, (..., padded width) -> (columns, ...)."""
    views = sliding_window_view(strip, lattice.window, axis=-1)[..., :: lattice.stride, :]
    return np.moveaxis(views, -2, 0)


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
        strip = empty_strip(source, window.height, window.width)
        for part, found in self.parts(source, window):
            if found is not None:
                source.put(strip, found, part.row - window.row, part.col - window.col)
        return strip

    def parts(self, source: Normalised, window: Window) -> Iterator[tuple[Window, Found | None]]:
        """What a window holds, in as many parts as it has unreadable places (None)."""
        try:
            yield window, source.found(window)
            return
        except BadBlockError as error:
            if not self.skip:
                raise
            if max(window.height, window.width) <= SMALLEST_BAD:
                self.skipped.append(str(error))
                yield window, None
                return
        for half in halves(window):
            yield from self.parts(source, half)


def empty_strip(source: Normalised, height: int, width: int) -> Strip:
    """An invalid strip of the right shape."""
    dates = len(source.dates)
    images, valid = {}, {}
    for m in source.modalities:
        channels = len(source.normalisation[m].bands)
        images[m] = np.zeros((dates, channels, height, width), np.float32)
        valid[m] = np.zeros((dates, height, width), np.bool_)
    return Strip(images, valid)


def halves(window: Window) -> tuple[Window, Window]:
    """A window cut in two across its longer side."""
    row, col, height, width = window
    if height > width:
        half = height // 2
        return Window(row, col, half, width), Window(row + half, col, height - half, width)
    half = width // 2
    return Window(row, col, height, half), Window(row, col + half, height, width - half)
