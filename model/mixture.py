"""The arithmetic of experts: many small feed-forward networks on parts of the tokens.

Shapes: T tokens, D width, F hidden width, E experts of a bank, N tokens assigned to experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import fused, int8

WIDE = 768
"""Width from which a left operand in bfloat16 is better transposed by a copy."""

Stack = tuple[Tensor, Tensor, Tensor, Tensor]
"""fc1.weight (E, F, D), fc1.bias (E, F), fc2.weight (E, D, F), fc2.bias (E, D); or of one expert,
without E."""
Weights = Stack | int8.Expert
"""An expert for inference: plain, packed (`fused.pack`), or in integers."""


@dataclass
class Plan:
    """What a `Mixture` computes, apart from its tensors."""

    counts: list[list[int] | None]
    """Tokens of each expert of each bank; None: the first expert takes all tokens."""
    form: str
    """Form of the GELU, as `F.gelu` calls it."""
    early: Callable[[Tensor], None] | None = None
    """Takes the tokens' gradient before those of the weights are computed (`run_locally`)."""

    def experts(
        self, rows: Sequence[Tensor | None], gates: Sequence[Tensor | None]
    ) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
        """Bank, expert, token rows (None: all) and gates (None: 1) of experts that have tokens."""
        for bank, counts in enumerate(self.counts):
            if counts is None:
                yield bank, 0, None, None
                continue
            rows_E = torch.split(cast(Tensor, rows[bank]), counts)
            gate = gates[bank]
            gates_E = [None] * len(counts) if gate is None else torch.split(gate, counts)
            for expert, count in enumerate(counts):
                if count:
                    yield bank, expert, rows_E[expert], gates_E[expert]

    def new(self, like: Tensor) -> Tensor:
        """A buffer to add the experts' results to."""
        return torch.empty_like(like) if None in self.counts else torch.zeros_like(like)

    def new_stack(self, bank: int, stack: Sequence[Tensor]) -> list[Tensor]:
        """Buffers for the gradients of a bank; experts without tokens have zeros."""
        counts = self.counts[bank]
        idle = counts is not None and 0 in counts
        return [torch.zeros_like(t) if idle else torch.empty_like(t) for t in stack]


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
        form = fused.quick_form(x_TD, plan.form)
        for bank, expert, rows, gate in plan.experts(tensors[0::6], tensors[1::6]):
            w1, b1, w2, b2 = (t[expert] for t in stacks[bank])
            x = x_TD if rows is None else fused.gather(x_TD, rows, kept=True)
            hidden = fused.linear(x, w1, b1)
            active = F.gelu(hidden, approximate=form)
            out = fused.linear(active, w2, b2)
            kept += [hidden, active]
            if rows is None:
                y_TD = out  # this job comes first
                continue
            out = out[: len(rows)]
            if gate is not None:
                kept.append(out)
                out = out * gate[:, None]
            y_TD.index_add_(0, rows, out)
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
        tensors, kept = saved[:size], saved[size:]
        stacks = [tensors[i + 2 : i + 6] for i in range(0, size, 6)]
        dgates = [None if g is None else torch.empty_like(g) for g in tensors[1::6]]
        dstacks = [plan.new_stack(bank, stack) for bank, stack in enumerate(stacks)]
        dx_TD = plan.new(x_TD)
        dy_TD = dy_TD.contiguous()
        factors: Iterable[tuple[int, int, Factors]]
        factors = to_tokens(plan, dy_TD, x_TD, tensors, kept, dx_TD, dgates)
        if plan.early is not None:
            factors = [*factors]
            plan.early(dx_TD)
        for bank, expert, of in factors:
            dw1, db1, dw2, db2 = (t[expert] for t in dstacks[bank])
            outer(of.dy, of.active, dw2)
            torch.sum(of.dy, dim=0, out=db2)
            outer(of.dhidden, of.x, dw1)
            torch.sum(of.dhidden, dim=0, out=db1)
        pairs = zip(dgates, dstacks, strict=True)
        return dx_TD, None, *(t for gate, stack in pairs for t in (None, gate, *stack))


class Factors(NamedTuple):
    """What the gradients of an expert's weights are products of."""

    x: Tensor
    """(N, D)."""
    active: Tensor
    """(N, F) hidden activations."""
    dhidden: Tensor
    """(N, F) gradient before the GELU."""
    dy: Tensor
    """(N, D) gradient of the output."""


