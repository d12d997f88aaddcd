"""Grouped products against one product per expert: outputs, all gradients, no waiting host."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.experts import ExpertBank, Job, RMoE, run_grouped, run_locally
from model.grouped import ALIGN, aligned
from model.router import Assignment


def bank(experts: int, config: ModelConfig) -> ExpertBank:
    made = ExpertBank(experts, config.embed_dim, config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def assignment(counts: list[int], tokens: int) -> Assignment:
    rows = torch.cat([torch.randperm(tokens)[:n] for n in counts])
    return Assignment(rows, torch.rand(len(rows)), torch.tensor(counts))


@pytest.mark.parametrize("counts", [[5, 0, 9, 3], [0, 0, 16, 0], [8, 8, 1, 7]])
def test_every_expert_begins_at_an_aligned_row(counts: list[int]) -> None:
    given = assignment(counts, 20)
    places = aligned(given)
    assert all(end % ALIGN == 0 for end in places.end_E.tolist())
    experts = torch.arange(4).repeat_interleave(given.counts_E)
    assert torch.equal(places.expert_P[places.place_N], experts)
    assert len(places.place_N.unique()) == sum(counts)
    assert places.end_E[-1] == len(places.expert_P)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("counts", [[5, 0, 9, 3], [20, 0, 0, 0]])
def test_equals_one_product_per_expert(counts: list[int], shared: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=16, depths=(1,), num_heads=(1,), image_size=16, window=4)
    x_TD = torch.randn(20, 16, requires_grad=True)
    jobs = [Job(bank(1, config), None)] if shared else []
    jobs += [Job(bank(4, config), assignment(c, 20)) for c in (counts, [3, 3, 3, 3])]
    for job in jobs:
        if job.assignment is not None:
            job.assignment.gate_N.requires_grad_()
    leaves = [x_TD, *(p for job in jobs for p in job.bank.parameters())]
    leaves += [job.assignment.gate_N for job in jobs if job.assignment is not None]

    def gradients(y_TD: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((y_TD * torch.linspace(-1, 1, 16)).square().sum(), leaves))

    ours, theirs = run_grouped(x_TD, jobs), run_locally(x_TD, jobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, expected in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_layer_on_a_gpu_does_not_make_the_host_wait() -> None:
    config = ModelConfig(embed_dim=64, depths=(1,), num_heads=(1,), channels={"opt": 3})
    layer = RMoE(config, 0, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_TD = torch.randn(300, 64).bfloat16()
    expected, _ = layer.bfloat16()(x_TD, {"opt": 300})
    layer, x_TD = layer.cuda(), x_TD.cuda().requires_grad_()
    layer(x_TD, {"opt": 300})[0].sum()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y_TD, _ = layer(x_TD, {"opt": 300})
        y_TD.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    close = (y_TD.float().cpu() - expected.float()).abs().amax(1) < 0.1
    assert close.float().mean() > 0.9  # a near tie may go to another expert
