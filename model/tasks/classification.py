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
SMALL = 1e-6
"""Added to variances: the root of a map of one token has no gradient otherwise."""


class Classification(Head):
    """A linear layer on means and deviations of all four stages, and of the pixels' own path.

    All stages, not the last alone: textures that tell crops or ships apart live in the early ones.
    """

    score = "accuracy"
    detailed = True

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        width = 2 * (sum(widths) + task.detail)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, len(task.classes))

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
            embeddings: (N, 2·ΣC) of `pooled`.
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
    """Means, then deviations, over space of all maps, (B, 2·ΣC): an embedding of the window."""
    means = torch.cat([stage.mean((2, 3)) for stage in features], 1)
    spreads = torch.cat([stage.var((2, 3), correction=0) for stage in features], 1)
    return torch.cat([means, (spreads + SMALL).sqrt()], 1)


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
