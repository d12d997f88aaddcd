"""From scenes to a tile store: decide the regions, run them on an engine, gather their sums.

Work grows in `OUT.part` with a manifest of finished regions, each line synced to disk. A run that
was interrupted is continued by the same command, bit for bit; the final name appears by rename.
"""

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ringmoe_cli.cluster import Engine
from ringmoe_cli.errors import LabelError, OutputExistsError, StoreError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labels import LabelSource
from ringmoe_cli.scene.raster import file_stamp, open_raster
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.store import layout
from ringmoe_cli.scene.store.regions import (
    Region,
    Source,
    gdal_settings,
    region_windows,
    stored_checksums,
    write_region,
)
from ringmoe_cli.scene.store.statistics import Moments, channel_keys, summary
from ringmoe_cli.scene.tiles import LabelLayer, Store, open_store

Line = dict[str, Any]
"""One finished region, as the manifest has it."""

Advance = Callable[..., None]


@dataclass(frozen=True)
class Settings:
    """How to tile; everything here decides the store's bytes, except the engine."""

    tile: int = 256
    """Side of a chunk in pixels."""
    min_valid: float = 0.0
    """Windows with a smaller share of valid pixels are left out by the loader."""
    skip_bad: bool = False
    """Mark undecodable blocks invalid instead of failing."""
    allow_remote: bool = False
    """Let GDAL use the network."""
    shards: bool = False
    """Zarr v3 with several chunks a file, instead of v2 with one."""
    overwrite: bool = False
    """Replace a finished store."""
    engine: Engine = field(default_factory=Engine)
    """Who does the work."""


@dataclass(frozen=True)
class Labelled:
    """A scene and its labels."""

    scene: Scene
    """As described by `open_scene`."""
    labels: Mapping[str, LabelSource] = field(default_factory=dict)
    """By task."""


def tile_scenes(
    scenes: Sequence[Labelled],
    out: str | Path,
    settings: Settings | None = None,
    progress: Callable[[float], Any] | None = None,
) -> Store:
    """Write scenes into one store, or finish an interrupted run of the same call.

    Args:
        scenes: at least one; names are made unique.
        out: the store's folder, which must not exist unless `overwrite`.
        settings: how to tile.
        progress: context manager of total megapixels -> advance(megapixels).

    Raises:
        OutputExistsError: if the store is there already.
        StoreError: if unfinished work of other inputs is in the way.
        LabelError: if labels cover no pixel.
        SceneError: if a scene cannot be read.
    """
    settings = settings or Settings()
    out = Path(out)
    if out.exists() and not settings.overwrite:
        raise OutputExistsError(out)
    part = out.with_name(f"{out.name}.part")
    sources = plan_sources(scenes, part, settings)
    regions = [Region(s, w) for s in sources for w in windows_of(s)]
    with room(part):
        prepare(part, sources, fingerprint(sources, settings))
    with locked(part), room(part):
        lines = finished_lines(part, regions)
        left = [r for r in regions if key(r) not in lines]
        with (progress or quiet)(size(regions)) as advance:
            advance(size([r for r in regions if key(r) in lines]))
            for line in run(part, left, settings.engine):
                lines[line["scene"], *line["window"]] = line
                advance(line["window"][2] * line["window"][3] / 1e6)
        finish(part, sources, [lines[key(r)] for r in regions], settings.min_valid)
        replace_folder(part, out)
    return open_store(out)


def plan_sources(scenes: Sequence[Labelled], part: Path, settings: Settings) -> list[Source]:
    """What is read from where and written where; scenes of one name are numbered."""
    taken: set[str] = set()
    sources = []
    run_name = uuid.uuid4().hex
    for each in scenes:
        name = unique(each.scene.name or "scene", taken)
        taken.add(name)
        sources.append(
            Source(
                replace(each.scene, name=name),
                part / name,
                settings.tile,
                dict(each.labels),
                settings.skip_bad,
                settings.allow_remote,
                gdal_settings(),
                settings.shards,
                run_name,
            )
        )
    return sources


