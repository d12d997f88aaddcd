"""Linear layers in 8-bit integers on a CPU: half the memory of bfloat16, and quicker.

Weights have a step for each output, activations one step for all of them, found anew for every
product (dynamic quantisation). oneDNN sums products as integers, exactly, and hands out floating
point.

Shapes: N tokens, D width, F hidden width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-30
"""Step of activations that are all 0."""


class Matrix(NamedTuple):
    """A linear layer whose weight is integers times a step for each output."""

    weight: Tensor
    """(out, in) int8, laid out as oneDNN's kernels read it."""
    step_O: Tensor
    """(out,) float32."""
    zero_O: Tensor
    """(out,) int32, zeros: weights are symmetric."""
    bias_O: Tensor
    """(out,) float32."""


class Expert(NamedTuple):
    """A feed-forward network in integers."""

    fc1: Matrix
    """D -> F."""
    fc2: Matrix
    """F -> D."""


def runs() -> bool:
    """Whether this processor multiplies 8-bit integers faster than floating point (VNNI)."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def quantised(weight: Tensor, bias: Tensor) -> Matrix:
    """A layer in integers: the largest weight of each output becomes 127."""
    weight = weight.detach()
    largest_O = torch.maximum(weight.amax(1), -weight.amin(1)).float()
    step_O = largest_O.clamp_min(1e-12) / 127
    whole = (weight * (1 / step_O)[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(whole, None)
    return Matrix(packed, step_O, torch.zeros_like(step_O, dtype=torch.int32), bias.float().clone())


def levels(x: Tensor) -> tuple[Tensor, float, int]:
    """The nearest of 255 evenly spaced levels for every value.

    Returns:
        uint8 numbers of the levels, the step between them, and the number of the level 0.

    Raises:
        ValueError: if a value is infinite or not a number.
    """
    low, high = (float(end) for end in torch.aminmax(x))
    step = max((max(high, 0.0) - min(low, 0.0)) / 254, SMALLEST)
    if not math.isfinite(step):
        raise ValueError("the model's activations are not finite; it cannot run with --int8")
    zero = round(-min(low, 0.0) / step)
    signed = torch.add(zero - 128.0, x.float(), alpha=1 / step).round_().to(torch.int8)
    return signed.view(torch.uint8).bitwise_xor_(128), step, zero  # a vectorised way to uint8


def feed_forward(x_ND: Tensor, expert: Expert) -> Tensor:
    """FFN(x), (N, D) -> (N, D) in the type of x.

    The erf form of the GELU stands for the tanh form: they differ by less than a level.
    """
    hidden_NF = linear(x_ND, expert.fc1, torch.float32, "gelu")
    return linear(hidden_NF, expert.fc2, x_ND.dtype)


def linear(x: Tensor, layer: Matrix, dtype: torch.dtype, after: str = "none") -> Tensor:
    """x·weightᵀ + bias and the function `after` it, (..., in) -> (..., out)."""
    whole, step, zero = levels(x)
    weight, step_O, zero_O, bias_O = layer
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        whole, step, zero, weight, step_O, zero_O, bias_O, 1.0, 0, dtype, after, [], "none"
    )
    return y
