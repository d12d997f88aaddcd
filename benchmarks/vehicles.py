"""Simulated satellite video: small vehicles on roads, moving and parked, as MOTChallenge clips.

Nothing of it is fitted to any real clip: sizes, speeds and contrasts cover what vehicles of five
to ten pixels can look like at one to two frames per second.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

Floats = NDArray[np.float64]


def texture(rng: np.random.Generator, size: int) -> Floats:
    """Ground with structure at all scales, mean 60, deviation 15."""
    layers = (gaussian_filter(rng.normal(size=(size, size)), s) * s for s in (1, 2, 4, 8, 16, 32))
    ground = sum(layer / layer.std() for layer in layers)
    assert isinstance(ground, np.ndarray)
    return np.asarray(60 + 15 * ground / ground.std(), float)


def stamp(image: Floats, x: float, y: float, box: tuple[float, float, float], value: float) -> None:
    """Draw a soft-edged rotated rectangle in place."""
    length, width, angle = box
    reach = math.ceil(length) + 2
    x0, y0 = max(int(x) - reach, 0), max(int(y) - reach, 0)
    part = image[y0 : int(y) + reach, x0 : int(x) + reach]
    if not part.size:
        return
    rows, cols = np.mgrid[0 : part.shape[0], 0 : part.shape[1]] + 0.5
    u = math.cos(angle) * (cols + x0 - x) + math.sin(angle) * (rows + y0 - y)
    v = math.cos(angle) * (rows + y0 - y) - math.sin(angle) * (cols + x0 - x)
    inside = np.clip(length / 2 - abs(u) + 0.5, 0, 1) * np.clip(width / 2 - abs(v) + 0.5, 0, 1)
    part += inside * (value - part)


def clip(folder: Path, seed: int, frames: int = 6, size: int = 256) -> None:
    """One clip: `img1/000001.png` …, `gt/gt.txt`."""
    rng = np.random.default_rng(seed)
    ground = texture(rng, size)
    vehicles = []
    for _ in range(rng.integers(2, 5)):
        vehicles += road(rng, ground, size)
    for _ in range(rng.integers(0, 3)):
        parking(rng, ground, size)
    clutter(rng, ground, size)
    (folder / "img1").mkdir(parents=True, exist_ok=True)
    (folder / "gt").mkdir(exist_ok=True)
    rows = []
    for t in range(frames):
        image = ground.copy()
        for track, (x, y, vx, vy, box, value) in enumerate(vehicles, 1):
            cx, cy = x + vx * t, y + vy * t
            if 2 <= cx < size - 2 and 2 <= cy < size - 2:
                stamp(image, cx, cy, box, value)
                rows.append(f"{t + 1},{track},{cx - 4.5:.2f},{cy - 4.5:.2f},9,9,1,1,1")
        shifted = shift(image, rng.normal(0, 0.4, 2), order=1, mode="nearest")
        noisy = gaussian_filter(shifted, 0.5) * rng.normal(1, 0.02) + rng.normal(0, 2, image.shape)
        grey = np.clip(noisy, 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(folder / "img1" / f"{t + 1:06d}.png")
    (folder / "gt" / "gt.txt").write_text("\n".join(rows) + "\n")


def road(rng: np.random.Generator, ground: Floats, size: int) -> list[tuple]:  # type: ignore[type-arg]
    """Draw a road with two lanes; the vehicles on it, each with its own speed."""
    angle, x, y = rng.uniform(0, math.pi), *rng.uniform(0.2 * size, 0.8 * size, 2)
    shade, width = rng.uniform(45, 90), rng.uniform(8, 18)
    stamp(ground, x, y, (3 * size, width, angle), shade)
    vehicles = []
    for lane in (-1, 1):
        along = -size + rng.uniform(0, 40)
        while along < size:
            speed = lane * (rng.uniform(0, 3) if rng.random() < 0.15 else rng.uniform(5, 20))
            off = lane * width / 4
            px = x + along * math.cos(angle) - off * math.sin(angle)
            py = y + along * math.sin(angle) + off * math.cos(angle)
            box = (rng.uniform(4.5, 9), rng.uniform(2.2, 4), angle)
            value = shade + rng.choice([-1, 1]) * rng.uniform(18, 110)
            vx, vy = speed * math.cos(angle), speed * math.sin(angle)
            vehicles.append((px, py, vx, vy, box, max(value, 5)))
            along += rng.uniform(14, 90)
    return vehicles


def clutter(rng: np.random.Generator, ground: Floats, size: int) -> None:
    """Bushes, signs, roof edges: what looks like a vehicle in one frame and never moves."""
    for _ in range(rng.integers(50, 250)):
        x, y = rng.uniform(0, size, 2)
        box = (rng.uniform(2, 12), rng.uniform(2, 5), rng.uniform(0, math.pi))
        here = ground[min(int(y), size - 1), min(int(x), size - 1)]
        stamp(ground, x, y, box, max(5.0, here + rng.choice([-1, 1]) * rng.uniform(15, 80)))


def parking(rng: np.random.Generator, ground: Floats, size: int) -> None:
    """Rows of parked vehicles and a roof: what does not move has no label."""
    angle, x, y = rng.uniform(0, math.pi), *rng.uniform(0.2 * size, 0.8 * size, 2)
    stamp(
        ground, x, y + 40, (rng.uniform(20, 60), rng.uniform(15, 30), angle), rng.uniform(60, 200)
    )
    for row in range(rng.integers(1, 4)):
        for column in range(rng.integers(4, 14)):
            px = x + column * 5 * math.cos(angle) - row * 14 * math.sin(angle)
            py = y + column * 5 * math.sin(angle) + row * 14 * math.cos(angle)
            if rng.random() < 0.8:
                box = (rng.uniform(5, 8), rng.uniform(2.5, 4), angle + math.pi / 2)
                stamp(ground, px, py, box, rng.uniform(10, 200))
