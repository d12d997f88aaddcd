"""The tracker's head: pairs of frames, and one clip learned by heart."""

import pytest
import torch
from drawn_boxes import clip, fit, network, score

from model.batch import Batch, Prediction
from model.boxes import Boxes
from model.detection_metrics import AveragePrecision
from model.tasks.tracking import ClipScores, with_difference


def test_one_clip_is_learned():
    """What moves is followed; its twins that stand still are not."""
    batch, model = clip(), network("tracking")
    assert score(model, batch)["hota"] < 0.1
    fit(model, batch, 50)
    scores = score(model, batch)
    assert scores["mota"] > 0.9
    assert scores["hota"] > 0.7
    assert scores["switches"] == 0


def test_each_frame_is_compared_with_its_partner():
    x = torch.randn(4, 3, 2, 2)
    y = with_difference(x)
    torch.testing.assert_close(y[:, :3], x)
    for row, partner in enumerate((1, 0, 3, 2)):
        torch.testing.assert_close(y[row, 3:], x[row] - x[partner])


def test_swapping_the_frames_of_a_pair_swaps_the_answers():
    model, batch = network("tracking").eval(), clip(frames=2)
    swapped = Batch({"opt": batch.images["opt"].flip(1)})
    with torch.no_grad():
        one, two = model(batch), model(swapped)
    torch.testing.assert_close(one.scores, two.scores.flip(0), atol=1e-4, rtol=1e-4)


def test_clips_are_put_together_from_pairs_in_any_order():
    """Five frames come as (3, 4), (0, 1), (2, 3): frame 3 counts once."""
    frames = [
        Boxes(torch.tensor([[10.0 + 3 * t, 20, 8, 8, 0]]), tracks=torch.tensor([5]))
        for t in range(5)
    ]
    metric = ClipScores(AveragePrecision(1))
    for pair in ((3, 4), (0, 1), (2, 3)):
        boxes = [frames[t] for t in pair]
        batch = Batch({}, targets={"boxes": boxes}, keys=[f"a:b:{pair[0]}:{pair[1]}"])
        metric.update(Prediction(boxes=boxes), batch)
    scores = metric.compute()
    assert scores["labels"] == scores["boxes"] == 5
    assert scores["hota"] == pytest.approx(1)
    assert scores["map"] == 1
