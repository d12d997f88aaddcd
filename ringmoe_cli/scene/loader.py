"""From tile stores to batches for pre-training: mixed modalities, any rank, any step.

Batch `s` of a run is a pure function of the seed: it has the same chips whether it is drawn on
one rank or cut over many, by workers or in this process, in a fresh or a resumed run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from model.batch import Batch
from model.modality import MODALITIES
from model.normalisation import Normalisation
from ringmoe_cli.errors import StoreError
from ringmoe_cli.scene.store.ahead import ahead
from ringmoe_cli.scene.store.chips import Chip, ChipDataset, channel_indexes, measured_channels
from ringmoe_cli.scene.store.statistics import POWER, Moments, moments_from
from ringmoe_cli.scene.tiles import Store, StoredScene

PREFETCH = 4
"""Batches made ahead, per worker."""

SMALLEST_STD = 1e-6
"""Deviation of a constant channel."""


@dataclass(frozen=True)
class MixedBatches(Dataset[Batch]):
    """One rank's batches of all modalities; batch `s` is item `s`."""

    chips: Mapping[str, ChipDataset]
    """By modality."""
    shares: Mapping[str, int]
    """Chips of each modality in a global batch."""
    rank: int = 0
    """Of this process."""
    world: int = 1
    """Processes that share a global batch."""

    def __getitem__(self, step: int) -> Batch:
        """This rank's part of global batch `step`."""
        everything = [(m, k) for m, n in self.shares.items() for k in range(n)]
        drawn: dict[str, list[Chip]] = {}
        for modality, k in everything[self.rank :: self.world]:
            number = step * self.shares[modality] + k
            drawn.setdefault(modality, []).append(self.chips[modality].sample(number))
        return collate(drawn)


def pretraining_batches(
    stores: Sequence[Store],
    normalisation: Mapping[str, Normalisation],
    *,
    size: int,
    batch_size: int,
    weights: Mapping[str, float],
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    resize: tuple[float, float] | None = None,
) -> Iterator[Batch]:
    """Endless batches of unpaired chips, from batch `start_step` on.

    Args:
        stores: tile stores; modalities without scenes are left out.
        normalisation: from `store_normalisation`.
        size: side of a chip in pixels.
        batch_size: chips of a batch over all ranks.
        weights: share of each modality.
        seed: of the run.
        start_step: number of the first batch.
        rank: of this process; it gets every `world`-th chip of a batch.
        world: number of processes.
        workers: reading processes; 0 reads in a thread beside the training.
        resize: enlarge random crops of optical chips, see `ChipDataset`.

    Raises:
        StoreError: if no modality has both scenes and a weight, or a scene lacks a channel.
    """
    chips = {
        m: ChipDataset(
            [s for store in stores for s in store.scenes_of(m)],
            norm,
            size,
            seed + number,
            resize=None if m.startswith("sar") else resize,
        )
        for number, (m, norm) in enumerate(normalisation.items())
        if weights.get(m, 0) > 0
    }
    if not chips:
        raise StoreError(
            f"no scene of {', '.join(weights)} in {', '.join(map(str, paths(stores)))}"
        )
    shares = mix(batch_size, {m: weights[m] for m in chips})
    mixed = MixedBatches(chips, shares, rank, world)
    return stream(mixed, start_step, workers)


def grid_batches(
    stores: Sequence[Store],
    normalisation: Mapping[str, Normalisation],
    *,
    size: int,
    batch_size: int,
) -> Iterator[Batch]:
    """Every window of a grid over the scenes once, one modality after the other, as it is.

    Windows that hold no valid pixel are left out.

    Args:
        stores: tile stores.
        normalisation: from `store_normalisation`, or a checkpoint's.
        size: side of a window in pixels.
        batch_size: windows of a batch; the last of a modality may have fewer.
    """
    for modality, norm in normalisation.items():
        scenes = [s for store in stores for s in store.scenes_of(modality)]
        chips = ChipDataset(scenes, norm, size, augment=False)
        for first in range(0, len(chips), batch_size):
            numbers = range(first, min(first + batch_size, len(chips)))
            yield collate({modality: [chips.cell(n) for n in numbers]})


def paths(stores: Sequence[Store]) -> list[Any]:
    """Where the stores are."""
    return [s.path for s in stores]


def stream(batches: MixedBatches, start: int, workers: int) -> Iterator[Batch]:
    """Batches in order, made ahead by worker processes or by a thread."""
    if workers == 0:
        return ahead(batches[step] for step in count(start))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=count(start),
        num_workers=workers,
        multiprocessing_context="forkserver",
        persistent_workers=True,
        prefetch_factor=PREFETCH,
    )
    return ahead(iter(loader), depth=1)  # taking over a worker's memory costs milliseconds


