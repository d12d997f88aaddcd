"""Association of boxes over frames, and its Kalman filter against plain matrices."""

import math

import numpy as np
import pytest
import torch

from model.association import Motion, Tracker, noise, track
from model.boxes import Boxes
from model.tracking_metrics import TrackingScores


def test_filter_equals_the_joint_matrices():
    """Four filters of two states against one of eight."""
    rng = np.random.default_rng(0)
    first = np.array([[50.0, 60, 20, 10]])
    motion = Motion(first, speed=0.7)
    mean = np.concatenate([first[0], np.zeros(4)])
    spread = np.sqrt(motion.covariance[0, :, 1, 1])
    covariance = np.diag(np.concatenate([noise(first)[0], spread**2]))
    step, drift = (
        np.eye(8) + np.eye(8, k=4),
        np.diag(np.concatenate([np.zeros(4), (spread / 4) ** 2])),
    )
    look = np.eye(4, 8)
    for _ in range(6):
        measured = first + rng.normal(0, 2, (1, 4))
        motion.predict()
        motion.update(np.array([0]), measured)
        mean, covariance = step @ mean, step @ covariance @ step.T + drift
        total = look @ covariance @ look.T + np.diag(noise(measured)[0])
        gain = covariance @ look.T @ np.linalg.inv(total)
        mean = mean + gain @ (measured[0] - look @ mean)
        covariance = (np.eye(8) - gain @ look) @ covariance
        np.testing.assert_allclose(motion.mean[0].T.ravel(), mean, rtol=1e-9)
        np.testing.assert_allclose(
            motion.covariance[0, :, 0, 0], np.diag(covariance)[:4], rtol=1e-9
        )
        np.testing.assert_allclose(
            motion.covariance[0, :, 1, 1], np.diag(covariance)[4:], rtol=1e-9
        )


def moving(frames, size, speed, count=6, missing=0.0, seed=0):
    """Objects on parallel lanes, with a share of them undetected."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for t in range(frames):
        lane = np.arange(count)
        x = 20 + lane * 7 + t * speed * np.where(lane % 2, 1, -1)
        geometry = torch.tensor(np.stack([x, 20 + lane * 4 * size], 1), dtype=torch.float32)
        geometry = torch.cat(
            [geometry, torch.full((count, 2), float(size)), torch.zeros(count, 1)], 1
        )
        boxes = Boxes(geometry, tracks=torch.arange(count))
        truth.append(boxes)
        seen = torch.from_numpy(rng.random(count) >= missing)
        found.append(Boxes(geometry[seen], scores=torch.full((int(seen.sum()),), 0.9)))
    return found, truth


def score(found, truth, **settings):
    scores = TrackingScores()
    scores.add(track(found, **settings), truth)
    return scores.compute()


def test_overlapping_objects_are_followed():
    assert score(*moving(10, size=20, speed=3))["hota"] == pytest.approx(1)


def test_tiny_objects_that_move_further_than_their_size_are_followed():
    """Consecutive boxes do not overlap at all: overlap alone would lose every one."""
    assert score(*moving(10, size=5, speed=8), speed=1.0)["hota"] == pytest.approx(1)


def test_gaps_are_bridged_up_to_the_patience():
    found, truth = moving(12, size=10, speed=4, count=3)
    found[5] = found[6] = Boxes.empty()
    scores = score(found, truth)
    assert scores["switches"] == 0
    assert scores["recall"] == pytest.approx(10 / 12)
    assert score(found, truth, patience=1)["switches"] == 3


def test_doubtful_boxes_continue_tracks_but_start_none():
    found, truth = moving(8, size=10, speed=2, count=2)
    doubtful = [Boxes(f.geometry, scores=torch.full((2,), 0.2)) for f in found]
    assert sum(map(len, track(doubtful))) == 0
    assert score([*found[:2], *doubtful[2:]], truth)["recall"] == 1


def test_flashes_are_dropped_and_numbers_have_no_gaps():
    found, _ = moving(6, size=10, speed=1, count=2)
    flash = Boxes.from_corners([[200, 200, 210, 210]], scores=torch.tensor([0.9]))
    found[0] = Boxes.cat([flash, found[0]])
    tracks = track(found)
    assert [boxes.tracks.tolist() for boxes in tracks] == [[0, 1]] * 6


def test_classes_do_not_mix():
    geometry = torch.tensor([[50.0, 50, 10, 10, 0]])
    frames = [Boxes(geometry, labels=torch.tensor([t % 2])) for t in range(4)]
    assert {n for boxes in track(frames) for n in boxes.tracks.tolist()} == {0, 1}


def test_angle_of_the_track_follows_the_boxes():
    tracker = Tracker()
    for t in range(3):
        tracker.step(Boxes(torch.tensor([[50.0, 50, 20, 10, 0.1 * t]])))
    assert tracker.angles[0] == pytest.approx(0.2)


def test_no_frames_and_empty_frames():
    assert track([]) == []
    assert [len(b) for b in track([Boxes.empty()] * 3)] == [0, 0, 0]
    assert math.isclose(score([Boxes.empty()] * 2, [Boxes.empty()] * 2)["mota"], 0)
