"""Object detection without anchors, horizontal or rotated (FCOS, Tian et al. 2019).

Every location of a feature pyramid says for each class how sure it is and, for the object it
belongs to, where the centre is, how large the box and how it is turned. The confidence learns the
overlap its own box reaches (quality focal loss, Li et al. 2020), so that suppression keeps the
better box. Rotated boxes learn through the exact intersection of the polygons; the angle is read
from (cos 2θ, sin 2θ), which has no jump.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Batch, Features, Prediction
from model.boxes import Boxes, flat_pair_iou, pair_iou, suppress
from model.config import TaskConfig
from model.decoders import FPN, conv_block
from model.detection_metrics import AveragePrecision
from model.tasks.head import Head, Metric

STRIDE = 4
"""Pixels per location of the finest level; each further level has twice as many."""
LEVELS = 4
REACH = 8
"""A level takes objects whose longer side is at most so many of its strides."""
CENTRE = 1.5
"""Locations within so many strides of the centre, and inside the box, belong to the object."""
BASE = 4.0
"""Sides of a box before anything is learned, in strides."""
PRIOR = 0.01
"""Confidence before anything is learned (Lin et al. 2017)."""
CANDIDATES = 1000
"""Boxes per image that go into suppression."""
LEAST_SCORE = 0.05
"""Confidence below which a box is not worth a word."""
SUPPRESS = {False: 0.5, True: 0.2}
"""Overlap at which the weaker box goes, by rotated or not: polygons overlap less than envelopes."""


@dataclass
class Raw:
    """What every location says; L locations of all levels, fine to coarse."""

    scores: Tensor
    """(B, L, K) logits."""
    boxes: Tensor
    """(B, L, 5) centre, size, angle in pixels of the image."""
    places: Tensor
    """(L, 2) x, y of the locations."""
    strides: Tensor
    """(L,) pixels per location of its level."""
    size: tuple[int, int]
    """(H, W) of the image."""


class Detection(Head):
    """A feature pyramid and one small head shared by its levels."""

    score = "map50"

    def __init__(self, task: TaskConfig, widths: tuple[int, ...]) -> None:
        super().__init__(task, widths)
        channels = task.channels
        self.pyramid = FPN(self.widths(widths), channels)
        self.classify = tower(channels, len(task.classes))
        self.locate = tower(channels, 6 if task.rotated else 4)
        self.scale = nn.Parameter(torch.zeros(LEVELS))
        last = self.classify[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.constant_(last.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]

    def widths(self, stages: tuple[int, ...]) -> tuple[int, ...]:
        """Channels of the maps that enter the pyramid."""
        return stages

    def forward(self, features: Features, size: tuple[int, int]) -> Raw:
        """Confidence and box of every location."""
        scores, boxes, places, strides = [], [], [], []
        for level, x in enumerate(self.pyramid(features)):
            stride = STRIDE * 2**level
            at = locations(x.shape[-2], x.shape[-1], stride).to(x.device)
            raw = self.locate(x).flatten(2).transpose(1, 2).float()  # (B, l, 4 or 6)
            scores.append(self.classify(x).flatten(2).transpose(1, 2).float())
            boxes.append(decode(raw, at, stride * self.scale[level].exp()))
            places.append(at)
            strides.append(torch.full((len(at),), float(stride), device=x.device))
        return Raw(
            torch.cat(scores, 1), torch.cat(boxes, 1), torch.cat(places), torch.cat(strides), size
        )

    def loss(self, output: Raw, batch: Batch) -> Tensor:
        """Quality focal loss of the confidences, and 1 - overlap + centre distance of the boxes.

        Objects whose class is ignored teach nothing, neither do the locations inside them.
        """
        truths: Sequence[Boxes] = batch.targets["boxes"]
        quality = torch.zeros_like(output.scores)  # what each confidence should be
        counts = torch.ones_like(output.scores[..., 0], dtype=torch.bool)
        misses = []
        for b, truth in enumerate(truths):
            owner = assign(truth[~truth.ignored], output.places, output.strides)
            mine = owner >= 0
            wanted = truth[~truth.ignored][owner[mine]]
            overlap, miss = self.compare(output.boxes[b][mine], wanted.geometry)
            quality[b, mine, wanted.labels] = overlap.detach().clamp(min=0.05)
            counts[b] = mine | ~covered(truth[truth.ignored], output.places)
            misses.append(miss)
        missed = torch.cat(misses)
        surprise = quality_focal(output.scores, quality)[counts].sum()
        return (surprise + missed.sum()) / max(len(missed), 1)

    def compare(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Overlap (P,) of predicted and wanted boxes, and what the regression pays (P,)."""
        overlap = (pair_iou if self.task.rotated else flat_pair_iou)(found, wanted)
        return overlap, 1 - overlap + centre_penalty(found, wanted)

    def predict(self, output: Raw) -> Prediction:
        """One `Boxes` per image, best first, overlaps suppressed."""
        scores = output.scores.sigmoid()
        return Prediction(
            boxes=[
                self.select(s, b, output.size) for s, b in zip(scores, output.boxes, strict=True)
            ]
        )

    def select(self, scores: Tensor, boxes: Tensor, size: tuple[int, int]) -> Boxes:
        """The boxes of one image worth keeping, from (L, K) confidences and (L, 5) boxes."""
        best, flat = scores.flatten().topk(min(CANDIDATES, scores.numel()))
        flat = flat[best >= LEAST_SCORE]
        place, label = flat // scores.shape[1], flat % scores.shape[1]
        found = Boxes(boxes[place], labels=label, scores=scores[place, label])
        return suppress(found.inside(*size, visible=0.1), SUPPRESS[self.task.rotated])

    def metric(self) -> Metric:
        """COCO average precision."""
        return AveragePrecision(len(self.task.classes))


