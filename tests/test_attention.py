"""Windows, masks and attention against definitions written pair by pair."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention import (
    WindowAttention,
    WindowGrid,
    attend_in_parts,
    attention_mask,
    grid_mask,
)

grids = st.builds(
    lambda height, width, window, odd: WindowGrid(height, width, window, window // 2 * odd),
    st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(0, 1),
)  # fmt: skip


def weights_of(attention: WindowAttention) -> None:
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)


@settings(max_examples=60, deadline=None)
@given(grid=grids)
def test_join_undoes_split(grid):
    x = torch.randn(2, grid.height, grid.width, 3)
    parts = grid.split(x)
    assert parts.shape == (2 * grid.windows, grid.window**2, 3)
    assert torch.equal(grid.join(parts), x)


@settings(max_examples=60, deadline=None)
@given(grid=grids, seed=st.integers(0, 9))
def test_mask_lets_only_neighbours_meet(grid, seed):
    """Two tokens of a window meet iff both are valid and the shift has not wrapped one of them."""
    valid = (
        torch.rand(1, grid.height, grid.width, generator=torch.Generator().manual_seed(seed)) < 0.8
    )
    place = torch.arange(grid.height * grid.width).view(1, grid.height, grid.width, 1) + 1
    place = grid.split(place).squeeze(-1)  # 0 is padding
    mask = attention_mask(grid, valid)[0]
    for window, i, j in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist():
        a, b = int(place[window, i]) - 1, int(place[window, j]) - 1
        real_a, real_b = (p >= 0 and bool(valid.flatten()[p]) for p in (a, b))
        if real_a != real_b:
            assert mask[window, i, j] == -torch.inf
        elif real_a:
            near = all(
                abs(p - q) < grid.window
                for p, q in zip(divmod(a, grid.width), divmod(b, grid.width), strict=True)
            )
            assert mask[window, i, j] == (0 if near else -100)


def naive(attention: WindowAttention, x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """Attention of each token over the tokens of its window, without padding or rolling."""
    heads, width = attention.heads, x.shape[-1]
    k_bias = 0 if attention.cosine else attention.k_bias
    biases = (attention.q_bias, k_bias, attention.v_bias)
    parts = zip(attention.qkv.weight.split(width), biases, strict=True)
    q, k, v = (x @ weight.T + bias for weight, bias in parts)
    bias, w = attention.position(), grid.window
    out = torch.zeros_like(x)
    down, right = grid.offset

    def cell(row: int, column: int) -> tuple[int, int]:
        return (row - down) // w, (column - right) // w

    places = [(r, c) for r in range(grid.height) for c in range(grid.width)]
    for r, c in places:
        mates = [p for p in places if cell(*p) == cell(r, c)]
        inside = [((p[0] - down) % w) * w + (p[1] - right) % w for p in mates]
        me = ((r - down) % w) * w + (c - right) % w
        for h in range(heads):
            d = slice(h * width // heads, (h + 1) * width // heads)
            keys = torch.stack([k[0, a, b, d] for a, b in mates])
            values = torch.stack([v[0, a, b, d] for a, b in mates])
            query = q[0, r, c, d]
            if attention.cosine:
                scale = (
                    attention.logit_scale[h, 0, 0].clamp(max=torch.log(torch.tensor(100.0))).exp()
                )
                logits = torch.cosine_similarity(keys, query[None], dim=-1, eps=1e-12) * scale
            else:
                logits = keys @ query / (width // heads) ** 0.5
            out[0, r, c, d] = torch.softmax(logits + bias[h, me, inside], 0) @ values
    return out @ attention.proj.weight.T + attention.proj.bias


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 7), width=st.integers(1, 7), window=st.integers(2, 4),
    odd=st.booleans(), kind=st.sampled_from(["swin_v1", "swin_v2"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_equals_its_definition(height, width, window, odd, kind, seed):
    torch.manual_seed(seed)
    attention = WindowAttention(4, 2, window, kind)
    weights_of(attention)
    attention = attention.double()
    grid = WindowGrid(height, width, window, window // 2 if odd else 0)
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    torch.testing.assert_close(attention(x, grid), naive(attention, x, grid), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", ["swin_v1", "swin_v2"])
def test_invalid_tokens_change_nothing_for_valid_ones(kind):
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 4, kind)
    weights_of(attention)
    grid = WindowGrid(10, 7, 4, 2)
    valid = torch.rand(2, 10, 7) < 0.7
    x, noise = torch.randn(2, 10, 7, 8), torch.randn(2, 10, 7, 8)
    other = torch.where(valid[..., None], x, noise)
    with torch.no_grad():
        first, second = attention(x, grid, valid), attention(other, grid, valid)
    torch.testing.assert_close(first[valid], second[valid])
    assert torch.isfinite(first).all()
    all_valid = attention(x, grid, torch.ones_like(valid))
    torch.testing.assert_close(all_valid, attention(x, grid))


@pytest.mark.parametrize("kind", ["swin_v1", "swin_v2"])
def test_bias_in_eval_follows_the_weights(kind):
    """The cached bias is built anew when the weights change, and gradients never see the cache."""
    attention = WindowAttention(8, 2, 4, kind).eval()
    weights_of(attention)
    grid, x = WindowGrid(9, 8, 4, 2), torch.randn(1, 9, 8, 8)
    with torch.inference_mode():
        before = attention(x, grid)
        assert torch.equal(before, attention(x, grid))
    weights_of(attention.position)
    with torch.no_grad():
        after = attention(x, grid)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, attention.train()(x, grid))
    attention(x, grid).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in attention.position.parameters())


def test_masks_are_built_once_per_shape():
    grid, device = WindowGrid(10, 7, 4, 2), torch.device("cpu")
    assert grid_mask(grid, device) is grid_mask(WindowGrid(10, 7, 4, 2), device)


@pytest.mark.parametrize("kind", ["swin_v1", "swin_v2"])
def test_bfloat16_training_and_inference_agree_with_float32(kind):
    torch.manual_seed(0)
    attention = WindowAttention(16, 2, 4, kind)
    if kind == "swin_v1":
        torch.nn.init.normal_(attention.position.table)
    grid, x = WindowGrid(9, 8, 4, 2), torch.randn(2, 9, 8, 16)
    grads = {}
    for name in ("float32", "bfloat16"):
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
            y = attention(x, grid)
            y.float().square().mean().backward()
        grads[name] = [p.grad.clone() for p in attention.parameters()]
    for exact, rough in zip(grads["float32"], grads["bfloat16"], strict=True):
        assert (exact - rough).abs().max() < 0.05 * exact.abs().max() + 1e-4
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(attention(x, grid), y, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("biases", [1, 5], ids=["shared", "per image"])
@pytest.mark.parametrize("room", [1, 100, 700, 1 << 20])
def test_attention_in_parts_equals_sdpa(biases, room, monkeypatch):
    """Whatever number of logits is computed at a time, and in bfloat16 to its rounding."""
    monkeypatch.setattr("model.attention.PART_LOGITS", room)
    q, k, v = torch.randn(3, 5, 7, 6, 4).bfloat16().unbind()
    bias = torch.randn(biases, 7, 6, 6)
    bias[..., 0, 3:] = -torch.inf
    with torch.inference_mode():
        found = attend_in_parts(q, k, v, bias)
        wanted = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=bias, scale=1.0
        )
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
