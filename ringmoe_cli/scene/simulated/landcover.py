"""The simulated ground: relief, lakes and rivers, woods, fields, towns, and what changes later."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.simulated.spectra import (
    ASPHALT,
    BROADLEAF,
    CLEAR_WATER,
    CONIFERS,
    DARK_SOIL,
    DRY_GRASS,
    GARDEN,
    GREEN_CEREAL,
    LIGHT_SOIL,
    MAIZE,
    MEADOW,
    RIPE_CEREAL,
    ROOF,
    TURBID_WATER,
)

Floats = NDArray[np.float32]

FIELD_SURFACES = (MEADOW, DRY_GRASS, GREEN_CEREAL, MAIZE, RIPE_CEREAL, DARK_SOIL, LIGHT_SOIL)
FIELD_SHARES = (0.24, 0.14, 0.19, 0.13, 0.12, 0.10, 0.08)
FIELD_CELL = (44.0, 28.0)
"""Mean size of a field in pixels."""
BLOCK_CELL = (16.0, 13.0)
"""Size of a town block in pixels, its streets included."""
STREET = 2.5
"""Width of a street in pixels."""


@dataclass(frozen=True)
class Ground:
    """Everything that lies on the ground, on one pixel grid."""

    surfaces: NDArray[np.uint8]
    """(H, W) index into `SURFACES`."""
    surfaces_after: NDArray[np.uint8]
    """(H, W) the same at the second date: rotated crops, felled woods, a grown town."""
    fields: NDArray[np.int32]
    """(H, W) number of the field a pixel would belong to."""
    terrain: Floats
    """(H, W) terrain height in metres."""
    objects: Floats
    """(H, W) height of trees and buildings above the terrain, in metres."""
    shading: Floats
    """(H, W) slope towards the sun, a field of mean 0 and variance 1."""
    buildings: Floats
    """(N, 5) buildings as x, y of the centre, width, height in pixels, angle in radians."""


def make_ground(seed: int, shape: tuple[int, int]) -> Ground:
    """Lay out a landscape; the same seed and shape give the same ground."""

    def rng(part: int) -> np.random.Generator:
        return np.random.default_rng([seed, part])

    relief = 0.9 * smooth_field(rng(0), shape, 70) + 0.4 * smooth_field(rng(1), shape, 22)
    stream = distance_to_contour(smooth_field(rng(2), shape, 60))
    fields, field_random = field_map(rng(3), shape)
    town = Town.plan(rng(4), shape)

    water = (relief < np.quantile(relief, 0.10)) | (stream < 4.5)
    turbid = smooth_field(rng(5), shape, 25) > 0
    wooded = smooth_field(rng(6), shape, 26) + 0.5 * relief
    conifers = smooth_field(rng(7), shape, 30) > 0.3
    urban = smooth_field(rng(8), shape, 32) - 0.4 * relief
    felled = smooth_field(rng(9), shape, 12) > 1.4

    def lay(field_draw: Floats, town_share: float, felling: bool) -> NDArray[np.uint8]:
        picked = np.searchsorted(np.cumsum(FIELD_SHARES), field_draw[fields], side="right")
        surfaces = np.array(FIELD_SURFACES, np.uint8)[np.minimum(picked, len(FIELD_SURFACES) - 1)]
        wood = wooded > np.quantile(wooded, 0.76)
        surfaces[wood] = np.where(conifers, CONIFERS, BROADLEAF)[wood]
        if felling:
            surfaces[wood & felled] = DARK_SOIL
        built = urban > np.quantile(urban, 1 - town_share)
        surfaces[built] = town.surfaces[built]
        surfaces[water] = np.where(turbid, TURBID_WATER, CLEAR_WATER)[water]
        return surfaces

    rotated = rng(10).random(len(field_random)) < 0.2
    later = np.where(rotated, rng(11).random(len(field_random)), field_random)
    surfaces = lay(field_random, 0.13, felling=False)
    surfaces_after = lay(later.astype(np.float32), 0.16, felling=True)
    terrain = 120 + 45 * relief - 12 * np.exp(-((stream / 30) ** 2))
    slope = np.gradient(relief, axis=1) + np.gradient(relief, axis=0)
    return Ground(
        surfaces=surfaces,
        surfaces_after=surfaces_after,
        fields=fields,
        terrain=terrain.astype(np.float32),
        objects=object_heights(rng(12), surfaces, town),
        shading=(slope / slope.std()).astype(np.float32),
        buildings=town.standing(surfaces == ROOF),
    )


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Floats:
    """A Gaussian random field of mean 0 and variance 1.

    Args:
        rng: source of the draws.
        shape: (H, W) of the result.
        scale: standard deviation in pixels of the Gaussian that smooths the white noise; the
            correlation length is about 1.4 times this.
    """
    margin = int(np.ceil(3 * scale))
    padded = tuple(fast_length(side + margin) for side in shape)
    white = rng.standard_normal(padded, np.float32)
    rows, columns = np.fft.fftfreq(padded[0]), np.fft.rfftfreq(padded[1])
    response = np.exp(-2 * (np.pi * scale) ** 2 * (rows[:, None] ** 2 + columns[None] ** 2))
    field = np.fft.irfft2(np.fft.rfft2(white) * response, padded)
    full = np.exp(-4 * (np.pi * scale) ** 2 * (rows[:, None] ** 2 + np.fft.fftfreq(padded[1]) ** 2))
    unit: Floats = (field[: shape[0], : shape[1]] / np.sqrt(full.mean())).astype(np.float32)
    return unit


def fast_length(length: int) -> int:
    """The next multiple of 32: lengths that the FFT likes."""
    return -(-length // 32) * 32


def distance_to_contour(field: Floats) -> Floats:
    """Approximate distance in pixels to the field's zero contour: a winding line without ends."""
    down, across = np.gradient(field)
    distance: Floats = np.abs(field) / np.maximum(np.hypot(down, across), 1e-6)
    return distance


