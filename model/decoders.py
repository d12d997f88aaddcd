"""Necks between the encoder's four stages and a head: FPN and UPerNet (Xiao et al. 2018).

GroupNorm instead of batch norm: batches are small, and a window's answer must not depend on the
windows it is predicted with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Features

POOLS = (1, 2, 3, 6)
"""Grid sizes of pyramid pooling (Zhao et al. 2017)."""


def conv_block(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, GroupNorm, GELU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(groups_of(outputs), outputs),
        nn.GELU(),
    )


def groups_of(width: int) -> int:
    """Groups of a GroupNorm, of at least eight channels: one per channel would erase 1 × 1 maps."""
    return next(g for g in range(max(1, min(32, width // 8)), 0, -1) if width % g == 0)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resampling of (B, C, h, w) to `size`."""
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


class FPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): every stage at one width, coarse added to fine."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_block(w, channels) for w in widths)
        self.smooths = nn.ModuleList(conv_block(channels, channels, 3) for _ in widths[:-1])

    def forward(self, features: Features) -> list[Tensor]:
        """Four maps (B, channels, h, w) on the stages' grids, fine to coarse."""
        maps = [lateral(x) for lateral, x in zip(self.laterals, features, strict=True)]
        for s in range(len(maps) - 2, -1, -1):
            maps[s] = maps[s] + resize(maps[s + 1], maps[s].shape[-2:])
        return [smooth(x) for smooth, x in zip(self.smooths, maps, strict=False)] + maps[-1:]


class PyramidPooling(nn.Module):
    """Context of a map from its averages over 1, 4, 9 and 36 cells."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_block(width, channels) for _ in POOLS)
        self.mix = conv_block(width + len(POOLS) * channels, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, h, w) -> the same shape."""
        size = x.shape[-2:]
        pooled = [
            resize(branch(F.adaptive_avg_pool2d(x, cells)), size)
            for branch, cells in zip(self.branches, POOLS, strict=True)
        ]
        mixed: Tensor = self.mix(torch.cat([x, *pooled], 1))
        return mixed


class UPerNet(nn.Module):
    """Pyramid pooling on the last stage, an FPN, and all levels mixed on the finest grid."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.pool = PyramidPooling(widths[-1], channels)
        self.pyramid = FPN(widths, channels)
        self.mix = conv_block(len(widths) * channels, channels, 3)

    def forward(self, features: Features) -> Tensor:
        """Four stages -> (B, channels, ceil(H/4), ceil(W/4))."""
        maps = self.pyramid([*features[:-1], self.pool(features[-1])])
        size = maps[0].shape[-2:]
        mixed: Tensor = self.mix(torch.cat([maps[0], *(resize(x, size) for x in maps[1:])], 1))
        return mixed


class Detail(nn.Module):
    """What the pixels of a modality themselves say: two narrow convolutions at full resolution.

    A token holds 16 pixels of every band in a few numbers, and the norm of the patch embedding
    takes their common level out; maps need both back. Nothing is normalised here for that reason.
    """

    def __init__(self, inputs: int, width: int, compress: bool) -> None:
        """Random weights.

        Args:
            inputs: channels of the images.
            width: channels of the answer.
            compress: take inverse hyperbolic sines of the pixels first, which keep sign and
                order: linear radar power spans four orders of magnitude.
        """
        super().__init__()
        self.compress = compress
        self.look = nn.Conv2d(inputs, width, 3, padding=1)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H, W)."""
        x = image.to(self.look.weight.dtype)
        if self.compress:
            x = torch.asinh(x * COMPRESSION) / 4
        detail: Tensor = F.gelu(self.mix(F.gelu(self.look(x))))
        return detail


COMPRESSION = 300.0
"""Values beyond 1/300 of the scale are compressed logarithmically."""


class PixelHead(nn.Module):
    """From the stride-4 grid back to pixels: each token answers for its own 4 × 4 pixels.

    A token was embedded from those very pixels, so it can say where a border runs between them,
    which upsampled logits cannot. With `detail` the pixels have their own say beside it.
    """

    def __init__(self, channels: int, outputs: int, stride: int = 4, detail: int = 0) -> None:
        super().__init__()
        self.stride = stride
        self.hidden = max(outputs, detail) if detail else outputs
        self.answer = nn.Conv2d(channels, self.hidden * stride**2, 1)
        self.judge = nn.Conv2d(self.hidden + detail, outputs, 1) if detail else None

    def forward(self, x: Tensor, size: tuple[int, int], detail: Tensor | None = None) -> Tensor:
        """(B, channels, ceil(H/4), ceil(W/4)) -> (B, outputs, H, W); detail is (B, d, H, W)."""
        pixels = F.pixel_shuffle(self.answer(x), self.stride)[..., : size[0], : size[1]]
        if self.judge is None or detail is None:
            return pixels
        answer: Tensor = self.judge(torch.cat([F.gelu(pixels), detail], 1))
        return answer
