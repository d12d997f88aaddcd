"""Boxes on the pixel grid, horizontal and rotated: overlap, non-maximum suppression, geometry.

Coordinates are pixels, x to the right and y down; (0, 0) is the outer corner of the first pixel,
so its centre is (0.5, 0.5). A box is its centre, its width and height, and the angle in radians
by which its width axis is turned from +x towards +y. Horizontal boxes have angle 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

MARGIN = 1e-7
"""The second box of a pair grows by this share, so that no two edges coincide."""
PAIR_CHUNK = 1 << 20
"""Pairs of boxes looked at together."""


@dataclass(frozen=True)
class Boxes:
    """Some boxes of one image, or of one scene."""

    geometry: Tensor
    """(N, 5) float32: centre x, centre y, width, height in pixels; angle in radians."""
    labels: Tensor = field(default=None)  # type: ignore[assignment]
    """(N,) int64 class of each box; 0 if not given."""
    scores: Tensor = field(default=None)  # type: ignore[assignment]
    """(N,) float32 in [0, 1]; 1 for labels."""
    tracks: Tensor = field(default=None)  # type: ignore[assignment]
    """(N,) int64 identity of the object across frames; -1: not known."""
    ignored: Tensor = field(default=None)  # type: ignore[assignment]
    """(N,) bool: crowd or difficult; neither rewarded nor punished, in loss and metric."""

    def __post_init__(self) -> None:
        geometry = self.geometry
        if geometry.ndim != 2 or geometry.shape[1] != 5:
            raise ValueError(f"boxes have shape (N, 5), not {tuple(geometry.shape)}")
        fills = {
            "labels": (0, torch.int64), "scores": (1, torch.float32),
            "tracks": (-1, torch.int64), "ignored": (False, torch.bool),
        }  # fmt: skip
        for name, (fill, dtype) in fills.items():
            if getattr(self, name) is None:
                value = torch.full((len(geometry),), fill, dtype=dtype, device=geometry.device)
                object.__setattr__(self, name, value)
            elif len(getattr(self, name)) != len(geometry):
                raise ValueError(f"{len(geometry)} boxes, but {len(getattr(self, name))} {name}")

    @classmethod
    def empty(cls) -> Self:
        """No boxes."""
        return cls(torch.zeros(0, 5))

    @classmethod
    def from_corners(cls, corners: Any, **more: Tensor) -> Self:
        """Horizontal boxes from (N, 4) xmin, ymin, xmax, ymax."""
        x = torch.as_tensor(corners, dtype=torch.float32).reshape(-1, 4)
        low, high = x[:, :2], x[:, 2:]
        return cls(torch.cat([(low + high) / 2, high - low, torch.zeros_like(x[:, :1])], 1), **more)

    @classmethod
    def from_polygons(cls, polygons: Any, **more: Tensor) -> Self:
        """The smallest rotated rectangle around each of (N, 4, 2) quadrilaterals."""
        return cls(
            smallest_rectangles(torch.as_tensor(polygons, dtype=torch.float64)).float(), **more
        )

    @classmethod
    def cat(cls, parts: Sequence["Boxes"]) -> Self:
        """All boxes of several groups, in order."""
        if not parts:
            return cls.empty()
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.geometry)

    def __getitem__(self, index: Any) -> Self:
        """The boxes at a mask, slice or index tensor."""
        return type(self)(*(getattr(self, f.name)[index] for f in fields(self)))

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        """The same boxes on a device."""
        moved = (getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self))
        return type(self)(*moved)

    @property
    def area(self) -> Tensor:
        """(N,) square pixels."""
        return self.geometry[:, 2] * self.geometry[:, 3]

    def polygons(self) -> Tensor:
        """(N, 4, 2) corners x, y, clockwise on the screen from the box's own upper left."""
        return corners_of(self.geometry)

    def corners(self) -> Tensor:
        """(N, 4) xmin, ymin, xmax, ymax of the horizontal envelope."""
        return envelopes(self.geometry)

    def horizontal(self) -> Self:
        """The horizontal envelope of each box."""
        low, high = self.corners().chunk(2, 1)
        flat = torch.cat([(low + high) / 2, high - low, torch.zeros_like(low[:, :1])], 1)
        return replace(self, geometry=flat)

    def shifted(self, x: float, y: float) -> Self:
        """Moved by (x, y) pixels."""
        return replace(self, geometry=self.geometry + self.geometry.new_tensor([x, y, 0, 0, 0]))

    def scaled(self, factor: float) -> Self:
        """On a grid with `factor` times as many pixels along each side."""
        scale = self.geometry.new_tensor([factor, factor, factor, factor, 1])
        return replace(self, geometry=self.geometry * scale)

    def mirrored(self, width: float) -> Self:
        """As seen after a left-right flip of an image `width` pixels wide."""
        x, y, w, h, a = self.geometry.unbind(1)
        return replace(self, geometry=torch.stack([width - x, y, w, h, -a], 1))

    def transposed(self) -> Self:
        """As seen after exchanging rows and columns; horizontal boxes stay horizontal."""
        x, y, w, h, a = self.geometry.unbind(1)
        return replace(self, geometry=torch.stack([y, x, h, w, -a], 1))

    def turned(self, k: int, size: float) -> Self:
        """As seen after symmetry k (0..7) of a square image.

        From 4 on mirrored, then k % 4 quarter turns counter-clockwise, as `numpy.rot90`.
        """
        boxes = self.mirrored(size) if k >= 4 else self
        for _ in range(k % 4):
            boxes = boxes.mirrored(size).transposed()
        return boxes

    def visible(self, height: float, width: float) -> Tensor:
        """(N,) share of each box's envelope that lies within an image."""
        low, high = self.corners().chunk(2, 1)
        edge = self.geometry.new_tensor([width, height])
        seen = (high.minimum(edge) - low.clamp(min=0)).clamp(min=0).prod(1)
        return seen / (high - low).prod(1).clamp(min=1e-9)

    def cut(self, height: float, width: float) -> Self:
        """Horizontal boxes cut at the border of an image; rotated ones keep their shape."""
        low, high = self.corners().chunk(2, 1)
        edge = self.geometry.new_tensor([width, height])
        low, high = low.clamp(min=0).minimum(edge), high.clamp(min=0).minimum(edge)
        flat = torch.cat([(low + high) / 2, high - low, torch.zeros_like(low[:, :1])], 1)
        straight = self.geometry[:, 4:] == 0
        return replace(self, geometry=torch.where(straight, flat, self.geometry))

    def inside(self, height: float, width: float, visible: float = 0.5) -> Self:
        """The boxes of which an image shows at least a share `visible`, cut at its border."""
        share = self.visible(height, width)
        return self[(share >= visible) & (share > 0)].cut(height, width)


