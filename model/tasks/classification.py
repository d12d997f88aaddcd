"""Scene classification: one class for a whole window (RingMoE §4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Features, Prediction
from model.config import TaskConfig
from model.metrics import IGNORE, Calibration, ConfusionMatrix
from model.tasks.head import Head

RIDGE = 1e-3
"""Weight of the squares of the probe's weights."""


class Classification(Head):
    """A linear layer on the averages of all four stages.

    All stages, not the last alone: textures that tell crops or ships apart live in the early ones.
    """

    score = "accuracy"

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        self.norm = nn.LayerNorm(sum(widths))
        self.classify = nn.Linear(sum(widths), len(task.classes))

    def forward(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor = self.classify(self.norm(pooled(features)))
        return logits

    @torch.enable_grad()
    def start_from(self, embeddings: Tensor, classes: Tensor) -> None:
        """Set the head to a linear probe of the encoder as it is (Kumar et al. 2022).

        A head of random weights sends noise into a pre-trained encoder for its first hundred
        updates; a regression needs none.

        Args:
            embeddings: (N, ΣC) of `pooled`.
            classes: (N,) their classes, all known.
        """
        plain = F.layer_norm(embeddings.float(), embeddings.shape[1:], eps=self.norm.eps)
        spread = plain.std(0, correction=0).clamp(min=1e-4)
        with torch.no_grad():
            self.norm.weight.copy_(1 / spread)
            self.norm.bias.copy_(-plain.mean(0) / spread)
            self.classify.weight.zero_()
            self.classify.bias.zero_()
        standard = (plain - plain.mean(0)) / spread
        weights = [self.classify.weight, self.classify.bias]
        newton = torch.optim.LBFGS(weights, max_iter=100, line_search_fn="strong_wolfe")

        def surprise() -> Tensor:
            newton.zero_grad()
            loss = F.cross_entropy(self.classify(standard), classes)
            loss = loss + RIDGE * self.classify.weight.square().sum()
            loss.backward()
            return loss

        newton.step(surprise)
        newton.zero_grad()

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the samples that have a label."""
        truth = batch.targets["classes"]
        total = F.cross_entropy(output.float(), truth, ignore_index=IGNORE, reduction="sum")
        known: Tensor = (truth != IGNORE).sum().clamp(min=1)
        return total / known

    def predict(self, output: Tensor) -> Prediction:
        """Class probabilities (B, K)."""
        return Prediction(scores=output.float().softmax(1))

    def metric(self) -> "WindowScores":
        """Confusion matrix over windows."""
        return WindowScores(len(self.task.classes))


def pooled(features: Features) -> Tensor:
    """Averages over space of all stages, (B, ΣC): an embedding of the window."""
    return torch.cat([stage.mean((2, 3)) for stage in features], 1)


class WindowScores:
    """Scores of one class per window."""

    def __init__(self, classes: int) -> None:
        self.confusion = ConfusionMatrix(classes)
        self.calibration = Calibration()

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Count the most probable class of every labelled sample."""
        assert prediction.scores is not None
        self.confusion.update(prediction.scores.argmax(1), batch.targets["classes"])
        self.calibration.update(prediction.scores, batch.targets["classes"])

    def compute(self) -> dict[str, Any]:
        """As `ConfusionMatrix.compute`, and `ece`."""
        return {**self.confusion.compute(), "ece": self.calibration.compute()}
