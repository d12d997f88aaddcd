"""Routing statistics and the balance loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.router import BranchRouting, LayerRouting, Router, balance_loss


def branch(counts: list[int], probability: list[float]) -> BranchRouting:
    tokens = sum(counts)
    return BranchRouting(torch.tensor(counts), torch.tensor(probability) * tokens, tokens)


def config(**changes: object) -> ModelConfig:
    return ModelConfig.preset("nano", **changes)


def test_an_even_router_pays_one_per_branch():
    even = branch([5, 5, 5, 5], [0.25] * 4)
    layers = [
        LayerRouting({"collaborative": even, "specialised.opt": even, "specialised.ms": even})
    ]
    assert balance_loss(layers * 3).item() == pytest.approx(6)


def test_a_lazy_router_pays_the_number_of_experts():
    lazy = branch([8, 0, 0, 0], [1.0, 0, 0, 0])
    assert balance_loss([LayerRouting({"collaborative": lazy})]).item() == pytest.approx(4)


def test_a_modality_without_tokens_is_not_averaged():
    even, absent = branch([2, 2], [0.5, 0.5]), branch([0, 0], [0.0, 0.0])
    layer = LayerRouting({"specialised.opt": even, "specialised.ms": absent})
    assert balance_loss([layer]).item() == pytest.approx(1)


def test_no_router_costs_nothing():
    assert balance_loss([LayerRouting({})]).item() == 0
    assert balance_loss([]).item() == 0


def test_statistics_of_two_grids_add_up():
    torch.manual_seed(0)
    router = Router(4, 8, (0, 1, 2, 3), config())
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(30, 8)
    _, whole = router(x_TD)
    (_, first), (_, second) = router(x_TD[:11]), router(x_TD[11:])
    total = (LayerRouting({"a": first}) + LayerRouting({"a": second, "b": first})).branches
    assert torch.equal(total["a"].counts_E, whole.counts_E)
    torch.testing.assert_close(total["a"].probability_E, whole.probability_E)
    assert (total["a"].tokens, total["b"].tokens) == (30, 11)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40), top_k=st.integers(1, 4), factor=st.sampled_from([0.3, 1.0, 1.2]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_capacity_drops_late_tokens_but_counts_them(tokens, top_k, factor, seed):
    torch.manual_seed(seed)
    x_TD = torch.randn(tokens, 8)
    tight = Router(4, 8, (0, 1, 2, 3), config(capacity_factor=factor, top_k=top_k))
    torch.nn.init.normal_(tight.weight)
    assignment, routing = tight(x_TD)
    room = -int(-top_k * tokens * factor / 4 // 1)
    assert int(assignment.counts_E.max()) <= room
    assert int(routing.counts_E.sum()) == top_k * tokens
    assert routing.dropped == top_k * tokens - len(assignment.rows_N)
    assert torch.equal(assignment.counts_E, routing.counts_E.clamp(max=room))


def test_softmax_gates_teach_the_router_and_normalised_top1_gates_do_not():
    x_TD = torch.randn(12, 8)
    for gate, learns in (("softmax", True), ("normalized", False)):
        router = Router(4, 8, (0, 1, 2, 3), config(gate=gate))
        torch.nn.init.normal_(router.weight)
        assignment, _ = router(x_TD)
        (assignment.gate_N * torch.arange(12)).sum().backward()
        assert bool((router.weight.grad.abs() > 1e-4).any()) == learns


def test_routing_is_float32_under_autocast_and_in_a_bfloat16_model():
    router = Router(4, 8, (0, 1, 2, 3), config())
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(12, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, routing = router(x_TD)
    assert routing.probability_E.dtype == torch.float32
    torch.testing.assert_close(routing.probability_E, router(x_TD)[1].probability_E)
    assert router.bfloat16()(x_TD.bfloat16())[1].probability_E.dtype == torch.float32