def corners_of(geometry: Tensor) -> Tensor:
    """(..., 5) boxes -> (..., 4, 2) corners, clockwise on the screen."""
    centre, size, angle = geometry[..., :2], geometry[..., 2:4], geometry[..., 4]
    signs = geometry.new_tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    local = signs * size[..., None, :]  # (..., 4, 2)
    return turn(local, angle[..., None]) + centre[..., None, :]


def turn(points: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 2) turned by an angle (...) from +x towards +y."""
    x, y, c, s = points[..., 0], points[..., 1], angle.cos(), angle.sin()
    return torch.stack([c * x - s * y, s * x + c * y], -1)


def envelopes(geometry: Tensor) -> Tensor:
    """(N, 5) boxes -> (N, 4) xmin, ymin, xmax, ymax."""
    w, h, a = geometry[:, 2:].unbind(1)
    c, s = a.cos().abs(), a.sin().abs()
    half = torch.stack([c * w + s * h, s * w + c * h], 1) / 2
    return torch.cat([geometry[:, :2] - half, geometry[:, :2] + half], 1)


def smallest_rectangles(quads: Tensor) -> Tensor:
    """(N, 4, 2) quadrilaterals of any corner order -> (N, 5) smallest enclosing rectangles.

    The smallest rectangle has a side along an edge of the convex hull, and every such edge is
    one of the six lines through two of the corners.
    """
    first, second = torch.triu_indices(4, 4, 1)
    along = quads[:, second] - quads[:, first]  # (N, 6, 2)
    angle = torch.atan2(along[..., 1], along[..., 0])  # (N, 6)
    local = turn(quads[:, None], -angle[..., None])  # (N, 6, 4, 2)
    low, high = local.amin(2), local.amax(2)
    best = (high - low).prod(-1).argmin(1)
    row = torch.arange(len(quads), device=quads.device)
    low, high, angle = low[row, best], high[row, best], angle[row, best]
    centre = turn((low + high) / 2, angle)
    return canonical(torch.cat([centre, high - low, angle[:, None]], 1))


def canonical(geometry: Tensor) -> Tensor:
    """The same rectangles with width >= height and the angle in [-π/2, π/2)."""
    x, y, w, h, a = geometry.unbind(1)
    tall = h > w
    a = torch.where(tall, a + math.pi / 2, a)
    a = torch.remainder(a + math.pi / 2, math.pi) - math.pi / 2
    return torch.stack([x, y, torch.where(tall, h, w), torch.where(tall, w, h), a], 1)


def pair_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area shared by each pair of boxes, (..., 5) and (..., 5) -> (...); differentiable.

    The outline of the common polygon is what of a's edges lies in b and what of b's edges lies
    in a; half the sum of cross products along it is the area (Green's theorem).
    """
    dtype, a, b = a.dtype, a.double(), b.double()
    origin = a[..., :2].detach()
    a = torch.cat([a[..., :2] - origin, a[..., 2:]], -1)
    b = torch.cat([b[..., :2] - origin, b[..., 2:4] * (1 + MARGIN), b[..., 4:]], -1)
    return (edges_inside(a, b) + edges_inside(b, a)).clamp(min=0).to(dtype)


