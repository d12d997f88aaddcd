"""From a scene to its map: rows of answers become bands on disk, bands become a map.

Finished bands survive whatever stops a run; the next one continues after them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ringmoe_cli import console
from ringmoe_cli.jobs.answers import Network, Settings, lattice_of, predict_rows
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.part import Part
from ringmoe_cli.scene.maps.product import Encoded, Product, Rows
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad
from ringmoe_cli.scene.maps.warp import Warp, WarpedWriter
from ringmoe_cli.scene.maps.zarrmap import ZarrWriter
from ringmoe_cli.scene.resample import Bands
from ringmoe_cli.scene.stitch import Lattice
from ringmoe_cli.scene.store.ahead import ahead
from ringmoe_cli.scene.writer import Layer, MapWriter

T = TypeVar("T")
RUN = 8
"""Rows of windows that one worker computes at a time, with those before that reach into them."""


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
    resumed_rows: int = 0
    """Rows that an earlier run had finished."""


@dataclass(frozen=True)
class Job:
    """Everything that decides the bands of one scene's map."""

    network: Network
    """What predicts windows."""
    source: Normalised
    """The scene as the model wants it."""
    product: Product
    """What to make of the network's answer."""
    settings: Settings
    """Window, overlap, batch, flips."""
    original: Normalised | None = None
    """The scene on its own grid, if `source` is resampled; the map is on this grid."""
    skip_bad: bool = False
    """Leave unreadable places out instead of failing."""

    @property
    def own(self) -> Normalised:
        """The scene on its own grid."""
        return self.original or self.source

    @cached_property
    def bands(self) -> Bands:
        """Which rows of the map each row of windows completes."""
        lattice = lattice_of(self.source, self.settings).shrunk(self.settings.cell)
        return Bands(lattice, cells_of(self.own.grid, self.settings.cell))

    def rows(self, first: int, stop: int, skip: SkipBad) -> Iterator[Rows]:
        """Rows of the map that rows of windows first..stop-1 complete, valid where the scene is."""
        if first >= stop:
            return
        begin = self.bands.begin(first)
        rows = predict_rows(
            self.network,
            self.source,
            self.settings,
            self.product.channels,
            begin,
            stop,
            skip,
        )
        if self.bands.same:
            yield from rows
            return
        for some in self.bands.regrid(rows, first):
            window = Window(some.start, 0, some.dense.shape[1], self.own.grid.width)
            yield replace(some, valid=skip.read(self.own, window).seen)

    def encoded(self, first: int, stop: int, skip: SkipBad) -> Iterator[tuple[int, Encoded]]:
        """First row of each band, and the band as it is stored; lets go of the rows at once."""
        for rows in self.rows(first, stop, skip):
            start, band = rows.start, self.product.encode(rows)
            del rows
            yield start, band

    def close(self) -> None:
        """Close the scene's files."""
        for date in self.own.dates:
            for reader in date.values():
                getattr(reader, "close", lambda: None)()


Crew = Callable[[Path, list[tuple[int, int]]], Iterator[list[str]]]
"""Other processes: given the folder of bands and runs of rows of windows, they save the bands of
these runs there. Yields, run by run, the unreadable places left out."""


def predict_scene(
    job: Job,
    outputs: Mapping[str, Path],
    *,
    about: Mapping[str, Any] | None = None,
    options: Mapping[str, str] | None = None,
    warp: Warp | None = None,
    finish: Callable[[Report], None] | None = None,
    crew: Crew | None = None,
) -> Report:
    """Write the maps of one scene; continue where an interrupted run with the same inputs stopped.

    Args:
        job: network, scene, product, settings.
        outputs: layer -> file; the first one's name is also that of the work in progress.
        about: what identifies scene and model, besides the settings.
        options: creation options of the COG driver.
        warp: where the maps shall lie; None: on the scene's grid.
        finish: writes what is no map, from the report, before the work in progress is dropped.
        crew: other processes that compute the bands; None: this one does.

    Raises:
        RingmoeError: for unreadable scenes and unwritable outputs.
    """
    start = time.perf_counter()
    bands, rows = job.bands, job.bands.lattice.rows
    report, skip = Report(dict(outputs)), SkipBad(job.skip_bad)
    identity = {**(about or {}), "settings": asdict(job.settings), "layers": sorted(outputs)}
    with Part(next(iter(outputs.values())), identity) as part:
        if crew:
            skip.skipped += by_others(crew, part, bands)
        done = rows if crew else finished_rows(part, bands)
        report.resumed_rows = bands.of(done - 1)[1] if done and not crew else 0
        fresh = ahead(job.encoded(done, rows, skip), 1)  # blended beside saving and writing
        whole = saved(part, bands, done, fresh)
        with maps(outputs, job.product, bands.grid, part.folder, options, warp) as writers:
            for row, band in watched(whole, bands.lattice, done):
                write_band(writers, report, row, band)
        if finish:
            finish(report)
    report.skipped, report.seconds = skip.skipped, time.perf_counter() - start
    return report


def by_others(crew: Crew, part: Part, bands: Bands) -> list[str]:
    """Let other processes compute what no earlier run has left; returns what they left out."""
    todo = missing_runs(part, bands)
    skipped: list[str] = []
    with console.progress(sum(stop - first for first, stop in todo), "predict", "rows") as advance:
        for left_out in crew(part.folder, todo):
            advance(bands.lattice.rows / max(len(todo), 1))
            skipped += left_out
    return skipped


def missing_runs(part: Part, bands: Bands) -> list[tuple[int, int]]:
    """Runs of at most `RUN` rows of windows whose bands are not all on disk."""
    runs = []
    for first in range(0, bands.lattice.rows, RUN):
        stop = min(first + RUN, bands.lattice.rows)
        spans = [bands.of(row) for row in range(first, stop)]
        if any(b > a and not part.has(a) for a, b in spans):
            runs.append((first, stop))
    return runs


def cells_of(grid: Grid, cell: int) -> Grid:
    """The grid of squares of `cell` pixels; the last ones may hang over the scene."""
    if cell == 1:
        return grid
    height, width = -(-grid.height // cell), -(-grid.width // cell)
    return grid.crop(Window(0, 0, height * cell, width * cell)).resized(height, width)


def finished_rows(part: Part, bands: Bands) -> int:
    """Rows of windows whose bands an earlier run has left, counted from the top."""
    if not part.resumed:
        return 0
    for row in range(bands.lattice.rows):
        start, stop = bands.of(row)
        if stop > start and part.load(start) is None:
            return row
    return bands.lattice.rows


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
    warp: Warp | None,
) -> Iterator[dict[str, MapWriter | ZarrWriter]]:
    """A writer per layer; all appear when all are whole."""

    def writer(layer: Layer) -> MapWriter | ZarrWriter:
        if outputs[layer.name].suffix == ".zarr":
            return ZarrWriter(outputs[layer.name], layer, grid, work)
        if warp:
            return WarpedWriter(outputs[layer.name], layer, grid, work, options, warp)
        return MapWriter(outputs[layer.name], layer, grid, work, options)

    with ExitStack() as stack:
        writers: dict[str, MapWriter | ZarrWriter] = {}
        for layer in product.layers:
            writers[layer.name] = writer(layer)
            stack.enter_context(writers[layer.name])
        yield writers


def write_band(
    writers: Mapping[str, MapWriter | ZarrWriter], report: Report, row: int, band: Encoded
) -> None:
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
