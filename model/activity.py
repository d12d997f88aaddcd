"""Which experts the tokens of each modality go to: counted beside the network, never inside it."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from model.encoder import RingMoE
from model.experts import RMoE
from model.router import LayerRouting

Shares = dict[str, dict[str, list[list[float]]]]
"""branch ("collaborative", "specialised") -> modality -> layers × experts, rows sum to 1."""


class ExpertActivity:
    """Counts the choices of every router by modality while `watching` is true."""

    def __init__(self, encoder: RingMoE) -> None:
        self.watching = False
        self.modalities = encoder.config.modalities
        self.layers = [m for m in encoder.modules() if isinstance(m, RMoE)]
        self.counts: dict[str, Tensor] = {}
        config = encoder.config
        for branch, experts in (
            ("collaborative", config.collaborative),
            ("specialised", config.specialised),
        ):
            if experts:
                shape = (len(self.layers), len(self.modalities), experts)
                self.counts[branch] = torch.zeros(shape, dtype=torch.int64)
        for number, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self.remember(number))
            if "collaborative" in layer.router:
                layer.router["collaborative"].register_forward_hook(self.collaborative)
            layer.register_forward_hook(self.specialised)

    def remember(self, number: int) -> Callable[[nn.Module, Any], None]:
        """Before a layer runs: which it is, and where the tokens of each modality are."""

        def hook(layer: nn.Module, inputs: tuple[Tensor, Mapping[str, int]]) -> None:
            self.layer, self.tokens = number, inputs[1]

        return hook

    def collaborative(self, router: nn.Module, inputs: Any, output: Any) -> None:
        """After the shared router: its choices, told apart by the token's modality."""
        if not self.watching:
            return
        assignment, experts = output[0], len(output[0].counts_E)
        ends = torch.tensor([*self.tokens.values()], device=assignment.rows_N.device).cumsum(0)
        kinds_N = torch.bucketize(assignment.rows_N, ends, right=True)
        experts_N = torch.arange(experts, device=ends.device).repeat_interleave(assignment.counts_E)
        found = torch.bincount(kinds_N * experts + experts_N, minlength=len(ends) * experts)
        for name, counts_E in zip(self.tokens, found.view(-1, experts).cpu(), strict=True):
            self.counts["collaborative"][self.layer, self.modalities.index(name)] += counts_E

    def specialised(self, layer: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        """After a layer: what the modalities' own routers chose."""
        if not self.watching:
            return
        for name in self.tokens:
            branch = output[1].branches.get(f"specialised.{name}")
            if branch is not None:
                at = self.layer, self.modalities.index(name)
                self.counts["specialised"][at] += branch.counts_E.cpu()

    def take(self, total: Callable[[Tensor], Tensor] = lambda values: values) -> Shares:
        """Shares of each modality's tokens since the last call; modalities unseen are left out.

        Args:
            total: sum over processes; all must call.
        """
        shares: Shares = {}
        for branch, counts in self.counts.items():
            summed = total(counts.clone())
            counts.zero_()
            share = summed / summed.sum(-1, keepdim=True).clamp(min=1)
            shares[branch] = {
                name: share[:, i].tolist()
                for i, name in enumerate(self.modalities)
                if summed[:, i].any()
            }
        return shares


def entropy(shares: Shares) -> dict[str, dict[str, list[float]]]:
    """How evenly each layer spreads a modality: 1 all experts alike, 0 one expert only."""
    return {
        branch: {name: [evenness(row) for row in layers] for name, layers in by_modality.items()}
        for branch, by_modality in shares.items()
    }


def evenness(share: list[float]) -> float:
    """Entropy of a distribution over its largest possible value."""
    if len(share) < 2:
        return 1.0
    return -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))


def drop_rates(routing: list[LayerRouting]) -> dict[str, list[float]]:
    """Branch -> share of choices that found their expert full, per layer."""
    rates: dict[str, list[float]] = {}
    for layer in routing:
        for name, branch in layer.branches.items():
            choices = max(int(branch.counts_E.sum()), 1)
            rates.setdefault(name, []).append(branch.dropped / choices)
    return rates


class DeadExperts:
    """Experts that have had no token in any report so far."""

    def __init__(self) -> None:
        self.reports = 0
        self.most: dict[tuple[str, str, int, int], float] = {}

    def add(self, shares: Shares) -> None:
        """Take note of one report."""
        self.reports += 1
        for branch, by_modality in shares.items():
            for name, layers in by_modality.items():
                owner = name if branch == "specialised" else ""
                for layer, row in enumerate(layers):
                    for expert, share in enumerate(row):
                        key = (branch, owner, layer, expert)
                        self.most[key] = max(self.most.get(key, 0.0), share)

    def named(self) -> list[str]:
        """Those without a token, by name."""
        return [
            f"{branch}{'.' + owner if owner else ''} expert {expert} of layer {layer}"
            for (branch, owner, layer, expert), share in sorted(self.most.items())
            if share == 0
        ]
