"""From boxes of single frames to tracks: ByteTrack's two rounds with a Kalman filter.

Zhang et al. 2022 match confident boxes first and the doubtful ones to what is left of the tracks.
Their overlap says nothing about a vehicle of five pixels that moves ten, so nearness to the
predicted place, in standard deviations of the filter, is added to it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.boxes import Boxes, iou_matrix

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

GATE = 3.0
"""Standard deviations beyond which a box is not the predicted object."""
MEASURED = 0.05
"""Noise of a detected side, as a share of it (Wojke et al. 2017), beside half a pixel."""
STEP = np.array([[1.0, 1.0], [0.0, 1.0]])
"""One frame of constant velocity on (place, velocity)."""


class Motion:
    """Constant-velocity Kalman filters of centre x, centre y, width and height, for n tracks.

    The four are filtered apart: their noises are independent, so the joint filter is the same.
    """

    def __init__(self, boxes: Floats, speed: float) -> None:
        """Start at measured (n, 4) boxes with unknown velocity.

        Args:
            boxes: centre x, centre y, width, height in pixels.
            speed: usual displacement between frames, as a share of the box's diagonal.
        """
        diagonal = np.hypot(boxes[:, 2], boxes[:, 3])
        self.mean = np.stack([boxes, np.zeros_like(boxes)], -1)  # (n, 4, 2)
        spread = np.stack([diagonal, diagonal, boxes[:, 2] / 10, boxes[:, 3] / 10], 1) * speed
        self.covariance = np.zeros((*boxes.shape, 2, 2))
        self.covariance[..., 0, 0] = noise(boxes)
        self.covariance[..., 1, 1] = spread**2
        self.drift = (spread / 4) ** 2
        """Variance of the change of velocity in one frame, (n, 4)."""

    def keep(self, index: Indices) -> None:
        """Forget the tracks that are not listed."""
        self.mean, self.covariance = self.mean[index], self.covariance[index]
        self.drift = self.drift[index]

    def join(self, other: "Motion") -> None:
        """Append the tracks of another filter."""
        self.mean = np.concatenate([self.mean, other.mean])
        self.covariance = np.concatenate([self.covariance, other.covariance])
        self.drift = np.concatenate([self.drift, other.drift])

    def predict(self) -> None:
        """Move every track by one frame."""
        self.mean = self.mean @ STEP.T
        self.mean[:, 2:, 0] = np.maximum(self.mean[:, 2:, 0], 1.0)
        self.covariance = STEP @ self.covariance @ STEP.T
        self.covariance[..., 1, 1] += self.drift

    def update(self, index: Indices, measured: Floats) -> None:
        """Correct the listed tracks by measured (k, 4) boxes."""
        covariance = self.covariance[index]
        gain = covariance[..., 0] / (covariance[..., 0, 0] + noise(measured))[..., None]
        surprise = measured - self.mean[index, :, 0]
        self.mean[index] += gain * surprise[..., None]
        self.covariance[index] = covariance - gain[..., None] * covariance[..., :1, :]

    def distances(self, measured: Floats) -> Floats:
        """(n, k) distance of each box's centre from each prediction, in standard deviations."""
        offset = measured[None, :, :2] - self.mean[:, None, :2, 0]
        variance = self.covariance[:, None, :2, 0, 0] + noise(measured)[None, :, :2]
        distance: Floats = np.sqrt((offset**2 / variance).sum(-1))
        return distance


def noise(boxes: Floats) -> Floats:
    """(n, 4) variance of measured centres and sides."""
    sides = boxes[:, [2, 3, 2, 3]]
    variance: Floats = (MEASURED * sides + 0.5) ** 2
    return variance


