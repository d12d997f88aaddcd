"""A network that trains in milliseconds, for tests of the loop around it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, PretrainConfig
from model.normalisation import Normalisation
from model.pretrain import MaskedImageModel, with_masks
from model.train import StepReport, TrainConfig, train

NORMALISATION = {"sar-l1": Normalisation(("hh_re",) * 8, (0.0,) * 8, (1.0,) * 8, (8.0, 4.0))}
TIMES = ("seconds", "data_wait", "images_per_s", "mfu")


def config(**changes: object) -> ModelConfig:
    sizes = {
        "depths": (1, 1, 1, 1), "embed_dim": 8, "image_size": 32, "window": 4, "mask_cell": 8,
        "channels": {"opt": 3, "sar-l1": 8},
    }  # fmt: skip
    return ModelConfig.preset("nano", **{**sizes, **changes})


def network(seed: int = 0) -> MaskedImageModel:
    torch.manual_seed(seed)
    return MaskedImageModel(config(), PretrainConfig(), NORMALISATION)


def waves(step: int, count: int, model: ModelConfig | None = None) -> Batch:
    """Images of oblique waves, whose hidden parts can be guessed; a function of the step."""
    random = torch.Generator().manual_seed(step)
    model = model or config()
    grid = torch.arange(model.image_size) / 32 * 2 * math.pi
    images = {}
    for name, channels in model.channels.items():
        phase = torch.rand(count, 1, channels, 1, 1, generator=random) * 2 * math.pi
        images[name] = torch.sin(grid + grid[:, None] + phase)
    return Batch(images, keys=[f"wave:{step}:{i}" for i in range(2 * count)])


def stream(train_config: TrainConfig) -> Callable[[int], Iterator[Batch]]:
    """Batches from any step on."""
    count = train_config.batch_size // 2 // train_config.accumulate

    def batches(start: int) -> Iterator[Batch]:
        def plain() -> Iterator[Batch]:
            step = start
            while True:
                yield waves(step, count)
                step += 1

        return with_masks(plain(), config(), 0.6, train_config.seed, start)

    return batches


def settings(**changes: object) -> TrainConfig:
    values = {"steps": 8, "batch_size": 4, "warmup_steps": 2, "save_every": 3, "lr": 3e-3}
    return TrainConfig(**{**values, **changes})


def run(
    folder: Path,
    train_config: TrainConfig,
    *,
    on_step: Callable[[StepReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train, or go on training, in a folder."""
    net = network(train_config.seed)

    def publish(step: int) -> None:
        about = CheckpointConfig(
            net.config, "pretraining", NORMALISATION, provenance={"step": step}
        )
        save_checkpoint(folder, about, disk_tensors(net))

    return train(
        net, stream(train_config), train_config, folder, publish=publish, on_step=on_step, stop=stop
    )
