"""The RMoE layer: specialised, collaborative and shared experts (RingMoE Eq. 3).

Shapes: T tokens, D width, F hidden width, E experts of a branch, N tokens assigned to experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.config import Gelu, ModelConfig
from model.router import Assignment, LayerRouting, Router

Stack = tuple[Tensor, Tensor, Tensor, Tensor]
"""fc1.weight (E, F, D), fc1.bias (E, F), fc2.weight (E, D, F), fc2.bias (E, D)."""


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


@dataclass
class Plan:
    """What a `Mixture` computes, apart from its tensors."""

    counts: list[list[int] | None]
    """Tokens of each expert of each bank; None: the first expert takes all tokens."""
    form: str
    """Form of the GELU, as `F.gelu` calls it."""
    keep: bool
    """Whether a backward pass may follow."""

    def experts(
        self, rows: Sequence[Tensor | None], gates: Sequence[Tensor | None]
    ) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
        """Bank, expert, token rows and gates (None: all, 1) of the experts that have tokens."""
        for bank, counts in enumerate(self.counts):
            if counts is None:
                yield bank, 0, None, None
                continue
            rows_E = torch.split(cast(Tensor, rows[bank]), counts)
            gates_E = torch.split(cast(Tensor, gates[bank]), counts)
            for expert, count in enumerate(counts):
                if count:
                    yield bank, expert, rows_E[expert], gates_E[expert]

    def new(self, like: Tensor) -> Tensor:
        """A buffer to add the experts' results to."""
        return torch.empty_like(like) if None in self.counts else torch.zeros_like(like)

    def new_stack(self, bank: int, stack: Sequence[Tensor]) -> list[Tensor]:
        """Buffers for the gradients of a bank; experts without tokens have zeros."""
        counts = self.counts[bank]
        full = counts is not None and 0 not in counts
        return [torch.empty_like(t) if full else torch.zeros_like(t) for t in stack]


class Mixture(torch.autograd.Function):
    """Σ gate·FFN_e(x) over the experts of several banks, one matrix product each.

    Tokens are gathered per expert and results added where they belong; the gradients of stacked
    weights are written expert by expert into one buffer (an autograd loop over `w[e]` would make
    a full-size gradient per expert).
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: Plan, *tensors: Tensor | None) -> Tensor:
        """`tensors` holds rows_N, gate_N and the stack of each bank."""
        stacks = [cast(Stack, tensors[i + 2 : i + 6]) for i in range(0, len(tensors), 6)]
        y_TD = plan.new(x_TD)
        kept: list[Tensor] = []
        for bank, expert, rows, gate in plan.experts(tensors[0::6], tensors[1::6]):
            w1, b1, w2, b2 = (t[expert] for t in stacks[bank])
            x = x_TD if rows is None else x_TD.index_select(0, rows)
            hidden = torch.addmm(b1, x, w1.t())
            active = F.gelu(hidden, approximate=plan.form)
            if rows is None or gate is None:
                torch.addmm(b2, active, w2.t(), out=y_TD)
                kept += [hidden, active] if plan.keep else []
            else:
                out = torch.addmm(b2, active, w2.t())
                y_TD.index_add_(0, rows, out * gate[:, None])
                kept += [hidden, active, out] if plan.keep else []
        ctx.plan = plan
        ctx.save_for_backward(x_TD, *tensors, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, the gates and the stacks."""
        plan: Plan = ctx.plan
        x_TD, *saved = ctx.saved_tensors
        size = 6 * len(plan.counts)
        tensors, kept = saved[:size], iter(saved[size:])
        stacks = [tensors[i + 2 : i + 6] for i in range(0, size, 6)]
        gates = tensors[1::6]
        dgates = [None if g is None else torch.empty_like(g) for g in gates]
        dstacks = [plan.new_stack(bank, stack) for bank, stack in enumerate(stacks)]
        dx_TD, dy_TD = plan.new(x_TD), dy_TD.contiguous()
        gate_views = (dgate for *_, dgate in plan.experts(tensors[0::6], dgates))
        for bank, expert, rows, gate in plan.experts(tensors[0::6], gates):
            w1, _, w2, _ = (t[expert] for t in stacks[bank])
            dw1, db1, dw2, db2 = (t[expert] for t in dstacks[bank])
            hidden, active, dgate = next(kept), next(kept), next(gate_views)
            x, dy = x_TD, dy_TD
            if rows is not None and gate is not None:
                x, dy = x_TD.index_select(0, rows), dy_TD.index_select(0, rows)
                torch.sum(dy * next(kept), dim=1, out=dgate)
                dy = dy * gate[:, None]
            torch.mm(dy.t(), active, out=dw2)
            torch.sum(dy, dim=0, out=db2)
            dhidden = torch.ops.aten.gelu_backward(dy @ w2, hidden, approximate=plan.form)
            torch.mm(dhidden.t(), x, out=dw1)
            torch.sum(dhidden, dim=0, out=db1)
            if rows is None:
                torch.mm(dhidden, w1, out=dx_TD)
            else:
                dx_TD.index_add_(0, rows, dhidden @ w1)
        pairs = zip(dgates, dstacks, strict=True)
        return dx_TD, None, *(t for gate, stack in pairs for t in (None, gate, *stack))


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
