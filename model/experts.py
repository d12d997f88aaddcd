"""The RMoE layer: specialised, collaborative and shared experts (RingMoE Eq. 3).

Shapes: T tokens, D width, F hidden width, E experts of a branch, N tokens assigned to experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from model import fused, grouped, int8
from model.config import Gelu, ModelConfig
from model.mixture import Mixture, Plan, Stack, Weights, each, mix
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
        self.packed: list[Weights] | None = None

    def __len__(self) -> int:
        return len(self.fc1.weight)

    def stack(self, dtype: torch.dtype) -> Stack:
        """The parameters in the type of the computation."""
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        return cast(Stack, tuple(p.to(dtype) for p in parameters))

    def experts(self, dtype: torch.dtype) -> Sequence[Weights]:
        """The parameters of each expert, for inference."""
        if self.packed is not None:
            return self.packed
        return each(self.stack(dtype))

    def pack(self, integers: bool = False) -> None:
        """Lay the weights out as oneDNN multiplies them, once instead of at every call.

        In place, for inference on a CPU: afterwards the parameters have a shape but no values.

        Args:
            integers: round them to 8-bit integers (`model.int8`).
        """
        if not (integers or fused.runs(self.fc1.weight)):
            return
        form = in_integers if integers else laid_out
        with torch.no_grad():
            self.packed = [form(expert) for expert in each(self.stack(self.fc1.weight.dtype))]
        self.to("meta")


def laid_out(expert: Stack) -> Weights:
    """An expert's weights as oneDNN multiplies them."""
    w1, b1, w2, b2 = expert
    return fused.pack(w1), b1.clone(), fused.pack(w2), b2.clone()


def in_integers(expert: Stack) -> Weights:
    """An expert's weights in 8-bit integers."""
    w1, b1, w2, b2 = expert
    return int8.Expert(int8.quantised(w1, b1), int8.quantised(w2, b2))


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


def run_locally(
    x_TD: Tensor, jobs: list[Job], early: Callable[[Tensor], None] | None = None
) -> Tensor:
    """All experts are here: (T, D) -> (T, D), the weighted sum over jobs.

    Args:
        x_TD: tokens.
        jobs: one for all tokens, if any, comes first.
        early: takes the tokens' gradient in the backward pass before those of the weights are
            computed, to send it while they are; grouped products do not call it.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
    if grouped.runs(x_TD):
        return run_grouped(x_TD, jobs)
    given = [job.assignment for job in jobs]
    counts = [None if a is None else a.counts_E.tolist() for a in given]
    rows = [None if a is None else a.rows_N for a in given]
    gates = [None if a is None or a.gate_N is None else a.gate_N.to(x_TD.dtype) for a in given]
    plan = Plan(counts, "tanh" if jobs[0].bank.gelu == "tanh" else "none", early)
    if not torch.is_grad_enabled():
        return mix(x_TD, plan, rows, gates, [job.bank.experts(x_TD.dtype) for job in jobs])
    stacks = (job.bank.stack(x_TD.dtype) for job in jobs)
    tensors = [
        t for parts in zip(rows, gates, stacks, strict=True) for t in (*parts[:2], *parts[2])
    ]
    y_TD: Tensor = Mixture.apply(x_TD, plan, *tensors)  # type: ignore[no-untyped-call]
    return y_TD


def run_grouped(x_TD: Tensor, jobs: list[Job]) -> Tensor:
    """`run_locally` with one grouped product per matrix of a bank; the host knows no counts."""
    form = "tanh" if jobs[0].bank.gelu == "tanh" else "none"
    y_TD = torch.zeros_like(x_TD)
    for job in jobs:
        stack = job.bank.stack(x_TD.dtype)
        if job.assignment is None:
            y_TD = grouped.dense_expert(x_TD, stack, form)  # comes first
        else:
            y_TD = y_TD + grouped.grouped_experts(x_TD, stack, job.assignment, form)
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
        wide_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        for name, bank, router, first, count in self.branches(tokens):
            assignment, routing.branches[name] = router(wide_TD[first : first + count])
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
