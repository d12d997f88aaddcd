"""What a network says about a scene: windows read, normalised, computed and blended at once.

Everything that decides the bits is counted from the scene's origin (windows, batches, bands), so
that a resumed or divided run does the same arithmetic as an undisturbed one.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch, Prediction
from ringmoe_cli.jobs.compute import Handful, each, in_order, lanes
from ringmoe_cli.jobs.lane import Fetched, Lane
from ringmoe_cli.scene.maps.product import Rows
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad, Windows, window_batches
from ringmoe_cli.scene.stitch import Lattice, Stitcher
from ringmoe_cli.scene.store.ahead import ahead

PIXELS = 4 * 192 * 192
"""Pixels at work at once on a CPU: enough tokens per expert, and little memory."""
GPU_BATCHES = 4
"""Times as many on a GPU."""


class Network(Protocol):
    """What predicts windows: a `TaskNetwork`, or anything that answers like one."""

    def predict(self, batch: Batch) -> Prediction:
        """Something dense about every window."""


@dataclass(frozen=True)
class Settings:
    """What decides the bits of a map besides scene and model."""

    window: int
    """Side of a window in pixels."""
    overlap: int
    """Pixels shared by neighbours."""
    batch: int
    """Windows per batch."""
    device: str = "cpu"
    """Where the network is."""
    flips: bool = False
    """Average the answers to the four mirror images of each window."""
    cell: int = 1
    """Side in pixels of the squares that the network speaks about."""
    bf16: bool = False
    """The encoder computes in bfloat16."""
    int8: bool = False
    """The experts are 8-bit integers."""

    @classmethod
    def of(
        cls,
        window: int,
        overlap: float | None = None,
        batch: int | None = None,
        device: str = "cpu",
        flips: bool = False,
        alone: bool = False,
    ) -> "Settings":
        """Settings with their defaults: a quarter of overlap, batches of a fixed pixel count.

        Batches that are computed side by side (`compute.lanes`) share these pixels.
        """
        pixels = PIXELS // lanes(device, alone) * (GPU_BATCHES if device.startswith("cuda") else 1)
        share = 0.25 if overlap is None else overlap
        pixels_shared = round(share * window) if share < 1 else round(share)
        return cls(window, pixels_shared, batch or max(1, pixels // window**2), device, flips)


def predict_rows(
    network: Network,
    source: Normalised,
    settings: Settings,
    channels: int,
    first: int = 0,
    stop: int | None = None,
    skip: SkipBad | None = None,
) -> Iterator[Rows]:
    """Blended rows of a scene, in order, while windows further down are read and computed.

    Rows are valid until the next ones are asked for: their memory is used again.

    Args:
        network: called with batches of windows; its answer must be dense.
        source: the scene.
        settings: window, overlap, batch.
        channels: K of the network's answer.
        first: first row of windows to finish.
        stop: one past the last; None means all.
        skip: what to do about unreadable blocks.
    """
    lattice = lattice_of(source, settings)
    stop = lattice.rows if stop is None else stop
    windows = window_batches(source, lattice, settings.batch, first, stop, skip or SkipBad())
    stitcher = Stitcher(lattice.shrunk(settings.cell), channels, first)
    for some, dense in forward(network, windows, settings):
        yield from blend(stitcher, some, dense, settings.cell)


def lattice_of(source: Normalised, settings: Settings) -> Lattice:
    """The windows of a scene."""
    grid = source.grid
    return Lattice(grid.height, grid.width, settings.window, settings.overlap)


def blend(
    stitcher: Stitcher, some: Windows, dense: NDArray[np.float32] | None, cell: int = 1
) -> Iterator[Rows]:
    """Add a batch of answers, neighbours at once; yield rows as they become complete."""
    last, full, done = stitcher.lattice.columns - 1, set(some.full), 0
    numbers = range(len(some.places))
    for (row, speaks), run in groupby(numbers, lambda i: (some.places[i][0], i in full)):
        columns = [some.places[i][1] for i in run]
        if speaks and dense is not None:
            stitcher.add(row, columns[0], dense[done : done + len(columns)])
            done += len(columns)
        else:
            stitcher.skip(row, columns[0], len(columns))
        if columns[-1] == last and row == stitcher.row:
            rows = stitcher.finish()
            if row in some.finished:
                start = stitcher.lattice.finished(row)[0]
                yield Rows(start, rows, any_in_cells(some.finished[row], cell))


def any_in_cells(valid: NDArray[np.bool_], cell: int) -> NDArray[np.bool_]:
    """Whether a square of `cell` pixels holds a valid one, (h, w) -> (ceil(h/cell), ...)."""
    if cell == 1:
        return valid
    height, width = valid.shape
    padded = np.pad(valid, ((0, -height % cell), (0, -width % cell)))
    parts = padded.reshape(padded.shape[0] // cell, cell, padded.shape[1] // cell, cell)
    return np.asarray(parts.any(axis=(1, 3)))


def forward(
    network: Network, batches: Iterable[Windows], settings: Settings
) -> Iterator[tuple[Windows, NDArray[np.float32] | None]]:
    """Answers (b, K, window, window) to the full windows of each batch, which are cut ahead.

    On a GPU the next batch is computed while the previous answer is fetched, in bfloat16 where
    autocast allows.
    """
    ask, lane = mirrored if settings.flips else plain, Lane(settings.device)
    handful = Handful()

    def answer(some: Windows) -> Fetched | None:
        if some.batch is None:
            return None
        with torch.inference_mode(), lane.precision():
            return Fetched(ask(network, lane.send(some.batch)))

    def answers(several: list[Windows]) -> list[Future[Fetched | None]]:
        start = perf_counter()
        outcomes = each(answer, several)
        sizes = [bytes_of(outcome) for outcome in outcomes]
        if any(sizes) and lane.stream is None:  # a GPU is not done yet; empty batches take no time
            handful.took(len(sizes) - sizes.count(0), perf_counter() - start, sum(sizes))
        return outcomes

    with closing(ahead(handful.of(batches), 1)) as handfuls:
        for several, outcomes in in_order(answers, handfuls):
            for some, outcome in zip(several, outcomes, strict=False):  # an exception ends them
                late = outcome.result()
                yield some, late.numpy() if late else None


def bytes_of(outcome: Future[Fetched | None]) -> int:
    """Bytes of an answer; 0 if there is none."""
    late = None if outcome.exception() else outcome.result()
    return late.host.nbytes if late else 0


def plain(network: Network, batch: Batch) -> Tensor:
    """The network's dense answer to a batch.

    Raises:
        ValueError: if it says nothing about pixels.
    """
    dense = network.predict(batch).dense
    if dense is None:
        raise ValueError("this model says nothing about single pixels; it cannot make a map")
    return dense


def mirrored(network: Network, batch: Batch) -> Tensor:
    """Mean answer to the four mirror images of a batch, mirrored back."""
    answers = []
    for axes in ((), (-1,), (-2,), (-2, -1)):
        images = {m: x.flip(axes) for m, x in batch.images.items()}
        valid = {m: x.flip(axes) for m, x in batch.valid.items()}
        flipped = Batch(images=images, valid=valid, channels=batch.channels)
        answers.append(plain(network, flipped).flip(axes))
    return torch.stack(answers).mean(0)


def answered(
    network: Network, batches: Iterable[Windows], device: str
) -> Iterator[tuple[Windows, Prediction]]:
    """Batches with a full window, and what the network says about these."""

    def ask(some: Windows) -> Prediction | None:
        if some.batch is None:
            return None
        with torch.inference_mode():
            return network.predict(some.batch.to(device))

    for some, answer in in_order(ask, batches):
        if answer is not None:
            yield some, answer
