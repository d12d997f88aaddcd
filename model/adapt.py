"""Cheap adaptation of a pre-trained encoder: other bands, frozen, Convpass, slower depths."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.encoder import Block, RingMoE
from model.patch import PatchEmbed


def encoder_for(path: Path | str, sources: Mapping[str, Sequence[int]]) -> RingMoE:
    """The encoder of a checkpoint, for some of its modalities and other bands.

    Args:
        path: any checkpoint.
        sources: wanted modality -> for each wanted channel, the checkpoint's channel it starts
            from (see `adapt_bands`).

    Raises:
        ValueError: for a folder without a model, or a modality the model does not have.
    """
    from model.checkpoint import load_module, read_config

    config = read_config(path).model
    missing = [m for m in sources if m not in config.channels]
    if missing:
        raise ValueError(
            f"{path} was trained on {', '.join(config.modalities)}, not on {missing[0]}"
        )
    encoder = RingMoE(config.with_modalities(tuple(sources)))
    load_module(path, encoder, "encoder.")
    for modality, channels in sources.items():
        adapt_bands(encoder, modality, channels)
    return encoder


def adapt_bands(encoder: RingMoE, modality: str, sources: Sequence[int]) -> None:
    """Give a patch embedding other channels, each a copy of an old one (see `adapted`).

    Args:
        encoder: changed in place, its config too.
        modality: whose patch embedding.
        sources: for each new channel the old one it starts from.
    """
    old = encoder.patch_embeds[modality]
    assert isinstance(old, PatchEmbed)
    if list(sources) == list(range(old.projection.in_channels)):
        return
    new = PatchEmbed(len(sources), encoder.config)
    with torch.no_grad():
        new.projection.weight.copy_(adapted(old.projection.weight, sources))
        new.projection.bias.copy_(old.projection.bias)  # type: ignore[union-attr,arg-type]
    new.norm.load_state_dict(old.norm.state_dict())
    encoder.patch_embeds[modality] = new
    channels = {**encoder.config.channels, modality: len(sources)}
    encoder.config = replace(encoder.config, channels=channels)


def adapted(weight: Tensor, sources: Sequence[int]) -> Tensor:
    """The weights (D, channels, p, p) of an embedding for other channels.

    Where an old channel is copied k times its weights are divided by k, so that the embedding of
    k equal bands is that of the one band; reordered or left-out bands keep their weights.

    Args:
        weight: of the old channels.
        sources: for each new channel the old one it starts from.
    """
    copies = torch.tensor([sources.count(s) for s in sources], dtype=weight.dtype)
    return weight[:, list(sources)] / copies.view(1, -1, 1, 1)


class Convpass(nn.Module):
    """Bypass of a block: narrow, 3 × 3 convolution over the token grid, wide (Jie and Deng 2022).

    Its last layer starts at zero, so that inserting it changes nothing.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.up = nn.Linear(hidden, width)
        nn.init.dirac_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same."""
        hidden = nn.functional.gelu(self.down(x)).movedim(-1, 1)
        hidden = nn.functional.gelu(self.conv(hidden)).movedim(1, -1)
        y: Tensor = self.up(hidden)
        return y


def insert_convpass(encoder: RingMoE, hidden: int) -> None:
    """Put a Convpass bypass beside every block; with 0 nothing happens.

    One bypass spans the whole block: in a post-norm block, a bypass inside the residual branch
    would be normalised away.
    """
    if not hidden:
        return
    for stage, width in zip(encoder.stages, encoder.config.widths, strict=True):
        for block in stage.blocks:  # type: ignore[union-attr]
            block.add_module("bypass", Convpass(width, hidden))
            block.register_forward_hook(add_bypass)


def add_bypass(block: Block, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook: block(x) + bypass(x), zero at tokens without data."""
    x, valid = inputs[0], inputs[2] if len(inputs) > 2 else None
    y, routing = output
    beside = block.bypass(x)  # type: ignore[operator]
    return y + (beside if valid is None else beside * valid[..., None]), routing


def freeze(encoder: RingMoE) -> None:
    """Train nothing of the encoder but its Convpass bypasses."""
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".bypass." in name)


def parameters(network: nn.Module) -> tuple[int, int]:
    """Number of trainable parameters, and of all."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def depth_scale(name: str, depths: Sequence[int], decay: float) -> float:
    """Factor of the learning rate of a parameter: decay^(blocks between it and the head).

    Layer-wise decay (BEiT, Bao et al. 2022): the head and final norm learn at the full rate, the
    last block at `decay`, the patch embedding slowest.

    Args:
        name: of the parameter in a `TaskNetwork`.
        depths: blocks per stage.
        decay: 1 leaves all rates equal.
    """
    if name.startswith("encoder.patch_embeds."):
        return decay ** (sum(depths) + 1)
    place = re.match(r"encoder\.stages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if place is None:
        return 1.0
    stage = int(place[1])
    block = int(place[2]) if place[2] else depths[stage] - 1
    return decay ** (sum(depths[stage:]) - block)
