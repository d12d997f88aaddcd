"""Average precision against COCO's own code, and against shapely for rotated boxes."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch

from model.batch import Batch, Prediction
from model.boxes import Boxes
from model.detection_metrics import AveragePrecision


def random_truth(g, n, classes, rotated, crowd):
    centre = torch.rand(n, 2, generator=g) * 300
    size = torch.exp(torch.rand(n, 2, generator=g) * 3.5 + 1.5)
    angle = (torch.rand(n, 1, generator=g) - 0.5) * math.pi * rotated
    return Boxes(
        torch.cat([centre, size, angle], 1),
        labels=torch.randint(0, classes, (n,), generator=g),
        ignored=torch.rand(n, generator=g) < crowd,
    )


def random_found(g, truth, n, classes, rotated):
    """Noisy copies of labels, doubles among them, and inventions."""
    pick = torch.randint(0, max(len(truth), 1), (n,), generator=g)[: n * bool(len(truth))]
    noise = torch.randn(len(pick), 5, generator=g) * torch.tensor([2, 2, 2, 2, 0.1 * rotated])
    copies = truth.geometry[pick] + noise
    invented = random_truth(g, n // 2, classes, rotated, 0)
    geometry = torch.cat([copies, invented.geometry])
    geometry[:, 2:4] = geometry[:, 2:4].clamp(min=1)
    labels = torch.cat([truth.labels[pick], invented.labels])
    return Boxes(geometry, labels=labels, scores=torch.rand(len(labels), generator=g))


def random_images(seed, images=8, classes=3, rotated=False, crowd=0.15):
    g = torch.Generator().manual_seed(seed)
    truths = [random_truth(g, int(n), classes, rotated, crowd) for n in [0, 1, *[12] * images]]
    return truths, [random_found(g, t, 20, classes, rotated) for t in truths]


def coco_scores(truths, founds, classes, limit):
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval

    def records(boxes, image):
        for b in range(len(boxes)):
            x0, y0, x1, y1 = boxes.corners()[b].double().tolist()
            yield {
                "image_id": image, "category_id": int(boxes.labels[b]) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": float(boxes.area[b]),
                "iscrowd": int(boxes.ignored[b]), "score": float(boxes.scores[b]),
            }  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        annotations = [r for i, t in enumerate(truths) for r in records(t, i)]
        truth.dataset = {
            "images": [{"id": i} for i in range(len(truths))],
            "categories": [{"id": k + 1} for k in range(classes)],
            "annotations": [{**r, "id": n + 1} for n, r in enumerate(annotations)],
        }
        truth.createIndex()
        found = truth.loadRes([r for i, f in enumerate(founds) for r in records(f, i)])
        run = evaluation(truth, found, "bbox")
        run.params.maxDets = [1, 2, limit]
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., 2]  # overlap, recall, class, area
    precision = np.where(precision < 0, np.nan, precision)
    return {
        "map": np.nanmean(precision[..., 0]),
        "map50": np.nanmean(precision[0, ..., 0]),
        "map75": np.nanmean(precision[5, ..., 0]),
        "map_small": np.nanmean(precision[..., 1]),
        "map_medium": np.nanmean(precision[..., 2]),
        "map_large": np.nanmean(precision[..., 3]),
        "recall": run.eval["recall"][..., 0, 2].mean(),
        "ap_per_class": precision[..., 0].mean((0, 1)),
    }


@pytest.mark.parametrize("limit", [5, 100])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_pycocotools(seed, limit):
    truths, founds = random_images(seed)
    ours = AveragePrecision(3, limit=limit)
    ours.update(Prediction(boxes=founds), Batch({}, targets={"boxes": truths}))
    scores = ours.compute()
    expected = coco_scores(truths, founds, 3, limit)
    assert 0.1 < expected["map"] < 0.9
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, atol=1e-9, err_msg=name)


def slow_ap(truths, founds, threshold):
    """One class, one overlap, in plain loops over shapely polygons."""
    import shapely

    rows, labels = [], 0
    for truth, found in zip(truths, founds, strict=True):
        labels += len(truth)
        polygons = [shapely.Polygon(p) for p in truth.polygons().double().numpy()]
        free = set(range(len(truth)))
        for d in sorted(range(len(found)), key=lambda d: -float(found.scores[d])):
            mine = shapely.Polygon(found.polygons()[d].double().numpy())
            iou = {g: mine.intersection(polygons[g]).area for g in free}
            iou = {g: v / (mine.area + polygons[g].area - v) for g, v in iou.items()}
            best = max(iou, key=iou.__getitem__, default=None)
            hit = best is not None and iou[best] >= threshold
            free -= {best} if hit else set()
            rows.append((float(found.scores[d]), hit))
    rows.sort(key=lambda r: -r[0])
    hits = np.cumsum([h for _, h in rows])
    precision, recall = hits / np.arange(1, len(rows) + 1), hits / labels
    return np.mean(
        [max(precision[recall >= r - 1e-12], default=0.0) for r in np.linspace(0, 1, 101)]
    )


def test_rotated_equals_a_slow_loop_over_polygons():
    truths, founds = random_images(3, images=4, classes=1, rotated=True, crowd=0)
    ours = AveragePrecision(1)
    ours.update(Prediction(boxes=founds), Batch({}, targets={"boxes": truths}))
    scores = ours.compute()
    assert 0.1 < scores["map50"] < 0.95
    assert scores["map50"] == pytest.approx(slow_ap(truths, founds, 0.5), abs=1e-9)
    assert scores["map75"] == pytest.approx(slow_ap(truths, founds, 0.75), abs=1e-9)


def test_perfect_absent_and_invented():
    truth = Boxes.from_corners([[0, 0, 10, 10], [20, 20, 40, 40]], labels=torch.tensor([0, 1]))
    perfect = AveragePrecision(3)
    perfect.add(truth, truth)
    scores = perfect.compute()
    assert scores["map"] == 1
    assert scores["ap_per_class"][:2] == [1, 1]
    assert math.isnan(scores["ap_per_class"][2])
    nothing = AveragePrecision(3)
    nothing.add(Boxes.empty(), truth)
    assert nothing.compute()["map"] == 0
    invented = AveragePrecision(3)
    invented.add(truth, Boxes.empty())
    assert math.isnan(invented.compute()["map"])


def test_label_outside_the_classes():
    truth = Boxes.from_corners([[0, 0, 10, 10]], labels=torch.tensor([3]))
    with pytest.raises(ValueError, match="outside the 2 classes"):
        AveragePrecision(2).add(truth, truth)
