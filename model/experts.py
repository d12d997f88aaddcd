"""The RMoE layer: specialised, collaborative and shared experts (RingMoE Eq. 3).

Shapes: T tokens, D width, F hidden width, E experts of a branch, N tokens assigned to experts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from model.config import Gelu, ModelConfig
from model.mixture import Mixture, Plan, Stack
from model.router import Assignment, LayerRouting, Router


class Stacked(nn.Module):
    """The same linear layer of E experts, stacked: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(experts, outputs))


class ExpertBank(nn.Module):
    """The weights of E feed-forward networks of equal shape: D -> F -> D with GELU between."""

    def __init__(self, experts: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Stacked(experts, width, config.mlp_ratio * width)
        self.fc2 = Stacked(experts, config.mlp_ratio * width, width)
        self.gelu: Gelu = config.gelu

    def __len__(self) -> int:
        return len(self.fc1.weight)

    def stack(self, dtype: torch.dtype) -> Stack:
        """The parameters in the type of the computation."""
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return cast(Stack, tuple(p.to(dtype) for p in parameters))


@dataclass
class Job:
    """A bank and the tokens it works on."""

    bank: ExpertBank
    """The experts."""
    assignment: Assignment | None
    """Which tokens each takes; None: all go to the first expert, unweighted (shared branch)."""


Dispatch = Callable[[Tensor, list[Job]], Tensor]
"""Runs the jobs of a layer on (T, D) tokens and sums their outputs. Replaced from outside where
experts live on several processes."""


def run_locally(x_TD: Tensor, jobs: list[Job]) -> Tensor:
    """All experts are here: (T, D) -> (T, D), the weighted sum over jobs.

    A job for all tokens, if any, comes first.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    counts: list[list[int] | None] = []
    tensors: list[Tensor | None] = []
    for job in jobs:
        given = job.assignment
        counts.append(None if given is None else given.counts_E.tolist())
        tensors += [None, None] if given is None else [given.rows_N, given.gate_N.to(x_TD.dtype)]
        tensors += job.bank.stack(x_TD.dtype)
    form = "tanh" if jobs[0].bank.gelu == "tanh" else "none"
    plan = Plan(counts, form, torch.is_grad_enabled())
    y_TD: Tensor = Mixture.apply(x_TD, plan, *tensors)  # type: ignore[no-untyped-call]
    return y_TD


class RMoE(nn.Module):
    """y = Σ g·specialised(x) + Σ g·collaborative(x) + shared(x) (RingMoE Eq. 3)."""

    def __init__(self, config: ModelConfig, stage: int, block: int) -> None:
        super().__init__()
        width = config.widths[stage]
        self.dispatch: Dispatch = run_locally
        self.router = nn.ModuleDict()
        self.specialised = nn.ModuleDict()
        self.collaborative: ExpertBank | None = None
        self.shared = ExpertBank(1, width, config) if config.shared else None
        kept = config.experts_of(stage, block, "collaborative")
        if kept:
            self.collaborative = ExpertBank(len(kept), width, config)
            self.router["collaborative"] = Router(config.collaborative, width, kept, config)
        routers = nn.ModuleDict()
        for name in config.modalities:
            kept = config.experts_of(stage, block, f"specialised.{name}")
            if kept:
                self.specialised[name] = ExpertBank(len(kept), width, config)
                routers[name] = Router(config.specialised, width, kept, config)
        if routers:
            self.router["specialised"] = routers

    def forward(self, x_TD: Tensor, tokens: Mapping[str, int]) -> tuple[Tensor, LayerRouting]:
        """Run the layer.

        Args:
            x_TD: tokens, those of each modality together.
            tokens: modality -> its number of tokens, in the order of `x_TD`.

        Returns:
            (T, D) outputs and the routing statistics.
        """
        jobs = [] if self.shared is None else [Job(self.shared, None)]
        routing = LayerRouting({})
        for name, bank, router, first, count in self.branches(tokens):
            assignment, routing.branches[name] = router(x_TD[first : first + count])
            jobs.append(Job(bank, replace(assignment, rows_N=assignment.rows_N + first)))
        return (self.dispatch(x_TD, jobs) if jobs else torch.zeros_like(x_TD)), routing

    def branches(
        self, tokens: Mapping[str, int]
    ) -> Iterator[tuple[str, ExpertBank, Router, int, int]]:
        """Routed branches that exist here: name, bank, router, first token, number of tokens."""
        if self.collaborative is not None:
            router = cast(Router, self.router["collaborative"])
            yield "collaborative", self.collaborative, router, 0, sum(tokens.values())
        first = 0
        for name, count in tokens.items():
            if name in self.specialised:
                bank = cast(ExpertBank, self.specialised[name])
                router = cast(Router, cast(nn.ModuleDict, self.router["specialised"])[name])
                yield f"specialised.{name}", bank, router, first, count
            first += count
