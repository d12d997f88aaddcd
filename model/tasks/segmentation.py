"""Semantic segmentation: a class for every pixel, by UPerNet (RingMoE §4)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from model.batch import Batch, Features, Prediction
from model.config import TaskConfig
from model.decoders import PixelHead, UPerNet
from model.metrics import IGNORE, Calibration, ConfusionMatrix
from model.tasks.head import Head, pixel_classes, with_detail


class Segmentation(Head):
    """UPerNet with a sub-pixel classifier; cross-entropy over labelled, valid pixels."""

    score = "miou"
    dense = True

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        self.decoder = UPerNet(widths, task.channels)
        self.classify = PixelHead(task.channels, len(task.classes), detail=task.detail)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W)."""
        stages, detail = with_detail(features)
        logits: Tensor = self.classify(self.decoder(stages), size, detail)
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the pixels whose label is not 255 and whose image is valid."""
        return pixel_cross_entropy(output, pixel_classes(batch))

    def predict(self, output: Tensor) -> Prediction:
        """Class probabilities (B, K, H, W)."""
        return Prediction(dense=output.float().softmax(1))

    def metric(self) -> "PixelScores":
        """Confusion matrix over labelled pixels."""
        return PixelScores(len(self.task.classes))


def pixel_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over pixels that are not 255; exactly 0 (with gradients) where there is none."""
    total = F.cross_entropy(logits.float(), truth, ignore_index=IGNORE, reduction="sum")
    return total / (truth != IGNORE).sum().clamp(min=1)


class PixelScores:
    """Scores of class maps."""

    def __init__(self, classes: int) -> None:
        self.confusion = ConfusionMatrix(classes)
        self.calibration = Calibration()

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Count the most probable class of every labelled pixel."""
        assert prediction.dense is not None
        truth = pixel_classes(batch)
        self.confusion.update(prediction.dense.argmax(1), truth)
        self.calibration.update(prediction.dense, truth)

    def compute(self) -> dict[str, Any]:
        """As `ConfusionMatrix.compute`, and `ece`."""
        return {**self.confusion.compute(), "ece": self.calibration.compute()}