def unique(name: str, taken: set[str]) -> str:
    """A name not yet taken, fit for a folder."""
    safe = "".join(c if c.isalnum() or c in "-_+" else "_" for c in name)
    numbered = (f"{safe}_{i}" for i in range(2, len(taken) + 3))
    return safe if safe not in taken else next(n for n in numbered if n not in taken)


def windows_of(source: Source) -> list[Window]:
    """The regions of one scene."""
    scene = source.scene
    first = next(b for b in scene.bands if b.measured)
    with open_raster(first.path, allow_remote=source.allow_remote) as dataset:
        block = dataset.block_shapes[0]
    shaped = (block[0] * first.zoom, block[1] * first.zoom)
    pixel = sum(b.measured for b in scene.bands) * np.dtype(scene.dtype).itemsize
    return region_windows(scene.grid, source.tile, pixel, shaped, source.shards)


def fingerprint(sources: Sequence[Source], settings: Settings) -> str:
    """What decides the store's bytes: inputs with their sizes and times, and settings."""
    about = {
        "scenes": [asdict(s.scene) for s in sources],
        "labels": [{t: v.identity() for t, v in s.labels.items()} for s in sources],
        "files": {
            p: file_stamp(p) for s in sources for p in {b.path for b in s.scene.bands if b.path}
        },
        "tile": settings.tile,
        "skip_bad": settings.skip_bad,
        "min_valid": settings.min_valid,
        "shards": settings.shards,
    }
    return json.dumps(about, sort_keys=True, default=str)


def prepare(part: Path, sources: Sequence[Source], print_: str) -> None:
    """Create the skeleton of a new store, or recognise the one that is there.

    Raises:
        StoreError: if it belongs to other inputs or settings.
    """
    marker = part / INPUTS
    if part.exists():
        if marker.is_file() and marker.read_text("utf-8") == print_:
            return
        if marker.is_file():
            raise StoreError(
                f"{part} holds unfinished work of other inputs or settings; delete it to start anew"
            )
        shutil.rmtree(part)  # killed before the skeleton was complete
    import zarr

    part.parent.mkdir(parents=True, exist_ok=True)
    zarr.create_group(store=part, zarr_format=3 if sources[0].shards else 2)
    for source in sources:
        layers = {t: v.layer for t, v in source.labels.items()}
        layout.create_scene(source.folder, source.scene, source.tile, layers, source.shards)
    (part / MANIFEST).touch()
    write_synced(marker, print_)


