"""First weights of a network, drawn part by part: no process needs room for all of them.

A part is a block, or everything outside the blocks; each has random numbers of its own, so that the
same seed starts the same network in one process and in many.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.config import ModelConfig, PretrainConfig
from model.encoder import Block, initialise
from model.pretrain import MaskedImageModel

Source = Callable[[str], Mapping[str, Tensor]]
"""Name of a part ("" is everything outside the blocks) -> its tensors, by their names inside it."""


def blocks_of(network: nn.Module) -> Iterator[tuple[str, Block]]:
    """The blocks of a network and their names."""
    return ((n, m) for n, m in network.named_modules() if isinstance(m, Block))


def drawn(config: ModelConfig, objective: PretrainConfig, seed: int) -> Source:
    """Random first weights.

    Args:
        config: sizes of the encoder.
        objective: of pre-training; decides on the decoders.
        seed: of all random numbers.
    """

    def draw(part: str) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(zlib.crc32(part.encode()) ^ seed)
            module = module_of(part, config, objective)
            return (module.apply(initialise) if part else module).state_dict()

    return draw


def module_of(part: str, config: ModelConfig, objective: PretrainConfig) -> nn.Module:
    """A block, or a network without its blocks."""
    if part:
        stage, block = (int(word) for word in part.split(".") if word.isdigit())
        return Block(config, stage, block)
    empty = replace(config, depths=(0,) * len(config.depths), kept={})
    return MaskedImageModel(empty, objective)


def fill(network: MaskedImageModel, source: Source) -> None:
    """Give a network built on the meta device its weights."""
    for name, block in blocks_of(network):
        fill_part(block, source(name))
    fill_part(network, source(""))


def fill_part(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module, or what of it is outside the blocks, its weights.

    Raises:
        ValueError: for a tensor that the module does not have.
    """
    surplus = module.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    if surplus:
        raise ValueError(f"the network has no {surplus[0]}")
