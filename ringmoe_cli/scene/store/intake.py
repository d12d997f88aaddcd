"""What the user names on the command line: scenes to open, and the labels that belong to them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ringmoe_cli import console
from ringmoe_cli.errors import LabelError, RingmoeError
from ringmoe_cli.scene.labels import RASTER_TASKS, LabelSource, Wanted, open_labels
from ringmoe_cli.scene.products.plain import Said
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.sensors import open_scenes
from ringmoe_cli.scene.tiles import Store
from ringmoe_cli.scene.tiling import Labelled


def listed(paths: Sequence[str]) -> list[str]:
    """The paths, with `-` replaced by the lines of stdin.

    Raises:
        RingmoeError: if there are none.
    """
    found = []
    for path in paths:
        if path == "-":
            found += [line.strip() for line in sys.stdin if line.strip()]
        else:
            found.append(path)
    if not found:
        raise RingmoeError("no scenes: name some, or pipe a list of paths into -")
    return found


def class_numbers(text: str | None) -> tuple[int, ...]:
    """`3,8,9` as numbers.

    Raises:
        RingmoeError: if one is none.
    """
    try:
        return tuple(int(n) for n in text.split(",")) if text else ()
    except ValueError as error:
        raise RingmoeError(f"--scl {text}: write class numbers, e.g. 3,8,9,10") from error


def default_output(first: str) -> Path:
    """`scene.zarr` beside the first scene."""
    path = Path(first)
    return path.with_name(f"{path.name.split('.')[0]}.zarr")


def gather(
    paths: Sequence[str],
    said: Said,
    label_texts: Sequence[str],
    wanted: Wanted,
    allow_remote: bool = False,
) -> list[Labelled]:
    """Open scenes, warn about what a user should know, and find each scene's labels.

    Raises:
        SceneError: if a scene cannot be opened or understood.
        LabelError: if a label file fits none of the scenes.
    """
    scenes = [s for p in paths for s in open_scenes(p, said, allow_remote=allow_remote)]
    for scene in scenes:
        warn_about(scene)
    labels: list[dict[str, LabelSource]] = [{} for _ in scenes]
    for text in label_texts:
        path, task = split_task(text, wanted.task)
        attach(path, Wanted(task, *rest(wanted)), scenes, labels)
    return [Labelled(s, x) for s, x in zip(scenes, labels, strict=True)]


def rest(wanted: Wanted) -> tuple[str | None, str | None, str | None, str]:
    """Everything but the task."""
    return wanted.classes, wanted.attribute, wanted.background, wanted.unit


def split_task(text: str, default: str) -> tuple[str, str]:
    """`depth=dsm.tif` as path and task; a plain path has the default task."""
    task, mark, path = text.partition("=")
    return (path, task) if mark and task in RASTER_TASKS else (text, default)


def attach(
    path: str, wanted: Wanted, scenes: Sequence[Scene], labels: list[dict[str, LabelSource]]
) -> None:
    """Give a label file to every scene that it covers.

    Raises:
        LabelError: if it fits no scene, or a scene has labels of this task already.
    """
    failures = []
    for scene, held in zip(scenes, labels, strict=True):
        try:
            source = open_labels(path, scene.grid, wanted)
        except LabelError as error:
            failures.append(error)
            continue
        if wanted.task in held:
            raise LabelError(f"{path}: {scene.name} has {wanted.task} labels already")
        held[wanted.task] = source
    if len(failures) == len(scenes):
        raise failures[0]


def warn_about(scene: Scene) -> None:
    """Say what may surprise about a scene."""
    if scene.grid.crs is None and not scene.grid.rpcs:
        console.warn(f"{scene.name} has no coordinate system; its pixels are kept as they are")
    for note in scene.notes:
        console.warn(f"{scene.name}: {note}")


def report(store: Store) -> dict[str, Any]:
    """A store as one JSON line."""
    return {
        "path": str(store.path),
        "scenes": [
            {
                "name": s.name,
                "modality": s.modality,
                "bands": list(s.scene.band_names),
                "height": s.grid.height,
                "width": s.grid.width,
                "gsd": s.scene.gsd,
                "valid": float(s.valid_fractions.mean()),
                "labels": {t: list(v.classes) or v.unit for t, v in s.labels.items()},
                "notes": list(s.scene.notes),
            }
            for s in store.scenes
        ],
    }