def tower(channels: int, outputs: int) -> nn.Sequential:
    """Two convolutions and an answer per location; the answer starts near zero."""
    answer = nn.Conv2d(channels, outputs, 3, padding=1)
    nn.init.normal_(answer.weight, std=0.01)
    nn.init.zeros_(answer.bias)  # type: ignore[arg-type]
    return nn.Sequential(
        conv_block(channels, channels, 3), conv_block(channels, channels, 3), answer
    )


def locations(height: int, width: int, stride: int) -> Tensor:
    """(h·w, 2) x, y of the cells' centres in pixels."""
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([cols, rows], -1).flatten(0, 1) + 0.5) * stride


def decode(raw: Tensor, places: Tensor, stride: Tensor) -> Tensor:
    """(B, l, 4 or 6) answers -> (B, l, 5) boxes: offset and log side in strides, cos and sin 2θ."""
    centre = places + raw[..., :2] * stride
    side = BASE * stride * raw[..., 2:4].clamp(-6, 6).exp()
    if raw.shape[-1] == 4:
        angle = torch.zeros_like(centre[..., :1])
    else:
        angle = torch.atan2(raw[..., 5:], 1 + raw[..., 4:5]) / 2
    return torch.cat([centre, side, angle], -1)


def assign(truth: Boxes, places: Tensor, strides: Tensor) -> Tensor:
    """(L,) index of the object each location belongs to, -1 for background.

    An object belongs to one level, by its longer side; there, to the locations near its centre
    and inside it, and in any case to the one nearest to its centre. The smaller object wins.
    """
    owner = torch.full((len(places),), -1, dtype=torch.int64, device=places.device)
    if not len(truth):
        return owner
    w, h, a = truth.geometry[:, 2:].unbind(1)
    offset = places[None] - truth.geometry[:, None, :2]  # (N, L, 2)
    c, s = a.cos()[:, None], a.sin()[:, None]
    u = (c * offset[..., 0] + s * offset[..., 1]).abs()
    v = (c * offset[..., 1] - s * offset[..., 0]).abs()
    near = CENTRE * strides[None]
    level = level_of(torch.maximum(w, h))[:, None] == torch.log2(strides / STRIDE)[None]
    inside = (u <= torch.minimum(near, w[:, None] / 2)) & (v <= torch.minimum(near, h[:, None] / 2))
    distance = offset.square().sum(-1).masked_fill(~level, math.inf)
    closest = F.one_hot(distance.argmin(1), len(places)).bool()
    belongs = (inside & level) | closest
    # The nearest location counts more than the size, the smaller area more than the larger.
    cost = truth.area.double()[:, None].masked_fill(~belongs, math.inf) - 1e12 * closest
    best, index = cost.min(0)
    return torch.where(best < math.inf, index, owner)


def level_of(side: Tensor) -> Tensor:
    """Level whose `REACH` holds a side in pixels."""
    return torch.log2(side / (STRIDE * REACH)).ceil().clamp(0, LEVELS - 1)


def covered(boxes: Boxes, places: Tensor) -> Tensor:
    """(L,) whether a location lies in the envelope of any of the boxes."""
    corners = boxes.corners()[:, None]
    inside = (places[None] >= corners[..., :2]) & (places[None] <= corners[..., 2:])
    return inside.all(-1).any(0)


def quality_focal(logits: Tensor, quality: Tensor) -> Tensor:
    """Cross-entropy with soft labels, weighted by the squared error (Li et al. 2020, Eq. 3)."""
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    loss: Tensor = (quality - logits.sigmoid()).square() * entropy
    return loss


def centre_penalty(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of the centres over that of the common envelope's diagonal (DIoU)."""
    half_found = found[:, 2:4].norm(dim=1) / 2
    half_wanted = wanted[:, 2:4].norm(dim=1) / 2
    distance = (found[:, :2] - wanted[:, :2]).square().sum(1)
    reach = distance.sqrt().detach() + half_found.detach() + half_wanted
    share: Tensor = distance / reach.square().clamp(min=1e-9)
    return share
