"""The RingMoE encoder: one hierarchy of Swin stages for all modalities (RingMoE §3.2)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor, nn

from model.attention import TableBias, WindowAttention, WindowGrid
from model.batch import Features
from model.config import ModelConfig
from model.experts import RMoE, Stacked
from model.norm import Norm
from model.patch import PatchEmbed, PatchMerging, patch_validity
from model.router import LayerRouting, Router

BRANCH_START = 0.1
"""First scale of what a block adds to its tokens. Swin V2 starts post-norms at 0, which leaves the
experts and routers without a gradient in the first step; at 1 a small model learns far slower."""


@dataclass
class Encoding:
    """What the encoder says about a batch."""

    features: dict[str, Features]
    """Modality -> four stage maps."""
    routing: list[LayerRouting]
    """One per block, in order."""


@dataclass
class Tokens:
    """The token grid of images of equal size on its way through the stages."""

    x: Tensor
    """(B, H, W, C), the images of each modality together."""
    images: dict[str, int]
    """Modality -> its number of images, in order."""
    valid: Tensor | None = None
    """(B, H, W) bool, tokens that hold data; None: all."""


class Block(nn.Module):
    """x = x + LN(attention(x)); x = x + LN(RMoE(x)) (residual post-norm, Liu et al. 2022)."""

    def __init__(self, config: ModelConfig, stage: int, block: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.window = config.stage_window(stage)
        self.shift = self.window // 2 if block % 2 else 0
        self.attn = WindowAttention(width, config.num_heads[stage], self.window, config.attention)
        self.norm1 = Norm(width, eps=config.norm_eps)
        self.moe = RMoE(config, stage, block)
        self.norm2 = Norm(width, eps=config.norm_eps)

    def forward(
        self, x: Tensor, images: dict[str, int], valid: Tensor | None = None
    ) -> tuple[Tensor, LayerRouting]:
        """(B, H, W, C) -> the same, and the routing; see `Tokens` for `images` and `valid`."""
        grid = WindowGrid(x.shape[1], x.shape[2], self.window, self.shift)
        x = x + self.norm1(self.attn(x, grid, valid))
        if valid is None:
            per_image = x.shape[1] * x.shape[2]
            tokens = {name: count * per_image for name, count in images.items()}
            y_TD, routing = self.moe(x.flatten(0, 2), tokens)
            return x + self.norm2(y_TD).view_as(x), routing
        counts = [int(part.sum()) for part in torch.split(valid, list(images.values()))]
        y_TD, routing = self.moe(x[valid], dict(zip(images, counts, strict=True)))
        out = torch.zeros_like(x)  # invalid tokens stay zero, like padding
        out[valid] = x[valid] + self.norm2(y_TD).to(x.dtype)
        return out, routing


class Stage(nn.Module):
    """Blocks of one width, and the merging that leads to the next stage."""

    def __init__(self, config: ModelConfig, stage: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, stage, b) for b in range(config.depths[stage]))
        last = stage == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(config.widths[stage], config.merge_eps)

    def forward(
        self, x: Tensor, images: dict[str, int], valid: Tensor | None = None
    ) -> tuple[Tensor, list[LayerRouting]]:
        """The blocks, without the merging: (B, H, W, C) -> the same, and each block's routing."""
        routing = []
        for block in self.blocks:
            x, layer = block(x, images, valid)
            routing.append(layer)
        return x, routing


