"""From a scene to its map: read, normalise, forward, blend, write, each beside the others.

Everything that decides a map's bits is counted from the scene's origin (windows, batches, bands),
so that a resumed or divided run does the same arithmetic as an undisturbed one.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch, Prediction
from ringmoe_cli import console
from ringmoe_cli.scene.ahead import ahead
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.part import Part
from ringmoe_cli.scene.product import Encoded, Product, Rows
from ringmoe_cli.scene.resample import Bands
from ringmoe_cli.scene.stitch import Lattice, Stitcher
from ringmoe_cli.scene.strips import Normalised, SkipBad, Windows, window_batches
from ringmoe_cli.scene.writer import MapWriter

T = TypeVar("T")
BATCH_PIXELS = 8 * 192 * 192
"""Pixels per batch on a CPU: enough tokens per expert, and little memory."""
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

    @classmethod
    def of(
        cls,
        window: int,
        overlap: float | None = None,
        batch: int | None = None,
        device: str = "cpu",
        flips: bool = False,
    ) -> "Settings":
        """Settings with their defaults: a quarter of overlap, batches of a fixed pixel count."""
        pixels = BATCH_PIXELS * (GPU_BATCHES if device.startswith("cuda") else 1)
        share = 0.25 if overlap is None else overlap
        pixels_shared = round(share * window) if share < 1 else round(share)
        return cls(window, pixels_shared, batch or max(1, pixels // window**2), device, flips)


@dataclass
class Report:
    """What came out of a scene."""

    outputs: dict[str, Path]
    """Layer -> file."""
    sums: list[tuple[int, int, Encoded]] = field(default_factory=list)
    """(first row, rows, the product's sums) of every band."""
    skipped: list[str] = field(default_factory=list)
    """Unreadable places left out."""
    seconds: float = 0.0
    """Time of this run."""
    forward_seconds: float = 0.0
    """Of it, inside the network (other work goes on beside it)."""
    resumed_rows: int = 0
    """Rows that an earlier run had finished."""


def predict_scene(
    network: Network,
    source: Normalised,
    product: Product,
    outputs: Mapping[str, Path],
    settings: Settings,
    *,
    original: Normalised | None = None,
    about: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    skip_bad: bool = False,
) -> Report:
    """Write the maps of one scene; continue where an interrupted run with the same inputs stopped.

    Args:
        network: what predicts windows.
        source: the scene as the model wants it.
        product: what to make of the network's answer.
        outputs: layer -> file; the first one's name is also that of the work in progress.
        settings: window, overlap, batch, flips.
        original: the scene on its own grid, if `source` is resampled; the map is on this grid.
        about: what identifies scene and model, besides the settings.
        options: creation options of the COG driver.
        skip_bad: leave unreadable places out instead of failing.

    Raises:
        RingmoeError: for unreadable scenes and unwritable outputs.
    """
    start = time.perf_counter()
    own = original or source
    report, skip, clock = Report(dict(outputs)), SkipBad(skip_bad), Clock()
    bands = Bands(lattice_of(source, settings), own.grid)
    identity = {**(about or {}), "settings": asdict(settings), "layers": sorted(outputs)}
    with Part(next(iter(outputs.values())), identity) as part:
        done = finished_rows(part, bands)
        report.resumed_rows = bands.of(done - 1)[1] if done else 0
        fresh = map_rows(network, source, own, settings, product.channels, bands, done, skip, clock)
        whole = saved(part, bands, done, (encode(product, rows) for rows in fresh))
        with maps(outputs, product, own.grid, part.folder, options) as writers:
            for row, band in watched(whole, bands.lattice, done):
                write_band(writers, report, row, band)
    report.skipped, report.forward_seconds = skip.skipped, clock.seconds
    report.seconds = time.perf_counter() - start
    return report


def map_rows(
    network: Network,
    source: Normalised,
    own: Normalised,
    settings: Settings,
    channels: int,
    bands: Bands,
    first: int,
    skip: SkipBad,
    clock: "Clock",
) -> Iterator[Rows]:
    """Rows of the map on the scene's own grid, valid where the scene is."""
    if first >= bands.lattice.rows:
        return
    begin = bands.begin(first)
    rows = predict_rows(network, source, settings, channels, begin, skip=skip, clock=clock)
    for some in bands.regrid(rows, first):
        if bands.same:
            yield some
        else:
            window = Window(some.start, 0, some.dense.shape[1], own.grid.width)
            yield replace(some, valid=skip.read(own, window).seen)


def finished_rows(part: Part, bands: Bands) -> int:
    """Rows of windows whose bands an earlier run has left, counted from the top."""
    if not part.resumed:
        return 0
    for row in range(bands.lattice.rows):
        start, stop = bands.of(row)
        if stop > start and part.load(start) is None:
            return row
    return bands.lattice.rows


def encode(product: Product, rows: Rows) -> tuple[int, Encoded]:
    """First row of a band, and the band as it is stored."""
    return rows.start, product.encode(rows)


def saved(
    part: Part, bands: Bands, done: int, fresh: Iterator[tuple[int, Encoded]]
) -> Iterator[tuple[int, Encoded]]:
    """All bands from the top: those on disk, then the fresh ones, each safe before the next."""
    for row in range(done):
        start, stop = bands.of(row)
        if stop > start:
            band = part.load(start)
            assert band is not None
            yield start, band
    for start, band in fresh:
        part.save(start, band)
        yield start, band


@contextmanager
def maps(
    outputs: Mapping[str, Path],
    product: Product,
    grid: Grid,
    work: Path,
    options: Mapping[str, str] | None,
) -> Iterator[dict[str, MapWriter]]:
    """A writer per layer; all appear when all are whole."""
    with ExitStack() as stack:
        yield {
            layer.name: stack.enter_context(
                MapWriter(outputs[layer.name], layer, grid, work, options)
            )
            for layer in product.layers
        }


def write_band(writers: Mapping[str, MapWriter], report: Report, row: int, band: Encoded) -> None:
    """Append a band to every map; remember its sums."""
    height = 0
    for name, writer in writers.items():
        writer.write(band[name])
        height = band[name].shape[1]
    sums = {name: values for name, values in band.items() if name not in writers}
    report.sums.append((row, height, sums))


def watched(bands: Iterator[T], lattice: Lattice, done: int) -> Iterator[T]:
    """The same bands, with progress in windows on stderr."""
    with console.progress(lattice.rows * lattice.columns, "predict", "windows") as advance:
        for row, band in enumerate(bands):
            if row >= done:
                advance(lattice.columns)
            yield band


def predict_rows(
    network: Network,
    source: Normalised,
    settings: Settings,
    channels: int,
    first: int = 0,
    stop: int | None = None,
    skip: SkipBad | None = None,
    clock: "Clock | None" = None,
) -> Iterator[Rows]:
    """Blended rows of a scene, in order, while windows further down are read and computed.

    Args:
        network: called with batches of windows; its answer must be dense.
        source: the scene.
        settings: window, overlap, batch.
        channels: K of the network's answer.
        first: first row of windows to finish.
        stop: one past the last; None means all.
        skip: what to do about unreadable blocks.
        clock: counts the time in the network.
    """
    lattice = lattice_of(source, settings)
    stop = lattice.rows if stop is None else stop
    skip, clock = skip or SkipBad(), clock or Clock()
    windows = window_batches(source, lattice, settings.batch, first, stop, skip)
    answers = ahead(forward(network, ahead(windows), settings, clock))
    stitcher = Stitcher(lattice, channels, first)
    for some, dense in answers:
        yield from blend(stitcher, some, dense)


def lattice_of(source: Normalised, settings: Settings) -> Lattice:
    """The windows of a scene."""
    grid = source.grid
    return Lattice(grid.height, grid.width, settings.window, settings.overlap)


def blend(stitcher: Stitcher, some: Windows, dense: NDArray[np.float32] | None) -> Iterator[Rows]:
    """Add a batch of answers window by window; yield rows as they become complete."""
    columns = stitcher.lattice.columns
    answer = dict(zip(some.full, dense, strict=True)) if dense is not None else {}
    for i, (row, column) in enumerate(some.places):
        if i in answer:
            stitcher.add(row, column, answer[i])
        if column == columns - 1 and row in some.finished:
            start = stitcher.lattice.finished(row)[0]
            yield Rows(start, stitcher.finish(), some.finished[row])


def forward(
    network: Network, batches: Iterable[Windows], settings: Settings, clock: "Clock"
) -> Iterator[tuple[Windows, NDArray[np.float32] | None]]:
    """Answers (b, K, window, window) to the full windows of each batch.

    On a GPU the next batch is on its way before the previous answer is fetched.
    """
    ask = mirrored if settings.flips else plain
    waiting: list[tuple[Windows, Tensor | None]] = []
    for some in batches:
        with clock, torch.inference_mode():
            dense = ask(network, sent(some.batch, settings.device)) if some.batch else None
            waiting.append((some, dense))
            if len(waiting) > settings.device.startswith("cuda"):
                done = waiting.pop(0)
                got = fetched(done[1])
            else:
                continue
        yield done[0], got
    for some, late in waiting:
        yield some, fetched(late)


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
        answers.append(plain(network, Batch(images=images, valid=valid)).flip(axes))
    return torch.stack(answers).mean(0)


def sent(batch: Batch, device: str) -> Batch:
    """The batch on its device, through pinned memory if that is a GPU."""
    if device == "cpu":
        return batch
    pinned = Batch(
        images={m: x.pin_memory() for m, x in batch.images.items()},
        valid={m: x.pin_memory() for m, x in batch.valid.items()},
    )
    return pinned.to(device)


def fetched(dense: Tensor | None) -> NDArray[np.float32] | None:
    """An answer in main memory."""
    return None if dense is None else dense.float().cpu().numpy()


class Clock:
    """Adds up the time spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.start
