"""A layer's experts on several ranks: tokens go where their experts are, outputs come back."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from model.experts import ExpertBank, Job, run_locally
from model.mixture import Stack, each
from model.router import Assignment


def nothing_for(bank: ExpertBank, x_TD: Tensor) -> Assignment:
    """An assignment of no tokens."""
    rows = torch.zeros(0, dtype=torch.long, device=x_TD.device)
    counts = torch.zeros(len(bank), dtype=torch.long, device=x_TD.device)
    return Assignment(rows, x_TD.new_zeros(0), counts)


class HeldBank:
    """The experts of a split bank that this rank holds."""

    def __init__(self, bank: ExpertBank) -> None:
        self.bank, self.gelu = bank, bank.gelu

    def stack(self, dtype: torch.dtype) -> Stack:
        """Their parameters."""
        held = (cast(DTensor, tensor).to_local() for tensor in self.bank.stack(dtype))
        return cast(Stack, tuple(held))

    def experts(self, dtype: torch.dtype) -> list[Stack]:
        """Their parameters one by one."""
        return each(self.stack(dtype))


class ExpertParallel:
    """Carries tokens to the ranks that hold their experts, and the outputs back.

    One exchange serves all routed branches of a layer.
    """

    def __init__(self, banks: list[ExpertBank], group: DeviceMesh) -> None:
        self.banks, self.group = banks, group.get_group()
        self.ranks = group.size()

    def __call__(self, x_TD: Tensor, jobs: list[Job]) -> Tensor:
        """Replaces `run_locally` on a group of ranks that all call it."""
        if torch.is_autocast_enabled(x_TD.device.type):
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        given = {id(job.bank): job.assignment for job in jobs if job.assignment is not None}
        plans = [given.get(id(bank)) or nothing_for(bank, x_TD) for bank in self.banks]
        rows_N, gate_N, sent = self.by_rank(plans)
        received = self.exchange_counts(sent)
        send, receive = sent.sum((1, 2)).tolist(), received.sum((1, 2)).tolist()
        there_RD = Exchange.apply(x_TD[rows_N], receive, send, self.group)  # type: ignore[no-untyped-call]
        done_RD = run_locally(there_RD, self.held_jobs(received, there_RD))
        back_ND = Exchange.apply(done_RD, send, receive, self.group)  # type: ignore[no-untyped-call]
        shared = [job for job in jobs if job.assignment is None]
        y_TD = run_locally(x_TD, shared) if shared else torch.zeros_like(x_TD)
        return y_TD.index_add(0, rows_N, back_ND * gate_N.to(back_ND.dtype)[:, None])

    def by_rank(self, plans: list[Assignment]) -> tuple[Tensor, Tensor, Tensor]:
        """Assignments of all branches in the order (rank, branch, expert), and their counts.

        Returns:
            rows_N, gate_N, and counts (ranks, branches, experts of a rank and branch).
        """
        counts = torch.stack([p.counts_E.unflatten(0, (self.ranks, -1)) for p in plans], dim=1)
        sizes = counts.sum(2).t().tolist()  # (branches, ranks)
        rows = [p.rows_N.split(n) for p, n in zip(plans, sizes, strict=True)]
        gates = [p.gate_N.split(n) for p, n in zip(plans, sizes, strict=True)]
        order = [(b, r) for r in range(self.ranks) for b in range(len(plans))]
        return (
            torch.cat([rows[b][r] for b, r in order]),
            torch.cat([gates[b][r] for b, r in order]),
            counts,
        )

    def exchange_counts(self, sent: Tensor) -> Tensor:
        """(ranks, branches, experts): what this rank sends -> what it receives."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        return received

    def held_jobs(self, received: Tensor, there_RD: Tensor) -> list[Job]:
        """Jobs for received tokens, which come in the order (rank, branch, expert)."""
        ranks, branches, experts = received.shape
        slot = torch.arange(branches * experts, device=received.device).repeat(ranks)
        order = slot.repeat_interleave(received.flatten()).argsort(stable=True)
        counts = received.sum(0)
        ones = torch.ones(len(order), dtype=there_RD.dtype, device=there_RD.device)
        sizes = counts.sum(1).tolist()
        pieces = zip(self.banks, order.split(sizes), ones.split(sizes), counts, strict=True)
        return [
            Job(cast(ExpertBank, HeldBank(bank)), Assignment(rows, gates, count))
            for bank, rows, gates, count in pieces
        ]


class Exchange(torch.autograd.Function):
    """Rows to other ranks and rows from them; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """(sum(send), D) -> (sum(receive), D)."""
        ctx.splits = (receive, send, group)
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        """(sum(receive), D) -> (sum(send), D)."""
        receive, send, group = ctx.splits
        dx = dy.new_empty(sum(send), *dy.shape[1:])
        dist.all_to_all_single(dx, dy.contiguous(), send, receive, group=group)
        return dx, None, None, None