class Tracker:
    """Gives every box of a clip the number of its object, frame by frame."""

    def __init__(
        self, high: float = 0.4, low: float = 0.1, speed: float = 0.7, patience: int = 5
    ) -> None:
        """No track yet.

        Args:
            high: score from which a box may start a track.
            low: score from which a box may continue one.
            speed: usual displacement between frames, as a share of the box's diagonal.
            patience: frames a track survives unseen.
        """
        self.high, self.low, self.speed, self.patience = high, low, speed, patience
        self.motion = Motion(np.zeros((0, 4)), speed)
        self.numbers: Indices = np.zeros(0, np.int64)
        self.labels: Indices = np.zeros(0, np.int64)
        self.angles: Floats = np.zeros(0)
        self.unseen: Indices = np.zeros(0, np.int64)
        self.started = 0

    def step(self, boxes: Boxes) -> Boxes:
        """The boxes of the next frame that belong to a track, with `tracks` filled in."""
        boxes = boxes.to("cpu")
        boxes = boxes[boxes.scores >= self.low]
        measured = boxes.geometry[:, :4].double().numpy()
        sure = boxes.scores.numpy() >= self.high
        self.motion.predict()
        owner = np.full(len(boxes), -1, np.int64)  # track (as an index) of each box
        for group in (sure, ~sure):
            tracks = np.setdiff1d(np.arange(len(self.numbers)), owner)
            self.assign(tracks, np.flatnonzero(group), boxes, owner)
        seen = np.flatnonzero(owner >= 0)
        self.motion.update(owner[seen], measured[seen])
        self.angles[owner[seen]] = boxes.geometry[seen, 4].numpy()
        self.unseen += 1
        self.unseen[owner[seen]] = 0
        fresh = np.flatnonzero((owner < 0) & sure)
        owner[fresh] = self.start(boxes[torch.from_numpy(fresh)])
        numbers = np.where(owner >= 0, self.numbers[owner] if len(self.numbers) else -1, -1)
        self.forget()
        tracked = replace(boxes, tracks=torch.from_numpy(numbers))
        return tracked[tracked.tracks >= 0]

    def assign(self, tracks: Indices, group: Indices, boxes: Boxes, owner: Indices) -> None:
        """Match some tracks with some boxes; writes the boxes' `owner`."""
        if not len(tracks) or not len(group):
            return
        likeness = self.likeness(boxes[torch.from_numpy(group)])[tracks]
        from scipy.optimize import linear_sum_assignment  # a quarter second of import

        row, col = linear_sum_assignment(likeness, maximize=True)
        good = likeness[row, col] > 0
        owner[group[col[good]]] = tracks[row[good]]

    def likeness(self, boxes: Boxes) -> Floats:
        """(n, k) overlap plus nearness in [0, 2]; 0 beyond the gate or for another class."""
        place = np.concatenate([self.motion.mean[..., 0], self.angles[:, None]], 1)
        predicted = Boxes(torch.from_numpy(place).float())
        overlap = iou_matrix(predicted, boxes).double().numpy()
        distance = self.motion.distances(boxes.geometry[:, :4].double().numpy())
        same = self.labels[:, None] == boxes.labels.numpy()[None]
        return np.asarray((overlap + np.maximum(0, 1 - distance / GATE)) * same)

    def start(self, boxes: Boxes) -> Indices:
        """New tracks at these boxes; their indices."""
        first = len(self.numbers)
        self.motion.join(Motion(boxes.geometry[:, :4].double().numpy(), self.speed))
        numbers = self.started + np.arange(len(boxes))
        self.started += len(boxes)
        self.numbers = np.concatenate([self.numbers, numbers])
        self.labels = np.concatenate([self.labels, boxes.labels.numpy()])
        self.angles = np.concatenate([self.angles, boxes.geometry[:, 4].double().numpy()])
        self.unseen = np.concatenate([self.unseen, np.zeros(len(boxes), np.int64)])
        return np.arange(first, len(self.numbers))

    def forget(self) -> None:
        """Drop the tracks that were not seen for too long."""
        alive = np.flatnonzero(self.unseen <= self.patience)
        self.motion.keep(alive)
        self.numbers, self.labels = self.numbers[alive], self.labels[alive]
        self.angles, self.unseen = self.angles[alive], self.unseen[alive]


def track(frames: Sequence[Boxes], shortest: int = 2, **settings: Any) -> list[Boxes]:
    """Tracks through a clip; those seen in fewer than `shortest` frames are dropped.

    Args:
        frames: detected boxes of each frame, in order.
        shortest: frames (of a clip with at least as many) a track must be seen in.
        settings: as for `Tracker`.

    Returns:
        Per frame the boxes that belong to a track, numbered 0, 1 … in order of appearance.
    """
    tracker = Tracker(**settings)
    found = [tracker.step(boxes) for boxes in frames]
    numbers = torch.cat([boxes.tracks for boxes in found]) if found else torch.zeros(0)
    names, counts = torch.unique(numbers, return_counts=True)
    kept = names[counts >= min(shortest, len(frames))]
    return [renumbered(boxes[torch.isin(boxes.tracks, kept)], kept) for boxes in found]


def renumbered(boxes: Boxes, names: torch.Tensor) -> Boxes:
    """The same boxes with each track's position in the sorted `names` as its number."""
    return replace(boxes, tracks=torch.searchsorted(names, boxes.tracks))
