"""Object tracking: a detector that compares two frames, and association over the clip.

RingMoE §4 tracks with a detector and ByteTrack. A vehicle of a few pixels in satellite video is
seen by its motion more than by its shape, so each frame of a pair is detected on its features
beside their difference to the partner's; the pair may be taken in either order.
"""

from typing import Any

import torch

from model.association import track
from model.batch import Batch, Features, Prediction
from model.boxes import Boxes
from model.detection_metrics import AveragePrecision
from model.tasks.detection import Detection, Raw
from model.tracking_metrics import TrackingScores


class Tracking(Detection):
    """Detection on pairs of frames; `model.association.track` joins the boxes of a clip."""

    dates = 2
    score = "hota"

    def widths(self, stages: tuple[int, ...]) -> tuple[int, ...]:
        """Features and their difference to the partner's."""
        return tuple(2 * width for width in stages)

    def forward(self, features: Features, size: tuple[int, int]) -> Raw:
        """Confidence and box of every location of both frames, rows b·2 + t."""
        return super().forward([with_difference(x) for x in features], size)

    def metric(self) -> "ClipScores":
        """MOTA, IDF1, HOTA over whole clips, and average precision of the single frames."""
        return ClipScores(AveragePrecision(len(self.task.classes)))


def with_difference(x: torch.Tensor) -> torch.Tensor:
    """(2B, C, h, w), rows b·2 + t -> (2B, 2C, h, w): each frame and its excess over the other."""
    pairs = x.view(-1, 2, *x.shape[1:])
    return torch.cat([pairs, pairs - pairs.flip(1)], 2).flatten(0, 1)


class ClipScores:
    """Tracking scores of clips that arrive as pairs of frames.

    Keys of the batch are "clip:frame:frame"; association runs over each clip once all its frames
    are there. A frame that comes twice (the last pair of an odd clip) counts once.
    """

    def __init__(self, precision: AveragePrecision, reach: float | None = None) -> None:
        """Nothing seen yet; `precision` scores the single frames, `reach` as in TrackingScores."""
        self.precision = precision
        self.reach = reach
        self.clips: dict[str, dict[int, tuple[Boxes, Boxes]]] = {}

    def update(self, prediction: Prediction, batch: Batch) -> None:
        """Remember the boxes of a batch of pairs."""
        assert prediction.boxes is not None
        truths = batch.targets["boxes"]
        for b, key in enumerate(batch.keys):
            clip, *frames = key.rsplit(":", 2)
            for t, frame in enumerate(frames):
                pair = (prediction.boxes[2 * b + t].to("cpu"), truths[2 * b + t].to("cpu"))
                self.add(clip, int(frame), *pair)

    def add(self, clip: str, frame: int, found: Boxes, truth: Boxes) -> None:
        """Remember one frame."""
        seen = self.clips.setdefault(clip, {})
        if frame not in seen:
            seen[frame] = (found, truth)
            self.precision.add(found, truth)

    def compute(self) -> dict[str, Any]:
        """Scores of `TrackingScores` over all clips, and `map`, `map50` of the frames."""
        scores = TrackingScores(self.reach)
        for frames in self.clips.values():
            pairs = [frames[f] for f in sorted(frames)]
            scores.add(track([found for found, _ in pairs]), [truth for _, truth in pairs])
        average = self.precision.compute()
        return {**scores.compute(), "map": average["map"], "map50": average["map50"]}
