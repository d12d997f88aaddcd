"""The released RingMoE's parameter names (MindSpore), as our tensors.

Theirs: matrices of FFNs are (in, out), of expert banks (E, in, out); query, key and value are
apart; LayerNorm has gamma and beta; the specialised banks are numbered opt, sar-l1, sar-l2, ms.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import disk_names
from model.config import ModelConfig
from model.encoder import RingMoE
from model.shards import Spec
from model.weights import Weights

ORDER = ("opt", "sar-l1", "sar-l2", "ms")
"""Modalities in the release's numbering."""
ANCHOR = "layers.0.blocks.0.norm1.gamma"
UNUSED = re.compile(r"relative_position_index$|attn_mask$|^patch_embed.?4\.")
"""Constants that are rebuilt, and the patch embedding that the release never calls."""

PARTS = {"fc1": "mapping", "fc2": "projection"}
BANKS = {"collaborative": "cross_ffn", "shared": "public_ffn"}
NORMS = {"weight": "gamma", "bias": "beta"}


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made of theirs."""

    sources: tuple[str, ...]
    """Their names; several are concatenated."""
    change: Callable[[Tensor], Tensor] = lambda t: t
    """Transposition, or one expert of a bank."""


def is_released(weights: Weights) -> bool:
    """Whether a file speaks the release's names."""
    return any(name.endswith(ANCHOR) for name in weights.specs)


def prefix_of(weights: Weights) -> str:
    """What stands before every name of the encoder; moments of an optimiser have more before."""
    anchors = [name for name in weights.specs if name.endswith(ANCHOR)]
    return min(anchors, key=len).removesuffix(ANCHOR)


def recipe(name: str, names: set[str]) -> Recipe:
    """How to make one encoder or decoder tensor, by its name on disk.

    Args:
        name: ours, e.g. "encoder.stages.0.blocks.0.moe.collaborative.2.fc1.weight".
        names: theirs, without prefix.
    """
    block = re.match(r"encoder\.stages\.(\d+)\.(blocks\.\d+\.)(.+)", name)
    if block:
        return in_block(f"layers.{block[1]}.{block[2]}", block[3], names)
    embed = re.match(r"encoder\.patch_embeds\.([^.]+)\.(projection|norm)\.(weight|bias)", name)
    if embed:
        base = numbered("patch_embed", embed[1], names)
        return Recipe((f"{base}.{embed[2]}.{NORMS[embed[3]] if embed[2] == 'norm' else embed[3]}",))
    decoder = re.match(r"decoders\.([^.]+)\.(weight|bias)", name)
    if decoder:
        return Recipe((f"{numbered('decoder', decoder[1], names)}.{decoder[2]}",))
    rest = name.removeprefix("encoder.").replace("stages.", "layers.")
    return Recipe((normed(rest),))


def in_block(base: str, rest: str, names: set[str]) -> Recipe:
    """A tensor of one block."""
    expert = re.match(r"moe\.(.+)\.(\d+)\.(fc[12])\.(weight|bias)", rest)
    if expert:
        return of_expert(base, expert, names)
    router = re.match(r"moe\.router\.(collaborative|specialised\.(.+))\.weight", rest)
    if router:
        bank = f"special_router.{ORDER.index(router[2])}" if router[2] else "cross_router"
        return Recipe((f"{base}mlp.{bank}.dense.weight",))
    if rest == "attn.qkv.weight":
        return Recipe(tuple(f"{base}attn.{part}.weight" for part in "qkv"))
    bias = re.match(r"attn\.([qkv])_bias", rest)
    if bias:
        return Recipe((f"{base}attn.{bias[1]}.bias",))
    if rest == "attn.position.table":
        return Recipe((f"{base}attn.relative_position_bias.relative_position_bias_table",))
    return Recipe((normed(base + rest),))


def of_expert(base: str, expert: re.Match[str], names: set[str]) -> Recipe:
    """One matrix or bias of one expert."""
    branch, index = expert[1], int(expert[2])
    modality = branch.removeprefix("specialised.")
    bank = BANKS.get(branch) or f"special_ffn.{ORDER.index(modality)}"
    name = f"{base}mlp.{bank}.{PARTS[expert[3]]}.{expert[4]}"
    plain = f"{base}mlp.{PARTS[expert[3]]}.{expert[4]}"
    if branch == "shared" and name not in names and plain in names:
        name = plain  # a dense model has one FFN instead of the layer
    if branch == "shared":
        return Recipe((name,), lambda t: t.T if t.ndim == 2 else t)
    if expert[4] == "weight":
        return Recipe((name,), lambda t: t[index].T)
    return Recipe((name,), lambda t: t.reshape(t.shape[-3], t.shape[-1])[index])


def numbered(base: str, modality: str, names: set[str]) -> str:
    """The name of a modality's own module: numbered, or plain where there is only one."""
    number = ORDER.index(modality)
    for candidate in (f"{base}_{number}", f"{base}{number}", f"{base}.{number}"):
        if any(name.startswith(candidate + ".") for name in names):
            return candidate
    return base