def to_tokens(
    plan: Plan,
    dy_TD: Tensor,
    x_TD: Tensor,
    tensors: Sequence[Tensor],
    kept: Sequence[Tensor],
    dx_TD: Tensor,
    dgates: Sequence[Tensor | None],
) -> Iterator[tuple[int, int, Factors]]:
    """The backward pass from outputs to tokens, expert by expert.

    Adds to `dx_TD`, writes `dgates`, and leaves bank, expert and what its weights' gradients need.
    """
    all_rows, all_gates, rest = tensors[0::6], tensors[1::6], iter(kept)
    form = fused.quick_form(x_TD, plan.form)
    gate_views = (dgate for *_, dgate in plan.experts(all_rows, dgates))
    for bank, expert, rows, gate in plan.experts(all_rows, all_gates):
        w1, w2 = tensors[6 * bank + 2][expert], tensors[6 * bank + 4][expert]
        hidden, active, dgate = next(rest), next(rest), next(gate_views)
        x, dy = x_TD, dy_TD
        if rows is not None:
            x = fused.gather(x_TD, rows, kept=True)
            dy = fused.gather_padded(dy_TD, rows, len(hidden))
        if rows is not None and gate is not None:
            torch.sum(dy[: len(rows)] * next(rest), dim=1, out=dgate)
            dy[: len(rows)].mul_(gate[:, None])
        dhidden = torch.ops.aten.gelu_backward(dy @ w2, hidden, approximate=form)
        if rows is None:
            torch.mm(dhidden, w1, out=dx_TD)
        else:
            dx_TD.index_add_(0, rows, (dhidden @ w1)[: len(rows)])
        yield bank, expert, Factors(x, active, dhidden, dy)


def mix(
    x_TD: Tensor,
    plan: Plan,
    rows: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    experts: Sequence[Sequence[Weights]],
) -> Tensor:
    """What `Mixture` computes, for inference.

    Args:
        x_TD: tokens.
        plan: how many tokens each expert has.
        rows: of each bank, its tokens sorted by expert.
        gates: of each bank, their weights.
        experts: of each bank, the weights of its experts.
    """
    y_TD = plan.new(x_TD)
    for bank, expert, mine, gate in plan.experts(rows, gates):
        weights = experts[bank][expert]
        hidden, packed = size_of(weights)
        tokens = len(x_TD) if mine is None else len(mine)
        for part in fused.steps(x_TD, tokens, hidden, packed):
            if mine is None:
                y_TD[part] = feed_forward(x_TD[part], weights, plan.form)
                continue
            out = feed_forward(fused.gather(x_TD, mine[part]), weights, plan.form)
            out = out[: len(mine[part])]
            y_TD.index_add_(0, mine[part], out if gate is None else out.mul_(gate[part, None]))
    return y_TD


def size_of(weights: Weights) -> tuple[int, bool]:
    """Hidden width of an expert, and whether its weights are laid out for oneDNN."""
    if isinstance(weights, int8.Expert):
        return len(weights.fc1.bias_O), True
    return weights[0].shape[0], weights[0].is_mkldnn


def feed_forward(x_ND: Tensor, weights: Weights, form: str) -> Tensor:
    """FFN(x), (N, D) -> (N, D), without gradients."""
    if isinstance(weights, int8.Expert):
        return int8.feed_forward(x_ND, weights)
    w1, b1, w2, b2 = weights
    return fused.linear(fused.linear_gelu(x_ND, w1, b1, form), w2, b2)


def each(stack: Stack) -> list[Stack]:
    """The weights of each expert of a bank."""
    return [cast(Stack, expert) for expert in zip(*map(torch.unbind, stack), strict=True)]


def outer(left_NP: Tensor, right_NQ: Tensor, out_PQ: Tensor) -> None:
    """leftᵀ·right, the gradient of a weight.

    oneDNN takes twice as long for a transposed left operand in bfloat16; writing the transpose
    out first costs less as soon as the right operand is wide.
    """
    slow = left_NP.is_cpu and left_NP.dtype == torch.bfloat16
    if slow and right_NQ.shape[1] >= WIDE:
        torch.mm(left_NP.t().contiguous(), right_NQ, out=out_PQ)
    else:
        torch.mm(left_NP.t(), right_NQ, out=out_PQ)
