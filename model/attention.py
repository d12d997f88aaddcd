"""Attention inside shifted windows, in the forms of Swin V2 and Swin V1.

Liu et al. 2022 (Swin V2): scaled cosine attention with a continuous position bias.
Liu et al. 2021 (Swin V1): scaled dot product with a table of biases, as in the RingMoE release.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import fused
from model.patch import pad_to_multiple

OTHER_REGION = -100.0
"""Added to the logit of a pair that only a cyclic shift brought into one window (Swin)."""
LOG_100 = math.log(100)
"""Largest logarithm of the logit scale (Liu et al. 2022)."""
PART_LOGITS = 1 << 20
"""Logits that are computed at a time where they are written out: 4 MB."""

Layer = tuple[Tensor, Tensor]
"""Weight and bias; the weight may be packed (`fused.pack`)."""


@dataclass(frozen=True)
class WindowGrid:
    """How a grid of tokens is cut into windows: padded to whole ones, then shifted cyclically."""

    height: int
    """Rows of tokens."""
    width: int
    """Columns of tokens."""
    window: int
    """Side of a window in tokens."""
    shift: int = 0
    """Cyclic shift in tokens; it falls away along a side that fits into one window."""

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns after padding."""
        return self.height + -self.height % self.window, self.width + -self.width % self.window

    @property
    def offset(self) -> tuple[int, int]:
        """The shift that applies to rows and columns."""
        return (
            self.shift if self.height > self.window else 0,
            self.shift if self.width > self.window else 0,
        )

    @property
    def windows(self) -> int:
        """Windows of one image."""
        return self.padded[0] * self.padded[1] // self.window**2

    @property
    def whole(self) -> bool:
        """Neither padded nor shifted: every pair in a window may meet."""
        return self.padded == (self.height, self.width) and self.offset == (0, 0)

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B·windows, N, C)."""
        x = pad_to_multiple(x, self.window)
        if self.offset != (0, 0):
            x = x.roll((-self.offset[0], -self.offset[1]), (1, 2))
        rows, columns = (side // self.window for side in self.padded)
        x = x.view(-1, rows, self.window, columns, self.window, x.shape[-1])
        return x.transpose(2, 3).reshape(-1, self.window**2, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """(B·windows, N, C) -> (B, H, W, C), inverse of `split`."""
        rows, columns = (side // self.window for side in self.padded)
        x = x.reshape(-1, rows, columns, self.window, self.window, x.shape[-1])
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if self.offset != (0, 0):
            x = x.roll(self.offset, (1, 2))
        return x[:, : self.height, : self.width]


def attention_mask(grid: WindowGrid, valid: Tensor) -> Tensor:
    """What to add to the logits so that strangers do not meet.

    Tokens from different ends of the image (brought together by the shift) get -100 as in Swin;
    padding and invalid tokens are cut off from valid ones altogether.

    Args:
        grid: the windows.
        valid: (B, H, W) bool, tokens that hold data.

    Returns:
        (B, windows, N, N) float32.
    """
    region = grid.split(region_image(grid, valid.device)).squeeze(-1)
    real = grid.split(valid[..., None]).view(-1, grid.windows, grid.window**2)
    apart = (region[:, :, None] != region[:, None, :]).float() * OTHER_REGION
    return apart.where(real[..., :, None] == real[..., None, :], -torch.inf)


def region_image(grid: WindowGrid, device: torch.device) -> Tensor:
    """(1, H, W, 1) region ids such that equal ids in a shifted window were neighbours before."""
    wrapped_row = torch.arange(grid.height, device=device) < grid.offset[0]
    wrapped_column = torch.arange(grid.width, device=device) < grid.offset[1]
    return (2 * wrapped_row[:, None] + wrapped_column)[None, ..., None].to(torch.int8)


@lru_cache(maxsize=64)
def grid_mask(grid: WindowGrid, device: torch.device) -> Tensor:
    """The mask of a grid whose tokens are all valid, (1, windows, N, N); built once per shape."""
    with torch.inference_mode(False):
        everywhere = torch.ones(1, grid.height, grid.width, dtype=torch.bool, device=device)
        return attention_mask(grid, everywhere)


@lru_cache(maxsize=64)
def relative_index(window: int, device: torch.device) -> Tensor:
    """(N·N,) index of each pair of tokens into a table of (2w-1)² relative positions."""
    with torch.inference_mode(False):
        place = torch.arange(window, device=device)
        row, column = place.repeat_interleave(window), place.repeat(window)
        down = row[:, None] - row[None, :] + window - 1
        right = column[:, None] - column[None, :] + window - 1
        return (down * (2 * window - 1) + right).flatten()


@lru_cache(maxsize=64)
def log_coordinates(window: int, device: torch.device) -> Tensor:
    """((2w-1)², 2) log-spaced relative positions in [-1, 1]·log2(9)/log2(8) (Swin V2, Eq. 4)."""
    with torch.inference_mode(False):
        step = torch.arange(1 - window, window, device=device, dtype=torch.float32)
        step = 8 * step / max(window - 1, 1)
        step = step.sign() * torch.log2(step.abs() + 1) / 3
        return torch.cartesian_prod(step, step)


def pair_bias(table: Tensor, window: int) -> Tensor:
    """((2w-1)², heads) biases of relative positions -> (heads, N, N) of pairs.

    Laid out head by head, as logits are: otherwise adding it takes five times as long.
    """
    bias = table[relative_index(window, table.device)].t().contiguous()
    return bias.view(-1, window**2, window**2)


class TableBias(nn.Module):
    """A learned bias per relative position and head (Swin V1)."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))

    def forward(self) -> Tensor:
        """(heads, N, N)."""
        return pair_bias(self.table, self.window)


