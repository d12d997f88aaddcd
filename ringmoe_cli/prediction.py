"""From a scene to its map: rows of answers become bands on disk, bands become a map.

Finished bands survive whatever stops a run; the next one continues after them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ringmoe_cli import console
from ringmoe_cli.answers import Clock, Network, Settings, lattice_of, predict_rows
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.part import Part
from ringmoe_cli.scene.product import Encoded, Product, Rows
from ringmoe_cli.scene.resample import Bands
from ringmoe_cli.scene.stitch import Lattice
from ringmoe_cli.scene.strips import Normalised, SkipBad
from ringmoe_cli.scene.writer import MapWriter

T = TypeVar("T")


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
    finish: Callable[[Report], None] | None = None,
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
        finish: writes what is no map, from the report, before the work in progress is dropped.

    Raises:
        RingmoeError: for unreadable scenes and unwritable outputs.
    """
    start = time.perf_counter()
    own = original or source
    report, skip, clock = Report(dict(outputs)), SkipBad(skip_bad), Clock()
    lattice = lattice_of(source, settings).shrunk(settings.cell)
    bands = Bands(lattice, cells_of(own.grid, settings.cell))
    identity = {**(about or {}), "settings": asdict(settings), "layers": sorted(outputs)}
    with Part(next(iter(outputs.values())), identity) as part:
        done = finished_rows(part, bands)
        report.resumed_rows = bands.of(done - 1)[1] if done else 0
        fresh = map_rows(network, source, own, settings, product.channels, bands, done, skip, clock)
        whole = saved(part, bands, done, encoded(product, fresh))
        with maps(outputs, product, bands.grid, part.folder, options) as writers:
            for row, band in watched(whole, bands.lattice, done):
                write_band(writers, report, row, band)
        if finish:
            finish(report)
    report.skipped, report.forward_seconds = skip.skipped, clock.seconds
    report.seconds = time.perf_counter() - start
    return report


def cells_of(grid: Grid, cell: int) -> Grid:
    """The grid of squares of `cell` pixels; the last ones may hang over the scene."""
    if cell == 1:
        return grid
    height, width = -(-grid.height // cell), -(-grid.width // cell)
    return grid.crop(Window(0, 0, height * cell, width * cell)).resized(height, width)


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
    if bands.same:
        yield from rows
        return
    for some in bands.regrid(rows, first):
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


def encoded(product: Product, fresh: Iterator[Rows]) -> Iterator[tuple[int, Encoded]]:
    """First row of each band, and the band as it is stored; lets go of the rows at once."""
    for rows in fresh:
        start, band = rows.start, product.encode(rows)
        del rows
        yield start, band


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
