"""Routing mass: which experts a modality really uses, measured on chips or read off the routers."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.budget import Mass, branches, layers, rows_of
from model.checkpoint import read_tensors
from model.config import ModelConfig
from model.encoder import RingMoE
from model.router import LayerRouting

PROBES = 4096
"""Random tokens behind a score that knows only the router's weights."""


def measured_mass(config: ModelConfig, routing: Sequence[LayerRouting]) -> Mass:
    """Shares of the tokens that each expert takes, from the routing of some chips."""
    return {
        layer: {
            name: (branch.counts_E / branch.counts_E.sum().clamp(min=1)).tolist()
            for name, branch in statistics.branches.items()
        }
        for layer, statistics in zip(layers(config), routing, strict=True)
    }


@torch.no_grad()
def mass_on_chips(encoder: RingMoE, chips: Iterable[Mapping[str, Tensor]]) -> Mass:
    """Routing mass of an encoder on calibration chips.

    Args:
        encoder: the parent.
        chips: batches, modality -> (B, C, H, W) normalised.

    Raises:
        ValueError: if there is no chip.
    """
    total: list[LayerRouting] = []
    seen: set[str] = set()
    for images in chips:
        routing = encoder.encode(images).routing
        total = [a + b for a, b in zip(total, routing, strict=True)] if total else routing
        seen |= set(images)
    if not seen:
        raise ValueError("there are no calibration chips")
    return measured_mass(encoder.config, total)


def mass_of_routers(directory: Path | str, config: ModelConfig) -> Mass:
    """Routing mass without chips: what the routers would do with tokens of no direction.

    Args:
        directory: the checkpoint; only its routers are read.
        config: the part of its model that stays.
    """
    names = {
        (layer, branch): "encoder.stages.{}.blocks.{}.moe.router.{}.weight".format(
            *layer.split("."), branch
        )
        for layer in layers(config)
        for branch in branches(config)
        if rows_of(config, layer, branch)
    }
    weights = dict(read_tensors(directory, names.values()))
    mass: dict[str, dict[str, list[float]]] = {layer: {} for layer in layers(config)}
    for (layer, branch), name in names.items():
        rows = rows_of(config, layer, branch)
        mass[layer][branch] = isotropic_mass(weights[name], rows, config.top_k)
    return mass


def isotropic_mass(weight: Tensor, rows: Sequence[int], top_k: int) -> list[float]:
    """Shares that a router would give to random tokens without a preferred direction.

    Args:
        weight: (E, D) router weights.
        rows: the experts that are present.
        top_k: experts per token.
    """
    logits_TE = random_tokens(weight.shape[1]) @ weight.float()[list(rows)].T
    chosen = logits_TE.topk(min(top_k, len(rows)), dim=-1).indices.flatten()
    counts = torch.bincount(chosen, minlength=len(rows)) / len(chosen)
    mass = [0.0] * len(weight)
    for row, share in zip(rows, counts.tolist(), strict=True):
        mass[row] = share
    return mass


@lru_cache(maxsize=1)
def random_tokens(width: int) -> Tensor:
    """(T, D) without a preferred direction; layers of one width follow one another."""
    return torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0))
