"""What is left on disk beside pixel maps: boxes, tracks, classes of tiles, changed regions."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.association import track
from model.boxes import Boxes
from model.config import TaskConfig
from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.answers import Settings, answered, lattice_of
from ringmoe_cli.jobs.maps import Mapper, check_free, output_path
from ringmoe_cli.jobs.objects import (
    OVERLAP,
    boxes_of_clip,
    merge_detections,
    parts_of_scene,
)
from ringmoe_cli.jobs.opening import SURE, Opener
from ringmoe_cli.jobs.summary import described
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad, window_batches
from ringmoe_cli.scene.maps.vectors import (
    check_format,
    write_boxes,
    write_mot,
    write_tiles,
    write_tracks,
)

Work = Callable[[str], dict[str, Any]]
Search = Callable[[int], tuple[list[Boxes], list[str]]]
"""Looks for objects in so many rows of windows; gives them and the unreadable places."""
SUFFIX = {"detection": ".geojson", "tracking": ".txt", "classification": ".geojson"}
"""Task -> suffix of its output, unless the user says another."""


def work_of(mapper: Mapper) -> Work:
    """What a model does with a scene: a map, or for its task boxes or classes of tiles."""
    if mapper.task.name in ("detection", "classification"):
        return lambda path: list_scene(mapper, path)
    return mapper.map_scene


def list_scene(mapper: Mapper, path: str, search: Search | None = None) -> dict[str, Any]:
    """Write the boxes, or the classes of the tiles, of one scene.

    Args:
        mapper: the model.
        path: the scene.
        search: other processes that look for boxes; None: this one does.

    Raises:
        RingmoeError: if the scene cannot be read or the output not be written.
    """
    opener = Opener(mapper.config, mapper.task.modalities, mapper.wish)
    source = opener.open(path)
    output = free_output(mapper, path, source)
    fitted = opener.at_model_resolution(source, path)
    network = mapper.network
    assert isinstance(network, TaskNetwork)
    try:
        if mapper.task.name == "classification":
            done = write_scene_tiles(network, source, fitted, output, mapper.settings)
        else:
            settings = with_overlap(mapper.settings)
            done = write_objects(
                network, source, fitted, output, settings,
                sure=mapper.wish.sure, skip_bad=mapper.wish.skip_bad, search=search,
            )  # fmt: skip
    finally:
        close(source)
    if mapper.wish.stac:
        outputs = {mapper.task.name: output}
        done["stac"] = described(outputs, path, source, mapper.task.name)
    return {"scene": path, **done}


def search_rows(mapper: Mapper, path: str, rows: tuple[int, int]) -> tuple[list[Boxes], list[str]]:
    """What some rows of windows of a scene tell, unmerged; and the unreadable places."""
    opener = Opener(mapper.config, mapper.task.modalities, mapper.wish)
    source = opener.open(path)
    fitted = opener.at_model_resolution(source, path)
    network, skip = mapper.network, SkipBad(mapper.wish.skip_bad)
    assert isinstance(network, TaskNetwork)
    try:
        parts = parts_of_scene(network, fitted, with_overlap(mapper.settings), skip, rows)
    finally:
        close(source)
    return parts[-1], skip.skipped


def search_pair(mapper: Mapper, paths: Sequence[str]) -> list[Boxes]:
    """The objects of neighbouring frames."""
    opener = Opener(mapper.config, mapper.task.modalities, mapper.wish)
    frames = [opener.open(p) for p in paths]
    network = mapper.network
    assert isinstance(network, TaskNetwork)
    try:
        return boxes_of_clip(network, frames, with_overlap(mapper.settings))
    finally:
        for frame in frames:
            close(frame)


def list_clip(
    mapper: Mapper, paths: Sequence[str], found: list[Boxes] | None = None
) -> dict[str, Any]:
    """Write the tracks through the frames of one clip, given in order.

    Args:
        mapper: the model.
        paths: the frames.
        found: their objects, if other processes have found them.

    Raises:
        RingmoeError: if a frame cannot be read, or they differ in size.
    """
    opener = Opener(mapper.config, mapper.task.modalities, mapper.wish)
    frames = [opener.open(p) for p in paths]
    output = free_output(mapper, paths[0], frames[0])
    check_free({"lines": output.with_suffix(".geojson")}, mapper.wish.overwrite)
    network = mapper.network
    assert isinstance(network, TaskNetwork)
    try:
        settings = with_overlap(mapper.settings)
        boxes = boxes_of_clip(network, frames, settings) if found is None else found
        done = write_clip(network.task, frames, boxes, output)
    finally:
        for frame in frames:
            close(frame)
    return {"scene": paths[0], **done}


def free_output(mapper: Mapper, path: str, source: Normalised) -> Path:
    """Where the result of a scene goes; nothing is in its way."""
    name = next(iter(source.dates[-1].values())).scene.name
    task, wish = mapper.task.name, mapper.wish
    output = output_path(path, name, task, wish.output, SUFFIX[task])
    if task != "tracking":
        check_format(output)
    if wish.warp:
        raise RingmoeError("--warp moves pixel maps; polygons lie on the ground already")
    check_free({task: output}, wish.overwrite)
    return output


def with_overlap(settings: Settings) -> Settings:
    """The same settings with at least the overlap that objects need."""
    return replace(settings, overlap=max(settings.overlap, round(OVERLAP * settings.window)))


def close(source: Normalised) -> None:
    """Close the files of a scene."""
    for date in source.dates:
        for reader in date.values():
            reader.close()  # type: ignore[attr-defined]


def write_objects(
    network: TaskNetwork,
    source: Normalised,
    fitted: Normalised,
    output: Path,
    settings: Settings,
    *,
    sure: float = SURE,
    skip_bad: bool = False,
    search: Search | None = None,
) -> dict[str, Any]:
    """Find the objects of a scene and write them as polygons.

    Args:
        network: of a detection task, in eval mode.
        source: the scene on its own grid.
        fitted: the scene as the model wants it, perhaps resampled.
        output: .geojson, .parquet or .gpkg.
        settings: window, overlap, batch, device.
        sure: least confidence of a box.
        skip_bad: leave unreadable places out.
        search: other processes that look for boxes; None: this one does.

    Returns:
        Output, objects per class, seconds: for `--json`.
    """
    start, skip = time.perf_counter(), SkipBad(skip_bad)
    if search is None:
        parts, skipped = parts_of_scene(network, fitted, settings, skip)[-1], skip.skipped
    else:
        parts, skipped = search(lattice_of(fitted, settings).rows)
    boxes = merge_detections(parts, network.task.rotated)
    boxes = on_own_grid(boxes[boxes.scores >= sure], source, fitted)
    write_boxes(output, boxes, source.grid, network.task.classes)
    return {
        "output": str(output),
        "task": network.task.name,
        "objects": counts(boxes, network.task),
        **({"skipped": skipped} if skipped else {}),
        "seconds": round(time.perf_counter() - start, 3),
    }


def on_own_grid(boxes: Boxes, source: Normalised, fitted: Normalised) -> Boxes:
    """Boxes of a resampled scene in the pixels of the original."""
    return boxes.scaled(source.grid.width / fitted.grid.width)


def counts(boxes: Boxes, task: TaskConfig) -> dict[str, int]:
    """Objects of each class."""
    found = Counter(boxes.labels.tolist())
    return {name: found[k] for k, name in enumerate(task.classes)}


def write_clip(
    task: TaskConfig, frames: Sequence[Normalised], boxes: Sequence[Boxes], output: Path
) -> dict[str, Any]:
    """Track through the frames of a clip; write MOT text, and the tracks as lines beside it.

    Args:
        task: names the classes.
        frames: in order, all on one grid.
        boxes: the objects of every frame.
        output: .txt; the lines go to the same name with .geojson.

    Returns:
        Outputs, tracks per class, seconds: for `--json`.
    """
    start = time.perf_counter()
    found = dict(enumerate(track(list(boxes)), 1))
    lines = output.with_suffix(".geojson")
    write_mot(output, found)
    write_tracks(lines, found, frames[0].grid, task.classes)
    everyone = Boxes.cat(list(found.values()))
    labels = dict(zip(everyone.tracks.tolist(), everyone.labels.tolist(), strict=True))
    per_class = Counter(labels.values())
    return {
        "output": str(output),
        "lines": str(lines),
        "task": task.name,
        "frames": len(frames),
        "tracks": {name: per_class[k] for k, name in enumerate(task.classes)},
        "seconds": round(time.perf_counter() - start, 3),
    }


def write_scene_tiles(
    network: TaskNetwork, source: Normalised, fitted: Normalised, output: Path, settings: Settings
) -> dict[str, Any]:
    """Classify a scene tile by tile; write the tiles as polygons with their probabilities.

    Tiles do not overlap; those without a valid pixel are left out.

    Returns:
        Output, tiles per class, seconds: for `--json`.
    """
    start = time.perf_counter()
    lattice = lattice_of(fitted, replace(settings, overlap=0))
    windows: list[Window] = []
    scores = []
    side = lattice.window
    with console.progress(lattice.rows * lattice.columns, "classify", "tiles") as advance:
        batches = window_batches(fitted, lattice, settings.batch, 0, lattice.rows, SkipBad())
        for some, answer in answered(network, batches, settings.device):
            advance(len(some.places))
            assert answer.scores is not None
            scores.append(answer.scores.float().cpu().numpy())
            places = [some.places[i] for i in some.full]
            windows += [Window(r * side, c * side, side, side) for r, c in places]
    classes = network.task.classes
    table = np.concatenate(scores) if scores else np.zeros((0, len(classes)), np.float32)
    write_tiles(output, windows, table, fitted.grid, classes)
    found = Counter(table.argmax(1).tolist())
    return {
        "output": str(output),
        "task": network.task.name,
        "tiles": {name: found[k] for k, name in enumerate(classes)},
        "seconds": round(time.perf_counter() - start, 3),
    }
