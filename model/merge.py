"""Many experts into one: knowledge summation, averaging and compression, on one layer's weights.

A method takes one matrix (or bias) of every expert of a layer, by branch, and returns the matrix
of one dense FFN of the same shape (RingMoE §3.5, "dense integration"; KC after Xue et al. 2022,
arXiv 2201.10890). None of them is exact: a sum of FFNs is not the FFN of the summed weights,
because of the GELU between. `concatenated` is exact, and as many times as wide.

The experts of a branch are any sized iterable, so that a checkpoint can hand them over one at a
time; half-precision weights are accumulated in float32.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.lowrank import truncated

Merging = Literal["ks", "ka", "kc"]
Parts = Mapping[str, Collection[Tensor]]
"""One matrix of every expert: "specialised.<modality>", "collaborative", "shared" -> tensors."""


class FFN(NamedTuple):
    """One expert: y = fc2·gelu(fc1·x + b1) + b2."""

    fc1_weight: Tensor
    """(F, D)."""
    fc1_bias: Tensor
    """(F,)."""
    fc2_weight: Tensor
    """(D, F)."""
    fc2_bias: Tensor
    """(D,)."""


Layer = Mapping[str, list[FFN]]
"""The experts of one layer by branch."""


def summed(parts: Parts) -> Tensor:
    """KS, knowledge summation: the sum over all experts of the layer."""
    return total(part for branch in parts.values() for part in branch)


def averaged(parts: Parts) -> Tensor:
    """KA, knowledge averaging: the mean over all experts of the layer."""
    count = sum(len(branch) for branch in parts.values())
    return total((part for branch in parts.values() for part in branch), divisor=count)


def compressed(parts: Parts) -> Tensor:
    """KC, knowledge compression: the sum of each expert's best rank-K approximation.

    K = floor(min(F, D) / N) for the N experts of a routed branch, so that the concatenated
    factors have the shape of one matrix; the shared expert is added whole, biases are summed.
    """
    found: list[torch.dtype] = []

    def pieces() -> Iterator[Tensor]:
        for branch, experts in parts.items():
            for part in experts:
                found.append(part.dtype)
                whole = part.ndim == 1 or branch == "shared"
                yield part if whole else truncated(part, kept_rank(part, experts))

    result = total(pieces())
    return result.to(found[0])


METHODS: dict[Merging, Callable[[Parts], Tensor]] = {
    "ks": summed,
    "ka": averaged,
    "kc": compressed,
}


def merge(layer: Layer, method: Merging) -> FFN:
    """One dense FFN from the experts of a layer, which stay as they are."""
    parts = [{b: [e[i] for e in experts] for b, experts in layer.items()} for i in range(4)]
    return FFN(*(METHODS[method](part) for part in parts))


def concatenated(layer: Layer) -> FFN:
    """All experts side by side in the hidden width: exact for one expert per branch with gate 1.

    Returns:
        An FFN of hidden width N·F whose output is the sum of the N experts' outputs.
    """
    everyone = [expert for experts in layer.values() for expert in experts]
    fc1, b1, fc2, b2 = zip(*everyone, strict=True)
    return FFN(torch.cat(fc1), torch.cat(b1), torch.cat(fc2, dim=1), total(b2))


def kept_rank(matrix: Tensor, experts: Collection[Tensor]) -> int:
    """K of KC for one matrix of a branch."""
    return max(1, min(matrix.shape) // len(experts))


def total(parts: Iterable[Tensor], divisor: int = 1) -> Tensor:
    """Sum (over `divisor`) in the order given; two tensors are alive at a time.

    Raises:
        ValueError: if there is nothing to sum.
    """
    stream = iter(parts)
    first = next(stream, None)
    if first is None:
        raise ValueError("a layer without experts cannot be merged")
    result = first.to(accumulator(first.dtype), copy=True)
    for part in stream:
        result += part
    return (result / divisor if divisor > 1 else result).to(first.dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The precision sums are carried in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
