"""Training chips of one modality: chip `i` is the same on every rank, worker and machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from model.normalisation import Normalisation
from ringmoe_cli.errors import StoreError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.store.augment import Sample, Turn, resized, turned
from ringmoe_cli.scene.tiles import StoredScene

TRIES = 8
"""Random places tried for a chip; the first half near its own, the others anywhere."""

SAR_L2_VALID = 0.85
"""Amplitude chips with 15 % zeros or more are left out; a zero amplitude is invalid."""


@dataclass(frozen=True)
class Chip:
    """One normalised chip."""

    values: torch.Tensor
    """(C, size, size) float32, invalid pixels 0."""
    valid: torch.Tensor
    """(1, size, size) bool."""
    measured: torch.Tensor
    """(C,) bool, false for polarisations that the product lacks."""
    key: str
    """scene:row:col."""


@dataclass
class ChipDataset(Dataset[Chip]):
    """Random chips of the scenes of one modality; an epoch is as many as tile them once."""

    scenes: Sequence[StoredScene]
    """All of one modality."""
    normalisation: Normalisation
    """Names the channels and how they become input."""
    size: int
    """Side of a chip in pixels."""
    seed: int = 0
    """Of the run."""
    augment: bool = True
    """Mirror, and turn the phase of complex chips."""
    resize: tuple[float, float] | None = None
    """Area of the crop over the chip's, lowest and highest; crops are enlarged. Not for SAR."""
    cells: list[tuple[int, Window]] = field(init=False, repr=False)
    """(scene, window) of every place that may hold enough valid pixels."""

    def __post_init__(self) -> None:
        modality = self.scenes[0].modality if self.scenes else "none"
        if self.resize and modality.startswith("sar"):
            raise ValueError(f"{modality} chips are cropped, never resized: power must survive")
        self.channels = [channel_indexes(s, self.normalisation.bands) for s in self.scenes]
        self.cells = [c for n, s in enumerate(self.scenes) for c in self.cells_of(n, s)]
        if not self.cells:
            names = ", ".join(s.name for s in self.scenes)
            raise StoreError(f"{names}: no {self.size}-pixel window has enough valid pixels")

    def __len__(self) -> int:
        """Chips per epoch."""
        return len(self.cells)

    def __getitem__(self, index: int) -> Chip:
        """Same as `sample`."""
        return self.sample(index)

    def sample(self, index: int) -> Chip:
        """Chip number `index`, counted over all epochs: a pure function of it and the seed."""
        epoch, place = divmod(index, len(self))
        order = epoch_order(self.seed, epoch, len(self))
        rng = np.random.default_rng((self.seed, 1, index))
        number, window = self.cells[order[place]]
        turn = Turn.draw(rng)
        side = self.crop_side(rng)
        for attempt in range(TRIES):
            if attempt >= TRIES // 2:
                number, window = self.cells[int(rng.integers(len(self)))]
            crop = moved(self.scenes[number].grid, window, side, rng)
            values, valid = self.scenes[number].physical(crop)
            if self.enough(number, crop, valid):
                return self.chip(number, crop, (values, valid), turn)
        nothing = np.zeros_like(valid)  # contributes nothing to any loss
        return self.chip(number, crop, (values, nothing), turn)

    def cell(self, number: int) -> Chip:
        """Cell `number` as it is: a window of the grid that tiles the scenes, never moved."""
        scene, window = self.cells[number]
        side = Window(window.row, window.col, self.size, self.size)
        return self.chip(scene, side, self.scenes[scene].physical(side), Turn())

    def crop_side(self, rng: np.random.Generator) -> int:
        """Side of the crop that becomes a chip."""
        if self.resize is None:
            return self.size
        return max(1, round(self.size * float(np.sqrt(rng.uniform(*self.resize)))))

    def enough(self, number: int, crop: Window, valid: NDArray[np.bool_]) -> bool:
        """Whether a crop holds enough valid pixels, of those that lie inside the scene."""
        inside = self.scenes[number].grid.clip(crop)
        share = float(valid.sum()) / max(inside.height * inside.width, 1)
        return self.accepts(number, share)

    def accepts(self, number: int, share: float) -> bool:
        """Whether a share of valid pixels is enough in a scene."""
        scene = self.scenes[number]
        if scene.modality == "sar-l2":
            return share > max(SAR_L2_VALID, scene.min_valid)
        return share > 0 and share >= scene.min_valid

    def cells_of(self, number: int, scene: StoredScene) -> list[tuple[int, Window]]:
        """Windows that tile a scene, without those that the index shows to be empty."""
        windows = scene.grid.windows(self.size)
        return [(number, w) for w in windows if may_hold(scene, w)]

    def chip(self, number: int, crop: Window, sample: Sample, turn: Turn) -> Chip:
        """A crop as normalised tensors."""
        scene, channels = self.scenes[number], self.channels[number]
        values, valid = resized((sample[0][channels], sample[1]), self.size)
        values = self.normalisation.apply(values, valid[None])
        if self.augment:
            values, valid = turned((values, valid), turn, self.normalisation.bands)
        return Chip(
            torch.from_numpy(values),
            torch.from_numpy(valid)[None],
            torch.from_numpy(measured_channels(scene)[channels]),
            f"{scene.name}:{crop.row}:{crop.col}",
        )


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of an epoch's chips."""
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def moved(grid: Grid, window: Window, side: int, rng: np.random.Generator) -> Window:
    """A crop of this side up to half a window away, inside the scene where that is large enough."""
    down, right = rng.integers(-(window.height // 2), window.height // 2 + 1, 2).tolist()
    return Window(
        min(max(window.row + down, 0), max(grid.height - side, 0)),
        min(max(window.col + right, 0), max(grid.width - side, 0)),
        side,
        side,
    )


def may_hold(scene: StoredScene, window: Window) -> bool:
    """Whether any tile that a window touches has valid pixels."""
    return bool((scene.tile_fractions(scene.grid.clip(window)) > 0).any())


def measured_channels(scene: StoredScene) -> NDArray[np.bool_]:
    """Which physical channels of a scene come from bands that were measured."""
    missing = {b.name for b in scene.scene.bands if not b.measured}
    return np.array([c.split("_")[0] not in missing for c in scene.scene.channels])


def channel_indexes(scene: StoredScene, wanted: Sequence[str]) -> list[int]:
    """Where a scene holds these channels.

    Raises:
        StoreError: naming those it lacks.
    """
    held = scene.scene.channels
    missing = [c for c in wanted if c not in held]
    if missing:
        raise StoreError(
            f"{scene.name} ({scene.modality}) lacks {', '.join(missing)}; it has "
            f"{', '.join(held)}. Choose common ones: --set modalities.{scene.modality}.bands=[…]"
        )
    return [held.index(c) for c in wanted]
