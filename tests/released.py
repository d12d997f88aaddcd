"""The released blocks' weights under our parameter names (see the oracle's README for layouts)."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODALITIES = ("opt", "sar-l1", "sar-l2", "ms")
"""Order of the released specialised experts and routers."""

Arrays = Mapping[str, NDArray]


def tensor(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.asarray(arrays[name]))


def norm(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.weight": tensor(arrays, f"{at}.gamma"),
        f"{ours}.bias": tensor(arrays, f"{at}.beta"),
    }


def attention(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    table = f"{at}relative_position_bias.relative_position_bias_table"
    return {
        f"{ours}qkv.weight": torch.cat([tensor(arrays, f"{at}{n}.weight") for n in "qkv"]),
        **{f"{ours}{n}_bias": tensor(arrays, f"{at}{n}.bias") for n in "qkv"},
        f"{ours}proj.weight": tensor(arrays, f"{at}proj.weight"),
        f"{ours}proj.bias": tensor(arrays, f"{at}proj.bias"),
        f"{ours}position.table": tensor(arrays, table),
    }


def bank(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    """A dense MLP (in, out) or an expert bank (E, in, out) as stacked (E, out, in) weights."""
    found = {}
    for layer, theirs in (("fc1", "mapping"), ("fc2", "projection")):
        weight = tensor(arrays, f"{at}{theirs}.weight").transpose(-1, -2)
        found[f"{ours}{layer}.weight"] = weight if weight.ndim == 3 else weight[None]
        bias = tensor(arrays, f"{at}{theirs}.bias")
        found[f"{ours}{layer}.bias"] = bias.reshape(-1, bias.shape[-1])
    return found


def rmoe(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    if f"{at}mapping.weight" in arrays:
        return bank(arrays, at, f"{ours}shared.")
    found = {f"{ours}router.collaborative.weight": tensor(arrays, f"{at}cross_router.dense.weight")}
    found |= bank(arrays, f"{at}cross_ffn.", f"{ours}collaborative.")
    found |= bank(arrays, f"{at}public_ffn.", f"{ours}shared.")
    for i, name in enumerate(MODALITIES):
        router = tensor(arrays, f"{at}special_router.{i}.dense.weight")
        found[f"{ours}router.specialised.{name}.weight"] = router
        found |= bank(arrays, f"{at}special_ffn.{i}.", f"{ours}specialised.{name}.")
    return found


def block(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    return {
        **norm(arrays, f"{at}norm1", f"{ours}norm1"),
        **attention(arrays, f"{at}attn.", f"{ours}attn."),
        **norm(arrays, f"{at}norm2", f"{ours}norm2"),
        **rmoe(arrays, f"{at}mlp.", f"{ours}moe."),
    }


def patch_embed(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}projection.weight": tensor(arrays, f"{at}projection.weight"),
        f"{ours}projection.bias": tensor(arrays, f"{at}projection.bias"),
        **norm(arrays, f"{at}norm", f"{ours}norm"),
    }


def merging(arrays: Arrays, at: str, ours: str) -> dict[str, Tensor]:
    reduction = tensor(arrays, f"{at}reduction.weight")
    return {f"{ours}reduction.weight": reduction, **norm(arrays, f"{at}norm", f"{ours}norm")}


def backbone(arrays: Arrays, at: str, depths: tuple[int, ...]) -> dict[str, Tensor]:
    found = patch_embed(arrays, f"{at}patch_embed.", "patch_embeds.opt.")
    for s, depth in enumerate(depths):
        for b in range(depth):
            found |= block(arrays, f"{at}layers.{s}.blocks.{b}.", f"stages.{s}.blocks.{b}.")
        if s < len(depths) - 1:
            found |= merging(arrays, f"{at}layers.{s}.downsample.", f"stages.{s}.downsample.")
    return found | norm(arrays, f"{at}norm", "norm")
