"""Weights that pre-training takes over from a checkpoint, read part by part (see `model.start`)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.adapt import adapted
from model.checkpoint import BANK, CheckpointConfig, disk_names, fill, open_tensors, read_config
from model.config import ModelConfig, PretrainConfig
from model.shards import Files
from model.start import Source, drawn, module_of

OF_MODALITY = re.compile(r"(?:patch_embeds|specialised|decoders)\.([^.]+)\.")
"""Names of tensors that belong to one modality."""


@dataclass(frozen=True)
class Heritage:
    """A checkpoint to start from, and what of it."""

    path: Path
    """Any checkpoint that has an encoder."""
    bands: Mapping[str, Sequence[int]]
    """Modality -> for each of its channels now, the checkpoint's channel it starts from
    (`model.adapt.adapted`). Modalities that the checkpoint lacks are not here."""
    share: tuple[int, int] = (0, 1)
    """Which part of the routed experts to read, of how many parts; a process that does not hold
    the others need not care what they are."""

    @cached_property
    def about(self) -> CheckpointConfig:
        """What the checkpoint says about itself."""
        return read_config(self.path)

    def model(self, channels: Mapping[str, int]) -> ModelConfig:
        """The checkpoint's model with the modalities and channels of now."""
        return replace(self.about.model, channels=dict(channels))

    def has(self, name: str, objective: PretrainConfig) -> bool:
        """Whether the checkpoint has values for a tensor of a pre-training network.

        A decoder's serve only for the same channels and the same target.
        """
        owner = OF_MODALITY.search(name)
        if owner and owner[1] not in self.bands:
            return False
        if name.startswith("encoder."):
            return True
        before = self.about.pretraining
        if before is None or owner is None:
            return before is not None
        channels = range(self.about.model.channels[owner[1]])
        same_target = before.sar_l1_target == objective.sar_l1_target
        return list(self.bands[owner[1]]) == [*channels] and (owner[1] != "sar-l1" or same_target)


def inherited(
    heritage: Heritage, config: ModelConfig, objective: PretrainConfig, seed: int
) -> Source:
    """The weights of a checkpoint, and random ones for what it does not have.

    Args:
        heritage: the checkpoint.
        config: `heritage.model(…)`.
        objective: of pre-training.
        seed: of what is drawn.

    Raises:
        ValueError: by the source, if the checkpoint is damaged.
    """
    draw = drawn(config, objective, seed)
    before = {m: heritage.about.model.channels[m] for m in heritage.bands}
    then = replace(config, channels={**config.channels, **before})

    def read(part: str) -> Mapping[str, Tensor]:
        prefix = f"{part}." if part else ""
        with torch.device("meta"):
            meant = module_of(part, then, objective).state_dict()
        held = {n: torch.empty_like(t, device="cpu") for n, t in meant.items()
                if heritage.has(prefix + n, objective)}  # fmt: skip
        read_slots(heritage, {prefix + n: slot for n, slot in held.items()})
        for modality, sources in heritage.bands.items():
            name = f"encoder.patch_embeds.{modality}.projection.weight"
            if name in held:
                held[name] = adapted(held[name], sources)
        return held if len(held) == len(meant) else {**draw(part), **held}

    return read


def read_slots(heritage: Heritage, slots: Mapping[str, Tensor]) -> None:
    """Read tensors into their places; of routed experts only the share that is wanted."""
    part, parts = heritage.share
    wanted: dict[str, Tensor] = {}
    for name, slot in slots.items():
        entries, bank = disk_names(name, slot), BANK.match(name)
        if bank and not bank[1].endswith(".shared"):
            size = len(entries) // parts
            entries = entries[part * size : (part + 1) * size]
        wanted.update(entries)
    with torch.no_grad(), Files() as files:
        for name, entry in open_tensors(heritage.path, wanted).items():
            fill(files, entry, wanted[name])