def edges_inside(a: Tensor, b: Tensor) -> Tensor:
    """Half the sum of cross products over the parts of a's edges that lie in b (Liang-Barsky)."""
    start = corners_of(a)  # (..., 4, 2)
    along = start.roll(-1, -2) - start
    angle = -b[..., None, 4]
    p, d = turn(start - b[..., None, :2], angle), turn(along, angle)  # in the frame of b
    d = torch.where(d.abs() < 1e-12, torch.full_like(d, 1e-12), d)
    half = b[..., None, 2:4] / 2
    one, two = (-half - p) / d, (half - p) / d
    enter = torch.minimum(one, two).amax(-1).clamp(0, 1)  # (..., 4)
    leave = torch.maximum(one, two).amin(-1).clamp(0, 1)
    leave = torch.maximum(enter, leave)
    q, r = start + enter[..., None] * along, start + leave[..., None] * along
    return (q[..., 0] * r[..., 1] - q[..., 1] * r[..., 0]).sum(-1) / 2


def pair_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of each pair, (..., 5) and (..., 5) -> (...); differentiable."""
    both = pair_intersection(a, b)
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - both
    return (both / union.clamp(min=1e-9)).clamp(max=1)


def flat_pair_iou(a: Tensor, b: Tensor) -> Tensor:
    """`pair_iou` of pairs known to be horizontal, several times cheaper."""
    low = torch.maximum(a[..., :2] - a[..., 2:4] / 2, b[..., :2] - b[..., 2:4] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:4] / 2, b[..., :2] + b[..., 2:4] / 2)
    both = (high - low).clamp(min=0).prod(-1)
    union = a[..., 2:4].prod(-1) + b[..., 2:4].prod(-1) - both
    return both / union.clamp(min=1e-9)


def iou_matrix(a: Boxes, b: Boxes) -> Tensor:
    """(N, M) intersection over union; the polygons meet only where the envelopes do."""
    flat = not (a.geometry[:, 4].any() or b.geometry[:, 4].any())
    if flat:
        return flat_pair_iou(a.geometry[:, None], b.geometry[None])
    row, col = torch.nonzero(envelopes_meet(a.corners()[:, None], b.corners()[None]), as_tuple=True)
    out = a.geometry.new_zeros(len(a), len(b))
    out[row, col] = in_chunks(a.geometry, b.geometry, row, col)
    return out


def envelopes_meet(a: Tensor, b: Tensor) -> Tensor:
    """Whether envelopes (..., 4) share some area."""
    return ((a[..., :2] < b[..., 2:]) & (b[..., :2] < a[..., 2:])).all(-1)


def in_chunks(a: Tensor, b: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """`pair_iou` of the listed pairs in bounded memory."""
    parts = [
        pair_iou(a[i], b[j])
        for i, j in zip(torch.split(row, PAIR_CHUNK), torch.split(col, PAIR_CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0)


def meeting_pairs(boxes: Boxes) -> tuple[Tensor, Tensor]:
    """All pairs i < j of one group whose envelopes share some area, found by a sweep along x.

    Memory follows the number of pairs that meet, not its square, so that a whole scene fits.
    """
    envelope = boxes.corners()
    order = envelope[:, 0].argsort()
    left = envelope[order, 0].contiguous()
    last = torch.searchsorted(left, envelope[order, 2].contiguous())  # first that starts beyond
    count = (last - torch.arange(len(boxes), device=left.device) - 1).clamp(min=0)
    found = [torch.zeros(2, 0, dtype=torch.int64, device=left.device)]
    for rows in chunks_of(count):
        first = torch.repeat_interleave(rows, count[rows])
        start = torch.repeat_interleave(count[rows].cumsum(0) - count[rows], count[rows])
        second = first + 1 + torch.arange(len(first), device=left.device) - start
        pair = torch.stack([order[first], order[second]])
        found.append(pair[:, envelopes_meet(envelope[pair[0]], envelope[pair[1]])])
    pairs = torch.cat(found, 1)
    return pairs.amin(0), pairs.amax(0)


def chunks_of(count: Tensor) -> list[Tensor]:
    """Consecutive row numbers, cut where the running sum of `count` passes a chunk of pairs."""
    group = torch.div(count.cumsum(0) - count, PAIR_CHUNK, rounding_mode="floor")
    rows = torch.arange(len(count), device=count.device)
    sizes = torch.unique_consecutive(group, return_counts=True)[1]
    return list(torch.split(rows, sizes.tolist())) if len(count) else []


def suppress(boxes: Boxes, threshold: float = 0.5, by_class: bool = True) -> Boxes:
    """Greedy non-maximum suppression: best first, drop what overlaps a kept box by more.

    Args:
        boxes: any number, horizontal or rotated.
        threshold: intersection over union above which the weaker box goes.
        by_class: compare boxes of the same class only.

    Returns:
        The kept boxes, best first; ties keep their order.
    """
    boxes = boxes[boxes.scores.argsort(descending=True, stable=True)]
    row, col = meeting_pairs(boxes)
    if by_class:
        same = boxes.labels[row] == boxes.labels[col]
        row, col = row[same], col[same]
    close = in_chunks(boxes.geometry, boxes.geometry, row, col) > threshold
    row, col = row[close], col[close]
    order = row.argsort()
    keep = [True] * len(boxes)
    for i, j in zip(row[order].tolist(), col[order].tolist(), strict=True):
        if keep[i]:
            keep[j] = False
    return boxes[torch.tensor(keep, dtype=torch.bool, device=boxes.geometry.device)]
