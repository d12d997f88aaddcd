"""What every task head is; one file per task beside this one."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from model.batch import Batch, Features, Prediction
from model.config import TaskConfig
from model.metrics import IGNORE


class Metric(Protocol):
    """Scores gathered over batches."""

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Count one batch of predictions against its targets."""

    def compute(self) -> dict[str, Any]:
        """Name -> number, or one number per class (a list in class order)."""


class Head(nn.Module, ABC):
    """From the encoder's four stages to an answer: output, loss, prediction, metric.

    Subclasses are built as `Head(task, widths)`, widths being the stages' channels C, 2C, 4C, 8C.
    """

    dates: ClassVar[int] = 1
    """T the task needs in `Batch.images`: 1, 2 for change; 0: any number."""
    detailed: ClassVar[bool] = False
    """Whether it can use `TaskConfig.detail`: a map of the pixels themselves."""
    score: ClassVar[str]
    """Key of `metric().compute()` that says how good a model is (larger is better, unless
    `lower_is_better`)."""
    lower_is_better: ClassVar[bool] = False
    """True where the score is an error (depth)."""

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.task = task

    @abstractmethod
    def forward(self, features: Features, size: tuple[int, int]) -> Any:
        """Raw output of the head, whatever its own `loss` and `predict` understand.

        Args:
            features: four maps (B·T, C·2^s, ceil(H/4·2^s), ceil(W/4·2^s)), already fused over
                modalities; the T dates of a sample are neighbours: row b·T + t. A detailed head
                with `task.detail` gets a fifth map, (B·T, detail, H, W).
            size: (H, W) of the images in pixels.
        """

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Scalar training loss; 0 with a gradient path where the batch has no label."""

    @abstractmethod
    def predict(self, output: Any) -> Prediction:
        """The answer as a `Prediction`; called without gradients."""

    @abstractmethod
    def metric(self) -> Metric:
        """A fresh metric of this task."""


def with_detail(features: Features, task: TaskConfig) -> tuple[Features, Tensor | None]:
    """The stages, and the map at full resolution if the head of this task has one."""
    return (features[:-1], features[-1]) if task.detail else (features, None)


def seen(batch: Batch) -> Tensor:
    """Where every date of a sample has a valid pixel of some modality, (B, H, W) bool."""
    masks = [
        batch.valid[name][:, :, 0] if name in batch.valid else torch.ones_like(x[:, :, 0]).bool()
        for name, x in batch.images.items()
    ]
    return torch.stack(masks).any(0).all(1)  # (M, B, T, H, W) -> (B, H, W)


def pixel_classes(batch: Batch) -> Tensor:
    """Class targets (B, H, W) int64, IGNORE where no image pixel is valid."""
    classes: Tensor = batch.targets["classes"]
    return classes.masked_fill(~seen(batch), IGNORE)
