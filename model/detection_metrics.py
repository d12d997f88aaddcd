"""Average precision of boxes, horizontal or rotated, by COCO's definition (Lin et al. 2014).

Precision is averaged over 101 recalls and ten overlaps (0.50, 0.55 … 0.95). A prediction takes
the free label it overlaps most, best predictions first. Ignored labels (crowd, difficult) may
absorb any number of predictions, by the share of the prediction they cover; neither counts.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.batch import Batch, Prediction
from model.boxes import Boxes, iou_matrix, pair_intersection

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {
    "": (0.0, 1e10),
    "_small": (0.0, 32.0**2),
    "_medium": (32.0**2, 96.0**2),
    "_large": (96.0**2, 1e10),
}
"""Suffix of a score -> area of the labels it looks at, in square pixels."""


@dataclass
class Tally:
    """Predictions of one class and one range of areas over all images."""

    scores: list[Floats] = field(default_factory=list)
    """Per image, (D,)."""
    hits: list[Flags] = field(default_factory=list)
    """Per image, (10, D): matched a label that counts."""
    void: list[Flags] = field(default_factory=list)
    """Per image, (10, D): neither right nor wrong."""
    labels: int = 0
    """Labels that count."""

    def precision(self) -> tuple[Floats, Floats]:
        """Precision at each overlap and recall (10, 101), and the recall reached (10,)."""
        if not self.labels:
            return np.full((10, 101), np.nan), np.full(10, np.nan)
        if not self.scores:
            return np.zeros((10, 101)), np.zeros(10)
        order = np.argsort(-np.concatenate(self.scores), kind="stable")
        hits = np.concatenate(self.hits, 1)[:, order]
        wrong = ~hits & ~np.concatenate(self.void, 1)[:, order]
        return precision_at_recalls(hits, wrong, self.labels)


def precision_at_recalls(hits: Flags, wrong: Flags, labels: int) -> tuple[Floats, Floats]:
    """Best precision at or beyond each recall (10, 101), and the last recall (10,).

    Args:
        hits: (10, D) right predictions, best score first.
        wrong: (10, D) wrong ones; what is neither does not count.
        labels: how many could be found.
    """
    right, total = hits.cumsum(1), (hits | wrong).cumsum(1)
    recall = right / labels
    precision = right / np.maximum(total, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    out = np.zeros((len(hits), len(RECALLS)))
    for t, row in enumerate(recall):
        at = np.searchsorted(row, RECALLS, side="left")
        reached = at < len(row)
        out[t, reached] = envelope[t, at[reached]]
    last = recall[:, -1] if recall.shape[1] else np.zeros(len(hits))
    return out, last


class AveragePrecision:
    """Detection scores gathered over images."""

    def __init__(self, classes: int, limit: int = 500) -> None:
        """Nothing seen yet.

        Args:
            classes: how many there are.
            limit: predictions looked at per image and class (COCO: 100; aerial images hold more).
        """
        self.limit = limit
        self.tallies = {area: [Tally() for _ in range(classes)] for area in AREAS}

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Count the predicted boxes of a batch against `batch.targets["boxes"]`."""
        assert prediction.boxes is not None
        for found, truth in zip(prediction.boxes, batch.targets["boxes"], strict=True):
            self.add(found, truth)

    def add(self, found: Boxes, truth: Boxes) -> None:
        """Count one image.

        Raises:
            ValueError: if a label is outside the class list.
        """
        found, truth = found.to("cpu"), truth.to("cpu")
        classes = len(self.tallies[""])
        if len(truth) and not 0 <= int(truth.labels.min()) <= int(truth.labels.max()) < classes:
            raise ValueError(f"box label(s) outside the {classes} classes: {truth.labels.tolist()}")
        for k in range(classes):
            mine, theirs = found[found.labels == k], truth[truth.labels == k]
            if len(mine) or len(theirs):
                best = mine.scores.argsort(descending=True, stable=True)[: self.limit]
                self.add_class(k, mine[best], theirs)

    def add_class(self, k: int, found: Boxes, truth: Boxes) -> None:
        """Count one class of one image; `found` is sorted, best first."""
        overlap = overlaps(found, truth)
        crowd, scores = truth.ignored.numpy(), found.scores.double().numpy()
        found_area, truth_area = found.area.double().numpy(), truth.area.double().numpy()
        for suffix, (low, high) in AREAS.items():
            ignored = crowd | (truth_area < low) | (truth_area > high)
            taken = match(overlap, ignored, crowd)  # (10, D), -1: nothing
            hit = taken >= 0
            void = np.zeros_like(hit)
            void[hit] = ignored[taken[hit]]
            void |= ~hit & ((found_area < low) | (found_area > high))
            tally = self.tallies[suffix][k]
            tally.scores.append(scores)
            tally.hits.append(hit & ~void)
            tally.void.append(void)
            tally.labels += int((~ignored).sum())

    def compute(self) -> dict[str, Any]:
        """Scores in [0, 1]; nan where there is no label. Per class in class order.

        `map` (mean over classes and overlaps), `map50`, `map75`, `map_small/_medium/_large`
        (below 32², below 96², above, in pixels), `recall` at the limit, and per-class lists.
        """
        curves = {
            suffix: [tally.precision() for tally in tallies]
            for suffix, tallies in self.tallies.items()
        }
        precision = np.stack([p for p, _ in curves[""]])  # (K, 10, 101)
        recall = np.stack([r for _, r in curves[""]])
        by_area = {
            f"map{suffix}": mean(np.stack([p for p, _ in curves[suffix]])) for suffix in AREAS
        }
        return {
            **by_area,
            "map50": mean(precision[:, 0]),
            "map75": mean(precision[:, 5]),
            "recall": mean(recall),
            "ap_per_class": precision.mean((1, 2)).tolist(),
            "ap50_per_class": precision[:, 0].mean(1).tolist(),
            "recall50_per_class": recall[:, 0].tolist(),
            "support_per_class": [tally.labels for tally in self.tallies[""]],
        }


