"""How many parameters and multiplications a model has, without allocating one of them."""

import re
from collections.abc import Iterable
from math import ceil

import torch

from model.config import ModelConfig

COMPONENTS: dict[str, str] = {
    "specialised experts": r"\bmoe\.specialised\.",
    "collaborative experts": r"\bmoe\.collaborative\.",
    "shared expert": r"\bmoe\.shared\.",
    "routers": r"\bmoe\.router\.",
    "position bias": r"\battn\.(relative_position_bias_table|cpb|position)",
    "attention": r"\battn\.",
    "patch merging": r"\bdownsample\.",
    "patch embedding": r"\bpatch_embeds\.",
    "block norms": r"\bblocks\.\d+\.norm",
    "final norm": r"^(encoder\.)?norm\.",
    "mask token": r"\bmask_token$",
    "decoders": r"\bdecoders\.",
}
"""Component -> pattern of its parameters' names; the first that matches counts."""


def by_component(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Parameters per component, from (name, number of elements); "head" takes what is left."""
    counts = dict.fromkeys([*COMPONENTS, "head"], 0)
    for name, size in names:
        found = (c for c, pattern in COMPONENTS.items() if re.search(pattern, name))
        counts[next(found, "head")] += size
    return {component: count for component, count in counts.items() if count}


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of the encoder per component, counted on the meta device."""
    from model.encoder import RingMoE

    with torch.device("meta"):
        net = RingMoE(config)
    return by_component((name, p.numel()) for name, p in net.named_parameters())


def multiply_adds(config: ModelConfig, height: int, width: int) -> int:
    """Multiply-adds of one image through the encoder: projections, attention, active experts.

    Every token of a block meets top-k experts of each routed branch and the shared one.
    """
    total = 0
    for stage, (depth, dim) in enumerate(zip(config.depths, config.widths, strict=True)):
        stride = config.patch_size * 2**stage
        tokens = ceil(height / stride) * ceil(width / stride)
        attention = 4 * dim * dim + 2 * config.stage_window(stage) ** 2 * dim
        for block in range(depth):
            experts = active_experts(config, stage, block)
            total += tokens * (attention + experts * 2 * config.mlp_ratio * dim * dim)
        if stage + 1 < len(config.depths):
            total += ceil(tokens / 4) * 8 * dim * dim
    return total


def active_experts(config: ModelConfig, stage: int, block: int) -> int:
    """Experts that each token meets in a layer."""
    branches = ("collaborative", f"specialised.{config.modalities[0]}")
    routed = sum(min(config.top_k, len(config.experts_of(stage, block, b))) for b in branches)
    return routed + config.shared


def pretraining_parameters(config: ModelConfig) -> int:
    """Parameters of the encoder with mask token and decoders."""
    from model.config import PretrainConfig
    from model.pretrain import MaskedImageModel

    with torch.device("meta"):
        net = MaskedImageModel(config, PretrainConfig())
    return sum(p.numel() for p in net.parameters())


def block_parameters(config: ModelConfig) -> list[tuple[int, int]]:
    """Parameters of each block: (everything but routed experts, routed experts)."""
    from model.encoder import RingMoE

    with torch.device("meta"):
        net = RingMoE(config)
    sizes: dict[str, tuple[int, int]] = {}
    for name, parameter in net.named_parameters():
        block = re.match(r"stages\.\d+\.blocks\.\d+\.", name)
        if block:
            dense, routed = sizes.get(block[0], (0, 0))
            if re.search(r"\bmoe\.(specialised|collaborative)\.", name):
                routed += parameter.numel()
            else:
                dense += parameter.numel()
            sizes[block[0]] = (dense, routed)
    return list(sizes.values())
