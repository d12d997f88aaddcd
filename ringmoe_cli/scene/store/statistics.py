"""Statistics of a scene in physical units, gathered region by region and merged exactly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import fsum, sqrt
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.radiometry import span_db, to_physical
from ringmoe_cli.scene.scene import Scene

POWER = "power_db"
"""Name under which sar-l1 scenes hold the statistics of their total power."""


@dataclass(frozen=True)
class Moments:
    """Count, sum, sum of squares and range of one channel."""

    count: int
    """Valid pixels."""
    total: float
    """Sum."""
    squares: float
    """Sum of squares."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""

    @property
    def mean(self) -> float:
        """Mean over valid pixels (0 if there are none)."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation (0 if there are no valid pixels)."""
        if not self.count:
            return 0.0
        return sqrt(max(self.squares / self.count - self.mean**2, 0.0))

    @property
    def rms(self) -> float:
        """Root mean square."""
        return sqrt(self.squares / self.count) if self.count else 0.0

    def to_list(self) -> list[float]:
        """For the manifest: exact, since JSON keeps a float's shortest round-trip form."""
        return list(asdict(self).values())

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """The moments of several regions together; independent of their order."""
        kept = [p for p in parts if p.count]
        if not kept:
            return cls(0, 0.0, 0.0, 0.0, 0.0)
        return cls(
            sum(p.count for p in kept),
            fsum(p.total for p in kept),
            fsum(p.squares for p in kept),
            min(p.low for p in kept),
            max(p.high for p in kept),
        )


def moments_of(values: NDArray[Any]) -> Moments:
    """Moments of a flat array, in float64."""
    if not values.size:
        return Moments(0, 0.0, 0.0, 0.0, 0.0)
    total = squares = 0.0
    for start in range(0, values.size, BLOCK):
        part = values[start : start + BLOCK].astype(np.float64)
        total += float(part.sum())
        squares += float(np.einsum("i,i->", part, part))  # a BLAS would start threads of its own
    return Moments(values.size, total, squares, float(values.min()), float(values.max()))


BLOCK = 2**16
"""Values converted to float64 at a time: they stay in the cache."""


def region_moments(raw: NDArray[Any], valid: NDArray[np.bool_], scene: Scene) -> list[Moments]:
    """Moments of every physical channel over the valid pixels, sar-l1 with its power last.

    Raw counts of optical bands are summed as they are and scaled afterwards. Polarisations that
    were not measured are zero and cost nothing.
    """
    measured = [i for i, b in enumerate(scene.bands) if b.measured]
    if len(measured) < len(scene.bands):
        part = replace(scene, bands=tuple(scene.bands[i] for i in measured))
        known = region_moments(raw[measured], valid, part)
        named = dict(zip(channel_keys(part), known, strict=True))
        nothing = Moments(int(np.count_nonzero(valid)), 0.0, 0.0, 0.0, 0.0)
        return [named.get(k, nothing) for k in channel_keys(scene)]
    linear = scene.quantity in ("dn", "reflectance", "coherency")
    channels = raw if linear else to_physical(raw, scene)
    everything = bool(valid.all())
    found = [moments_of(c.ravel() if everything else c[valid]) for c in channels]
    if linear:
        found = [rescaled(m, b.scale, b.offset) for m, b in zip(found, scene.bands, strict=True)]
    if scene.modality == "sar-l1":
        power = span_db(to_physical(raw, scene) if linear else channels, scene)
        found.append(moments_of(power.ravel() if everything else power[valid]))
    return found


def rescaled(m: Moments, scale: float, offset: float) -> Moments:
    """Moments of x · scale + offset."""
    ends = sorted((m.low * scale + offset, m.high * scale + offset))
    squares = scale**2 * m.squares + 2 * scale * offset * m.total + m.count * offset**2
    if not m.count:
        return m
    return Moments(m.count, m.total * scale + m.count * offset, squares, ends[0], ends[1])


def channel_keys(scene: Scene) -> tuple[str, ...]:
    """Names that belong to `region_moments`, in order."""
    return (*scene.channels, POWER) if scene.modality == "sar-l1" else scene.channels


def moments_from(about: Mapping[str, float]) -> Moments:
    """Inverse of `summary` for one channel."""
    count = about["count"]
    return Moments(
        int(count), about["mean"] * count, about["rms"] ** 2 * count, about["min"], about["max"]
    )


def summary(names: Sequence[str], moments: Sequence[Moments]) -> dict[str, dict[str, float]]:
    """What the store's attributes say about each channel."""
    return {
        n: {
            "count": m.count, "mean": m.mean, "std": m.std, "rms": m.rms,
            "min": m.low, "max": m.high,
        }
        for n, m in zip(names, moments, strict=True)
    }  # fmt: skip
