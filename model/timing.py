"""What the parts of a training step cost on this device: one block of every stage, the rest, AdamW.

`model.plan` adds them up. Nothing is fitted to whole steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.encoder import Block, initialise
from model.optim import adamw
from model.pretrain import MaskedImageModel, batch_masks
from model.train import Precision, computing_in

UPDATED = (64, 512, 512)
"""Matrices on which the update is timed: their number and sizes, far more than caches hold."""


@dataclass(frozen=True)
class Line:
    """Seconds that grow with the images."""

    fixed: float
    """Reading weights, writing their gradients, starting operators."""
    per_image: float
    """Of each image."""

    @classmethod
    def through(cls, few: tuple[int, float], many: tuple[int, float]) -> "Line":
        """The line through two measurements (images, seconds), never falling."""
        slope = max((many[1] - few[1]) / (many[0] - few[0]), 0.0)
        return cls(max(many[1] - slope * many[0], 0.0), slope)

    def at(self, images: int) -> float:
        """Seconds of so many images."""
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Pace:
    """How fast a device trains a model, forward and backward."""

    stages: tuple[Line, ...]
    """One block of each stage."""
    rest: Line
    """Everything outside the blocks: embedding, merging, decoder, loss."""
    update: float
    """Clipping and AdamW, seconds per parameter."""
    together: bool = False
    """Blocks were timed on all ranks of the layout, their messages included."""


def pace(
    config: ModelConfig,
    device: str = "cpu",
    precision: Precision = "fp32",
    images: tuple[int, int] = (1, 4),
    spread: Callable[[nn.Module], None] | None = None,
    rounds: int = 3,
) -> Pace:
    """Time the parts of a pre-training step on one modality.

    Args:
        config: the model; all its blocks of a stage cost the same.
        device: where.
        precision: of the matrix products.
        images: two numbers of images, between and beyond which the time is a line.
        spread: lays blocks and the module around them out over ranks, which all call this; None:
            every rank for itself.
        rounds: repetitions, of which the median counts.
    """
    config = config.with_modalities(config.modalities[:1])

    def line(prepare: Callable[[int], Callable[[], None]], parts: int = 1) -> Line:
        few, many = ((n, seconds(prepare(n), device, rounds) / parts) for n in images)
        return Line.through(few, many)

    stages = []
    for stage, depth in enumerate(config.depths):
        step = partial(block_step, config, stage, device=device, precision=precision, spread=spread)
        stages.append(line(step, min(depth, 2)))
    rest = line(partial(rest_step, config, device=device, precision=precision))
    return Pace(tuple(stages), rest, update_seconds(device, rounds), spread is not None)


def seconds(run: Callable[[], None], device: str, rounds: int) -> float:
    """Median time of a call, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


class Blocks(nn.Module):
    """Blocks of a stage, one after another; a module around them, as the network is."""

    def __init__(self, config: ModelConfig, stage: int, number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, stage, b).apply(initialise) for b in range(number)
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, images: dict[str, int]) -> Tensor:
        """(B, H, W, C) -> a scalar to differentiate."""
        for block in self.blocks:
            x, _ = block(x, images)
        return (x * self.scale).sum()


def block_step(
    config: ModelConfig,
    stage: int,
    images: int,
    device: str,
    precision: Precision,
    spread: Callable[[nn.Module], None] | None,
) -> Callable[[], None]:
    """Forward and backward of a block, and of a shifted one if the stage has any."""
    torch.manual_seed(0)
    blocks = Blocks(config, stage, min(config.depths[stage], 2)).to(device)
    if spread is not None:
        spread(blocks)
    side = -(-config.image_size // (config.patch_size * 2**stage))
    x = torch.randn(images, side, side, config.widths[stage], device=device, requires_grad=True)
    modality = config.modalities[0]

    def run() -> None:
        with computing_in(precision, device):
            y = blocks(x, {modality: images})
        y.backward()
        blocks.zero_grad(set_to_none=True)
        x.grad = None

    return run


def rest_step(
    config: ModelConfig, images: int, device: str, precision: Precision
) -> Callable[[], None]:
    """Forward and backward of a network without blocks."""
    bare = replace(config, depths=(0,) * len(config.depths), kept={})
    net, side = MaskedImageModel(bare, PretrainConfig()).to(device), config.image_size
    modality = config.modalities[0]
    batch = Batch({modality: torch.randn(images, 1, config.channels[modality], side, side)})
    batch.targets["masks"] = batch_masks(config, 0.6, batch, 0, 0)
    batch = batch.to(device)

    def run() -> None:
        with computing_in(precision, device):
            loss = net.loss(batch).loss
        loss.backward()
        net.zero_grad(set_to_none=True)

    return run


def update_seconds(device: str, rounds: int) -> float:
    """Seconds per parameter of clipping and AdamW."""
    number, *size = UPDATED
    weights = nn.ParameterList(
        nn.Parameter(torch.randn(size, device=device)) for _ in range(number)
    )
    optimiser = adamw(weights, 1e-4, 0.05)
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    def run() -> None:
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimiser.step()

    parameters: int = sum(w.numel() for w in weights)
    return seconds(run, device, rounds) / parameters
