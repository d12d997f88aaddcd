"""Which expert sees which token, how much it counts, and how evenly the work is spread.

A token meets two routers: that of its modality and the collaborative one (RingMoE Eq. 3).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig


@dataclass
class BranchRouting:
    """What one router did with its tokens, summed over them."""

    counts_E: Tensor
    """(E,) int64: choices of each expert, before any were dropped."""
    probability_E: Tensor
    """(E,) sums of the softmax probabilities; carries the gradient of the balance loss."""
    tokens: int
    """Tokens that met this router."""
    dropped: int = 0
    """Choices that found their expert full."""

    def __add__(self, other: "BranchRouting") -> "BranchRouting":
        """The two seen as one."""
        return BranchRouting(
            self.counts_E + other.counts_E,
            self.probability_E + other.probability_E,
            self.tokens + other.tokens,
            self.dropped + other.dropped,
        )


@dataclass
class LayerRouting:
    """Routing statistics of one RMoE layer."""

    branches: dict[str, BranchRouting]
    """The routed branches that ran: "collaborative" and "specialised.<modality>"."""

    def __add__(self, other: "LayerRouting") -> "LayerRouting":
        """The two seen as one."""
        merged = dict(self.branches)
        for name, branch in other.branches.items():
            merged[name] = merged[name] + branch if name in merged else branch
        return LayerRouting(merged)


@dataclass
class Assignment:
    """Tokens sorted by the expert that takes them: N assignments of T tokens."""

    rows_N: Tensor
    """(N,) token of each assignment; no token twice within an expert."""
    gate_N: Tensor | None
    """(N,) weight of the expert's output; None: 1."""
    counts_E: Tensor
    """(E,) assignments of each present expert; they sum to N."""


class Router(nn.Module):
    """Scores the experts of a branch for each token; always in float32 or better.

    A pruned branch keeps all rows of its router: only `kept` experts can be chosen, but the
    softmax still runs over all, so that the weights stay those of the parent.
    """

    def __init__(
        self, experts: int, width: int, kept: tuple[int, ...], config: ModelConfig
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.kept = kept
        self.top_k = min(config.top_k, len(kept))
        self.gate = config.gate
        self.capacity_factor = config.capacity_factor

    def forward(self, x_TD: Tensor) -> tuple[Assignment, BranchRouting]:
        """Choose experts for (T, D) tokens (RingMoE Eq. 3: the gates g_k)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            logits_ET = self.weight.to(wide) @ x_TD.to(wide).t()
            probability_TE = logits_ET.softmax(0).t()  # along a dimension of 4 it is slow
        gate_TK, choice_TK = self.choose(probability_TE)
        counts_E = count(choice_TK.flatten(), len(self.kept))
        assignment = self.assign(gate_TK, choice_TK, counts_E)
        dropped = choice_TK.numel() - len(assignment.rows_N)
        row_counts_E = counts_E
        if len(self.kept) < len(self.weight):
            row_counts_E = counts_E.new_zeros(len(self.weight))
            row_counts_E[list(self.kept)] = counts_E
        return assignment, BranchRouting(row_counts_E, probability_TE.sum(0), len(x_TD), dropped)

    def choose(self, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The top k present experts of each token, and their weights."""
        if len(self.kept) < len(self.weight):
            probability_TE = probability_TE[:, list(self.kept)]
        if self.top_k == 1:
            gate_TK, choice_TK = probability_TE.max(-1, keepdim=True)
        else:
            gate_TK, choice_TK = probability_TE.topk(self.top_k, dim=-1)
        if self.gate == "normalized":
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return gate_TK, choice_TK

    def assign(self, gate_TK: Tensor, choice_TK: Tensor, counts_E: Tensor) -> Assignment:
        """Sort the choices by expert; first choices, then earlier tokens, win a full expert."""
        tokens, k = choice_TK.shape
        choice_N = choice_TK.t().flatten()
        order_N = choice_N.argsort(stable=True)
        if self.capacity_factor is not None:
            room = math.ceil(k * tokens * self.capacity_factor / len(self.kept))
            first_E = counts_E.cumsum(0) - counts_E
            place_N = torch.arange(k * tokens, device=order_N.device) - first_E[choice_N[order_N]]
            order_N = order_N[place_N < room]
            counts_E = counts_E.clamp(max=room)
        rows_N = order_N if k == 1 else order_N % max(tokens, 1)
        return Assignment(rows_N, gate_TK.t().flatten()[order_N], counts_E)


def count(choice_N: Tensor, experts: int) -> Tensor:
    """(E,) how often each expert was chosen; a GPU would make the host wait for `bincount`."""
    return choice_N.new_zeros(experts).scatter_add_(0, choice_N, torch.ones_like(choice_N))


def balance_loss(routing: list[LayerRouting]) -> Tensor:
    """How unevenly the routers spread their tokens, summed over layers; 1 per even branch.

    E·Σ f_e·P_e of the collaborative branch plus its mean over the modalities' specialised ones
    (RingMoE §3.3, after Switch): f is the share of choices before dropping, P the mean softmax
    probability. The caller multiplies by the weight.
    """
    terms = []
    for layer in routing:
        busy = {name: branch for name, branch in layer.branches.items() if branch.tokens}
        for name, branch in busy.items():
            modalities = len(busy) - ("collaborative" in busy)
            terms.append(imbalance(branch) / (1 if name == "collaborative" else modalities))
    return torch.stack(terms).sum() if terms else torch.zeros(())


def imbalance(branch: BranchRouting) -> Tensor:
    """E·Σ f_e·P_e of one branch: 1 when every expert gets its share."""
    f_E = branch.counts_E / branch.counts_E.sum()
    return len(f_E) * (f_E * branch.probability_E).sum() / branch.tokens
