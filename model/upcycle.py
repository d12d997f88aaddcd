"""A dense Swin Transformer V2 of timm, Hugging Face or torchvision, upcycled into experts.

Every expert starts as the dense FFN, its output projection divided by the number of branches; with
normalised gates the features equal the dense network's (Komatsuzaki et al. 2023, "sparse
upcycling"; Liu et al. 2022). Training then lets the experts part.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.released import encoder_shapes
from model.shards import Spec
from model.weights import Weights

Layout = Literal["timm", "huggingface", "torchvision"]

ANCHORS: dict[Layout, str] = {
    "timm": "layers.0.blocks.0.attn.logit_scale",
    "huggingface": "encoder.layers.0.blocks.0.attention.self.logit_scale",
    "torchvision": "features.1.0.attn.logit_scale",
}
"""A name that only this layout of a Swin V2 has; what stands before it is the prefix."""

BLOCK: dict[Layout, dict[str, str]] = {
    "timm": {"mlp": "mlp.fc1 mlp.fc2", "bias": "attn.cpb_mlp", "proj": "attn.proj"},
    "torchvision": {"mlp": "mlp.0 mlp.3", "bias": "attn.cpb_mlp", "proj": "attn.proj"},
    "huggingface": {
        "mlp": "intermediate.dense output.dense",
        "bias": "attention.self.continuous_position_bias_mlp",
        "proj": "attention.output.dense",
    },
}
NORMS: dict[Layout, tuple[str, str]] = {
    "timm": ("norm1", "norm2"),
    "torchvision": ("norm1", "norm2"),
    "huggingface": ("layernorm_before", "layernorm_after"),
}
EMBED: dict[Layout, tuple[str, str]] = {
    "timm": ("patch_embed.proj", "patch_embed.norm"),
    "torchvision": ("features.0.0", "features.0.2"),
    "huggingface": ("embeddings.patch_embeddings.projection", "embeddings.norm"),
}
FINAL: dict[Layout, str] = {"timm": "norm", "torchvision": "norm", "huggingface": "layernorm"}


@dataclass(frozen=True)
class Swin:
    """A dense Swin V2 in a weight file."""

    weights: Weights
    """The file."""
    layout: Layout
    """Whose names it speaks."""
    prefix: str
    """What stands before every name."""
    early_merge: bool
    """timm >= 0.9 keeps the merging at the start of the next stage."""

    def name(self, rest: str) -> str:
        """A full name in the file."""
        return self.prefix + rest

    def block(self, stage: int, block: int) -> str:
        """What stands before the names of a block."""
        return {
            "timm": f"layers.{stage}.blocks.{block}.",
            "huggingface": f"encoder.layers.{stage}.blocks.{block}.",
            "torchvision": f"features.{2 * stage + 1}.{block}.",
        }[self.layout]

    def merging(self, stage: int) -> str:
        """What stands before the names of the merging after a stage."""
        return {
            "timm": f"layers.{stage + self.early_merge}.downsample.",
            "huggingface": f"encoder.layers.{stage}.downsample.",
            "torchvision": f"features.{2 * stage + 2}.",
        }[self.layout]

    def shape(self, rest: str) -> tuple[int, ...]:
        """Shape of a tensor in the file.

        Raises:
            ValueError: if it is not there.
        """
        if self.name(rest) not in self.weights.specs:
            raise ValueError(f"the file has no {self.name(rest)}; is it a whole Swin V2?")
        return self.weights.specs[self.name(rest)].shape

    def has(self, rest: str) -> bool:
        """Whether a tensor is there."""
        return self.name(rest) in self.weights.specs

    def read(self, rest: str) -> Tensor:
        """A tensor of the file."""
        self.shape(rest)
        return self.weights.read(self.name(rest))


def find_swin(weights: Weights) -> Swin | None:
    """The Swin V2 in a weight file, if there is one."""
    for layout, anchor in ANCHORS.items():
        found = next((n for n in weights.specs if n.endswith(anchor)), None)
        if found is not None:
            prefix = found.removesuffix(anchor)
            early = f"{prefix}layers.0.downsample.reduction.weight" not in weights.specs
            return Swin(weights, layout, prefix, early)
    return None


def swin_config(swin: Swin, modalities: Mapping[str, int], **changes: Any) -> ModelConfig:
    """The config of the upcycled model: shapes from the file, Swin's own GELU and epsilons.

    Args:
        swin: the dense model.
        modalities: modality -> channels of the result.
        changes: fields that a file does not tell or that should differ (window, image_size,
            specialised, collaborative, gate).
    """
    first = "query.weight" if swin.layout == "huggingface" else "qkv.weight"
    attention = "attention.self." if swin.layout == "huggingface" else "attn."
    depths: list[int] = []
    heads: list[int] = []
    while swin.has(f"{swin.block(len(depths), 0)}{attention}{first}"):
        stage = len(depths)
        heads.append(swin.shape(f"{swin.block(stage, 0)}{attention}logit_scale")[0])
        blocks = 0
        while swin.has(f"{swin.block(stage, blocks)}{attention}{first}"):
            blocks += 1
        depths.append(blocks)
    projection = swin.shape(f"{EMBED[swin.layout][0]}.weight")
    fields: dict[str, Any] = {
        "embed_dim": projection[0], "depths": tuple(depths), "num_heads": tuple(heads),
        "patch_size": projection[2], "channels": dict(modalities), "gate": "normalized",
        "attention": "swin_v2", "gelu": "erf", "norm_eps": 1e-5, "merge_eps": 1e-5,
        **window_of(swin),
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def window_of(swin: Swin) -> dict[str, int]:
    """Window and image size, where the file's constants tell them; else Swin's 8 at 256 pixels."""
    sizes = {
        int(found[1]): (isqrt(spec.shape[1]) + 1) // 2
        for name, spec in swin.weights.specs.items()
        if (found := re.search(r"layers\.(\d+)\.blocks\.0\..*relative_coords_table$", name))
    }
    if not sizes:
        return {"window": 8, "image_size": 256}
    window, last = max(sizes.values()), max(sizes)
    return {"window": window, "image_size": sizes[last] * 4 * 2**last}


def upcycled(swin: Swin, config: ModelConfig, seed: int = 0) -> tuple[list[Spec], Iterator[Tensor]]:
    """The tensors of the upcycled encoder, made one at a time.

    Raises:
        ValueError: if the file lacks a tensor.
    """
    dtype = swin.weights.specs[swin.name(f"{EMBED[swin.layout][0]}.weight")].dtype
    specs = [Spec(name, dtype, shape) for name, shape in encoder_shapes(config)]
    generator = torch.Generator().manual_seed(seed)

    def make() -> Iterator[Tensor]:
        for spec in specs:
            if ".moe.router." in spec.name:
                yield torch.empty(spec.shape).normal_(0, 0.02, generator=generator).to(dtype)
            else:
                tensor = dense_tensor(swin, spec.name, config)
                yield tensor.to(dtype).reshape(spec.shape).contiguous()

    return specs, make()


def dense_tensor(swin: Swin, name: str, config: ModelConfig) -> Tensor:
    """What the dense model has for one of our tensors."""
    layout, last = swin.layout, name.rpartition(".")[2]
    block = re.match(r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(.+)", name)
    if block:
        return in_block(swin, swin.block(int(block[1]), int(block[2])), block[3], config)
    merging = re.match(r"encoder\.stages\.(\d+)\.downsample\.(.+)", name)
    if merging:
        return swin.read(swin.merging(int(merging[1])) + merging[2])
    embed = re.match(r"encoder\.patch_embeds\.([^.]+)\.(projection|norm)\.", name)
    if embed:
        tensor = swin.read(f"{EMBED[layout][embed[2] == 'norm']}.{last}")
        return adapted(tensor, config.channels[embed[1]]) if tensor.ndim == 4 else tensor
    return swin.read(f"{FINAL[layout]}.{last}")


def adapted(kernel: Tensor, channels: int) -> Tensor:
    """A patch kernel for another number of channels: their mean, at the same total strength."""
    if kernel.shape[1] == channels:
        return kernel
    mean = kernel.mean(dim=1, keepdim=True) * kernel.shape[1] / channels
    return mean.expand(-1, channels, -1, -1)


def in_block(swin: Swin, base: str, rest: str, config: ModelConfig) -> Tensor:
    """A tensor of a block."""
    names = BLOCK[swin.layout]
    expert = re.fullmatch(r"moe\.(.+)\.\d+\.(fc[12])\.(weight|bias)", rest)
    if expert:
        tensor = swin.read(f"{base}{names['mlp'].split()[expert[2] == 'fc2']}.{expert[3]}")
        return tensor / branches(config) if expert[2] == "fc2" else tensor
    part, _, last = rest.rpartition(".")
    if part == "attn.proj":
        return swin.read(f"{base}{names['proj']}.{last}")
    if part in ("norm1", "norm2"):
        return swin.read(f"{base}{NORMS[swin.layout][part == 'norm2']}.{last}")
    if part.startswith("attn.position."):
        return swin.read(f"{base}{names['bias']}.{'0' if part.endswith('fc1') else '2'}.{last}")
    return in_attention(swin, base, rest.removeprefix("attn."))


def in_attention(swin: Swin, base: str, name: str) -> Tensor:
    """Queries, keys, values and their scale. Swin V2's keys have no bias."""
    if swin.layout == "huggingface":
        base += "attention.self."
        if name == "qkv.weight":
            parts = ("query", "key", "value")
            return torch.cat([swin.read(f"{base}{part}.weight") for part in parts])
        return swin.read(base + {"q_bias": "query.bias", "v_bias": "value.bias"}.get(name, name))
    base += "attn."
    if name in ("q_bias", "v_bias") and not swin.has(base + name):
        q, _, v = swin.read(f"{base}qkv.bias").chunk(3)
        return q if name == "q_bias" else v
    return swin.read(base + name)


def branches(config: ModelConfig) -> int:
    """Branches that are summed in a layer."""
    return sum(bool(n) for n in (config.specialised, config.collaborative, config.shared))
