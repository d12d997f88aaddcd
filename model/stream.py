"""Models larger than memory: one layer of weights at a time.

The blocks of a streamed encoder fetch their weights from the checkpoint when they are called, and
drop them when they have answered. Those that are rounded to integers are read once, one by one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.checkpoint import load_module, read_config
from model.encoder import Block, RingMoE
from model.packing import pack


def streamed_encoder(path: Path | str, modalities: tuple[str, ...] | None = None) -> RingMoE:
    """The encoder of a checkpoint, whose blocks come from disk whenever they are needed.

    Args:
        path: the checkpoint, which must stay in place.
        modalities: those that are wanted; None means all.
    """
    config = read_config(path).model
    with torch.device("meta"):
        net = RingMoE(config if modalities is None else config.with_modalities(modalities))
    stream_blocks(net, path, "encoder.")
    return net.eval()


def stream_blocks(module: nn.Module, path: Path | str, prefix: str = "") -> None:
    """Load a module, but for its encoder's blocks, which are fetched when they are called.

    Args:
        module: an encoder built on the meta device, or a network around one; inference only.
        path: the checkpoint.
        prefix: put before the module's own names, as in `load_module`.
    """

    def from_disk(block: Block, prefix: str) -> None:
        block.register_forward_pre_hook(fetch(path, prefix))
        block.register_forward_hook(drop)

    load_around_blocks(module, path, prefix, from_disk)


def load_in_integers(
    module: nn.Module, path: Path | str, prefix: str = "", bf16: bool = False
) -> None:
    """Load a module and round its experts to 8-bit integers, block by block.

    Args:
        module: an encoder built on the meta device, or a network around one; inference only.
        path: the checkpoint.
        prefix: put before the module's own names, as in `load_module`.
        bf16: the rest of a block becomes bfloat16.
    """

    def rounded(block: Block, prefix: str) -> None:
        load_module(path, block, prefix)
        pack(block.bfloat16() if bf16 else block, integers=True)

    load_around_blocks(module, path, prefix, rounded)


def load_around_blocks(
    module: nn.Module, path: Path | str, prefix: str, treat: Callable[[Block, str], None]
) -> None:
    """Load a module, but for its encoder's blocks, which are treated as `treat` does."""
    for name, child in module.named_children():
        if isinstance(child, Block):
            treat(child, f"{prefix}{name}.")
        else:
            load_around_blocks(child, path, f"{prefix}{name}.", treat)
    own = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        own.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        kept = name not in module._non_persistent_buffers_set
        own.register_buffer(name, buffer, persistent=kept)
    if own.state_dict():
        load_module(path, own, prefix)
        for name, parameter in own.named_parameters():
            setattr(module, name, parameter)


def fetch(path: Path | str, prefix: str) -> Any:
    """A hook that loads a block before it runs."""

    def hook(block: nn.Module, _: Any) -> None:
        load_module(path, block, prefix)

    return hook


def drop(block: nn.Module, _: Any, __: Any) -> None:
    """A hook that frees a block after it ran."""
    block.to("meta")