class ContinuousBias(nn.Module):
    """A small network from relative position to a bias per head, 16·sigmoid (Swin V2)."""

    def __init__(self, window: int, heads: int) -> None:
        super().__init__()
        self.window = window
        self.fc1 = nn.Linear(2, 512)
        self.fc2 = nn.Linear(512, heads, bias=False)

    def forward(self) -> Tensor:
        """(heads, N, N)."""
        place = log_coordinates(self.window, self.fc1.weight.device).to(self.fc1.weight.dtype)
        table = 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(place))))
        return pair_bias(table, self.window)


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of each window."""

    def __init__(self, width: int, heads: int, window: int, kind: str) -> None:
        super().__init__()
        self.heads = heads
        self.cosine = kind == "swin_v2"
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.kept_bias: tuple[Any, tuple[Tensor, ...], Tensor] | None = None
        self.packed: list[Layer] | None = None
        if self.cosine:
            self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
            self.position: nn.Module = ContinuousBias(window, heads)
        else:
            self.k_bias = nn.Parameter(torch.zeros(width))
            self.position = TableBias(window, heads)

    def forward(self, x: Tensor, grid: WindowGrid, valid: Tensor | None = None) -> Tensor:
        """Attend within the windows of a grid.

        Args:
            x: (B, H, W, C) tokens.
            grid: how they are cut into windows.
            valid: (B, H, W) bool; invalid tokens are not seen by valid ones. None: all valid.

        Returns:
            (B, H, W, C).
        """
        inward, outward = self.layers()
        q, k, v = self.project(grid.split(x), inward)  # each (B·windows, heads, N, C/heads)
        dtype = torch.promote_types(v.dtype, torch.float32) if v.is_cpu else v.dtype
        bias = self.logit_bias(grid, valid, dtype)
        shape = v.shape
        if bias.shape[1] != self.heads:  # one bias per window, the same for all images
            q, k, v = (t.reshape(len(x), -1, *t.shape[2:]) for t in (q, k, v))
        out = attend(q, k, v, bias).view(shape)
        return grid.join(linear(out.transpose(1, 2).flatten(2), outward))

    def layers(self) -> list[Layer]:
        """The projections to queries, keys and values, and of the result."""
        if self.packed is not None:
            return self.packed
        k_bias = torch.zeros_like(self.q_bias) if self.cosine else self.k_bias
        bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        return [(self.qkv.weight, bias), (self.proj.weight, self.proj.bias)]

    def pack(self) -> None:
        """Lay the projections out for inference on a CPU (`ExpertBank.pack`)."""
        if self.packed is None and fused.runs(self.qkv.weight):
            with torch.no_grad():
                self.packed = [(fused.pack(weight), bias.clone()) for weight, bias in self.layers()]
            self.qkv.to("meta")
            self.proj.to("meta")

    def logit_bias(self, grid: WindowGrid, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Position bias and mask: (1, heads, N, N) or (1 or B, windows·heads, N, N).

        Without gradients, the last one is kept until the weights or the grid change; a pass with
        gradients announces a change of weights.
        """
        if torch.is_grad_enabled():
            self.kept_bias = None
        if valid is not None or torch.is_grad_enabled():
            return self.build_bias(grid, valid)
        weights = tuple(self.position.parameters())
        key = (grid, dtype, *map(state_of, weights))
        kept = self.kept_bias  # other threads may replace it meanwhile
        if kept is None or kept[0] != key:
            kept = self.kept_bias = (key, weights, self.build_bias(grid, None).to(dtype))
        return kept[2]

    def build_bias(self, grid: WindowGrid, valid: Tensor | None) -> Tensor:
        """The bias of this grid, with its mask where tokens must not meet."""
        bias: Tensor = self.position()[None]
        if valid is None and grid.whole:
            return bias
        mask = grid_mask(grid, bias.device) if valid is None else attention_mask(grid, valid)
        return (mask[:, :, None] + bias).flatten(1, 2)

    def project(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the scale of the logits folded into the queries."""
        qkv = linear(x, layer)
        split = qkv.view(*x.shape[:2], 3, self.heads, x.shape[2] // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        if self.cosine:  # Liu et al. 2022, Eq. 2
            scale = self.logit_scale.clamp(max=LOG_100).exp()
            if not torch.is_grad_enabled():
                q, k = unit_vectors(split[:, :, :2], scale.squeeze(-1)).permute(2, 0, 3, 1, 4)
                return q, k, v
            q, k = F.normalize(q, dim=-1) * scale.to(q.dtype), F.normalize(k, dim=-1)
        else:
            q = q * q.shape[-1] ** -0.5
        return q, k.to(v.dtype), v


def state_of(weight: Tensor) -> tuple[int, int, int]:
    """What changes when a weight is replaced, moved or written to."""
    version = 0 if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), version


def linear(x: Tensor, layer: Layer) -> Tensor:
    """x·weightᵀ + bias; on a CPU without gradients in one pass."""
    weight, bias = layer
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return fused.linear(x, weight, bias)


def unit_vectors(qk: Tensor, scale: Tensor) -> Tensor:
    """Queries and keys of length 1, queries times `scale`, for inference.

    Args:
        qk: (B, N, 2, heads, d); overwritten if it is float32 or better.
        scale: (heads, 1).
    """
    wide = qk.to(torch.promote_types(qk.dtype, torch.float32))
    factor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min_(1e-12).reciprocal_()
    factor[:, :, 0] *= scale
    return wide.mul_(factor).to(qk.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q·kᵀ + bias)·v over (B, heads, N, d)."""
    q = q.to(v.dtype)
    if v.is_cpu and v.dtype == torch.bfloat16:
        if torch.is_grad_enabled():  # with a learned bias SDPA would compute all in float32
            logits = (q @ k.transpose(-1, -2)).float() + bias
            return logits.softmax(-1).to(v.dtype) @ v
        if not fused.TILES:
            return attend_in_parts(q, k, v, bias)
    bias = bias if v.is_cpu else bias.to(v.dtype)  # a CPU would compute in float32 anyway
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attend` for inference in bfloat16: logits in float32, as many at a time as stay in cache.

    SDPA multiplies 32 queries at a time, which without tiles takes 1.4 times as long.
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    images, heads, tokens, _ = v.shape
    step = min(max(PART_LOGITS // tokens**2, 1), heads)
    many = max(PART_LOGITS // (step * tokens**2), 1)
    for image in range(0, images, many):
        for head in range(0, heads, step):
            part = (slice(image, image + many), slice(head, head + step))
            logits = (q[part] @ k[part].contiguous().transpose(-1, -2)).float()
            logits += bias[part if len(bias) > 1 else (slice(None), part[1])]
            torch.softmax(logits, -1, out=logits)
            torch.matmul(logits.to(v.dtype), v[part], out=out[part])
    return out
