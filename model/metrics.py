"""Scores of predictions against labels, gathered over batches; nothing is averaged per batch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = 255
"""Class index of pixels without a label: no loss, no score."""


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs and the scores that follow from them."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # (truth, prediction)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Count class indices of equal shape; truth 255 is left out.

        Raises:
            ValueError: if a label is outside the class list.
        """
        known = truth != IGNORE
        t, p = truth[known].long(), predicted[known].long()
        classes = len(self.counts)
        if t.numel() and (int(t.max()) >= classes or int(t.min()) < 0):
            wrong = sorted(set(t[(t >= classes) | (t < 0)].tolist()))[:5]
            raise ValueError(f"label value(s) {wrong} are outside the {classes} classes")
        cells = torch.bincount(t * classes + p, minlength=classes * classes)
        self.counts += cells.view(classes, classes).cpu()

    def compute(self) -> dict[str, Any]:
        """Scores in [0, 1] (kappa in [-1, 1]); per class in class order, nan where undefined.

        Means over classes leave out classes that are neither in the truth nor predicted.
        """
        n = self.counts.double()
        hit, truth, predicted = n.diag(), n.sum(1), n.sum(0)
        total = n.sum()
        iou = hit / (truth + predicted - hit)
        f1 = 2 * hit / (truth + predicted)
        chance = (truth * predicted).sum() / total**2
        accuracy = hit.sum() / total
        return {
            "miou": mean_known(iou),
            "accuracy": float(accuracy),
            "balanced_accuracy": mean_known(hit / truth),
            "f1": mean_known(f1),
            "kappa": float((accuracy - chance) / (1 - chance)),
            "pixels": int(total),
            "iou_per_class": iou.tolist(),
            "f1_per_class": f1.tolist(),
            "precision_per_class": (hit / predicted).tolist(),
            "recall_per_class": (hit / truth).tolist(),
            "support_per_class": self.counts.sum(1).tolist(),
        }


def mean_known(values: Tensor) -> float:
    """Mean of the numbers that are not nan; nan if there is none."""
    return float(values.nanmean())


class Calibration:
    """Expected calibration error over equal-width bins of confidence (Guo et al. 2017)."""

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # count, confidence, correct

    def update(self, probabilities: Tensor, truth: Tensor) -> None:
        """Count (B, K, ...) class probabilities against (B, ...) labels; 255 is left out."""
        confidence, predicted = probabilities.max(1)
        known = truth != IGNORE
        confidence, right = confidence[known].double(), (predicted == truth)[known].double()
        # Bins are (lower, upper], so that confidence 1 falls into the last.
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        rows = torch.stack([torch.ones_like(confidence), confidence, right])
        self.sums.index_add_(1, index.cpu(), rows.cpu())

    def compute(self) -> float:
        """ECE in [0, 1]: mean of |accuracy - confidence| over bins, weighted by count."""
        count, confidence, right = self.sums
        return float((confidence - right).abs().sum() / count.sum())


class RegressionErrors:
    """Errors of heights or depths in their unit; nan in the truth is left out."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(
            (
                "n",
                "error",
                "absolute",
                "squared",
                "truth",
                "truth2",
                "relative",
                "positive",
                "delta1",
            ),
            0.0,
        )

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Count values of equal shape."""
        known = torch.isfinite(truth)
        p, t = predicted[known].double(), truth[known].double()
        positive = t > 0
        ratio = torch.maximum(p[positive] / t[positive], t[positive] / p[positive].clamp(min=1e-9))
        gathered: dict[str, Tensor | int] = {
            "n": p.numel(), "error": (p - t).sum(), "absolute": (p - t).abs().sum(),
            "squared": ((p - t) ** 2).sum(), "truth": t.sum(), "truth2": (t**2).sum(),
            "relative": ((p - t).abs() / t)[positive].sum(), "positive": positive.sum(),
            "delta1": (ratio < 1.25).sum(),
        }  # fmt: skip
        for name, value in gathered.items():
            self.sums[name] += float(value)

    def compute(self) -> dict[str, Any]:
        """rmse, mae and bias in the unit; r2; abs_rel and delta1 over positive truth only."""
        s = self.sums
        n, positive = max(s["n"], 1), max(s["positive"], 1)
        spread = s["truth2"] - s["truth"] ** 2 / n
        return {
            "rmse": (s["squared"] / n) ** 0.5,
            "mae": s["absolute"] / n,
            "bias": s["error"] / n,
            "r2": 1 - s["squared"] / spread if spread > 0 else float("nan"),
            "abs_rel": s["relative"] / positive,
            "delta1": s["delta1"] / positive,
            "pixels": int(s["n"]),
        }


@dataclass(frozen=True)
class AreaEstimate:
    """Area of one class, corrected for the map's errors."""

    mapped: float
    """Area of the class on the map."""
    estimated: float
    """Stratified estimate of its true area (Olofsson et al. 2014, Eq. 9), same unit."""
    margin: float
    """Half width of the 95 % confidence interval (1.96 standard errors, Eq. 10-11)."""


def area_estimates(counts: NDArray[np.int64], mapped: NDArray[np.float64]) -> list[AreaEstimate]:
    """Error-adjusted area of every class (Olofsson et al. 2014, Eq. 8-11).

    Args:
        counts: (K, K) reference samples, (truth, prediction) as in `ConfusionMatrix.counts`; the
            interval takes them as independent, so neighbouring pixels make it too narrow.
        mapped: (K,) area of each class on the whole map, in any unit.
    """
    by_map = counts.T.astype(float)  # rows: map class i (the strata), columns: truth j
    drawn = by_map.sum(1)
    share = np.divide(by_map, drawn[:, None], out=np.zeros_like(by_map), where=drawn[:, None] > 0)
    total = mapped.sum()
    weight = mapped / total
    proportion = (weight[:, None] * share).sum(0)
    spread = share * (1 - share) / np.maximum(drawn - 1, 1)[:, None]
    error = np.sqrt((weight[:, None] ** 2 * spread).sum(0))
    return [
        AreaEstimate(float(m), float(p * total), float(1.96 * e * total))
        for m, p, e in zip(mapped, proportion, error, strict=True)
    ]
