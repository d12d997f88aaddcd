"""Checkpoints of random weights, of any size, written one tensor at a time.

They serve to measure what a machine can do with a model of that size before there is one.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import CheckpointConfig, disk_names, write_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.modality import MODALITIES
from model.normalisation import Normalisation
from model.shards import Spec
from model.tasks import TASKS

STD = 0.02
"""Of every matrix, as at the start of training."""
POOL = 1 << 24
"""Different numbers."""
PIECE = 1 << 16
"""Numbers that stay together."""


def random_checkpoint(
    directory: Path | str,
    config: ModelConfig,
    task: TaskConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Write a checkpoint of seeded random weights.

    Args:
        directory: the new checkpoint.
        config: the encoder.
        task: adds a head.
        dtype: of all weights.
        seed: the same seed gives the same bytes.
        advance: called with the bytes of every tensor made.
    """
    specs = random_specs(config, task, dtype)

    def tensors() -> Iterator[Tensor]:
        for spec in specs:
            yield random_tensor(spec, seed)
            advance(spec.nbytes)

    about = CheckpointConfig(
        config,
        kind="task" if task else "encoder",
        normalisation={m: unit_normalisation(m, c) for m, c in config.channels.items()},
        task=task,
        provenance={"random": {"seed": seed}},
    )
    write_checkpoint(directory, about, specs, tensors())


def random_specs(config: ModelConfig, task: TaskConfig | None, dtype: torch.dtype) -> list[Spec]:
    """The tensors of an encoder, and of a head, as they stand on disk."""
    with torch.device("meta"):
        modules: dict[str, torch.nn.Module] = {"encoder": RingMoE(config)}
        if task is not None:
            modules["head"] = TASKS[task.name](task, config.widths)
    return [
        Spec(f"{prefix}.{on_disk}", dtype if t.is_floating_point() else t.dtype, tuple(part.shape))
        for prefix, module in modules.items()
        for name, t in module.state_dict().items()
        for on_disk, part in disk_names(name, t)
    ]


def random_tensor(spec: Spec, seed: int) -> Tensor:
    """One tensor: matrices normal, norms and scales as at the start of training, the rest zero."""
    if spec.name.endswith("logit_scale"):
        return torch.full(spec.shape, math.log(10), dtype=spec.dtype)
    if not spec.dtype.is_floating_point or spec.name.endswith(("bias", "running_mean")):
        return torch.zeros(spec.shape, dtype=spec.dtype)
    if len(spec.shape) < 2:
        return torch.ones(spec.shape, dtype=spec.dtype)
    return shuffled(spec, zlib.crc32(spec.name.encode()) ^ seed)


def shuffled(spec: Spec, seed: int) -> Tensor:
    """Normal numbers: pieces of one pool, in an order of the tensor's own.

    Drawing every number anew would take longer than writing it to a disk.
    """
    pool, generator = normal_pool(spec.dtype), torch.Generator().manual_seed(seed)
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    for piece in tensor.view(-1).split(PIECE):
        first = int(torch.randint(len(pool) - len(piece), (), generator=generator))
        piece.copy_(pool[first : first + len(piece)])
    return tensor


@lru_cache(maxsize=1)
def normal_pool(dtype: torch.dtype) -> Tensor:
    """Seeded normal numbers to take pieces of."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(POOL, dtype=dtype).normal_(0, STD, generator=generator)


def unit_normalisation(modality: str, channels: int) -> Normalisation:
    """Reflectance or amplitude as it is: mean 0, deviation 1."""
    known = MODALITIES[modality].bands if modality in MODALITIES else ()
    bands = known if len(known) == channels else tuple(f"band_{i + 1}" for i in range(channels))
    power = (0.0, 1.0) if modality == "sar-l1" else None
    return Normalisation(bands, (0.0,) * channels, (1.0,) * channels, power)


def example_task(name: str, config: ModelConfig, modalities: tuple[str, ...]) -> TaskConfig:
    """A head of a task, for six classes named class_1 to class_6.

    Raises:
        ValueError: for an unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose from {', '.join(TASKS)}")
    classes = tuple(f"class_{i + 1}" for i in range(6))
    task = TaskConfig(name, classes, modalities=modalities, window=config.image_size)
    return replace(task, classes=()) if name == "depth" else task
