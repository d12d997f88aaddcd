"""Weights laid out for inference on a CPU, once instead of at every call: few tokens cost less."""

from torch import nn

from model.attention import WindowAttention
from model.experts import ExpertBank


def pack(network: nn.Module, integers: bool = False) -> None:
    """Lay out the large matrices of a network, in place; afterwards it can only infer.

    Args:
        network: an encoder, a part of one, or a network around one.
        integers: round those of the experts to 8-bit integers (`model.int8`).
    """
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.pack()
        elif isinstance(module, ExpertBank):
            module.pack(integers)