def normed(name: str) -> str:
    """LayerNorm's weight and bias by their other names."""
    found = re.fullmatch(r"(.*\bnorm\d?)\.(weight|bias)", name)
    return f"{found[1]}.{NORMS[found[2]]}" if found else name


def released_config(weights: Weights, **changes: Any) -> ModelConfig:
    """The config that fits the shapes of a released checkpoint.

    Args:
        weights: the file.
        changes: fields that shapes do not tell (capacity_factor, top_k, mask_cell).
    """
    prefix = prefix_of(weights)
    shapes = {n.removeprefix(prefix): s.shape for n, s in weights.specs.items()}
    table = "attn.relative_position_bias.relative_position_bias_table"
    tables = {
        int(found[1]): shape
        for name, shape in shapes.items()
        if (found := re.fullmatch(rf"layers\.(\d+)\.blocks\.0\.{re.escape(table)}", name))
    }
    windows = [(isqrt(tables[s][0]) + 1) // 2 for s in sorted(tables)]
    whole = windows[-1] * 4 * 2 ** (len(windows) - 1)
    first = "layers.0.blocks.0.mlp."
    banks = {m: f"{first}special_ffn.{i}.mapping.weight" for i, m in enumerate(ORDER)}
    present = tuple(m for m in ORDER if banks[m] in shapes) or ("opt",)
    embeds = {m: numbered("patch_embed", m, set(shapes)) for m in present}
    cross = shapes.get(f"{first}cross_ffn.mapping.weight", (0,))
    fields: dict[str, Any] = {
        "embed_dim": shapes["norm.gamma"][0] // 2 ** (len(windows) - 1),
        "depths": tuple(depth(shapes, s) for s in sorted(tables)),
        "num_heads": tuple(tables[s][1] for s in sorted(tables)),
        "image_size": whole,
        "window": windows[0],
        "channels": {m: shapes[f"{embeds[m]}.projection.weight"][1] for m in present},
        "specialised": shapes[banks[present[0]]][0] if banks[present[0]] in shapes else 0,
        "collaborative": cross[0],
        "attention": "swin_v1",
        "gate": "normalized",
    }
    return ModelConfig(**{**fields, **changes})


def depth(shapes: dict[str, tuple[int, ...]], stage: int) -> int:
    """Blocks of a stage."""
    found = (re.match(rf"layers\.{stage}\.blocks\.(\d+)\.", name) for name in shapes)
    return 1 + max(int(match[1]) for match in found if match)


def released_tensors(
    weights: Weights, config: ModelConfig
) -> tuple[list[Spec], Iterator[Tensor], list[str]]:
    """Our tensors from theirs, made one at a time.

    Returns:
        What they will be, the tensors, and the names in the file that were not used.

    Raises:
        ValueError: naming a parameter that is missing or has another shape.
    """
    prefix = prefix_of(weights)
    names = {name.removeprefix(prefix): name for name in weights.specs}
    ours = dict(encoder_shapes(config))
    decoders = {n: m for m in config.modalities for n in decoder_names(m, set(names))}
    recipes = {name: recipe(name, set(names)) for name in [*ours, *decoders]}
    for name, made in recipes.items():
        missing = [source for source in made.sources if source not in names]
        if missing:
            raise ValueError(f"the file has no {prefix}{missing[0]}, which {name} needs")
    used = {source for made in recipes.values() for source in made.sources}
    unused = [names[n] for n in names if n not in used and not UNUSED.search(n)]

    def make(name: str) -> Tensor:
        made = recipes[name]
        tensor = torch.cat([weights.read(names[s]) for s in made.sources])
        tensor = made.change(tensor).contiguous()
        return tensor.flatten() if name == "mask_token" else tensor

    specs = [
        Spec(n, weights.specs[names[recipes[n].sources[0]]].dtype, shape)
        for n, shape in ours.items()
    ]
    for name in decoders:
        there = weights.specs[names[recipes[name].sources[0]]]
        shape = (config.embed_dim,) if name == "mask_token" else there.shape
        specs.append(Spec(name, there.dtype, shape))
    return specs, (make(spec.name) for spec in specs), unused


def encoder_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names on disk and shapes of an encoder's tensors."""
    with torch.device("meta"):
        net = RingMoE(config)
    for name, tensor in net.state_dict().items():
        for on_disk, part in disk_names(f"encoder.{name}", tensor):
            yield on_disk, tuple(part.shape)


def decoder_names(modality: str, names: set[str]) -> list[str]:
    """Our names of a modality's decoder, and of the mask token, if the file has them."""
    base = numbered("decoder", modality, names)
    parts = (f"decoders.{modality}.{p}" for p in ("weight", "bias") if f"{base}.{p}" in names)
    return [*parts, *(["mask_token"] if "mask_token" in names else [])]
