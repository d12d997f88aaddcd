"""A grid is one value: shape, coordinate system and the way from pixels to the ground."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import hypot
from typing import Any, NamedTuple, Self

import numpy as np

Transform = tuple[float, float, float, float, float, float]
"""Affine coefficients a, b, c, d, e, f: x = a·col + b·row + c, y = d·col + e·row + f."""

IDENTITY: Transform = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class Window(NamedTuple):
    """A rectangle of pixels; it may hang over the edges of its grid."""

    row: int
    col: int
    height: int
    width: int


class ControlPoint(NamedTuple):
    """A ground control point: this pixel lies at these coordinates."""

    row: float
    col: float
    x: float
    y: float
    z: float = 0.0


@dataclass(frozen=True)
class Grid:
    """Where the pixels of a scene lie. Everything here is pure arithmetic."""

    height: int
    """Rows."""
    width: int
    """Columns."""
    crs: str | None = None
    """WKT of the coordinate system; of the control points where those place the scene."""
    transform: Transform = IDENTITY
    """Pixel corner to ground; the identity where nothing places the scene, or points do."""
    gcps: tuple[ControlPoint, ...] = ()
    """Ground control points, if the scene has no transform."""
    rpcs: Mapping[str, str] | None = field(default=None, hash=False)
    """Rational polynomial coefficients in GDAL's names, if the scene has them."""
    pixel_is_point: bool = False
    """The file says its coordinates belong to pixel centres (GDAL has moved them already)."""

    @property
    def has_transform(self) -> bool:
        """Whether an affine transform places the scene."""
        return self.transform != IDENTITY

    @property
    def is_rectilinear(self) -> bool:
        """Whether rows and columns run along x and y (no rotation, no control points)."""
        _, b, _, d, _, _ = self.transform
        return self.has_transform and b == 0 and d == 0

    @property
    def is_placed(self) -> bool:
        """Whether the scene lies somewhere known on the ground."""
        return (self.has_transform and self.crs is not None) or bool(self.gcps)

    def xy(self, row: Any, col: Any) -> tuple[Any, Any]:
        """Ground coordinates of pixel positions; (0, 0) is the outer corner of the first pixel."""
        a, b, c, d, e, f = self.transform
        return a * col + b * row + c, d * col + e * row + f

    def rowcol(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Inverse of `xy`: fractional (row, col).

        Raises:
            ValueError: if the transform is degenerate.
        """
        a, b, c, d, e, f = self.transform
        det = a * e - b * d
        if det == 0:
            raise ValueError(f"transform {self.transform} maps all pixels onto a line")
        dx, dy = x - c, y - f
        return (a * dy - d * dx) / det, (e * dx - b * dy) / det

    def crop(self, window: Window) -> Self:
        """The grid of a window, which may hang over the edges."""
        x, y = self.xy(window.row, window.col)
        a, b, _, d, e, _ = self.transform
        moved = (a, b, float(x), d, e, float(y)) if self.has_transform else IDENTITY
        gcps = tuple(p._replace(row=p.row - window.row, col=p.col - window.col) for p in self.gcps)
        rpcs = shifted_rpcs(self.rpcs, window.row, window.col) if self.rpcs else self.rpcs
        return replace(
            self, height=window.height, width=window.width, transform=moved, gcps=gcps, rpcs=rpcs
        )

    def resized(self, height: int, width: int) -> Self:
        """The same ground with other pixels."""
        rows, cols = self.height / height, self.width / width
        a, b, c, d, e, f = self.transform
        scaled = (a * cols, b * rows, c, d * cols, e * rows, f)
        gcps = tuple(p._replace(row=p.row / rows, col=p.col / cols) for p in self.gcps)
        return replace(
            self,
            height=height,
            width=width,
            transform=scaled if self.has_transform else IDENTITY,
            gcps=gcps,
            rpcs=scaled_rpcs(self.rpcs, rows, cols) if self.rpcs else self.rpcs,
        )

    def windows(self, size: int, stride: int | None = None) -> Iterator[Window]:
        """Square windows that cover the scene, row by row from its origin.

        The last ones of a row or column may hang over the edge; readers pad them. Where stride
        is larger than size there are gaps; the default stride is size.

        Raises:
            ValueError: for a size or stride below 1.
        """
        step = size if stride is None else stride
        if size < 1 or step < 1:
            raise ValueError(f"window size {size} and stride {step} must be at least 1")
        for row in starts(self.height, size, step):
            for col in starts(self.width, size, step):
                yield Window(row, col, size, size)

    def clip(self, window: Window) -> Window:
        """The part of a window inside the scene (height or width 0 if there is none)."""
        top, left = max(window.row, 0), max(window.col, 0)
        bottom = min(window.row + window.height, self.height)
        right = min(window.col + window.width, self.width)
        return Window(top, left, max(bottom - top, 0), max(right - left, 0))

    @property
    def gsd(self) -> float | None:
        """Ground sampling distance in metres at the middle of the scene; None if unknown."""
        middle = (self.height / 2, self.width / 2)
        if self.has_transform:
            a, b, _, d, e, _ = self.transform
            steps = ((a, d), (b, e))
            position = self.xy(*middle)
        elif len(self.gcps) >= 3:
            steps, position = fitted_steps(self.gcps, middle)
        else:
            return None
        return metres(self.crs, steps, position) if self.crs else None


def starts(length: int, size: int, step: int) -> range:
    """First pixels of the windows along one axis: as few as cover it."""
    count = 1 if length <= size else -(-(length - size) // step) + 1
    return range(0, count * step, step)


def fitted_steps(
    points: tuple[ControlPoint, ...], at: tuple[float, float]
) -> tuple[tuple[tuple[float, float], tuple[float, float]], tuple[float, float]]:
    """Least-squares affine through control points: (per column, per row) steps, and a position."""
    design = np.array([(p.col, p.row, 1.0) for p in points])
    ground = np.array([(p.x, p.y) for p in points])
    (per_col, per_row, origin), *_ = np.linalg.lstsq(design, ground, rcond=None)
    x, y = at[1] * per_col + at[0] * per_row + origin
    steps = ((float(per_col[0]), float(per_col[1])), (float(per_row[0]), float(per_row[1])))
    return steps, (float(x), float(y))


def metres(
    crs: str,
    steps: tuple[tuple[float, float], tuple[float, float]],
    position: tuple[float, float],
) -> float | None:
    """Mean length in metres of one step along columns and rows; None for unknown systems."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    try:
        system = CRS.from_user_input(crs)
    except CRSError:
        return None
    if system.is_geographic:
        geod = system.get_geod()
        if geod is None:
            return None
        x, y = position
        y = min(max(y, -89.9), 89.9)
        lengths = [geod.inv(x, y, x + dx, y + dy)[2] for dx, dy in steps]
    else:
        unit = system.axis_info[0].unit_conversion_factor if system.axis_info else 1.0
        lengths = [hypot(dx, dy) * unit for dx, dy in steps]
    return float(sum(lengths) / len(lengths))


def shifted_rpcs(rpcs: Mapping[str, str], row: int, col: int) -> dict[str, str]:
    """RPCs of an image that starts at this pixel of the original."""
    moved = dict(rpcs)
    moved["LINE_OFF"] = str(float(rpcs["LINE_OFF"]) - row)
    moved["SAMP_OFF"] = str(float(rpcs["SAMP_OFF"]) - col)
    return moved


def scaled_rpcs(rpcs: Mapping[str, str], rows: float, cols: float) -> dict[str, str]:
    """RPCs of an image whose pixels are `rows` × `cols` original ones (centres at integers)."""
    scaled = dict(rpcs)
    for axis, factor in (("LINE", rows), ("SAMP", cols)):
        scaled[f"{axis}_OFF"] = str((float(rpcs[f"{axis}_OFF"]) + 0.5) / factor - 0.5)
        scaled[f"{axis}_SCALE"] = str(float(rpcs[f"{axis}_SCALE"]) / factor)
    return scaled
