"""The detector: assignment by hand, losses by hand, and one batch learned by heart."""

import math

import pytest
import torch
from drawn_boxes import fit, network, score, still
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import Batch
from model.boxes import Boxes, corners_of, pair_iou
from model.config import TaskConfig
from model.tasks.detection import (
    Detection,
    assign,
    centre_penalty,
    decode,
    locations,
    quality_focal,
)


def grid(size=64):
    """Places and strides of all levels of a square image."""
    places = [locations(size // s, size // s, s) for s in (4, 8, 16, 32)]
    strides = [torch.full((len(p),), float(s)) for p, s in zip(places, (4, 8, 16, 32), strict=True)]
    return torch.cat(places), torch.cat(strides)


@pytest.mark.parametrize("rotated", [False, True])
def test_one_batch_is_learned(rotated):
    batch, model = still(rotated=rotated), network("detection", rotated)
    assert score(model, batch)["map50"] < 0.1
    fit(model, batch, 50)
    scores = score(model, batch)
    assert scores["map50"] > 0.95
    assert scores["map"] > 0.6


def test_locations_are_cell_centres():
    assert locations(2, 3, 4).tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_objects_go_to_the_level_of_their_longer_side():
    places, strides = grid()
    for side, stride in ((3, 4), (32, 4), (33, 8), (64, 8), (65, 16), (129, 32), (500, 32)):
        truth = Boxes(torch.tensor([[32.0, 32, side, min(side, 10), 0.3]]))
        owner = assign(truth, places, strides)
        assert set(strides[owner == 0].tolist()) == {stride}


def test_an_object_smaller_than_a_cell_has_one_location():
    places, strides = grid()
    owner = assign(Boxes(torch.tensor([[33.0, 33, 1, 1, 0]])), places, strides)
    assert places[owner == 0].tolist() == [[34, 34]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(8, 56)] * 2, *[st.floats(2, 40)] * 2, st.floats(-3, 3)),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_assignment_equals_a_loop_over_polygons(rows):
    """Every assigned location is near the centre and inside the box, or the nearest one."""
    import shapely

    places, strides = grid()
    truth = Boxes(torch.tensor(rows))
    owner = assign(truth, places, strides)
    polygons = [shapely.Polygon(p).buffer(1e-3) for p in corners_of(truth.geometry).numpy()]
    for place in torch.nonzero(owner >= 0).flatten().tolist():
        n = int(owner[place])
        distance = (places - truth.geometry[n, :2]).norm(dim=1)
        same = strides == strides[place]
        nearest = distance[place] <= distance[same].min() + 1e-4
        near = distance[place] <= 1.5 * strides[place] * math.sqrt(2) + 1e-4
        assert nearest or (near and polygons[n].contains(shapely.Point(*places[place].tolist())))


def test_the_smaller_of_two_nested_objects_wins():
    places, strides = grid()
    truth = Boxes(torch.tensor([[32.0, 32, 30, 30, 0], [32.0, 32, 10, 10, 0]]))
    owner = assign(truth, places, strides)
    assert (owner == 1).sum() >= 4
    assert owner[(places == torch.tensor([30.0, 30.0])).all(1) & (strides == 4)] == 1


def test_decoding_by_hand():
    places = torch.tensor([[10.0, 20.0]])
    raw = torch.tensor([[[0.5, -1, math.log(2), 0, math.cos(0.8) - 1, math.sin(0.8)]]])
    boxes = decode(raw, places, torch.tensor(4.0))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([12.0, 16, 32, 16, 0.4]))
    assert decode(raw[..., :4], places, torch.tensor(4.0))[0, 0, 4] == 0


def test_quality_focal_loss_by_hand():
    logit, quality = torch.tensor([0.7, -2.0]), torch.tensor([0.6, 0.0])
    p = 1 / (1 + torch.exp(-logit))
    entropy = -(quality * p.log() + (1 - quality) * (1 - p).log())
    torch.testing.assert_close(quality_focal(logit, quality), (quality - p) ** 2 * entropy)


def test_distant_boxes_are_pulled_together():
    found = torch.tensor([[0.0, 0, 4, 4, 0]], requires_grad=True)
    wanted = torch.tensor([[50.0, 0, 4, 4, 0]])
    assert pair_iou(found, wanted) == 0
    centre_penalty(found, wanted).sum().backward()
    assert found.grad[0, 0] < 0
    assert found.grad[0, 1] == 0


def head(rotated=False):
    torch.manual_seed(0)
    task = TaskConfig("detection", ("car", "ship"), rotated=rotated, channels=16)
    widths = (8, 16, 32, 64)
    features = [torch.randn(2, w, 16 // 2**s, 16 // 2**s) for s, w in enumerate(widths)]
    return Detection(task, widths), features


def test_ignored_objects_teach_nothing():
    """Neither as objects nor, in their place, as background."""
    detector, features = head()
    output = detector(features, (64, 64))
    real = Boxes.from_corners([[4, 4, 24, 24]])
    crowd = Boxes.from_corners([[30, 30, 64, 64]], ignored=torch.tensor([True]))
    loss = detector.loss(output, Batch({}, targets={"boxes": [Boxes.cat([real, crowd])] * 2}))
    grad = torch.autograd.grad(loss, output.scores)[0].abs().sum((0, 2))
    under = ((output.places >= 30) & (output.places < 64)).all(1)
    assert grad[under].max() == 0
    assert grad[~under].min() > 0


def test_images_without_objects_teach_background_only():
    detector, features = head()
    output = detector(features, (64, 64))
    loss = detector.loss(output, Batch({}, targets={"boxes": [Boxes.empty()] * 2}))
    loss.backward()
    assert loss > 0
    assert detector.classify[-1].weight.grad.abs().sum() > 0


def test_predictions_are_sorted_inside_the_image_and_suppressed():
    detector, features = head(rotated=True)
    torch.nn.init.constant_(detector.classify[-1].bias, 1.0)
    for boxes in detector.predict(detector(features, (62, 60))).boxes:
        assert len(boxes) > 3
        assert (boxes.scores.diff() <= 0).all()
        low, high = boxes.corners().chunk(2, 1)
        assert (high > 0).all()
        assert (low < torch.tensor([60.0, 62.0])).all()
        for k in (0, 1):
            mine = boxes[boxes.labels == k].geometry
            n = len(mine)
            overlap = pair_iou(
                mine[:, None].expand(n, n, 5).reshape(-1, 5), mine.repeat(n, 1)
            ).view(n, n)
            assert (overlap.fill_diagonal_(0) <= 0.2).all()
