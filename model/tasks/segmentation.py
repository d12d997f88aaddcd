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
    """UPerNet with a sub-pixel classifier; cross-entropy and overlap of labelled, valid pixels."""

    score = "miou"
    detailed = True

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        self.decoder = UPerNet(widths, task.channels)
        self.classify = PixelHead(task.channels, len(task.classes), detail=task.detail)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W)."""
        stages, detail = with_detail(features, self.task)
        logits: Tensor = self.classify(self.decoder(stages), size, detail)
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """`pixel_loss` of the pixels whose label is not 255 and whose image is valid."""
        return pixel_loss(output, pixel_classes(batch))

    def predict(self, output: Tensor) -> Prediction:
        """Class probabilities (B, K, H, W)."""
        return Prediction(dense=output.float().softmax(1))

    def metric(self) -> "PixelScores":
        """Confusion matrix over labelled pixels."""
        return PixelScores(len(self.task.classes))


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy plus `missed_overlap`; exactly 0 (with gradients) without a label.

    Args:
        logits: (B, K, H, W).
        truth: (B, H, W), 255 being unknown.
    """
    known = truth != IGNORE
    surprise = F.cross_entropy(logits.float(), truth, ignore_index=IGNORE, reduction="sum")
    chances = logits.float().softmax(1).movedim(1, -1)[known]
    return surprise / known.sum().clamp(min=1) + missed_overlap(chances, truth[known])


def missed_overlap(chances: Tensor, truth: Tensor) -> Tensor:
    """1 - mean soft intersection over union of the classes present (Rahman and Wang 2016).

    Every class counts the same, however few its pixels: cross-entropy alone leaves rare ones out.

    Args:
        chances: (N, K) probabilities.
        truth: (N,) classes.
    """
    right = F.one_hot(truth, chances.shape[1]).to(chances.dtype)
    both = (chances * right).sum(0)
    union = chances.sum(0) + right.sum(0) - both
    present = right.any(0)
    missed: Tensor = (1 - both / union.clamp(min=1e-6))[present].sum() / present.sum().clamp(min=1)
    return missed


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