class RingMoE(nn.Module):
    """The encoder: any number of modalities in, four feature maps of each out.

    Attention, collaborative and shared experts are common to all modalities; patch embeddings and
    specialised experts are each modality's own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        warn_of_silent_gate(config)
        self.config = config
        self.patch_embeds = nn.ModuleDict(
            {name: PatchEmbed(channels, config) for name, channels in config.channels.items()}
        )
        self.stages = nn.ModuleList(Stage(config, s) for s in range(len(config.depths)))
        self.norm = Norm(config.widths[-1], eps=config.norm_eps)
        self.apply(initialise)

    @classmethod
    def from_pretrained(cls, path: str | Path, modality: str | None = None) -> Self:
        """The encoder of a checkpoint folder, of one modality only if said.

        Raises:
            ValueError: for a folder without a model, or a modality the model does not have.
        """
        from model.checkpoint import load_module, read_config

        config = read_config(path).model
        if modality is not None:
            if modality not in config.modalities:
                raise ValueError(
                    f"{path} has no modality {modality!r}; it has {', '.join(config.modalities)}"
                )
            config = config.with_modalities((modality,))
        with torch.device("meta"):
            net = cls(config)
        load_module(path, net, "encoder.")
        return net.eval()

    def forward(self, images: Mapping[str, Tensor]) -> dict[str, Features]:
        """Features of each modality.

        Args:
            images: modality -> (B, C, H, W), normalised; B, H, W may differ between modalities.

        Returns:
            modality -> [(B, C·2^s, ceil(H/4·2^s), ceil(W/4·2^s)) for the stages s].
        """
        return self.encode(images).features

    def encode(
        self,
        images: Mapping[str, Tensor],
        *,
        valid: Mapping[str, Tensor] | None = None,
        channels: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        mask_token: Tensor | None = None,
    ) -> Encoding:
        """Features and routing.

        Args:
            images: modality -> (B, C, H, W), normalised.
            valid: modality -> (B, 1, H, W) or (B, H, W) bool. Patches without a valid pixel are
                not seen by the others, not routed, and stay zero.
            channels: modality -> (B, C) bool, channels really measured; the others are zeroed.
            masks: modality -> (B, ceil(H/4), ceil(W/4)) bool, patches hidden behind `mask_token`.
            mask_token: (C,) or broadcastable; needed with `masks`.

        Raises:
            ValueError: for a modality the model does not have, or an image it cannot take.
        """
        self.check(images)
        valid, channels, masks = valid or {}, channels or {}, masks or {}
        grids: dict[tuple[int, int], Tokens] = {}
        for name, image in images.items():
            if name in channels:
                image = image * channels[name][:, :, None, None].to(image.dtype)
            x = self.patch_embeds[name](image)
            if name in masks:
                if mask_token is None:
                    raise ValueError("masks were given without a mask_token")
                x = torch.where(masks[name][..., None], mask_token.to(x.dtype), x)
            seen = self.token_validity(valid.get(name))
            join(grids, name, x, seen)
        encodings = [self.run(tokens) for tokens in grids.values()]
        features = {k: v for e in encodings for k, v in e.features.items()}
        routing = encodings[0].routing
        for other in encodings[1:]:
            routing = [a + b for a, b in zip(routing, other.routing, strict=True)]
        return Encoding({name: features[name] for name in images}, routing)

    def check(self, images: Mapping[str, Tensor]) -> None:
        """Refuse modalities the model does not have."""
        if not images:
            raise ValueError("no images were given")
        for name in images:
            if name not in self.patch_embeds:
                have = ", ".join(self.config.modalities)
                raise ValueError(f"the model has no modality {name!r}; it has {have}")

    def token_validity(self, valid: Tensor | None) -> Tensor | None:
        """(B, H, W) bool of the patches, or None if all pixels are valid."""
        if valid is None or bool(valid.all()):
            return None
        if valid.ndim == 4:
            valid = valid.squeeze(1)
        return patch_validity(valid, self.config.patch_size)

    def run(self, tokens: Tokens) -> Encoding:
        """All stages on one token grid."""
        x, valid = tokens.x, tokens.valid
        if valid is not None:
            x = x * valid[..., None].to(x.dtype)
        maps, routing = [], []
        for stage in self.stages:
            x, layers = stage(x, tokens.images, valid)
            routing += layers
            maps.append(x)
            merge = cast(Stage, stage).downsample
            if merge is not None:
                x = merge(x)
                valid = None if valid is None else patch_validity(valid, 2)
        maps[-1] = self.norm(maps[-1])
        parts = [torch.split(m.movedim(-1, 1), list(tokens.images.values())) for m in maps]
        features = {
            name: [stage_parts[i] for stage_parts in parts] for i, name in enumerate(tokens.images)
        }
        return Encoding(features, routing)


def join(grids: dict[tuple[int, int], Tokens], name: str, x: Tensor, valid: Tensor | None) -> None:
    """Add a modality's tokens to the grid of its size; attention is shared along the batch."""
    size = (x.shape[1], x.shape[2])
    if size not in grids:
        grids[size] = Tokens(x, {name: len(x)}, valid)
        return
    before = grids[size]
    if valid is not None or before.valid is not None:

        def everywhere(t: Tensor) -> Tensor:
            return torch.ones(t.shape[:3], dtype=torch.bool, device=t.device)

        old = everywhere(before.x) if before.valid is None else before.valid
        valid = torch.cat([old, everywhere(x) if valid is None else valid])
    grids[size] = Tokens(torch.cat([before.x, x]), {**before.images, name: len(x)}, valid)


def warn_of_silent_gate(config: ModelConfig) -> None:
    """Tell those who train a lone routed branch that its gate hardly learns from the task."""
    lone = not config.shared and not (config.specialised and config.collaborative)
    if lone and config.top_k == 1 and config.gate == "softmax":
        warnings.warn(
            "one routed branch and no shared expert: the norm after the layer cancels the gate, "
            "so the router learns from the balance loss alone; add a branch or use top_k 2",
            stacklevel=3,
        )


def initialise(module: nn.Module) -> None:
    """Truncated normal of 0.02 for weights, zero for biases, as in Swin; blocks start quietly."""
    if isinstance(module, nn.Linear | nn.Conv2d | Stacked | Router):
        nn.init.trunc_normal_(module.weight, std=0.02)
        bias = getattr(module, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)
    elif isinstance(module, Block):
        nn.init.constant_(module.norm1.weight, BRANCH_START)
        nn.init.constant_(module.norm2.weight, BRANCH_START)
    elif isinstance(module, TableBias):
        nn.init.trunc_normal_(module.table, std=0.02)
