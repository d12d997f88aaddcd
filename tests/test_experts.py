"""The expert dispatch against a loop over tokens, in float64, with all gradients."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import fused
from model.config import ModelConfig
from model.experts import ExpertBank, Job, RMoE, run_grouped, run_locally
from model.mixture import outer
from model.packing import pack
from model.router import Assignment, Router


def config(**changes: object) -> ModelConfig:
    sizes = {"embed_dim": 4, "depths": (1,), "num_heads": (1,), "image_size": 16, "window": 4}
    return ModelConfig(**{**sizes, "channels": {"opt": 3, "ms": 4}, **changes})  # type: ignore[arg-type]


def layer(config: ModelConfig, seed: int = 0) -> RMoE:
    moe = RMoE(config, 0, 0).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return moe


def feed_forward(bank: ExpertBank, expert: int, x_D: Tensor) -> Tensor:
    form = "tanh" if bank.gelu == "tanh" else "none"
    hidden = bank.fc1.weight[expert] @ x_D + bank.fc1.bias[expert]
    active = F.gelu(hidden, approximate=form)
    return bank.fc2.weight[expert] @ active + bank.fc2.bias[expert]


def choices(router: Router, x_TD: Tensor) -> list[list[tuple[int, Tensor]]]:
    """(expert, gate) pairs of each token, decided token by token."""
    wanted = []
    for x_D in x_TD:
        probability_E = torch.softmax(router.weight @ x_D, 0)
        score = [probability_E.tolist()[row] for row in router.kept]
        ranked = sorted(range(len(score)), key=lambda e: -score[e])
        top = [(e, probability_E[router.kept[e]]) for e in ranked[: router.top_k]]
        if router.gate == "normalized":
            total = torch.stack([gate for _, gate in top]).sum()
            top = [(e, gate / total) for e, gate in top]
        wanted.append(top)
    if router.capacity_factor is None:
        return wanted
    share = router.top_k * len(x_TD) * router.capacity_factor / len(router.kept)
    room = [-int(-share // 1)] * len(router.kept)
    taken: list[list[tuple[int, Tensor]]] = [[] for _ in wanted]
    for rank in range(router.top_k):
        for token, top in enumerate(wanted):
            expert, gate = top[rank]
            if room[expert]:
                room[expert] -= 1
                taken[token].append((expert, gate))
    return taken


def loop(moe: RMoE, x_TD: Tensor, tokens: dict[str, int]) -> Tensor:
    """Eq. 3, one token and one expert at a time."""
    out = [x_D * 0 for x_D in x_TD]
    if moe.shared is not None:
        out = [y + feed_forward(moe.shared, 0, x_D) for y, x_D in zip(out, x_TD, strict=True)]
    work = []
    if moe.collaborative is not None:
        work.append((moe.collaborative, moe.router["collaborative"], 0, len(x_TD)))
    first = 0
    for name, count in tokens.items():
        if name in moe.specialised:
            router = moe.router["specialised"][name]
            work.append((moe.specialised[name], router, first, count))
        first += count
    for bank, router, first, count in work:
        for token, top in enumerate(choices(router, x_TD[first : first + count]), first):
            for expert, gate in top:
                out[token] = out[token] + gate * feed_forward(bank, expert, x_TD[token])
    return torch.stack(out) if out else x_TD * 0


def gradients(moe: RMoE, x_TD: Tensor, y_TD: Tensor) -> dict[str, Tensor]:
    target = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    named = {"x": x_TD, **dict(moe.named_parameters())}
    grads = torch.autograd.grad((y_TD * target).sum(), list(named.values()), allow_unused=True)
    zeros = [torch.zeros_like(p) for p in named.values()]
    return dict(
        zip(named, (z if g is None else g for z, g in zip(zeros, grads, strict=True)), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    specialised=st.integers(0, 4),
    collaborative=st.integers(0, 4),
    shared=st.integers(0, 1),
    top_k=st.integers(1, 3),
    gate=st.sampled_from(["softmax", "normalized"]),
    gelu=st.sampled_from(["tanh", "erf"]),
    capacity=st.sampled_from([None, 0.5, 1.0, 1.2]),
    seed=st.integers(0, 99),
)
def test_equals_the_loop_over_tokens(
    tokens, specialised, collaborative, shared, top_k, gate, gelu, capacity, seed
):
    counts = [n for n in (specialised, collaborative) if n]
    if not (counts or shared):
        shared = 1
    moe = layer(
        config(
            specialised=specialised, collaborative=collaborative, shared=shared, gate=gate,
            gelu=gelu, capacity_factor=capacity, top_k=min([top_k, *counts]),
        ),
        seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(sum(tokens), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    split = dict(zip(("opt", "ms"), tokens, strict=True))
    ours, _ = moe(x_TD, split)
    theirs = loop(moe, x_TD, split)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    if sum(tokens):
        expected = gradients(moe, x_TD, theirs)
        for name, grad in gradients(moe, x_TD, ours).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def test_an_expert_without_tokens_has_zero_gradient():
    moe = layer(config(specialised=0, shared=0))
    with torch.no_grad():
        moe.router["collaborative"].weight.zero_()
        moe.router["collaborative"].weight[2] = 1
    x_TD = torch.rand(6, 4, dtype=torch.float64) + 0.1
    y_TD, routing = moe(x_TD, {"opt": 6})
    y_TD.sum().backward()
    assert routing.branches["collaborative"].counts_E.tolist() == [0, 0, 6, 0]
    busy = moe.collaborative.fc1.weight.grad.abs().sum((1, 2)) > 0
    assert busy.tolist() == [False, False, True, False]


def test_pruned_branches_keep_the_parents_gates():
    kept = {"0.0": {"collaborative": (1, 3), "specialised.ms": ()}}
    parent, child = layer(config()), layer(config(kept=kept))
    for name, parameter in child.named_parameters():
        source = parent.get_parameter(name)
        parameter.data = source[[1, 3]] if name.startswith("collaborative.") else source.clone()
    assert "ms" not in child.specialised
    assert "ms" not in child.router["specialised"]
    x_TD = torch.randn(12, 4, dtype=torch.float64)
    probability_TE = torch.softmax(x_TD @ parent.router["collaborative"].weight.T, -1)
    _, routing = child(x_TD, {"opt": 5, "ms": 7})
    counts = routing.branches["collaborative"].counts_E
    assert counts[[0, 2]].tolist() == [0, 0]
    torch.testing.assert_close(
        routing.branches["collaborative"].probability_E, probability_TE.sum(0)
    )
    torch.testing.assert_close(
        child(x_TD, {"opt": 5, "ms": 7})[0], loop(child, x_TD, {"opt": 5, "ms": 7})
    )


def test_no_grad_gives_the_same_output():
    moe, x_TD = layer(config()), torch.randn(9, 4, dtype=torch.float64)
    with torch.no_grad():
        quiet, _ = moe(x_TD, {"opt": 9})
    assert torch.equal(quiet, moe(x_TD, {"opt": 9})[0])


@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_stays_close_to_float32(whole):
    torch.manual_seed(0)
    moe = RMoE(config(embed_dim=16), 0, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_TD = torch.randn(64, 16)
    exact, _ = moe(x_TD, {"opt": 64})
    if whole:
        rough, _ = moe.bfloat16()(x_TD.bfloat16(), {"opt": 64})
    else:
        with torch.autocast("cpu", torch.bfloat16):
            rough, _ = moe(x_TD, {"opt": 64})
    assert rough.dtype == torch.bfloat16
    close = (rough.float() - exact).abs().amax(1) < 0.05
    assert close.float().mean() > 0.9  # a near tie may go to another expert


def test_autocast_gradients_reach_the_float32_parameters():
    torch.manual_seed(0)
    moe = RMoE(config(embed_dim=16), 0, 0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, _ = moe(torch.randn(64, 16), {"opt": 32, "ms": 32})
        y_TD.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("form", ["tanh", "erf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_inference_is_as_near_the_truth_as_plain_layers(form, dtype):
    torch.manual_seed(0)
    moe = RMoE(config(embed_dim=64, specialised=0, collaborative=0, gelu=form), 0, 0).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x_TD = torch.randn(1500, 64).to(dtype)

    def plain(wider: torch.dtype) -> Tensor:
        w1, b1, w2, b2 = (t[0].detach().to(wider) for t in moe.shared.stack(dtype))
        hidden = F.linear(x_TD.to(wider), w1, b1)
        active = F.gelu(hidden, approximate="tanh" if form == "tanh" else "none")
        return F.linear(active, w2, b2)

    with torch.inference_mode():
        fast, _ = moe(x_TD, {"opt": len(x_TD)})
    truth = plain(torch.float64)
    error = (fast - truth).square().mean()
    assert error < max(1.05 * (plain(dtype) - truth).square().mean(), 1e-11)


@pytest.mark.parametrize("width", [8, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_of_narrow_and_wide_layers(width, dtype):
    left, right = torch.randn(70, 24).to(dtype), torch.randn(70, width).to(dtype)
    out = torch.empty(24, width, dtype=dtype)
    outer(left, right, out)
    torch.testing.assert_close(out.double(), left.double().T @ right.double(), rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_experts_give_the_same_output(dtype):
    torch.manual_seed(0)
    moe = RMoE(config(embed_dim=64), 0, 0).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x_TD = torch.randn(1300, 64).to(dtype)
    with torch.inference_mode():
        plain, _ = moe(x_TD, {"opt": 1300})
        pack(moe)
        packed, _ = moe(x_TD, {"opt": 1300})
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (packed - plain).abs().max() <= tolerance * plain.abs().max()
    assert moe.shared.fc1.weight.is_meta  # their memory is free, and nobody saves them by mistake


@pytest.mark.parametrize("tokens", [0, 1, 31, 256, 384, 385, 1000, 5000])
@pytest.mark.parametrize("width", [64, 8192])
def test_steps_cover_all_tokens_once(tokens, width):
    parts = list(fused.steps(torch.zeros(1, 16), tokens, width, packed=True))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(tokens))
    assert all((part.stop - part.start) % fused.ROUND[torch.float32] == 0 for part in parts[:-1])


RUNS = {"products": run_locally, "grouped": run_grouped}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("grad", [True, False])
def test_no_gates_are_gates_of_one(run: str, grad: bool) -> None:
    moe = layer(config()).float()  # grouped products have no float64
    x_TD = torch.randn(12, 4, requires_grad=True)
    bank = moe.collaborative
    assert bank is not None
    plain = Assignment(torch.randperm(12), None, torch.tensor([5, 0, 4, 3]))
    weighted = replace(plain, gate_N=torch.ones(12))
    with torch.set_grad_enabled(grad):
        ours, theirs = (RUNS[run](x_TD, [Job(bank, a)]) for a in (plain, weighted))
    torch.testing.assert_close(ours, theirs)
    if grad:
        leaves = [x_TD, *bank.parameters()]
        mine = torch.autograd.grad(ours.square().sum(), leaves)
        expected = torch.autograd.grad(theirs.square().sum(), leaves)
        torch.testing.assert_close(mine, expected)


def test_gradients_of_tokens_leave_before_those_of_weights() -> None:
    moe = layer(config())
    x_TD = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    bank = moe.collaborative
    assert bank is not None
    job = Job(bank, Assignment(torch.randperm(12), None, torch.tensor([5, 0, 4, 3])))
    leaves = [x_TD, *bank.parameters()]
    expected = torch.autograd.grad(run_locally(x_TD, [job]).square().sum(), leaves)
    order: list[str] = []
    left: list[Tensor] = []

    def leave(dx_TD: Tensor) -> None:
        order.append("tokens")
        left.append(dx_TD.clone())

    def watched(*factors: Tensor) -> None:
        order.append("weight")
        outer(*factors)

    with mock.patch("model.mixture.outer", watched):
        y_TD = run_locally(x_TD, [job], leave)
        found = torch.autograd.grad(y_TD.square().sum(), leaves)
    assert order == ["tokens"] + 6 * ["weight"]
    torch.testing.assert_close(left[0], expected[0])
    torch.testing.assert_close(found, expected)
