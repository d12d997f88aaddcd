"""Boxes: overlap against shapely, suppression against a slow loop, geometry as properties."""

import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.boxes import (
    Boxes,
    canonical,
    corners_of,
    iou_matrix,
    meeting_pairs,
    pair_iou,
    suppress,
)


def random_boxes(n, seed, rotated=True, spread=40.0):
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=g) * spread
    size = 1 + torch.rand(n, 2, generator=g) * 20
    angle = (torch.rand(n, 1, generator=g) - 0.5) * 2 * math.pi * rotated
    return Boxes(
        torch.cat([centre, size, angle], 1),
        labels=torch.randint(0, 2, (n,), generator=g),
        scores=torch.rand(n, generator=g),
    )


def shapely_iou(a, b):
    one = shapely.polygons(a.polygons().double().numpy())[:, None]
    two = shapely.polygons(b.polygons().double().numpy())[None]
    both = shapely.area(shapely.intersection(one, two))
    return both / (shapely.area(one) + shapely.area(two) - both)


coordinate = st.floats(-20, 20, width=32)
side = st.floats(0.5, 30, width=32)
angle = st.sampled_from([0, math.pi / 2, -math.pi / 4, math.pi, 1e-6]) | st.floats(-4, 4, width=32)
box = st.tuples(coordinate, coordinate, side, side, angle)


@settings(max_examples=200, deadline=None)
@given(box, box)
def test_iou_of_any_pair_equals_shapely(a, b):
    one, two = Boxes(torch.tensor([a])), Boxes(torch.tensor([b]))
    expected = shapely_iou(one, two)[0, 0]
    assert abs(float(pair_iou(one.geometry, two.geometry)[0]) - expected) < 2e-4


@settings(max_examples=100, deadline=None)
@given(box, st.integers(0, 3), st.floats(0.1, 1.0))
def test_iou_where_edges_coincide(a, quarter, share):
    """The same box turned by quarters, and a part that shares its edges."""
    one = torch.tensor([a])
    x, y, w, h, t = a
    turned = (w, h) if quarter % 2 == 0 else (h, w)
    same = torch.tensor([[x, y, *turned, t + quarter * math.pi / 2]])
    assert float(pair_iou(one, same)) == pytest.approx(1, abs=1e-4)
    left = -(1 - share) * w / 2
    part = torch.tensor([[x + left * math.cos(t), y + left * math.sin(t), share * w, h, t]])
    assert float(pair_iou(one, part)) == pytest.approx(share, abs=1e-3)
    assert float(pair_iou(part, one)) == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize("rotated", [False, True])
def test_iou_matrix_equals_shapely(rotated):
    a, b = random_boxes(60, 1, rotated), random_boxes(40, 2, rotated)
    np.testing.assert_allclose(iou_matrix(a, b).numpy(), shapely_iou(a, b), atol=1e-5)


def test_touching_boxes_share_nothing():
    a = torch.tensor([[5.0, 5, 10, 10, 0], [5, 5, 10, 10, 0], [5, 5, 10, 10, math.pi / 2]])
    b = torch.tensor([[15.0, 5, 10, 10, 0], [5, 15, 10, 10, math.pi], [-5, 5, 10, 10, 0]])
    assert pair_iou(a, b).abs().max() < 1e-6


def test_iou_gradient_equals_finite_differences():
    a = random_boxes(8, 3, spread=10).geometry.double().requires_grad_()
    b = random_boxes(8, 4, spread=10).geometry.double()
    assert torch.autograd.gradcheck(lambda x: pair_iou(x, b), (a,), eps=1e-6, atol=1e-4)


def slow_suppress(boxes, threshold, by_class):
    order = sorted(range(len(boxes)), key=lambda i: -float(boxes.scores[i]))
    overlap = shapely_iou(boxes, boxes)
    kept = []
    for i in order:
        rivals = [k for k in kept if not by_class or boxes.labels[k] == boxes.labels[i]]
        if all(overlap[i, k] <= threshold for k in rivals):
            kept.append(i)
    return boxes[torch.tensor(kept)]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
def test_suppression_equals_the_slow_loop(rotated, by_class):
    boxes = random_boxes(80, 5, rotated)
    ours, slow = suppress(boxes, 0.3, by_class), slow_suppress(boxes, 0.3, by_class)
    assert 10 < len(slow) < 70
    torch.testing.assert_close(ours.geometry, slow.geometry)
    torch.testing.assert_close(ours.scores, slow.scores)


def test_suppression_of_nothing_and_of_one():
    assert len(suppress(Boxes.empty())) == 0
    assert len(suppress(random_boxes(1, 0))) == 1


