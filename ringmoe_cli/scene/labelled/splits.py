"""What is held out: whole images, or blocks of a scene that no training window touches."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labelled.examples import Labelled, LabelledWindows, Place
from ringmoe_cli.scene.labelled.labelcode import IGNORE

ENOUGH_IMAGES = 5
"""From so many images on, whole images are held out instead of blocks of them."""


@dataclass(frozen=True)
class Split:
    """Training and held-out windows."""

    training: LabelledWindows
    held_out: LabelledWindows


def split_by_image(
    items: Sequence[Labelled], size: int, share: float, seed: int, whole: bool = False
) -> Split:
    """Hold out a share of the images, drawn by seed.

    Args:
        items: labelled images.
        size: side of a sample.
        share: of the images.
        seed: of the draw.
        whole: samples are whole images, and every class gives its share.
    """
    held: set[int] = set()
    for group in groups_of(items, whole):
        order = np.random.default_rng((seed, len(group))).permutation(group)
        held |= set(order[: max(1, round(share * len(group)))].tolist())
    training = [i for i in range(len(items)) if i not in held]
    return Split(
        windows_of(items, training, size, whole), windows_of(items, sorted(held), size, whole)
    )


def groups_of(items: Sequence[Labelled], whole: bool) -> list[list[int]]:
    """Images of one class each, where images have a class; else all of them."""
    if not whole:
        return [list(range(len(items)))]
    groups: dict[int, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.label(Window(0, 0, 1, 1)), []).append(number)
    return list(groups.values())


def windows_of(
    items: Sequence[Labelled], chosen: Sequence[int], size: int, whole: bool = False
) -> LabelledWindows:
    """All labelled windows of some images."""
    places = [p for number in chosen for p in tiled(number, items[number], size, whole)]
    return LabelledWindows(items, places, size)


def tiled(number: int, item: Labelled, size: int, whole: bool = False) -> list[Place]:
    """Windows that tile an image without overlap and hold a label; or the whole image."""
    if whole:
        return [Place(number, Window(0, 0, item.grid.height, item.grid.width))]
    windows = item.grid.windows(size, size)
    return [Place(number, w) for w in windows if has_label(item.label(w))]


def has_label(label: Any) -> bool:
    """Whether any pixel has a class or value, or any date a box."""
    if isinstance(label, list):
        return any(len(boxes) for boxes in label)
    known = np.isfinite(label) if label.dtype.kind == "f" else label != 255
    return bool(known.any())


def split_by_block(items: Sequence[Labelled], size: int, share: float, seed: int) -> Split:
    """Hold out square blocks of every scene; no training window touches them.

    Blocks are two windows wide in scenes of at least eight windows, else one, so that held-out
    pixels lie far from training ones where there is room. They are drawn by the place, so that
    all sensors and dates of one place hold out the same ground.

    Raises:
        LabelError: if a scene is too small to be divided.
    """
    training: list[Place] = []
    held_out: list[Place] = []
    kept_out: dict[int, NDArray[np.bool_]] = {}
    for number, item in enumerate(items):
        blocks = draw_blocks(item, size, share, seed)
        mask = np.zeros((item.grid.height, item.grid.width), np.bool_)
        for row, col, height, width in blocks:
            mask[row : row + height, col : col + width] = True
        kept_out[number] = mask
        for place in tiled(number, item, size):
            row, col, height, width = place.window
            part = mask[row : row + height, col : col + width]
            if part.all():
                held_out.append(place)
            elif not part.any():
                training.append(place)
    return Split(
        LabelledWindows(items, training, size, kept_out=kept_out),
        LabelledWindows(items, held_out, size),
    )


def draw_blocks(item: Labelled, size: int, share: float, seed: int) -> list[Window]:
    """Held-out blocks of one scene, at least one, out of those with labels.

    Raises:
        LabelError: if there are fewer than two to choose from.
    """
    grid = item.grid
    side = size * 2 if min(grid.height, grid.width) >= 8 * size else size
    blocks = [w for w in grid.windows(side, side) if has_label(item.label(w))]
    if len(blocks) < 2:
        raise LabelError(
            f"{item.name} is too small to hold out a part of it ({len(blocks)} labelled block(s) "
            f"of {side} pixels); pass --val with other data, or a smaller task.window"
        )
    where = repr((grid.transform, grid.height, grid.width)) if grid.has_transform else item.name
    rng = np.random.default_rng((seed, zlib.crc32(where.encode())))
    order = rng.permutation(len(blocks))
    return [blocks[i] for i in order[: max(1, round(share * len(blocks)))]]


def few(windows: LabelledWindows, shots: int, draw: int) -> LabelledWindows:
    """Some of the training windows: so many per class, or so many in all where there is none.

    Args:
        windows: all training windows.
        shots: windows per class; one that holds several classes counts for each.
        draw: number of the draw.

    Raises:
        LabelError: if a class has fewer windows.
    """
    order = np.random.default_rng((draw, shots)).permutation(len(windows.places))
    held: dict[int, list[int]] = {}
    chosen: set[int] = set()
    for number in order.tolist():
        classes = classes_in(windows, windows.places[number])
        if any(len(held.get(c, [])) < shots for c in classes):
            chosen.add(number)
            for c in classes:
                held.setdefault(c, []).append(number)
    scarce = [c for c, members in held.items() if len(members) < shots]
    if scarce:
        raise LabelError(
            f"class {scarce[0]} has only {len(held[scarce[0]])} labelled windows, not {shots}"
        )
    places = [windows.places[n] for n in sorted(chosen)]
    return LabelledWindows(windows.items, places, windows.size, kept_out=windows.kept_out)


def classes_in(windows: LabelledWindows, place: Place) -> list[int]:
    """Class indices that a window holds; 0 for values."""
    label = windows.items[place.item].label(place.window)
    if isinstance(label, int):
        return [label]
    if label.dtype.kind == "f":
        return [0]
    return [int(c) for c in np.unique(label) if c != IGNORE]
