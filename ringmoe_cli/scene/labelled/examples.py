"""Labelled windows as batches: which windows, in which order, turned how.

A training sample is a pure function of (seed, number of the sample), so that a run resumes
exactly, and any rank can draw its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.batch import Batch
from model.modality import MODALITIES
from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.store.augment import mirror_signs

Sample = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Physical channels (C, h, w) and validity (h, w)."""

TRIES = 8
"""Random positions tried for a training window before its own place is taken."""


class Labelled(Protocol):
    """An image, or co-registered images of one place, with a label."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def grid(self) -> Grid:
        """Pixels common to all its images."""

    @property
    def channels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the physical channels per modality."""

    @property
    def gsd(self) -> Mapping[str, float]:
        """Metres per pixel per modality, where known."""

    def read(self, window: Window) -> Mapping[str, Sequence[Sample]]:
        """One sample per date for every modality."""

    def label(self, window: Window) -> Any:
        """What is said about a window.

        Class indices (h, w) int64 with 255, values (h, w) float32 with nan, one index for the
        whole image, or a list of `Boxes`, one per date.
        """


@dataclass(frozen=True)
class Place:
    """One window of one labelled image."""

    item: int
    """Number of the image."""
    window: Window
    """In its pixels; may overhang."""


class LabelledWindows:
    """Windows of labelled images, and the batches they make."""

    def __init__(
        self,
        items: Sequence[Labelled],
        places: Sequence[Place],
        size: int,
        *,
        kept_out: Mapping[int, NDArray[np.bool_]] | None = None,
    ) -> None:
        """Describe the samples; no pixel is read.

        Args:
            items: labelled images.
            places: windows of them that tile what this split may see.
            size: side of a sample in pixels; whole images of another size are resized.
            kept_out: item -> (H, W) bool, pixels that no training window may touch.

        Raises:
            LabelError: if there is no window.
        """
        if not places:
            raise LabelError("no labelled pixels in this split; check the labels and the split")
        self.items, self.places, self.size = list(items), list(places), size
        self.kept_out = dict(kept_out or {})
        self.normalisation: Mapping[str, Normalisation] = {}

    @cached_property
    def channels(self) -> dict[str, tuple[str, ...]]:
        """Names of the channels per modality.

        Raises:
            LabelError: if the images differ in modalities or bands.
        """
        first = self.items[self.places[0].item]
        for place in self.places:
            item = self.items[place.item]
            if dict(item.channels) != dict(first.channels):
                raise LabelError(
                    f"{item.name} has {described(item)}, but {first.name} has {described(first)};"
                    " choose with --modality"
                )
        return dict(first.channels)

    @cached_property
    def gsd(self) -> dict[str, float]:
        """Median metres per pixel per modality, where known."""
        found: dict[str, list[float]] = {}
        for item in self.items:
            for modality, metres in item.gsd.items():
                found.setdefault(modality, []).append(metres)
        return {m: float(np.median(v)) for m, v in found.items()}

    def training(
        self, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Endless augmented batches from batch `start` on; every window once per epoch.

        Args:
            batch_size: of this rank.
            seed: of the run.
            start: number of the first batch.
            rank: of this process.
            world: processes that share the windows.
        """
        step = start
        while True:
            first = (step * world + rank) * batch_size
            numbers = range(first, first + batch_size)
            drawn = [self.draw(seed, n) for n in numbers]
            gains = [drawn_gain(seed, n) for n in numbers]
            moves = [drawn_move(seed, n, self.size) for n in numbers]
            yield self.batch([p for p, _ in drawn], [k for _, k in drawn], gains, moves)
            step += 1

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every window once, in order, as it is."""
        for i in range(0, len(self.places), batch_size):
            yield self.batch(self.places[i : i + batch_size])

    def draw(self, seed: int, number: int) -> tuple[Place, int]:
        """The window of training sample `number`, moved at random, and its turn (0..7)."""
        epoch, index = divmod(number, len(self.places))
        order = np.random.default_rng((seed, epoch)).permutation(len(self.places))
        place = self.places[order[index]]
        rng = np.random.default_rng((seed, 1, number))
        turn = int(rng.integers(8))
        for _ in range(TRIES):
            moved = Place(place.item, self.moved(place, rng))
            if self.allowed(moved):
                return moved, turn
        return place, turn

    def moved(self, place: Place, rng: np.random.Generator) -> Window:
        """A window up to half its size away, kept inside the image where that is large enough."""
        row, col, height, width = place.window
        grid, half = self.items[place.item].grid, (height // 2, width // 2)
        down, right = (int(rng.integers(-h, h + 1)) for h in half)
        return Window(
            min(max(row + down, 0), max(grid.height - height, 0)),
            min(max(col + right, 0), max(grid.width - width, 0)),
            height,
            width,
        )

    def allowed(self, place: Place) -> bool:
        """Whether a window is free of pixels that are kept out of training."""
        if place.item not in self.kept_out:
            return True
        row, col, height, width = place.window
        return not self.kept_out[place.item][row : row + height, col : col + width].any()

    def batch(
        self,
        places: Sequence[Place],
        turns: Sequence[int] | None = None,
        gains: Sequence[tuple[float, float]] | None = None,
        moves: Sequence[tuple[int, int]] | None = None,
    ) -> Batch:
        """Some windows as one batch, turned by numbers 0..7, radar at other gains.

        Images with one label for the whole are moved, as the others were when they were drawn.
        """
        read = [self.items[p.item].read(p.window) for p in places]
        modalities = list(self.channels)
        ks = [0] * len(places) if turns is None else list(turns)
        if any(MODALITIES[m].polarimetric for m in modalities):
            ks = [k - k % 2 for k in ks]  # mirrors only: a quarter turn mixes the polarisations
        if "sar-l2" in modalities:
            ks = [0] * len(ks)  # radar looks from one side: turned shadows fall where none can
        images: dict[str, torch.Tensor] = {}
        valid: dict[str, torch.Tensor] = {}
        for m in modalities:
            parts = [self.normalised(m, r[m], k) for r, k in zip(read, ks, strict=True)]
            self.check_size(m, parts[0][0], places[0])
            images[m] = torch.stack([self.fit(x) for x, _ in parts])
            mask = torch.stack([self.fit(v) for _, v in parts]) > 0.5
            if gains is not None and m == "sar-l2":
                images[m] = with_gains(images[m], mask, gains)
            if not mask.all():
                valid[m] = mask
        labels = [self.items[p.item].label(p.window) for p in places]
        if moves is not None and isinstance(labels[0], int):
            images = {m: with_moves(x, moves) for m, x in images.items()}
            valid = {m: with_moves(x, moves) for m, x in valid.items()}
        keys = [f"{self.items[p.item].name}:{p.window.row}:{p.window.col}" for p in places]
        return Batch(images, valid, targets=targets(labels, ks, self.size), keys=keys)

    def normalised(self, modality: str, dates: Sequence[Sample], turn: int) -> tuple[Any, Any]:
        """All dates of a modality: values (T, C, h, w) and validity (T, 1, h, w), both float32."""
        values = np.stack([v for v, _ in dates])
        valid = np.stack([ok for _, ok in dates])[:, None]
        x = turned(self.normalisation[modality].apply(values, valid), turn)
        if turn >= 4 and MODALITIES[modality].polarimetric:
            x *= mirror_signs(self.channels[modality])[:, None, None]
        return x, turned(valid.astype(np.float32), turn)

    def check_size(self, modality: str, values: NDArray[np.float32], place: Place) -> None:
        """Complex images are never resized: that would change their power."""
        side = min(values.shape[-2:])
        if MODALITIES[modality].polarimetric and values.shape[-2:] != (self.size, self.size):
            raise LabelError(
                f"{self.items[place.item].name} is complex SAR of {values.shape[-2]} x "
                f"{values.shape[-1]} pixels and cannot be resized to {self.size}; "
                f"use --set task.window={side} and square images"
            )

    def fit(self, array: NDArray[np.float32]) -> torch.Tensor:
        """(T, C, h, w) at the sample's size; only whole images need resizing."""
        x = torch.from_numpy(array)
        if x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(
            x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
        )


GAIN, LEVEL = 0.1, 0.3
"""Deviation of the factor, and of the summand in deviations of the data, that radar is given."""


def drawn_gain(seed: int, number: int) -> tuple[float, float]:
    """Factor and summand of training sample `number`."""
    factor, level = np.random.default_rng((seed, 2, number)).normal(size=2)
    return 1 + GAIN * float(factor), LEVEL * float(level)


def with_gains(
    images: torch.Tensor, valid: torch.Tensor, gains: Sequence[tuple[float, float]]
) -> torch.Tensor:
    """Radar as another incidence angle or calibration would have measured it; invalid stays 0.

    The level of the clutter around a target tells one collection from another, and a network
    gladly learns that instead of the target.
    """
    factor, level = torch.tensor(gains, dtype=images.dtype).T.view(2, -1, 1, 1, 1, 1)
    changed: torch.Tensor = (images * factor + level) * valid
    return changed


def drawn_move(seed: int, number: int, size: int) -> tuple[int, int]:
    """Rows and columns, up to an eighth of the size, that training sample `number` is moved by."""
    down, right = np.random.default_rng((seed, 3, number)).integers(-size // 8, size // 8 + 1, 2)
    return int(down), int(right)


def with_moves(images: torch.Tensor, moves: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Images (B, T, C, h, w), each moved down and right; what comes in mirrors what is there."""
    height, width = images.shape[-2:]

    def source(length: int, move: int) -> torch.Tensor:
        at = (torch.arange(length) - move).abs()
        return length - 1 - (length - 1 - at).abs()

    moved = [x[..., source(height, d)[:, None], source(width, r)]
             for x, (d, r) in zip(images, moves, strict=True)]  # fmt: skip
    return torch.stack(moved)


def described(item: Labelled) -> str:
    """Modalities and bands of an image, for a message."""
    return "; ".join(f"{m}: {', '.join(bands)}" for m, bands in item.channels.items())


def targets(labels: Sequence[Any], turns: Sequence[int], size: int) -> dict[str, Any]:
    """Labels as the heads want them: classes (B,) or (B, H, W), values (B, 1, H, W), or boxes."""
    if isinstance(labels[0], int):
        return {"classes": torch.tensor(labels)}
    if isinstance(labels[0], list):
        pairs = zip(labels, turns, strict=True)
        return {"boxes": [x.turned(k, size) for dates, k in pairs for x in dates]}
    stacked = np.stack([turned(x, k) for x, k in zip(labels, turns, strict=True)])
    if stacked.dtype.kind == "f":
        return {"values": torch.from_numpy(stacked[:, None])}
    return {"classes": torch.from_numpy(stacked.astype(np.int64, copy=False))}


def turned(array: NDArray[Any], k: int) -> NDArray[Any]:
    """One of the eight symmetries of the square, on the last two axes; 0 changes nothing."""
    flipped = array[..., ::-1] if k >= 4 else array
    return np.ascontiguousarray(np.rot90(flipped, k % 4, axes=(-2, -1)))


def cut(array: NDArray[Any], window: Window, fill: Any = 0) -> NDArray[Any]:
    """A window (..., h, w) of an array, filled where it lies outside."""
    height, width = array.shape[-2:]
    top, left = max(window.row, 0), max(window.col, 0)
    bottom, right = min(window.row + window.height, height), min(window.col + window.width, width)
    part = array[..., top : max(bottom, top), left : max(right, left)]
    if part.shape[-2:] == (window.height, window.width):
        return part
    out = np.full((*array.shape[:-2], window.height, window.width), fill, array.dtype)
    rows, cols = top - window.row, left - window.col
    out[..., rows : rows + part.shape[-2], cols : cols + part.shape[-1]] = part
    return out