@contextmanager
def locked(part: Path) -> Iterator[None]:
    """Keep other processes out of unfinished work.

    Raises:
        StoreError: if one is at it.
    """
    held = os.open(part / INPUTS, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise StoreError(f"another run is writing {part}; wait for it") from error
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def room(part: Path) -> Iterator[None]:
    """Say what to do about a full disk.

    Raises:
        StoreError: if it is full; what is finished stays.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"{part}: the disk is full; make room and run the same command again, "
            "what is finished is kept"
        ) from error


INPUTS = "inputs.json"
MANIFEST = "manifest.jsonl"


def write_synced(path: Path, text: str) -> None:
    """Write a file whole: it is either there with this text or not there."""
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def finished_lines(part: Path, regions: Sequence[Region]) -> dict[Any, Line]:
    """Regions that the manifest says are done and whose stored bytes still have their checksum."""
    found: dict[Any, Line] = {}
    by_key = {key(r): r for r in regions}
    for text in (part / MANIFEST).read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by a kill
        at = (line["scene"], *line["window"])
        if at in by_key and intact(by_key[at], line):
            found[at] = line
    return found


def intact(region: Region, line: Line) -> bool:
    """Whether the store still holds what the manifest says."""
    try:
        return bool(stored_checksums(region) == line["checksums"])
    except OSError:
        return False


def key(region: Region) -> tuple[Any, ...]:
    """What identifies a region in the manifest."""
    return (region.source.folder.name, *region.window)


def size(regions: Sequence[Region]) -> float:
    """Millions of pixels in some regions."""
    return sum(r.window.height * r.window.width / 1e6 for r in regions)


def run(part: Path, regions: Sequence[Region], engine: Engine) -> Iterator[Line]:
    """Do the regions, noting each in the manifest once it is done."""
    with (part / MANIFEST).open("a", encoding="utf-8") as manifest:
        manifest.write("\n")  # after a line that a kill has cut off
        for line in engine.run(write_region, regions):
            manifest.write(json.dumps(line) + "\n")
            manifest.flush()  # no sync: after a power cut the checksums tell what is really there
            yield line


def finish(part: Path, sources: Sequence[Source], lines: Sequence[Line], min_valid: float) -> None:
    """Write statistics, window indexes and metadata; sort the manifest.

    Raises:
        LabelError: if a label layer covers no pixel.
    """
    for source in sources:
        mine = [x for x in lines if x["scene"] == source.folder.name]
        scene = with_skipped(source.scene, mine)
        moments = [
            Moments.merged(Moments(int(c), *rest) for c, *rest in channel)
            for channel in zip(*(x["moments"] for x in mine), strict=True)
        ]
        layers = {t: counted(v.layer, mine) for t, v in source.labels.items()}
        layout.finish_scene(
            source.folder,
            scene,
            source.tile,
            layers,
            summary(channel_keys(scene), moments),
            valid_fractions(source, mine),
            min_valid,
        )
    layout.finish_store(part, [s.folder.name for s in sources])
    for leftover in part.rglob("*.partial"):  # zarr's unfinished files, if it was killed
        leftover.unlink()
    write_synced(part / MANIFEST, "".join(json.dumps(x) + "\n" for x in lines))
    (part / INPUTS).unlink()


def with_skipped(scene: Scene, lines: Sequence[Line]) -> Scene:
    """The scene as stored: calibration is done, and undecodable squares are noted."""
    squares = sum(len(x["skipped"]) for x in lines)
    if not squares:
        return scene
    note = f"{squares} square(s) could not be decoded and are invalid"
    return replace(scene, notes=(*scene.notes, note))


def counted(layer: LabelLayer, lines: Sequence[Line]) -> LabelLayer:
    """A label layer with its counts.

    Raises:
        LabelError: if it covers no pixel.
    """
    parts = [x["labels"][layer.task] for x in lines]
    if layer.classes:
        counts = tuple(int(sum(n)) for n in zip(*parts, strict=True))
    else:
        counts = (int(sum(n for n, _, _ in parts)),)
    if not any(counts):
        raise LabelError(f"the {layer.task} labels cover no pixel of the scene")
    known = [(low, high) for n, low, high in parts if n] if not layer.classes else [(0.0, 0.0)]
    return replace(
        layer, counts=counts, value_range=(min(x for x, _ in known), max(y for _, y in known))
    )


def valid_fractions(source: Source, lines: Sequence[Line]) -> Any:
    """The window index, put together from the regions."""
    grid, tile = source.scene.grid, source.tile
    whole = np.zeros((-(-grid.height // tile), -(-grid.width // tile)), np.float32)
    for line in lines:
        part = np.asarray(line["valid"], np.float32)
        row, col = line["window"][0] // tile, line["window"][1] // tile
        whole[row : row + part.shape[0], col : col + part.shape[1]] = part
    return whole


def replace_folder(part: Path, out: Path) -> None:
    """Give a finished store its name; a replaced one leaves only once the new one is complete."""
    if out.exists():
        old = out.with_name(f"{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        part.rename(out)
        shutil.rmtree(old)
    else:
        part.rename(out)


@contextmanager
def quiet(_: float) -> Iterator[Advance]:
    """No progress."""
    yield lambda *_: None
