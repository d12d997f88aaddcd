"""Experts on a GPU: all experts of a bank in one grouped matrix product, without asking the host.

Shapes: T tokens, D width, F hidden width, E experts, N assignments, P rows with padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.mixture import Stack
from model.router import Assignment

ALIGN = 8
"""Experts begin at multiples of so many rows: 16 bytes of bfloat16, along which the kernel that
computes the weights' gradients reads."""


class Places(NamedTuple):
    """Where assigned tokens stand when every expert begins at an aligned row."""

    place_N: Tensor
    """Row of each assignment."""
    expert_P: Tensor
    """Expert of each row."""
    end_E: Tensor
    """End of each expert's rows, int32; the last takes all rows that are left."""


def runs(x: Tensor) -> bool:
    """Whether the grouped kernels compute this."""
    return x.is_cuda and x.dtype == torch.bfloat16


def aligned(assignment: Assignment) -> Places:
    """Where to put the tokens; the number of rows depends on sizes alone, so nobody has to wait."""
    counts_E = assignment.counts_E
    experts, tokens = len(counts_E), len(assignment.rows_N)
    order_N = torch.arange(tokens, device=counts_E.device)
    expert_N = torch.searchsorted(counts_E.cumsum(0), order_N, right=True)
    room_E = (counts_E + ALIGN - 1) // ALIGN * ALIGN
    shift_E = (room_E - counts_E).cumsum(0) - (room_E - counts_E)
    rows = -(-(tokens + experts * (ALIGN - 1)) // ALIGN) * ALIGN
    end_E = room_E.cumsum(0)
    end_E[-1] = rows
    row_P = torch.arange(rows, device=counts_E.device)
    expert_P = torch.searchsorted(end_E, row_P, right=True)
    return Places(order_N + shift_E[expert_N], expert_P, end_E.to(torch.int32))


def grouped_experts(x_TD: Tensor, stack: Stack, assignment: Assignment, form: str) -> Tensor:
    """Σ gate·FFN_e(x) over one bank, (T, D) -> (T, D), differentiable.

    The padding is rows of zeros; what experts make of them is not read.
    """
    w1, b1, w2, b2 = stack
    places = aligned(assignment)
    x_ND = x_TD.index_select(0, assignment.rows_N)
    x_PD = x_TD.new_zeros(len(places.expert_P), x_TD.shape[1]).index_copy(0, places.place_N, x_ND)
    hidden_PF = F.grouped_mm(x_PD, w1.transpose(1, 2), offs=places.end_E)
    active_PF = F.gelu(hidden_PF + b1[places.expert_P], approximate=form)
    out_PD = F.grouped_mm(active_PF, w2.transpose(1, 2), offs=places.end_E) + b2[places.expert_P]
    out_ND = out_PD.index_select(0, places.place_N)
    if assignment.gate_N is not None:
        out_ND = out_ND * assignment.gate_N.to(x_TD.dtype)[:, None]
    return torch.zeros_like(x_TD).index_add(0, assignment.rows_N, out_ND)


def dense_expert(x_TD: Tensor, stack: Stack, form: str) -> Tensor:
    """FFN(x) of the first expert on all tokens, (T, D) -> (T, D)."""
    w1, b1, w2, b2 = (t[0] for t in stack)
    return F.linear(F.gelu(F.linear(x_TD, w1, b1), approximate=form), w2, b2)
