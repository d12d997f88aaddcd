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
        received, counting = self.exchange_counts(sent)
        x_ND = x_TD.index_select(0, rows_N)  # while the counts travel
        counting.wait()
        send, receive = sent.sum((1, 2)).tolist(), received.sum((1, 2)).tolist()
        outward, homeward = Way(receive, send, self.group), Way(send, receive, self.group)
        there_RD = travel(x_ND, outward)
        done_RD = run_locally(there_RD, self.held_jobs(received), outward.go_back)
        leaving_ND = Depart.apply(done_RD, homeward)  # type: ignore[no-untyped-call]
        shared = [job for job in jobs if job.assignment is None]  # while the others travel
        y_TD = run_locally(x_TD, shared) if shared else torch.zeros_like(x_TD)
        back_ND = Arrive.apply(leaving_ND, homeward)  # type: ignore[no-untyped-call]
        return y_TD.index_add_(0, rows_N, back_ND * gate_N.to(back_ND.dtype)[:, None])

    def by_rank(self, plans: list[Assignment]) -> tuple[Tensor, Tensor, Tensor]:
        """Assignments of all branches in the order (rank, branch, expert), and their counts.

        Returns:
            rows_N, gate_N, and counts (ranks, branches, experts of a rank and branch).
        """
        counts = torch.stack([p.counts_E.unflatten(0, (self.ranks, -1)) for p in plans], dim=1)
        sizes = counts.sum(2).t().tolist()  # (branches, ranks)
        rows = [p.rows_N.split(n) for p, n in zip(plans, sizes, strict=True)]
        gates = [cast(Tensor, p.gate_N).split(n) for p, n in zip(plans, sizes, strict=True)]
        order = [(b, r) for r in range(self.ranks) for b in range(len(plans))]
        return (
            torch.cat([rows[b][r] for b, r in order]),
            torch.cat([gates[b][r] for b, r in order]),
            counts,
        )

    def exchange_counts(self, sent: Tensor) -> tuple[Tensor, Any]:
        """(ranks, branches, experts): what this rank sends -> what it receives, and the wait."""
        received = torch.empty_like(sent)
        return received, dist.all_to_all_single(received, sent, group=self.group, async_op=True)

    def held_jobs(self, received: Tensor) -> list[Job]:
        """Jobs for received tokens, which come in the order (rank, branch, expert)."""
        ranks, branches, experts = received.shape
        slot = torch.arange(branches * experts, device=received.device).repeat(ranks)
        order = slot.repeat_interleave(received.flatten()).argsort(stable=True)
        counts = received.sum(0)
        pieces = zip(self.banks, order.split(counts.sum(1).tolist()), counts, strict=True)
        return [
            Job(cast(ExpertBank, HeldBank(bank)), Assignment(rows, None, count))
            for bank, rows, count in pieces
        ]


class Way:
    """Rows to other ranks and rows from them; gradients take the way back.

    What departs is not there before the arrival: its memory may be read only then.
    """

    def __init__(self, receive: list[int], send: list[int], group: dist.ProcessGroup) -> None:
        self.receive, self.send, self.group = receive, send, group
        self.journey: Any = None
        self.luggage: tuple[Tensor, Tensor] | None = None

    def depart(self, x: Tensor, receive: list[int], send: list[int]) -> Tensor:
        """(sum(send), D) -> (sum(receive), D), not yet filled."""
        x, out = x.contiguous(), x.new_empty(sum(receive), *x.shape[1:])
        self.luggage = x, out  # both must live as long as the journey
        self.journey = dist.all_to_all_single(
            out, x, receive, send, group=self.group, async_op=True
        )
        return out

    def go_back(self, dx: Tensor) -> None:
        """Send gradients of what arrived, (sum(receive), D), unless they are on their way."""
        if self.journey is None:
            self.depart(dx, self.send, self.receive)

    def arrive(self) -> Tensor:
        """Wait for the rows."""
        assert self.luggage is not None
        self.journey.wait()
        out = self.luggage[1]
        self.journey = self.luggage = None
        return out


class Depart(torch.autograd.Function):
    """Sends rows; in the backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        """(sum(send), D) -> (sum(receive), D), on the way."""
        ctx.way = way
        return way.depart(x, way.receive, way.send)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        """The gradients that `Arrive.backward` sent."""
        return ctx.way.arrive(), None


class Arrive(torch.autograd.Function):
    """Waits for rows; in the backward pass sends their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        """What `Depart` gave, now filled."""
        ctx.way = way
        way.arrive()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """(sum(receive), D) on their way to (sum(send), D), which `Depart.backward` returns."""
        ctx.way.go_back(dy)
        return dy, None


def travel(x: Tensor, way: Way) -> Tensor:
    """(sum(send), D) -> (sum(receive), D)."""
    arrived: Tensor = Arrive.apply(Depart.apply(x, way), way)  # type: ignore[no-untyped-call]
    return arrived
