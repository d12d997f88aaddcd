"""What a finished row becomes: class numbers, probabilities, values, or features."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.config import TaskConfig
from ringmoe_cli.scene.writer import (
    Layer,
    class_layer,
    probability_layer,
    quantise,
    value_layer,
)

CELL = 256
"""Width in pixels of the cells in which classes are counted, for areas."""
ROWS = 8
"""Rows of which the most probable classes are found at a time."""

Encoded = dict[str, NDArray[Any]]
"""Rows of a map by layer name, and sums over these rows."""


@dataclass(frozen=True)
class Rows:
    """Finished rows of a scene."""

    start: int
    """First row."""
    dense: NDArray[np.float32]
    """(K, n, width) class probabilities, values or features."""
    valid: NDArray[np.bool_]
    """(n, width) where the scene has a measurement."""


class Product(Protocol):
    """How rows are stored."""

    @property
    def channels(self) -> int:
        """K of the rows."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The maps it makes."""

    def encode(self, rows: Rows) -> Encoded:
        """The rows of each layer (bands, n, width), and sums to be added up over the scene."""


@dataclass(frozen=True)
class ClassMap:
    """The most probable class of every pixel."""

    task: TaskConfig
    """Names and colours of the classes."""
    probabilities: bool = False
    """Also store the probability of every class."""

    @property
    def channels(self) -> int:
        """One per class."""
        return len(self.task.classes)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Class numbers; probabilities if asked."""
        classes = class_layer(self.task.classes, self.task.colours)
        more = (probability_layer(self.task.classes),) if self.probabilities else ()
        return (classes, *more)

    def encode(self, rows: Rows) -> Encoded:
        """Class numbers, with pixels per class and cell, and the sum of the best probability."""
        classes, best = most_probable(rows.dense)
        if not rows.valid.all():
            np.copyto(classes, np.uint8(255), where=~rows.valid)
            np.copyto(best, np.float32(0), where=~rows.valid)
        out: Encoded = {
            "classes": classes[None],
            "counts": counts_in_cells(classes, self.channels),
            "confidence": np.array([best.sum(axis=1).sum(dtype=np.float64)]),
        }
        if self.probabilities:
            steps = quantise(rows.dense)
            steps[:, ~rows.valid] = 255
            out["probabilities"] = steps
        return out


@dataclass(frozen=True)
class ValueMap:
    """One value per pixel: heights."""

    task: TaskConfig
    """Its unit."""
    name: str = "height"
    """What the values are."""
    channels: int = field(default=1, init=False)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One float32 map."""
        return (value_layer(self.name, self.task.unit),)

    def encode(self, rows: Rows) -> Encoded:
        """The values, with their number, sum, and sum of squares."""
        values = np.where(rows.valid, rows.dense, np.float32("nan"))
        valid = rows.dense[0][rows.valid].astype(np.float64)
        return {self.name: values, "sums": np.array([valid.size, valid.sum(), (valid**2).sum()])}


@dataclass(frozen=True)
class FeatureMap:
    """Features of an encoder, as they are (half precision) or in 255 steps per band."""

    channels: int
    """Number of features."""
    dtype: str
    """float16 or int8."""
    largest: tuple[float, ...] = ()
    """int8: per feature, the size that 127 stands for; larger ones are cut off."""

    @property
    def scales(self) -> tuple[float, ...]:
        """What a step of int8 stands for, per feature."""
        return tuple(v / 127 for v in self.largest) if self.dtype == "int8" else ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One map with a band per feature."""
        names = tuple(f"feature_{i + 1}" for i in range(self.channels))
        if self.dtype == "int8":
            return (Layer("features", "int8", -128, self.channels, descriptions=names, scales=self.scales),)  # fmt: skip # noqa: E501
        nan = float("nan")
        return (Layer("features", "float32", nan, self.channels, descriptions=names, nbits=16),)

    def encode(self, rows: Rows) -> Encoded:
        """The features as they are stored."""
        if self.dtype != "int8":
            return {"features": np.where(rows.valid, rows.dense, np.float32("nan"))}
        steps = np.asarray(self.scales, np.float32)[:, None, None]
        whole = np.clip(np.rint(rows.dense / steps), -127, 127).astype(np.int8)
        return {"features": np.where(rows.valid, whole, np.int8(-128))}


@dataclass(frozen=True)
class Vectors:
    """One vector per tile: no map, but kept band by band like one."""

    channels: int
    """Length of a vector."""
    layers: tuple[Layer, ...] = field(default=(), init=False)

    def encode(self, rows: Rows) -> Encoded:
        """The vectors of a row of tiles, and which of them say something."""
        return {"vectors": rows.dense.copy(), "valid": rows.valid.astype(np.uint8)}


def most_probable(
    probabilities: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Class numbers (n, W) and their probabilities; ties go to the lower number, as in argmax.

    Several times as fast as `argmax(0)`, which strides over the classes: some rows at a time, which
    stay in cache.
    """
    _, height, width = probabilities.shape
    best = np.empty((height, width), probabilities.dtype)
    classes = np.zeros((height, width), np.uint8)
    for top in range(0, height, ROWS):
        rows = slice(top, top + ROWS)
        leading, chosen = best[rows], classes[rows]
        np.copyto(leading, probabilities[0, rows])
        better = np.empty(leading.shape, np.bool_)
        for number, probability in enumerate(probabilities[1:, rows], start=1):
            np.greater(probability, leading, out=better)
            np.maximum(chosen, better.view(np.uint8) * np.uint8(number), out=chosen)
            np.maximum(leading, probability, out=leading)
    return classes, best


def counts_in_cells(classes: NDArray[np.uint8], count: int, cell: int = CELL) -> NDArray[np.int64]:
    """Pixels per class in cells `cell` wide and as high as these rows, (cells, count)."""
    height, width = classes.shape
    counts = np.zeros((width, count), np.int64)
    for top in range(0, height, 255):  # so many ones fit into a byte
        some = classes[top : top + 255]
        for number in range(count):
            ones = (some == number).view(np.uint8)
            counts[:, number] += np.add.reduce(ones, axis=0, dtype=np.uint8)
    return np.asarray(np.add.reduceat(counts, np.arange(0, width, cell), axis=0))


def product_of(task: TaskConfig, probabilities: bool = False) -> Product:
    """The product of a task that speaks about every pixel.

    Raises:
        ValueError: for a task that makes no map.
    """
    if task.name in ("segmentation", "change"):
        return ClassMap(task, probabilities)
    if task.name == "depth":
        return ValueMap(task)
    raise ValueError(f"a {task.name} model makes no map of a scene; use ringmoe evaluate with it")