def mean(values: Floats) -> float:
    """Mean of the known values; nan if there is none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def overlaps(found: Boxes, truth: Boxes) -> Floats:
    """(D, G) intersection over union; over the prediction's own area where the label is ignored."""
    overlap = iou_matrix(found, truth).double().numpy()
    crowd = truth.ignored.numpy()
    if crowd.any():
        a, b = found.geometry[:, None], truth.geometry[truth.ignored][None]
        shape = (len(found), b.shape[1], 5)
        both = pair_intersection(a.expand(shape), b.expand(shape)).double().numpy()
        overlap[:, crowd] = both / np.maximum(found.area.double().numpy()[:, None], 1e-9)
    return np.asarray(overlap)


def match(overlap: Floats, ignored: Flags, crowd: Flags) -> NDArray[np.int64]:
    """Which label each prediction takes at each overlap, (10, D) with -1 for none.

    Args:
        overlap: (D, G), predictions best first.
        ignored: (G,) labels that do not count; taken only if no other fits.
        crowd: (G,) labels that can be taken any number of times.
    """
    taken = np.full((len(OVERLAPS), len(overlap)), -1, np.int64)
    if not overlap.size:
        return taken
    for t, threshold in enumerate(OVERLAPS):
        free = np.ones(overlap.shape[1], bool)
        for d in np.flatnonzero(overlap.max(1) >= threshold - 1e-10):
            fits = (overlap[d] >= threshold - 1e-10) & free
            fits = fits & ~ignored if (fits & ~ignored).any() else fits
            if not fits.any():
                continue
            # Of equal overlaps the last label wins, as in COCO's own code.
            g = len(fits) - 1 - int(np.argmax(np.where(fits, overlap[d], -1)[::-1]))
            taken[t, d] = g
            free[g] = crowd[g]
    return taken
