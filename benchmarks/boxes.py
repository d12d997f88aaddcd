"""Rotated overlap and suppression against obvious ways of doing the same, in one process.

python benchmarks/boxes.py
"""

import math
import time
from collections.abc import Callable

import numpy as np
import shapely
import torch

from model.boxes import Boxes, iou_matrix, pair_iou, suppress

ROUNDS = 5


def best(work: Callable[[], object]) -> float:
    """Least seconds of a few runs, one warm-up aside."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def scene(count: int, rotated: bool, seed: int = 0) -> Boxes:
    """Boxes of 10 to 40 pixels, three around each object, as dense as parked cars."""
    g = torch.Generator().manual_seed(seed)
    side = 30 * math.sqrt(count)
    centre = (torch.rand(count // 3, 2, generator=g) * side).repeat(3, 1)
    centre = centre + torch.randn(len(centre), 2, generator=g) * 3
    size = 10 + torch.rand(len(centre), 2, generator=g) * 30
    angle = (torch.rand(len(centre), 1, generator=g) - 0.5) * math.pi * rotated
    scores = torch.rand(len(centre), generator=g)
    return Boxes(torch.cat([centre, size, angle], 1), scores=scores)


def with_shapely(a: Boxes, b: Boxes) -> None:
    """Overlap of pairs by shapely's own loop in C."""
    one = shapely.polygons(a.polygons().double().numpy())
    two = shapely.polygons(b.polygons().double().numpy())
    both = shapely.area(shapely.intersection(one, two))
    _ = both / (shapely.area(one) + shapely.area(two) - both)


def with_matrix(boxes: Boxes, threshold: float = 0.5) -> Boxes:
    """Suppression with the whole matrix of overlaps."""
    boxes = boxes[boxes.scores.argsort(descending=True)]
    close = (iou_matrix(boxes, boxes) > threshold).numpy()
    keep = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if keep[i]:
            keep[i + 1 :] &= ~close[i, i + 1 :]
    return boxes[torch.from_numpy(keep)]


def main() -> None:
    """Print ratios, ours over the obvious way; below 1 is faster."""
    a, b = scene(60_000, True), scene(60_000, True)
    b = Boxes(torch.cat([a.geometry[:, :2] + torch.randn(len(a), 2) * 5, b.geometry[:, 2:]], 1))
    ours, theirs = best(lambda: pair_iou(a.geometry, b.geometry)), best(lambda: with_shapely(a, b))
    print(f"rotated overlap of {len(a)} pairs / shapely: {ours / theirs:.2f} ({ours:.3f} s)")
    for rotated in (False, True):
        for count in (1_000, 6_000):
            boxes = scene(count, rotated)
            assert len(suppress(boxes)) == len(with_matrix(boxes))
            ours, theirs = best(lambda: suppress(boxes)), best(lambda: with_matrix(boxes))  # noqa: B023
            kind = "rotated" if rotated else "horizontal"
            print(f"suppression of {len(boxes)} {kind} boxes / whole matrix: {ours / theirs:.3f}"
                  f" ({ours:.3f} s)")  # fmt: skip
    boxes = scene(100_000, True)
    print(f"suppression of {len(boxes)} rotated boxes: {best(lambda: suppress(boxes)):.2f} s")


if __name__ == "__main__":
    main()