def test_pairs_that_meet_equal_all_pairs():
    boxes = random_boxes(120, 6)
    low, high = boxes.corners().split(2, 1)
    meet = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(2).triu(1)
    expected = set(map(tuple, torch.nonzero(meet).tolist()))
    assert set(zip(*(x.tolist() for x in meeting_pairs(boxes)), strict=True)) == expected


def test_pairs_that_meet_do_not_depend_on_the_chunk(monkeypatch):
    boxes = random_boxes(60, 7)
    whole = sorted(zip(*(x.tolist() for x in meeting_pairs(boxes)), strict=True))
    monkeypatch.setattr("model.boxes.PAIR_CHUNK", 7)
    assert sorted(zip(*(x.tolist() for x in meeting_pairs(boxes)), strict=True)) == whole


@settings(max_examples=100, deadline=None)
@given(box)
def test_polygons_and_back(a):
    boxes = Boxes(torch.tensor([a]))
    back = Boxes.from_polygons(boxes.polygons()[:, torch.tensor([2, 0, 3, 1])])
    assert float(back.geometry[0, 2]) >= float(back.geometry[0, 3]) - 1e-4
    assert float(pair_iou(boxes.geometry, back.geometry)) == pytest.approx(1, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(coordinate, coordinate), min_size=4, max_size=4))
def test_smallest_rectangle_equals_shapely(points):
    hull = shapely.MultiPoint(points)
    rectangle = Boxes.from_polygons([points])
    expected = shapely.area(shapely.minimum_rotated_rectangle(hull))
    assert float(rectangle.area[0]) <= expected + 1e-2 * (1 + expected)
    assert float(rectangle.area[0]) >= expected - 1e-2 * (1 + expected)


@given(box)
def test_canonical_form_is_the_same_rectangle(a):
    geometry = torch.tensor([a])
    other = canonical(geometry)
    assert float(pair_iou(geometry, other)) == pytest.approx(1, abs=1e-4)
    assert abs(float(other[0, 4])) <= math.pi / 2 + 1e-6
    assert float(other[0, 2]) >= float(other[0, 3])


def test_corners_and_envelope():
    boxes = Boxes.from_corners([[1, 2, 5, 10]])
    assert boxes.geometry.tolist() == [[3, 6, 4, 8, 0]]
    assert boxes.corners().tolist() == [[1, 2, 5, 10]]
    assert boxes.polygons()[0].tolist() == [[1, 2], [5, 2], [5, 10], [1, 10]]
    tilted = random_boxes(20, 8)
    points = corners_of(tilted.geometry)
    torch.testing.assert_close(tilted.corners(), torch.cat([points.amin(1), points.amax(1)], 1))


def test_flips_move_every_corner():
    boxes = random_boxes(10, 9)
    mirrored = boxes.polygons() * torch.tensor([-1.0, 1]) + torch.tensor([50.0, 0])
    assert same_corners(boxes.mirrored(50).polygons(), mirrored)
    assert same_corners(boxes.transposed().polygons(), boxes.polygons().flip(-1))
    torch.testing.assert_close(boxes.mirrored(50).mirrored(50).geometry, boxes.geometry)


@pytest.mark.parametrize("k", range(8))
def test_turns_follow_the_pixels(k):
    """One bright pixel per box, turned with numpy."""
    picture = np.zeros((16, 16))
    picture[3, 11] = 1
    boxes = Boxes.from_corners([[11, 3, 12, 4], [2, 5, 9, 7]])
    turned = np.rot90(picture[:, ::-1] if k >= 4 else picture, k % 4)
    row, col = np.argwhere(turned)[0]
    assert boxes.turned(k, 16).corners()[0].tolist() == [col, row, col + 1, row + 1]
    assert sorted(boxes.turned(k, 16).geometry[1, 2:4].tolist()) == [2, 7]
    assert (boxes.turned(k, 16).geometry[:, 4] == 0).all()


def same_corners(a, b):
    return torch.cdist(a, b).amin(2).max() < 1e-3


def test_boxes_an_image_shows():
    boxes = Boxes.from_corners([[-6, 0, 4, 10], [-4, 0, 6, 10], [95, 95, 105, 97], [5, 5, 9, 9]])
    shown = boxes.inside(100, 100)
    assert shown.corners().tolist() == [[0, 0, 6, 10], [95, 95, 100, 97], [5, 5, 9, 9]]
    tilted = Boxes(torch.tensor([[0.0, 50, 20, 10, 0.5], [-30, 50, 20, 10, 0.5]]))
    assert tilted.inside(100, 100).geometry.tolist() == tilted.geometry[:1].tolist()


def test_boxes_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"\(N, 5\)"):
        Boxes(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="3 boxes, but 2 labels"):
        Boxes(torch.zeros(3, 5), labels=torch.zeros(2, dtype=torch.int64))
