"""Patches: from pixels to tokens, and from four tokens to one between stages (RingMoE §3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.norm import Norm


class PatchEmbed(nn.Module):
    """Cut an image of one modality into patches and embed each: convolution, then LayerNorm."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            channels, config.embed_dim, config.patch_size, stride=config.patch_size
        )
        self.norm = Norm(config.embed_dim, eps=config.norm_eps)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> (B, ceil(H/p), ceil(W/p), D) tokens; part patches see zeros.

        Raises:
            ValueError: for an image smaller than a patch, or with other channels.
        """
        self.check(image)
        image = image.to(self.projection.weight.dtype)
        pixels = pad_to_multiple(image.movedim(1, -1), self.projection.stride[0]).movedim(-1, 1)
        tokens: Tensor = self.norm(self.projection(pixels).movedim(1, -1))
        return tokens

    def check(self, image: Tensor) -> None:
        """Refuse images that have no patch or other channels."""
        patch, channels = self.projection.stride[0], self.projection.in_channels
        if image.ndim != 4 or image.shape[1] != channels:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; expected (B, {channels}, H, W)"
            )
        if min(image.shape[-2:]) < patch:
            raise ValueError(
                f"image of {image.shape[-2]}x{image.shape[-1]} pixels is smaller than a patch"
                f" of {patch}x{patch}"
            )


class PatchMerging(nn.Module):
    """Join each 2x2 square of tokens into one of twice the width: linear, then LayerNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = Norm(2 * width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        x = pad_to_multiple(x, 2)
        squares = torch.cat(
            [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1
        )
        merged: Tensor = self.norm(self.reduction(squares))
        return merged


def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zeros at the bottom and right of (B, H, W, C), up to multiples of `size`."""
    below, right = -x.shape[1] % size, -x.shape[2] % size
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def patch_validity(valid: Tensor, size: int) -> Tensor:
    """Which squares of `size` hold a valid cell: (B, H, W) bool -> (B, ceil(H/s), ceil(W/s))."""
    padded = pad_to_multiple(valid[..., None], size)[..., 0]
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    return padded.view(-1, rows, size, columns, size).any(4).any(2)
