"""Height of every pixel by adaptive bins (Bhat et al. 2021; BinsFormer, Li et al. 2022)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Features, Prediction
from model.config import TaskConfig
from model.decoders import PixelHead, UPerNet
from model.metrics import RegressionErrors
from model.tasks.head import Head, seen, with_detail

BINS = 32
"""Bins the range of heights is cut into, anew for every window."""
CHAMFER_WEIGHT = 0.1
"""Weight of the bin-centre term (Bhat et al. 2021)."""
CHAMFER_PIXELS = 2048
"""Pixels per window that the bin centres are compared with."""


@dataclass
class DepthOutput:
    """Heights and the bins they were read from."""

    values: Tensor
    """(B, 1, H, W) in the task's unit."""
    centres: Tensor
    """(B, BINS) in the task's unit, ascending."""


class Depth(Head):
    """Learned queries read the scene and say where its heights lie; pixels choose among them."""

    score = "rmse"
    detailed = True
    lower_is_better = True

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        width, pixel = task.channels, max(8, task.channels // 4)
        self.decoder = UPerNet(widths, width)
        self.describe = PixelHead(width, pixel, detail=task.detail)
        self.queries = nn.Parameter(torch.randn(BINS, width) * 0.02)
        self.memory = nn.ModuleList(nn.Conv2d(w, width, 1) for w in widths[1:])
        self.read = nn.TransformerDecoderLayer(
            width, 8, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.widen = nn.Linear(width, 1)
        self.name = nn.Linear(width, pixel)

    def forward(self, features: Features, size: tuple[int, int]) -> DepthOutput:
        """Heights as the mean of the bin centres under each pixel's probabilities."""
        stages, detail = with_detail(features, self.task)
        pixels = self.describe(self.decoder(stages), size, detail)  # (B, c, H, W)
        queries = self.read(self.queries.expand(len(pixels), -1, -1), self.remember(stages))
        centres = self.centres(queries)
        likeness = torch.einsum("bnc,bchw->bnhw", self.name(queries), pixels).float()
        values = torch.einsum("bnhw,bn->bhw", likeness.softmax(1), centres)
        return DepthOutput(values[:, None], centres)

    def remember(self, features: Features) -> Tensor:
        """The three coarse stages as one list of tokens (B, n, C)."""
        maps = [conv(x) for conv, x in zip(self.memory, features[1:], strict=True)]
        return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)

    def centres(self, queries: Tensor) -> Tensor:
        """Bin centres (B, BINS) that fill the range of the training heights."""
        low, high = self.task.value_range
        widths = self.widen(queries).float().squeeze(-1).softmax(-1) * (high - low)
        centres: Tensor = low + widths.cumsum(-1) - widths / 2
        return centres

    def loss(self, output: DepthOutput, batch: Batch) -> Tensor:
        """Smooth L1 over known pixels plus the bin-centre term, both relative to the range."""
        truth = known_values(batch)
        low, high = self.task.value_range
        scale = max(high - low, 1e-6)
        known = torch.isfinite(truth)
        error = F.smooth_l1_loss(
            output.values[known] / scale, truth[known] / scale, beta=0.05, reduction="sum"
        )
        bins = chamfer(output.centres / scale, truth.flatten(1) / scale)
        return error / known.sum().clamp(min=1) + CHAMFER_WEIGHT * bins

    def predict(self, output: DepthOutput) -> Prediction:
        """Heights (B, 1, H, W) in the task's unit."""
        return Prediction(dense=output.values)

    def metric(self) -> "DepthErrors":
        """Errors in the task's unit."""
        return DepthErrors()


def known_values(batch: Batch) -> Tensor:
    """Targets (B, 1, H, W), nan where there is no label or no valid image pixel."""
    values: Tensor = batch.targets["values"]
    return values.masked_fill(~seen(batch)[:, None], float("nan"))


def chamfer(centres: Tensor, values: Tensor) -> Tensor:
    """Mean squared distance from centres to their nearest value and back (Bhat et al. 2021, Eq. 5).

    Args:
        centres: (B, N).
        values: (B, P); nan is unknown.
    """
    total = centres.sum() * 0
    for c, v in zip(centres, values, strict=True):
        known = v[torch.isfinite(v)]
        if not len(known):
            continue
        step = max(1, len(known) // CHAMFER_PIXELS)
        squared = (c[:, None] - known[None, ::step]) ** 2
        total = total + squared.min(0).values.mean() + squared.min(1).values.mean()
    return total / len(centres)


class DepthErrors:
    """Errors of height maps."""

    def __init__(self) -> None:
        self.errors = RegressionErrors()

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Count every known pixel."""
        assert prediction.dense is not None
        self.errors.update(prediction.dense, known_values(batch))

    def compute(self) -> dict[str, Any]:
        """As `RegressionErrors.compute`."""
        return self.errors.compute()
