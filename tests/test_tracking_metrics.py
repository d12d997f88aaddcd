"""Tracking scores against motmetrics, and against TrackEval where it is installed."""

import numpy as np
import pytest
import torch

from model.boxes import Boxes
from model.tracking_metrics import TrackingScores, compact


def boxes(centres, tracks, size=20.0, ignored=None):
    geometry = torch.zeros(len(tracks), 5)
    geometry[:, :2] = torch.as_tensor(np.array(centres, dtype=np.float32).reshape(-1, 2))
    geometry[:, 2:4] = size
    return Boxes(geometry, tracks=torch.tensor(tracks, dtype=torch.int64), ignored=ignored)


def random_clip(seed, frames=30, objects=12, room=200):
    """Objects on straight lines; tracks with noise, gaps, swaps, inventions."""
    rng = np.random.default_rng(seed)
    place, speed = rng.uniform(0, room, (objects, 2)), rng.normal(0, 3, (objects, 2))
    names = np.arange(objects) + 100
    truth, found = [], []
    for t in range(frames):
        present = np.flatnonzero(rng.random(objects) < 0.9)
        truth.append(boxes(place[present], present.tolist()))
        if rng.random() < 0.3:
            a, b = rng.choice(objects, 2, replace=False)
            names[[a, b]] = names[[b, a]]
        seen = np.flatnonzero(rng.random(objects) < 0.8)
        centres = place[seen] + rng.normal(0, 3, (len(seen), 2))
        invented = rng.uniform(0, room, (2, 2))
        numbers = [*names[seen].tolist(), 1000 + 2 * t, 1001 + 2 * t]
        found.append(boxes(np.concatenate([centres, invented]), numbers))
        place = place + speed
    return found, truth


@pytest.mark.parametrize("seed", range(4))
def test_mota_and_idf1_equal_motmetrics(seed):
    """Where objects keep apart: in crowds it counts switches in another way than TrackEval."""
    motmetrics = pytest.importorskip("motmetrics")
    found, truth = random_clip(seed, room=3000)
    scores = TrackingScores()
    scores.add(found, truth)
    theirs = motmetrics.MOTAccumulator(auto_id=True)
    for f, t in zip(found, truth, strict=True):
        distance = 1 - scores.compare(f, t).likeness
        distance[distance > 0.5] = np.nan
        theirs.update(t.tracks.tolist(), f.tracks.tolist(), distance)
    names = ["mota", "motp", "idf1", "num_switches", "precision", "recall"]
    expected = motmetrics.metrics.create().compute(theirs, metrics=names).iloc[0]
    ours = scores.compute()
    assert 0.05 < ours["mota"] < 0.9
    assert ours["switches"] == expected["num_switches"] > 0
    assert ours["motp"] == pytest.approx(1 - expected["motp"], abs=1e-9)
    for name in ("mota", "idf1", "precision", "recall"):
        assert ours[name] == pytest.approx(expected[name], abs=1e-9), name


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_hota_equals_trackeval(seed):
    metrics = pytest.importorskip("trackeval").metrics
    found, truth = random_clip(seed)
    scores = TrackingScores()
    scores.add(found, truth)
    frames = compact([scores.compare(f, t) for f, t in zip(found, truth, strict=True)])
    data = {
        "num_timesteps": len(frames),
        "num_gt_ids": 1 + max(int(f.objects.max()) for f in frames),
        "num_tracker_ids": 1 + max(int(f.tracks.max()) for f in frames),
        "num_gt_dets": sum(len(f.objects) for f in frames),
        "num_tracker_dets": sum(len(f.tracks) for f in frames),
        "gt_ids": [f.objects for f in frames],
        "tracker_ids": [f.tracks for f in frames],
        "similarity_scores": [f.likeness for f in frames],
    }
    ours = scores.compute()
    hota = metrics.HOTA().eval_sequence(data)
    for name, theirs in {"hota": "HOTA", "deta": "DetA", "assa": "AssA", "loca": "LocA"}.items():
        assert ours[name] == pytest.approx(hota[theirs].mean(), abs=1e-6), name
    clear = metrics.CLEAR({"PRINT_CONFIG": False}).eval_sequence(data)
    identity = metrics.Identity({"PRINT_CONFIG": False}).eval_sequence(data)
    assert ours["mota"] == pytest.approx(clear["MOTA"])
    assert ours["switches"] == clear["IDSW"]
    assert ours["mostly_tracked"] == clear["MT"]
    assert ours["mostly_lost"] == clear["ML"]
    assert ours["idf1"] == pytest.approx(identity["IDF1"])


def test_perfect_tracks():
    found, _ = random_clip(0)
    scores = TrackingScores()
    scores.add(found, found)
    ours = scores.compute()
    for name in ("hota", "mota", "idf1", "motp"):
        assert ours[name] == pytest.approx(1), name


def test_one_swap_by_hand():
    """Two objects, four frames; from the third frame on the tracks are exchanged."""
    truth = [boxes([(0, 0), (100, 0)], [0, 1])] * 4
    found = [*truth[:2], *[boxes([(0, 0), (100, 0)], [1, 0])] * 2]
    scores = TrackingScores()
    scores.add(found, truth)
    ours = scores.compute()
    assert ours["switches"] == 2
    assert ours["mota"] == pytest.approx(1 - 2 / 8)
    assert ours["idf1"] == pytest.approx(0.5)
    assert ours["deta"] == 1
    # Every pair is together in 2 of the 6 frames that show either: A(c) = 2 / (4 + 4 - 2).
    assert ours["assa"] == pytest.approx(2 / 6)


def test_points_match_within_reach():
    truth = [boxes([(50, 50)], [0])]
    for offset, hit in ((5.9, 1), (6.1, 0)):
        scores = TrackingScores(reach=6)
        scores.add([boxes([(50 + offset, 50)], [7], size=3)], truth)
        assert scores.compute()["recall"] == hit


def test_what_lies_on_ignored_objects_does_not_count():
    truth = [boxes([(50, 50), (90, 90)], [0, 1], ignored=torch.tensor([False, True]))]
    scores = TrackingScores()
    scores.add([boxes([(50, 50), (91, 90)], [3, 4])], truth)
    ours = scores.compute()
    assert ours["mota"] == 1
    assert ours["labels"] == ours["boxes"] == 1


def test_nothing_found():
    _, truth = random_clip(1)
    scores = TrackingScores()
    scores.add([Boxes.empty()] * len(truth), truth)
    ours = scores.compute()
    assert ours["mota"] == ours["hota"] == ours["idf1"] == 0
