"""Scores of multi-object tracking: CLEAR MOT, identity and HOTA.

Definitions of Bernardin & Stiefelhagen 2008 (MOTA), Ristani et al. 2016 (IDF1) and Luiten et al.
2021 (HOTA). An object may only be matched by a track of its class; counts are summed over clips
and classes. Likeness is intersection over union, or for point labels 1 - distance/(2·reach).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.boxes import Boxes, iou_matrix

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ALPHAS = np.arange(0.05, 0.99, 0.05)
"""Localisation thresholds HOTA is averaged over."""
LIKE = 0.5
"""Likeness from which MOTA and IDF1 call a pair a match."""
TINY = float(np.finfo(float).eps)


@dataclass
class Frame:
    """One frame of a clip: who is there, who was found, how alike they are."""

    objects: Indices
    """(G,) numbers 0 … of the labelled objects."""
    tracks: Indices
    """(D,) numbers 0 … of the predicted tracks."""
    likeness: Floats
    """(G, D) in [0, 1]."""


class TrackingScores:
    """Tracking scores gathered over clips."""

    def __init__(self, reach: float | None = None) -> None:
        """Nothing seen yet.

        Args:
            reach: None compares boxes; a number says that labels are points, matched by centres
                at most so many pixels apart.
        """
        self.reach = reach
        self.clear = np.zeros(8)  # objects, found, hits, switches, likeness, mostly, lost, tracks
        self.identity = np.zeros(3)  # IDTP, objects, found
        self.hota = np.zeros((4, len(ALPHAS)))  # hits, objects or found, association, likeness

    def add(self, found: Sequence[Boxes], truth: Sequence[Boxes]) -> None:
        """Count one clip: per frame the tracked boxes and the labelled ones."""
        frames = compact([self.compare(f, t) for f, t in zip(found, truth, strict=True)])
        self.clear += clear_mot(frames)
        self.identity += identities(frames)
        self.hota += higher_order(frames)

    def compare(self, found: Boxes, truth: Boxes) -> Frame:
        """One frame; what lies on an ignored object is taken out."""
        found, truth = found.to("cpu"), truth.to("cpu")
        like = self.likeness(truth, found)
        crowd = truth.ignored.numpy()
        void = np.zeros(len(found), bool)
        if crowd.any() and len(found):
            real = like[~crowd].max(0, initial=0)
            void = (like[crowd].max(0) >= LIKE) & (real < LIKE)
        return Frame(
            truth.tracks.numpy()[~crowd], found.tracks.numpy()[~void], like[~crowd][:, ~void]
        )

    def likeness(self, truth: Boxes, found: Boxes) -> Floats:
        """(G, D) likeness; 0 between classes."""
        if self.reach is None:
            like = iou_matrix(truth, found).double().numpy()
        else:
            distance = torch.cdist(truth.geometry[:, :2], found.geometry[:, :2]).double().numpy()
            like = np.maximum(0, 1 - distance / (2 * self.reach))
        return np.asarray(like * (truth.labels[:, None] == found.labels[None]).numpy())

    def compute(self) -> dict[str, Any]:
        """`hota`, `deta`, `assa`, `loca`, `mota`, `motp`, `idf1`, and the counts behind them."""
        objects, found, hits, switches, like, mostly, lost, tracks = self.clear
        n, total, association, place = self.hota
        deta = n / np.maximum(1, total - n)
        assa = association / np.maximum(1, n)
        true, everyone, guessed = self.identity
        return {
            "hota": float(np.sqrt(deta * assa).mean()),
            "deta": float(deta.mean()),
            "assa": float(assa.mean()),
            "mota": float((hits - (found - hits) - switches) / max(1, objects)),
            "loca": float((place / np.maximum(1, n)).mean()),
            "motp": float(like / max(1, hits)),
            "idf1": float(2 * true / max(1, everyone + guessed)),
            "precision": float(hits / max(1, found)),
            "recall": float(hits / max(1, objects)),
            "switches": int(switches),
            "mostly_tracked": int(mostly),
            "mostly_lost": int(lost),
            "objects": int(tracks),
            "labels": int(objects),
            "boxes": int(found),
        }


def compact(frames: list[Frame]) -> list[Frame]:
    """The same frames with objects and tracks numbered 0, 1 … without gaps."""
    objects = np.unique(np.concatenate([f.objects for f in frames]))
    tracks = np.unique(np.concatenate([f.tracks for f in frames]))
    return [
        Frame(np.searchsorted(objects, f.objects), np.searchsorted(tracks, f.tracks), f.likeness)
        for f in frames
    ]


def sizes(frames: list[Frame]) -> tuple[Indices, Indices]:
    """Frames in which each object, and each track, is seen."""
    return (
        np.bincount(np.concatenate([f.objects for f in frames])),
        np.bincount(np.concatenate([f.tracks for f in frames])),
    )


def best_pairs(score: Floats) -> tuple[Indices, Indices]:
    """The one-to-one pairs (rows, columns) of largest total score."""
    from scipy.optimize import linear_sum_assignment  # a quarter second of import

    row, col = linear_sum_assignment(score, maximize=True)
    return row, col


def clear_mot(frames: list[Frame]) -> Floats:
    """Objects, found, hits, switches, likeness of hits, mostly tracked, mostly lost, tracks."""
    present, _ = sizes(frames)
    last = np.full(len(present), -1)  # track that last matched the object
    before = last.copy()  # and only if that was in the previous frame
    hit_of = np.zeros(len(present))
    hits = switches = like = 0.0
    for f in frames:
        if not f.likeness.size:
            continue
        stays = before[f.objects][:, None] == f.tracks[None]
        score = np.where(f.likeness >= LIKE - TINY, 1000 * stays + f.likeness, 0)
        row, col = best_pairs(score)
        row, col = row[score[row, col] > TINY], col[score[row, col] > TINY]
        who, by = f.objects[row], f.tracks[col]
        switches += int(((last[who] >= 0) & (last[who] != by)).sum())
        before[:] = -1
        before[who] = last[who] = by
        hit_of[who] += 1
        hits += len(row)
        like += float(f.likeness[row, col].sum())
    share = hit_of / np.maximum(present, 1)
    objects, found = sum(len(f.objects) for f in frames), sum(len(f.tracks) for f in frames)
    mostly, lost = (share > 0.8).sum(), (share < 0.2).sum()
    return np.array([objects, found, hits, switches, like, mostly, lost, len(present)], float)


def identities(frames: list[Frame]) -> Floats:
    """Boxes right under the best one-to-one map of objects to tracks; objects; found."""
    present, seen = sizes(frames)
    together = np.zeros((len(present), len(seen)))
    for f in frames:
        row, col = np.nonzero(f.likeness >= LIKE)
        together[f.objects[row], f.tracks[col]] += 1
    row, col = best_pairs(together)
    return np.array([together[row, col].sum(), present.sum(), seen.sum()], float)


def higher_order(frames: list[Frame]) -> Floats:
    """Per threshold: hits, objects plus found, sum of association scores, likeness of hits."""
    present, seen = sizes(frames)
    alike = np.zeros((len(present), len(seen)))
    for f in frames:
        total = f.likeness.sum(0)[None] + f.likeness.sum(1)[:, None] - f.likeness
        share = np.divide(f.likeness, total, out=np.zeros_like(total), where=total > TINY)
        alike[np.ix_(f.objects, f.tracks)] += share
    prior = alike / np.maximum(TINY, present[:, None] + seen[None] - alike)
    matched = np.zeros((len(ALPHAS), *alike.shape))
    like = np.zeros(len(ALPHAS))
    for f in frames:
        row, col = best_pairs(prior[np.ix_(f.objects, f.tracks)] * f.likeness)
        value = f.likeness[row, col]
        for a, alpha in enumerate(ALPHAS):
            good = value >= alpha - TINY
            matched[a, f.objects[row[good]], f.tracks[col[good]]] += 1
            like[a] += value[good].sum()
    either = np.maximum(1, present[:, None] + seen[None] - matched)
    hits = matched.sum((1, 2))
    everything = np.full(len(ALPHAS), float(present.sum() + seen.sum()))
    return np.stack([hits, everything, (matched * matched / either).sum((1, 2)), like])
