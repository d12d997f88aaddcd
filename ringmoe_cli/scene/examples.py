"""Labelled images of a folder as batches: windows, augmentation, validity, statistics.

A training sample is a pure function of (seed, number of the sample), so that a run resumes exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.batch import Batch
from model.modality import MODALITIES
from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.folders import ANY, Example
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labelcode import IGNORE, ClassList
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.sensors import open_scene

SMALL = 1 << 20
"""Images of up to so many pixels are read once and kept."""
KEPT_BYTES = 1 << 30
"""Memory for images that are kept."""
MEASURED = 200
"""Images that the statistics are taken from."""
DISPLAY = {".jpg", ".jpeg", ".png", ".bmp"}
"""Files made to be looked at: their grey levels are taken as they are, never as amplitudes."""

Sample = tuple[NDArray[np.float32], NDArray[np.bool_]]


@dataclass(frozen=True)
class Place:
    """One window of one example."""

    example: int
    """Number of the example."""
    window: Window
    """In the pixels of its image."""


class Images:
    """Reads windows of many files; small ones stay in memory as they were stored."""

    def __init__(self, modality: str | None, bands: Sequence[str] | None) -> None:
        self.modality, self.bands = modality, bands
        self.kept: dict[Path, tuple[Scene, NDArray[Any], NDArray[np.bool_]]] = {}
        self.scenes: dict[Path, Scene] = {}
        self.room = KEPT_BYTES

    def scene(self, path: Path, modality: str) -> Scene:
        """What a file is."""
        if path not in self.scenes:
            said = modality if modality != ANY else self.modality
            scale = "db" if said == "sar-l2" and path.suffix.lower() in DISPLAY else None
            self.scenes[path] = open_scene(
                path, modality=said, bands=self.bands, scale=scale, unnamed="number"
            )
        return self.scenes[path]

    def read(self, path: Path, modality: str, window: Window) -> Sample:
        """Physical channels (C, h, w) and validity (h, w); outside the image: 0 and invalid."""
        scene = self.scene(path, modality)
        height, width = scene.grid.height, scene.grid.width
        if path not in self.kept and height * width <= SMALL and self.room > 0:
            with SceneReader(scene) as reader:
                raw, valid = reader.read(Window(0, 0, height, width))
            self.kept[path] = (scene, raw, valid)
            self.room -= raw.nbytes + valid.nbytes
        if path not in self.kept:
            with SceneReader(scene) as reader:
                return reader.physical(window)
        _, raw, valid = self.kept[path]
        return to_physical(cut(raw, window), scene), cut(valid, window, False)


def cut(array: NDArray[Any], window: Window, fill: Any = 0) -> NDArray[Any]:
    """A window (..., h, w) of an array, filled where it lies outside."""
    height, width = array.shape[-2:]
    top, left = max(window.row, 0), max(window.col, 0)
    bottom, right = min(window.row + window.height, height), min(window.col + window.width, width)
    if (top, left, bottom, right) == (
        window.row, window.col, window.row + window.height, window.col + window.width
    ):  # fmt: skip
        return array[..., top:bottom, left:right]
    out = np.full((*array.shape[:-2], window.height, window.width), fill, array.dtype)
    if bottom > top and right > left:
        rows, cols = top - window.row, left - window.col
        part = array[..., top:bottom, left:right]
        out[..., rows : rows + bottom - top, cols : cols + right - left] = part
    return out


class FolderExamples:
    """Labelled images as samples of one size."""

    def __init__(
        self,
        examples: Sequence[Example],
        task: str,
        classes: ClassList,
        size: int,
        *,
        modality: str | None = None,
        bands: Sequence[str] | None = None,
        whole: bool = False,
    ) -> None:
        """Describe the samples; nothing but headers is read.

        Args:
            examples: the images and their labels.
            task: decides what a label is.
            classes: names, and how label rasters encode them.
            size: side of a sample in pixels.
            modality: of images whose folder does not say it.
            bands: names of the files' bands, in order.
            whole: a sample is the whole image, resized (classification), not a window.
        """
        self.examples, self.task, self.classes = list(examples), task, classes
        self.size, self.whole = size, whole
        self.images = Images(modality, bands)
        self.normalisation: Mapping[str, Normalisation] = {}
        self.kept_labels: dict[Path, NDArray[Any]] = {}

    @cached_property
    def modalities(self) -> dict[str, tuple[str, ...]]:
        """Names of the channels per modality, from the first example.

        Raises:
            LabelError: if there is no example.
        """
        if not self.examples:
            raise LabelError("there is no labelled image in this split")
        scenes = [self.images.scene(p[0], m) for m, p in self.examples[0].images.items()]
        return {s.modality: s.channels for s in scenes}

    @cached_property
    def gsd(self) -> dict[str, float]:
        """Ground sampling distance in metres per modality, of images that have one."""
        scenes = [self.images.scene(p[0], m) for m, p in self.examples[0].images.items()]
        return {s.modality: s.gsd for s in scenes if s.gsd}

    @cached_property
    def places(self) -> list[Place]:
        """Windows that tile the images without overlap; those without any label are left out.

        Raises:
            LabelError: if no window has a label.
        """
        found = [p for i in range(len(self.examples)) for p in self.windows(i)]
        if not self.whole:
            found = [p for p in found if self.is_labelled(p)]
        if not found:
            raise LabelError(f"no labelled pixels in these {len(self.examples)} images")
        return found

    def windows(self, number: int) -> list[Place]:
        """The windows of one example."""
        modality, dates = next(iter(self.examples[number].images.items()))
        grid = self.images.scene(dates[0], modality).grid
        if self.whole:
            return [Place(number, Window(0, 0, grid.height, grid.width))]
        return [Place(number, w) for w in grid.windows(self.size, self.size)]

    def is_labelled(self, place: Place) -> bool:
        """Whether a window has at least one labelled pixel."""
        label = self.label(place)
        return bool(np.isfinite(label).any() if self.task == "depth" else (label != IGNORE).any())

    def label(self, place: Place) -> NDArray[Any]:
        """Class indices (h, w) int64, or values (h, w) float32 with nan where unknown.

        Raises:
            LabelError: if label and image differ in size.
        """
        example = self.examples[place.example]
        assert isinstance(example.label, Path)
        modality, dates = next(iter(example.images.items()))
        grid = self.images.scene(dates[0], modality).grid
        if grid.height * grid.width > SMALL:
            return self.read_label(example.label, grid, place.window)
        if example.label not in self.kept_labels:
            whole = Window(0, 0, grid.height, grid.width)
            self.kept_labels[example.label] = self.read_label(example.label, grid, whole)
        unknown = np.nan if self.task == "depth" else IGNORE
        return cut(self.kept_labels[example.label], place.window, unknown)

    def read_label(self, path: Path, grid: Grid, window: Window) -> NDArray[Any]:
        """A window of a label raster that must lie on the image's grid."""
        from ringmoe_cli.scene.raster import open_raster

        with open_raster(str(path)) as file:
            if file.shape != (grid.height, grid.width):
                raise LabelError(
                    f"{path} is {file.shape[0]}x{file.shape[1]} pixels, "
                    f"but its image is {grid.height}x{grid.width}"
                )
            inside, nodata = grid.clip(window), file.nodata
            part = (
                (inside.row, inside.row + inside.height),
                (inside.col, inside.col + inside.width),
            )
            raw = np.asarray(file.read(window=part))
        around = Window(
            window.row - inside.row, window.col - inside.col, window.height, window.width
        )
        if self.task == "depth":
            values = raw[0].astype(np.float32)
            known = values if nodata is None else np.where(values == nodata, np.nan, values)
            return cut(known, around, np.nan)
        decoded = self.classes.code.decode(raw, len(self.classes.names), path)
        if nodata is not None:
            decoded = np.where(raw[0] == nodata, IGNORE, decoded)
        return cut(decoded, around, IGNORE)

    def measure(self) -> dict[str, Normalisation]:
        """Statistics of the physical values, per modality and channel."""
        step = max(1, len(self.examples) // MEASURED)
        totals: dict[str, NDArray[np.float64]] = {}
        for example in self.examples[::step]:
            for name, dates in example.images.items():
                for path in dates:
                    scene = self.images.scene(path, name)
                    whole = Window(0, 0, min(scene.grid.height, 4096), min(scene.grid.width, 4096))
                    values, valid = self.images.read(path, name, whole)
                    total = sums(values[:, valid])
                    totals[scene.modality] = totals.get(scene.modality, 0) + total
        return {m: normalisation_of(m, self.modalities[m], t) for m, t in totals.items()}

    def sample(self, place: Place) -> tuple[dict[str, Sample], Any]:
        """Normalised images (T, C, h, w) with validity (T, 1, h, w) per modality, and the label."""
        example = self.examples[place.example]
        images = {}
        for name, dates in example.images.items():
            scene = self.images.scene(dates[0], name)
            parts = [self.images.read(path, name, place.window) for path in dates]
            shapes = {p[0].shape for p in parts}
            if len(shapes) > 1:
                raise LabelError(f"{dates[0]} and {dates[1]} differ in bands; dates must match")
            values = np.stack([p[0] for p in parts])
            valid = np.stack([p[1] for p in parts])[:, None]
            normal = self.normalisation[scene.modality]
            images[scene.modality] = (normal.apply(values, valid), valid)
        label = example.label if self.whole else self.label(place)
        return images, label

    def batch(self, places: Sequence[Place], augment: Sequence[int] | None = None) -> Batch:
        """Several samples as one batch; `augment` are numbers that choose flips and turns."""
        samples = [self.sample(p) for p in places]
        images: dict[str, Any] = {}
        valid: dict[str, Any] = {}
        turns = [0] * len(places) if augment is None else list(augment)
        for m in samples[0][0]:
            parts = [s[0][m] for s in samples]
            turnable = not MODALITIES[m].polarimetric
            images[m] = torch.stack(
                [self.fit(turned(p[0], k * turnable)) for p, k in zip(parts, turns, strict=True)]
            )
            valid[m] = torch.stack(
                [
                    self.fit(turned(p[1].astype(np.float32), k * turnable)) > 0.5
                    for p, k in zip(parts, turns, strict=True)
                ]
            )
        turnable = not any(MODALITIES[m].polarimetric for m in images)
        keys = [f"{self.examples[p.example].name}:{p.window.row}:{p.window.col}" for p in places]
        labels = [s[1] for s in samples]
        if self.whole:
            targets = {"classes": torch.tensor(labels)}
        else:
            arrays = [turned(x, k * turnable) for x, k in zip(labels, turns, strict=True)]
            stacked = torch.from_numpy(np.stack(arrays))
            targets = {"values": stacked[:, None]} if self.task == "depth" else {"classes": stacked}
        return Batch(images, valid, targets=targets, keys=keys)

    def fit(self, array: NDArray[np.float32]) -> torch.Tensor:
        """(T, C, h, w) at the sample's size: whole images are resized, windows already fit."""
        x = torch.from_numpy(np.ascontiguousarray(array))
        if x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(
            x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )

    def training(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Endless augmented batches from batch `start` on; every window once per epoch."""
        count, step = len(self.places), start
        while True:
            numbers = range(step * batch_size, (step + 1) * batch_size)
            drawn = [self.draw(seed, n, count) for n in numbers]
            yield self.batch([p for p, _ in drawn], [k for _, k in drawn])
            step += 1

    def draw(self, seed: int, number: int, count: int) -> tuple[Place, int]:
        """The window of training sample `number`, shifted at random, and its flips and turns."""
        order = np.random.default_rng((seed, number // count)).permutation(count)
        place = self.places[order[number % count]]
        rng = np.random.default_rng((seed, 1, number))
        turn = int(rng.integers(8))
        if self.whole:
            return place, turn
        half = self.size // 2
        modality, dates = next(iter(self.examples[place.example].images.items()))
        grid = self.images.scene(dates[0], modality).grid
        row = shifted(place.window.row, int(rng.integers(-half, half + 1)), grid.height, self.size)
        col = shifted(place.window.col, int(rng.integers(-half, half + 1)), grid.width, self.size)
        return replace(place, window=Window(row, col, self.size, self.size)), turn

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every window once, in order, as it is."""
        for i in range(0, len(self.places), batch_size):
            yield self.batch(self.places[i : i + batch_size])


def shifted(start: int, by: int, length: int, size: int) -> int:
    """A window's start, moved but kept inside the image where the image is large enough."""
    return min(max(start + by, 0), max(length - size, 0))


def turned(array: NDArray[Any], k: int) -> NDArray[Any]:
    """One of the eight symmetries of the square, on the last two axes; 0 changes nothing."""
    flipped = array[..., ::-1] if k >= 4 else array
    return np.ascontiguousarray(np.rot90(flipped, k % 4, axes=(-2, -1)))


def sums(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Count, sum and sum of squares per channel of (C, n) values, and of 10·log10 of the span."""
    wide = values.astype(np.float64)
    span = 10 * np.log10(np.maximum(np.square(wide).sum(0), 1e-10))
    rows = np.concatenate([wide, span[None]])
    return np.stack([np.full(len(rows), wide.shape[1]), rows.sum(1), np.square(rows).sum(1)])


def normalisation_of(
    modality: str, channels: tuple[str, ...], total: NDArray[np.float64]
) -> Normalisation:
    """Mean and deviation per channel; one scale and no mean for polarimetric channels."""
    count, first, second = total
    mean = first / np.maximum(count, 1)
    std = np.sqrt(np.maximum(second / np.maximum(count, 1) - mean**2, 1e-12))
    if not MODALITIES[modality].polarimetric:
        return Normalisation(channels, tuple(mean[:-1].tolist()), tuple(std[:-1].tolist()))
    scale = float(np.sqrt((second / np.maximum(count, 1))[:-1].mean()))
    return Normalisation(
        channels, (0.0,) * len(channels), (scale,) * len(channels),
        (float(mean[-1]), float(std[-1])),
    )  # fmt: skip
