"""Patches and merging on every size, not only the convenient ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.patch import PatchEmbed, PatchMerging, pad_to_multiple, patch_validity

CONFIG = ModelConfig.preset("nano")


@settings(max_examples=25, deadline=None)
@given(height=st.integers(4, 21), width=st.integers(4, 21), channels=st.integers(1, 13))
def test_patches_cover_the_image_and_see_zeros_beyond_it(height, width, channels):
    embed = PatchEmbed(channels, CONFIG)
    image = torch.randn(2, channels, height, width)
    padded = torch.zeros(2, channels, -(-height // 4) * 4, -(-width // 4) * 4)
    padded[:, :, :height, :width] = image
    tokens = embed(image)
    assert tokens.shape == (2, -(-height // 4), -(-width // 4), CONFIG.embed_dim)
    torch.testing.assert_close(tokens, embed(padded))


@pytest.mark.parametrize("shape", [(1, 3, 3, 8), (1, 4, 8, 8), (3, 8, 8)])
def test_images_without_a_patch_or_with_other_channels_are_refused(shape):
    with pytest.raises(ValueError, match=r"patch|expected"):
        PatchEmbed(3, CONFIG)(torch.zeros(shape))


@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9))
def test_merging_joins_squares_in_the_released_order(height, width):
    merge = PatchMerging(3, 1e-4)
    x = torch.randn(2, height, width, 3)
    whole = pad_to_multiple(x, 2)
    out = merge(x)
    assert out.shape == (2, -(-height // 2), -(-width // 2), 6)
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            corners = [whole[:, 2 * i + a, 2 * j + b] for a, b in ((0, 0), (1, 0), (0, 1), (1, 1))]
            square = merge.norm(merge.reduction(torch.cat(corners, -1)))
            torch.testing.assert_close(out[:, i, j], square)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    size=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_a_square_is_valid_if_any_cell_is(height, width, size, seed):
    valid = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < 0.2
    squares = patch_validity(valid, size)
    for b, i, j in torch.cartesian_prod(*(torch.arange(n) for n in squares.shape)).tolist():
        cells = valid[b, i * size : (i + 1) * size, j * size : (j + 1) * size]
        assert bool(squares[b, i, j]) == bool(cells.any())
