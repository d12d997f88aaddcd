"""What the values of a label raster mean: numbers, grey levels or colours -> class indices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import LabelError
from ringmoe_cli.text_file import read_text

IGNORE = 255
"""Class index of pixels without a label."""

UNLABELLED = {"unlabeled", "unlabelled", "ignore", "ignored", "nodata", "no-data", "unknown"}
"""Class names that mean there is no label."""


@dataclass(frozen=True)
class LabelCode:
    """How label values become class indices; at most one field is set, none for plain indices."""

    values: Mapping[int, int] = field(default_factory=dict)
    """Raw value -> class index or 255; a value that is not here is an error."""
    colours: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    """RGB -> class index or 255; the nearest colour counts (JPEG masks)."""
    threshold: int | None = None
    """Two classes: 1 from this value on."""

    def decode(
        self,
        raw: NDArray[Any],
        classes: int,
        where: Path,
        void: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """Class indices (H, W) of a label raster (bands, H, W), 255 where `void`.

        Raises:
            LabelError: naming the values that no class has.
        """
        if self.colours:
            return self.by_colour(raw, where)
        plain = raw[0] if void is None else np.where(void, IGNORE, raw[0])
        if self.threshold is not None:
            return np.asarray(plain >= self.threshold, np.int64)
        found = np.unique(plain)
        known = self.values or {**{i: i for i in range(classes)}, IGNORE: IGNORE}
        wrong = [int(v) for v in found if int(v) not in known]
        if wrong:
            raise LabelError(
                f"{where}: label value(s) {', '.join(map(str, wrong[:5]))} belong to no class; "
                "name the classes and their values with --classes"
            )
        table = np.array([known[int(v)] for v in found], np.int64)
        return np.asarray(table[np.searchsorted(found, plain)])

    def by_colour(self, raw: NDArray[Any], where: Path) -> NDArray[np.int64]:
        """The class of the nearest listed colour."""
        if len(raw) < 3:
            raise LabelError(f"{where} has {len(raw)} band(s), but the classes are colours")
        listed = np.array(list(self.colours), np.int32)
        index = np.array(list(self.colours.values()), np.int64)
        packed = (raw[0].astype(np.int32) << 16) | (raw[1].astype(np.int32) << 8) | raw[2]
        found, place = np.unique(packed, return_inverse=True)
        rgb = np.stack([found >> 16, found >> 8 & 255, found & 255], 1)
        nearest = np.square(rgb[:, None] - listed[None]).sum(-1).argmin(1)
        return np.asarray(index[nearest][place.reshape(packed.shape)])


@dataclass(frozen=True)
class ClassList:
    """Class names, their colours, and how labels encode them."""

    names: tuple[str, ...]
    """In index order, without the unlabelled one."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB per class where the list says it."""
    code: LabelCode = LabelCode()
    """How labels encode them."""


def class_list(text: str) -> ClassList:
    """Classes from `water,land,road` or `1=water,2=land`, or a CSV file of one class per line.

    Lines are `name` (indices 0, 1, …), `name,value` or `name,red,green,blue`. A class called
    "unlabelled", "ignore" or "nodata" is not learned.

    Raises:
        LabelError: naming the line that cannot be read.
    """
    if not Path(text).is_file():
        parts = [part.strip() for part in text.split(",") if part.strip()]
        rows = [p.split("=", 1)[::-1] for p in parts]
    else:
        lines = read_text(Path(text)).splitlines()
        rows = [[c.strip() for c in line.split(",")] for line in lines if line.strip()]
    if not rows:
        raise LabelError(f"{text} names no class")
    numbers = [[number(cell, row, text) for cell in row[1:]] for row in rows]
    widths = {len(n) for n in numbers}
    if len(widths) > 1 or not widths <= {0, 1, 3}:
        raise LabelError(f"{text}: write every class as name, name,value or name,red,green,blue")
    return coded([row[0] for row in rows], numbers)


def number(cell: str, row: Sequence[str], where: str) -> int:
    """A value of a class list."""
    if not cell.isdigit():
        raise LabelError(f"{where}: {','.join(row)} has {cell!r} where a number belongs")
    return int(cell)


def coded(names: Sequence[str], numbers: Sequence[Sequence[int]]) -> ClassList:
    """Give the learned classes indices in order, and 255 to the unlabelled one."""
    learned = [n for n in names if n.lower() not in UNLABELLED]
    index = {n: learned.index(n) if n in learned else IGNORE for n in names}
    if not numbers[0]:
        values = {i: index[n] for i, n in enumerate(names)}
        return ClassList(tuple(learned), (), LabelCode({**values, IGNORE: IGNORE}))
    if len(numbers[0]) == 1:
        values = {v[0]: index[n] for n, v in zip(names, numbers, strict=True)}
        return ClassList(tuple(learned), (), LabelCode({IGNORE: IGNORE, **values}))
    rgb = [(v[0], v[1], v[2]) for v in numbers]
    colours = {c: index[n] for n, c in zip(names, rgb, strict=True)}
    shown = tuple(c for n, c in zip(names, rgb, strict=True) if n in learned)
    return ClassList(tuple(learned), shown, LabelCode(colours=colours))