def rotate(shape: tuple[int, int], angle: float) -> tuple[Floats, Floats]:
    """Pixel-centre coordinates turned by an angle in radians: (u, v), each (H, W)."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) + np.float32(0.5)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def field_map(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[NDArray[np.int32], Floats]:
    """Fields as cells around jittered lattice points, in two directions of ploughing.

    Returns:
        (H, W) field numbers, and one uniform draw in [0, 1) per field.
    """
    angles = rng.uniform(0, np.pi / 2, 2)
    first = smooth_field(rng, shape, 80) > 0
    numbers = np.where(first, *(lattice_cells(rng, shape, angle) for angle in angles))
    used, fields = np.unique(np.stack([numbers, first]).reshape(2, -1), axis=1, return_inverse=True)
    draws = rng.random((used.shape[1],), np.float32)
    return fields.reshape(shape).astype(np.int32), draws


def lattice_cells(
    rng: np.random.Generator, shape: tuple[int, int], angle: float
) -> NDArray[np.int64]:
    """Number of the nearest point of a jittered, turned lattice, for every pixel."""
    u, v = (axis / cell for axis, cell in zip(rotate(shape, angle), FIELD_CELL, strict=True))
    left, top = int(np.floor(u.min())) - 1, int(np.floor(v.min())) - 1
    count = int(np.floor(v.max())) - top + 3
    jitter = rng.uniform(0.15, 0.85, (int(np.floor(u.max())) - left + 3, count, 2))
    column, row = np.floor(u).astype(int) - left, np.floor(v).astype(int) - top
    best, nearest = np.full(shape, np.inf), np.zeros(shape, np.int64)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            c, r = column + i, row + j
            point = jitter[c, r]
            distance = (c + left + point[..., 0] - u) ** 2 + (r + top + point[..., 1] - v) ** 2
            closer = distance < best
            best = np.where(closer, distance, best)
            nearest = np.where(closer, c * count + r, nearest)
    return nearest


@dataclass(frozen=True)
class Town:
    """A street grid with one building per block, laid over the whole scene."""

    surfaces: NDArray[np.uint8]
    """(H, W) street, roof or garden."""
    numbers: NDArray[np.int64]
    """(H, W) block of each pixel."""
    boxes: Floats
    """(blocks, 5) its building: x, y, width, height, angle."""

    @classmethod
    def plan(cls, rng: np.random.Generator, shape: tuple[int, int]) -> "Town":
        """Draw streets and buildings."""
        angle = float(rng.uniform(0, np.pi / 2))
        axes = rotate(shape, angle)
        starts = [
            int(np.floor(axis.min() / cell)) for axis, cell in zip(axes, BLOCK_CELL, strict=True)
        ]
        cells = [
            np.floor(axis / cell).astype(np.int64) - start
            for axis, cell, start in zip(axes, BLOCK_CELL, starts, strict=True)
        ]
        counts = [int(cell.max()) + 1 for cell in cells]
        numbers = cells[0] * counts[1] + cells[1]
        index = np.indices(counts).reshape(2, -1)
        sizes, centres = [], []
        for axis, cell in enumerate(BLOCK_CELL):
            room = cell - STREET
            size = rng.uniform(0.45, 0.85, index.shape[1]) * room
            slack = room - size
            offset = STREET + size / 2 + slack * rng.random(index.shape[1])
            sizes.append(size)
            centres.append((index[axis] + starts[axis]) * cell + offset)
        inside = [
            np.abs(axis - centre[numbers]) <= size[numbers] / 2
            for axis, centre, size in zip(axes, centres, sizes, strict=True)
        ]
        street = [
            axis - np.floor(axis / cell) * cell < STREET
            for axis, cell in zip(axes, BLOCK_CELL, strict=True)
        ]
        surfaces = np.full(shape, GARDEN, np.uint8)
        surfaces[inside[0] & inside[1]] = ROOF
        surfaces[street[0] | street[1]] = ASPHALT
        cosine, sine = np.cos(angle), np.sin(angle)
        x = centres[0] * cosine - centres[1] * sine
        y = centres[0] * sine + centres[1] * cosine
        boxes = np.stack([x, y, *sizes, np.full_like(x, angle)], axis=1).astype(np.float32)
        return cls(surfaces, numbers, boxes)

    def standing(self, roofs: NDArray[np.bool_]) -> Floats:
        """(N, 5) buildings of which at least 80 % are really there."""
        blocks = len(self.boxes)
        seen = np.bincount(self.numbers[roofs], minlength=blocks)
        area = self.boxes[:, 2] * self.boxes[:, 3]
        return self.boxes[seen >= 0.8 * area]


def object_heights(rng: np.random.Generator, surfaces: NDArray[np.uint8], town: Town) -> Floats:
    """Metres above the terrain: trees vary smoothly, buildings are flat."""
    trees = 14 + 4 * smooth_field(rng, (surfaces.shape[0], surfaces.shape[1]), 3)
    storeys = rng.integers(1, 6, len(town.boxes))[town.numbers] * 3.2
    wooded = (surfaces == BROADLEAF) | (surfaces == CONIFERS)
    heights = np.where(wooded, np.maximum(trees, 2), np.where(surfaces == ROOF, storeys, 0))
    return heights.astype(np.float32)
