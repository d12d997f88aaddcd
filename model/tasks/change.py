"""Change detection between two dates: a bitemporal transformer (BIT, Chen et al. 2021)."""

from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch, Features, Prediction
from model.config import TaskConfig
from model.decoders import PixelHead, UPerNet
from model.tasks.head import Head, pixel_classes, with_detail
from model.tasks.segmentation import PixelScores, pixel_loss

TOKENS = 4
"""Semantic tokens per date (Chen et al. 2021)."""


class Change(Head):
    """Both dates as a few words, the words discussed together, then compared pixel by pixel.

    Encoder, neck, tokeniser and transformer share their weights between the dates, and the answer
    is read from |difference|: swapping the dates changes nothing.
    """

    dates = 2
    score = "change_f1"
    detailed = True

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        width = task.channels
        self.neck = UPerNet(widths, width)
        self.tokenise = nn.Conv2d(width, TOKENS, 1)
        self.discuss = nn.TransformerEncoderLayer(
            width, 8, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.refine = CrossAttention(width)
        self.compare = PixelHead(width, len(task.classes), detail=task.detail)

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, H, W) from maps of 2·B dates."""
        stages, detail = with_detail(features, self.task)
        maps = self.neck(stages)  # (2B, C, h, w), rows b·2 + t
        words = self.words(maps)  # (2B, L, C)
        words = self.discuss(words.view(-1, 2 * TOKENS, words.shape[-1])).view(words.shape)
        refined = self.refine(maps, words)
        fine = None if detail is None else apart(detail)
        logits: Tensor = self.compare(apart(refined), size, fine)
        return logits

    def words(self, maps: Tensor) -> Tensor:
        """Semantic tokens (2B, L, C): averages of the map under L learned attention maps."""
        attention = self.tokenise(maps).flatten(2).softmax(-1)  # (2B, L, hw)
        words: Tensor = attention @ maps.flatten(2).transpose(1, 2)
        return words

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """`pixel_loss` of labelled pixels that are valid at both dates."""
        return pixel_loss(output, pixel_classes(batch))

    def predict(self, output: Tensor) -> Prediction:
        """Class probabilities (B, K, H, W); class 0 is "no change"."""
        return Prediction(dense=output.float().softmax(1))

    def metric(self) -> "ChangeScores":
        """F1 and IoU of the changed pixels, beside the confusion matrix."""
        return ChangeScores(len(self.task.classes))


def apart(maps: Tensor) -> Tensor:
    """How far the dates are apart: rows b·2 + t of (2B, C, h, w) -> (B, C, h, w)."""
    return (maps[1::2] - maps[0::2]).abs()


class CrossAttention(nn.Module):
    """Every pixel of a map listens to the words of its date (pre-norm, residual)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 8, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, maps: Tensor, words: Tensor) -> Tensor:
        """(B, C, h, w) maps and (B, L, C) words -> (B, C, h, w)."""
        x = maps.flatten(2).transpose(1, 2)
        x = x + self.attend(self.norm(x), words, words, need_weights=False)[0]
        x = x + self.mlp(x)
        refined: Tensor = x.transpose(1, 2).reshape(maps.shape)
        return refined


class ChangeScores(PixelScores):
    """Scores of change maps; class 0 is "no change"."""

    def compute(self) -> dict[str, Any]:
        """As `ConfusionMatrix.compute`, and F1, IoU, precision, recall of "changed or not"."""
        n = self.confusion.counts.double()
        hit, missed, invented = n[1:, 1:].sum(), n[1:, 0].sum(), n[0, 1:].sum()
        found: dict[str, Tensor] = {
            "change_f1": 2 * hit / (2 * hit + missed + invented),
            "change_iou": hit / (hit + missed + invented),
            "change_precision": hit / (hit + invented),
            "change_recall": hit / (hit + missed),
        }
        return {**{k: float(torch.nan_to_num(v)) for k, v in found.items()}, **super().compute()}
