"""Dense integration: the identities that KS, KA, KC and concatenation must keep."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.lowrank import LARGE, iterated, truncated
from model.merge import FFN, METHODS, concatenated, merge, summed


def random_ffn(seed: int, width: int = 6, hidden: int = 24) -> FFN:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return FFN(draw(hidden, width), draw(hidden), draw(width, hidden), draw(width))


def run(ffn: FFN, x: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(F.linear(x, ffn.fc1_weight, ffn.fc1_bias), approximate="tanh")
    return F.linear(hidden, ffn.fc2_weight, ffn.fc2_bias)


def layer_of(specialised: int, collaborative: int, shared: int) -> dict[str, list[FFN]]:
    seeds = iter(range(100))
    return {
        "specialised.opt": [random_ffn(next(seeds)) for _ in range(specialised)],
        "collaborative": [random_ffn(next(seeds)) for _ in range(collaborative)],
        "shared": [random_ffn(next(seeds)) for _ in range(shared)],
    }


def assert_same(a: FFN, b: FFN, atol: float = 1e-12) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, atol=atol, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_single_expert_is_unchanged(method, counts):
    layer = layer_of(*counts)
    only = next(e for experts in layer.values() for e in experts)
    assert_same(merge(layer, method), only, atol=0)


def test_summation_and_averaging_by_hand():
    layer = layer_of(2, 3, 1)
    everyone = [e for experts in layer.values() for e in experts]
    for part in range(4):
        stacked = torch.stack([e[part] for e in everyone])
        torch.testing.assert_close(merge(layer, "ks")[part], stacked.sum(0))
        torch.testing.assert_close(merge(layer, "ka")[part], stacked.mean(0))


def test_compression_by_hand_with_an_svd():
    layer = layer_of(2, 3, 1)

    def low_rank(matrix, rank):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    for part in (0, 2):
        expected = layer["shared"][0][part].clone()
        expected += sum(low_rank(e[part], 6 // 2) for e in layer["specialised.opt"])
        expected += sum(low_rank(e[part], 6 // 3) for e in layer["collaborative"])
        torch.testing.assert_close(merge(layer, "kc")[part], expected)


def test_full_rank_compression_is_summation():
    layer = layer_of(1, 1, 1)
    assert_same(merge(layer, "kc"), merge(layer, "ks"))


def test_average_of_identical_experts_gives_the_layer_after_layernorm():
    expert = random_ffn(7)
    layer = {"specialised.opt": [expert] * 4, "collaborative": [expert] * 4, "shared": [expert]}
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = torch.rand(2, 50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = (gates[0] + gates[1] + 1) * run(expert, x)
    merged = run(merge(layer, "ka"), x)
    norm = torch.nn.LayerNorm(6, eps=1e-6, elementwise_affine=False, dtype=torch.float64)
    torch.testing.assert_close(norm(merged), norm(exact), atol=1e-5, rtol=0)


def test_one_expert_per_branch_is_the_hidden_width_concatenation():
    layer = layer_of(1, 1, 1)
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = sum(run(experts[0], x) for experts in layer.values())
    wide = concatenated(layer)
    assert wide.fc1_weight.shape == (3 * 24, 6)
    torch.testing.assert_close(run(wide, x), exact, atol=1e-12, rtol=0)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_truncation_is_the_best_approximation(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    seed = data.draw(st.integers(0, 1000))
    matrix = torch.randn(
        rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    approximation = truncated(matrix, rank)
    assert torch.linalg.matrix_rank(approximation) <= rank
    left_over = torch.linalg.svdvals(matrix)[rank:].square().sum()
    error = (matrix - approximation).square().sum()
    torch.testing.assert_close(error, left_over, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_large_matrices_are_as_near_as_their_svd(dtype, decay):
    """A flat spectrum is iterated; a steep one settles or is left to `eigh`."""
    width, rank = LARGE, LARGE // 4
    matrix = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(0))
    matrix = (matrix * torch.arange(1.0, width + 1) ** -decay).to(dtype)
    exact = matrix.double()
    least = torch.linalg.svdvals(exact)[rank:].square().sum().sqrt()
    for tall in (True, False):
        found = truncated(matrix if tall else matrix.T, rank).double()
        error = (exact - (found if tall else found.T)).norm()
        assert error <= least * (1 + 1e-4) + 1e-5 * exact.norm()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("rank", [5, 100])
def test_matrices_of_lower_rank_and_flat_ones(rank):
    low = torch.randn(800, rank) @ torch.randn(rank, LARGE)
    torch.testing.assert_close(truncated(low, 120), low, atol=1e-2, rtol=1e-3)
    turn = torch.linalg.qr(torch.randn(800, LARGE)).Q
    error = (turn - truncated(turn, rank)).square().sum()
    torch.testing.assert_close(error, torch.tensor(float(LARGE - rank)), rtol=1e-4, atol=0)
    assert iterated(torch.zeros(800, LARGE), rank) is None


def test_an_empty_layer_is_refused():
    with pytest.raises(ValueError, match="without experts"):
        summed({"shared": []})


def test_half_precision_is_summed_in_float32():
    parts = {"shared": [torch.full((3,), 1.0, dtype=torch.bfloat16)] * 300}
    assert summed(parts).tolist() == [300.0] * 3
    assert summed(parts).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["ks", "ka", "kc"])
def test_half_precision_stays(method):
    generator = torch.Generator().manual_seed(0)
    fine = {b: [torch.randn(12, 8, generator=generator)] * 2 for b in ("collaborative", "shared")}
    rough = {b: [part.bfloat16() for part in parts] for b, parts in fine.items()}
    found = METHODS[method](rough)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), METHODS[method](fine), atol=0.05, rtol=0.02)
