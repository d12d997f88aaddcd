"""Linear layers without autograd on a CPU, through oneDNN with bias and GELU inside.

Elsewhere (other devices, other types, no oneDNN) the same functions are plain PyTorch.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

STEP_TOKENS, STEP_BYTES = 256, 1 << 20
"""Tokens that go through a packed expert at a time, or as many as these bytes of hidden activations
hold: then those stay in cache. Where the first take more than twice the bytes, all is lost."""
WIDE_TOKENS = 1024
"""Tokens of other experts: every step reads the weights, and lays them out if unpacked."""
TILES = torch.cpu._is_amx_tile_supported()
"""Whether the processor multiplies bfloat16 in tiles (AMX): then products cost little beside what
surrounds them."""
ROUND = {torch.bfloat16: 32 if TILES else 16, torch.float32: 16}
"""Gathered tokens are rounded up to this: oneDNN compiles a kernel for every new number of them,
which in tiles takes longer than the product, and experts see another number in every batch. Finer
steps need more kernels than it keeps."""


def runs(x: Tensor) -> bool:
    """Whether oneDNN computes this; a compiler has products of its own."""
    if torch.compiler.is_compiling():
        return False
    if not (x.is_cpu and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return x.dtype == torch.float32 or (
        x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias, (..., in) -> (..., out); the weight may be packed."""
    if runs(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def quick_form(x: Tensor, form: str) -> str:
    """The form of the GELU to compute where `form` is meant.

    In bfloat16 the erf form stands for the tanh form on a CPU: they are at most 4.7e-4 apart, less
    than what rounding does, and the tanh form takes as long as the matrix product.
    """
    return "none" if x.is_cpu and x.dtype == torch.bfloat16 else form


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, form: str) -> Tensor:
    """GELU(x·weightᵀ + bias), without gradients; oneDNN does not round the product in between."""
    form = quick_form(x, form)
    if runs(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], form)
        return y
    return F.gelu(F.linear(x, weight, bias), approximate=form)


def pack(weight: Tensor) -> Tensor:
    """A (out, in) weight as oneDNN's kernels read it; it can only be multiplied with."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), STEP_TOKENS)
    return packed


def steps(x_TD: Tensor, tokens: int, hidden: int, packed: bool) -> Iterator[slice]:
    """The steps, of about equal size, in which an expert of a hidden width takes tokens."""
    about = WIDE_TOKENS if x_TD.is_cpu else max(tokens, 1)
    held = hidden * x_TD.itemsize
    if packed and STEP_TOKENS * held <= 2 * STEP_BYTES:
        about = min(max(STEP_TOKENS, STEP_BYTES // held), WIDE_TOKENS)
    step = -(-tokens // max(round(tokens / about), 1))
    step = max(step + -step % ROUND.get(x_TD.dtype, 1), 1)
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def gather(x_TD: Tensor, rows_N: Tensor, kept: bool = False) -> Tensor:
    """The tokens of an expert, and where oneDNN computes some more to make a round number.

    Not in float32 if a backward pass keeps them: its kernels are compiled quickly.
    """
    if runs(x_TD) and not (kept and x_TD.dtype == torch.float32):
        rows_N = F.pad(rows_N, (0, -len(rows_N) % ROUND[x_TD.dtype]))
    return x_TD.index_select(0, rows_N)


def gather_padded(x_TD: Tensor, rows_N: Tensor, rows: int) -> Tensor:
    """Some tokens, and rows of zeros up to a number."""
    if rows == len(rows_N):
        return x_TD.index_select(0, rows_N)
    x = x_TD.new_zeros(rows, x_TD.shape[1])
    torch.index_select(x_TD, 0, rows_N, out=x[: len(rows_N)])
    return x