def collate(drawn: Mapping[str, Sequence[Chip]]) -> Batch:
    """Chips as a batch; validity and channels are named only where something is missing."""
    images = {m: torch.stack([c.values for c in chips])[:, None] for m, chips in drawn.items()}
    valid = {m: torch.stack([c.valid for c in chips])[:, None] for m, chips in drawn.items()}
    channels = {m: torch.stack([c.measured for c in chips]) for m, chips in drawn.items()}
    return Batch(
        images,
        {m: v for m, v in valid.items() if not v.all()},
        {m: c for m, c in channels.items() if not c.all()},
        keys=[c.key for chips in drawn.values() for c in chips],
    )


def mix(batch_size: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Chips per modality by largest remainder, at least one of each where the batch allows.

    Raises:
        ValueError: if the batch is empty or no weight is positive.
    """
    total = sum(weights.values())
    if batch_size < 1 or total <= 0:
        raise ValueError(f"batch of {batch_size} with weights {dict(weights)}: nothing to draw")
    exact = {m: batch_size * w / total for m, w in weights.items()}
    shares = {m: int(x) for m, x in exact.items()}
    by_remainder = sorted(exact, key=lambda m: shares[m] - exact[m])
    for m in by_remainder[: batch_size - sum(shares.values())]:
        shares[m] += 1
    for m in shares:
        richest = max(shares, key=lambda k: shares[k])
        if shares[m] == 0 and shares[richest] > 1:
            shares[richest] -= 1
            shares[m] = 1
    return {m: n for m, n in shares.items() if n}


def store_normalisation(
    stores: Sequence[Store], bands: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Normalisation]:
    """How the modalities of some stores are normalised, from their statistics.

    Args:
        stores: tile stores; every scene counts by its valid pixels.
        bands: channels to use per modality; otherwise those of the first scene.

    Raises:
        StoreError: if a scene lacks a channel, or counts and reflectances are mixed.
    """
    found = {}
    for modality in MODALITIES:
        scenes = [s for store in stores for s in store.scenes_of(modality)]
        if scenes:
            wanted = tuple((bands or {}).get(modality, ())) or scenes[0].scene.channels
            found[modality] = normalisation_of(scenes, wanted)
    if not found:
        raise StoreError(f"{', '.join(map(str, paths(stores)))}: no scenes")
    return found


def store_gsd(stores: Sequence[Store], modalities: Iterable[str]) -> dict[str, float]:
    """Median metres per pixel of the scenes of some modalities, where known."""
    found: dict[str, float] = {}
    for modality in modalities:
        scenes = [s.scene for store in stores for s in store.scenes_of(modality)]
        metres = [scene.gsd for scene in scenes if scene.gsd]
        found |= {modality: float(median(metres))} if metres else {}
    return found


def normalisation_of(scenes: Sequence[StoredScene], channels: tuple[str, ...]) -> Normalisation:
    """Normalisation of one modality: mean and deviation, or one scale for complex channels."""
    for scene in scenes:
        channel_indexes(scene, channels)
    check_units(scenes)
    if scenes[0].modality == "sar-l1":
        return polarimetric(scenes, channels)
    merged = [Moments.merged(moments_from(s.statistics[c]) for s in scenes) for c in channels]
    return Normalisation(
        channels,
        tuple(m.mean for m in merged),
        tuple(float(max(m.std, SMALLEST_STD)) for m in merged),
    )


def polarimetric(scenes: Sequence[StoredScene], channels: tuple[str, ...]) -> Normalisation:
    """One scale and no mean, so that power survives; unmeasured channels don't count."""
    squares = []
    for c in channels:
        parts = [s for s in scenes if measured_channels(s)[s.scene.channels.index(c)]]
        if parts:
            squares.append(Moments.merged(moments_from(s.statistics[c]) for s in parts).rms ** 2)
    scale = float(max(np.sqrt(np.mean(squares)), np.finfo(np.float32).tiny))
    full = [s for s in scenes if measured_channels(s).all()] or list(scenes)
    power = Moments.merged(moments_from(s.statistics[POWER]) for s in full)
    return Normalisation(
        channels,
        (0.0,) * len(channels),
        (scale,) * len(channels),
        (power.mean, max(power.std, SMALLEST_STD)),
    )


def check_units(scenes: Sequence[StoredScene]) -> None:
    """Refuse to average plain counts with reflectances.

    Raises:
        StoreError: naming one scene of each.
    """
    units = {s.scene.quantity: s.name for s in scenes}
    if {"dn", "reflectance"} <= set(units):
        raise StoreError(
            f"{units['dn']} holds plain counts and {units['reflectance']} reflectances; "
            "tile the former with --scale"
        )
