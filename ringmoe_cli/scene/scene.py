"""A scene is one value: its bands, its grid, and what its numbers mean. Nothing is read here."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.errors import SceneError
from ringmoe_cli.scene.grid import Grid

Quantity = Literal["reflectance", "dn", "amplitude", "sigma0", "db", "complex", "coherency"]
"""What a stored number is: scaled reflectance, plain counts, SAR amplitude, linear
backscatter, decibels, complex amplitude, or elements of a coherency or covariance matrix."""


@dataclass(frozen=True)
class Calibration:
    """A calibration table of a radar product: the divisor A at some lines and pixels."""

    lines: tuple[float, ...]
    """Line of each row of the table."""
    pixels: tuple[float, ...]
    """Pixel of each column."""
    values: tuple[tuple[float, ...], ...]
    """A of sigma nought: σ⁰ = |DN|² / A² (Sentinel-1 product specification)."""

    def divisor(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float32]:
        """A at every crossing of these rows and columns, (rows, cols), bilinear."""
        table = np.asarray(self.values, np.float64)
        along = np.stack([np.interp(cols, self.pixels, line) for line in table])  # (lines, cols)
        at = np.interp(rows, self.lines, np.arange(len(self.lines)))
        low = np.minimum(at.astype(np.int64), max(len(self.lines) - 2, 0))
        high = np.minimum(low + 1, len(self.lines) - 1)
        share = (at - low)[:, None]
        values: NDArray[np.float32] = (along[low] * (1 - share) + along[high] * share).astype("f4")
        return values


@dataclass(frozen=True)
class Band:
    """One band of a scene and where its numbers are."""

    name: str
    """Canonical name: red, nir, vv, t11 …"""
    path: str = ""
    """What GDAL opens; empty for a band that was not measured (its values are zero)."""
    index: int = 1
    """Band number in that file; 0 is the file's own mask."""
    wavelength: float | None = None
    """Centre in nm."""
    scale: float = 1.0
    """Physical value = raw · scale + offset (after calibration, if any)."""
    offset: float = 0.0
    nodata: float | None = None
    """Raw value that means no measurement."""
    saturated: float | None = None
    """Raw value that means saturation; such pixels are invalid too."""
    zoom: int = 1
    """Pixels of the scene per pixel of this file, along each axis."""
    calibration: Calibration | None = None
    """Table that turns its counts into σ⁰ or a calibrated complex amplitude."""

    @property
    def measured(self) -> bool:
        """Whether the band is in the file at all."""
        return bool(self.path)


@dataclass(frozen=True)
class Scene:
    """Everything known about a scene before a pixel is read."""

    name: str
    """Short name, from the file's."""
    modality: str
    """opt, ms, sar-l1 or sar-l2."""
    bands: tuple[Band, ...]
    """In the order they are read."""
    grid: Grid
    """Where the pixels lie."""
    dtype: str
    """numpy name of the raw values' type."""
    quantity: Quantity
    """What the raw values are, once scale and offset are applied."""
    mask: Band | None = None
    """An alpha band or the file's own mask: pixels are valid where it is not zero."""
    mask_out: tuple[int, ...] = ()
    """Classes of the mask that are invalid, if it holds classes."""
    corner: tuple[int, int] = (0, 0)
    """Row and column of the files where the scene begins."""
    gsd: float | None = None
    """Ground sampling distance in metres, if known."""
    sensor: str = ""
    """Sensor and product, where the metadata says."""
    date: str = ""
    """Acquisition date, ISO 8601, where the metadata says."""
    named: bool = True
    """False where the file does not name its bands and they are numbered."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know: assumptions, missing channels."""

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of the bands as read."""
        return tuple(b.name for b in self.bands)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the physical channels, see `radiometry.to_physical`."""
        return channel_names(self.band_names, self.quantity, self.modality)

    def select(self, names: Sequence[str]) -> Self:
        """The same scene with these bands, in this order.

        Raises:
            SceneError: if the scene lacks one of them.
        """
        held = {b.name: b for b in self.bands}
        missing = [n for n in names if n not in held]
        if missing:
            raise SceneError(
                f"{self.name} has no band {', '.join(missing)}; "
                f"it has {', '.join(self.band_names)} (name them with --bands)"
            )
        return replace(self, bands=tuple(held[n] for n in names))

    def for_channels(self, wanted: Sequence[str]) -> Self:
        """The same scene with the bands that make these physical channels, in their order.

        Bands without names are taken in order if their number fits.

        Raises:
            SceneError: if the scene cannot make these channels.
        """
        count = len(bands_of_channels(wanted))
        if not self.named and len(self.bands) == count:
            names = bands_of_channels(wanted)
            taken = (replace(b, name=n) for b, n in zip(self.bands, names, strict=True))
            made = replace(self, bands=tuple(taken), named=True)
        else:
            made = self.select(bands_of_channels(wanted))
        if made.channels != tuple(wanted):
            raise SceneError(
                f"{self.name} ({self.quantity}) gives channels {', '.join(made.channels)}, "
                f"but {', '.join(wanted)} are wanted"
            )
        return made


def channel_names(bands: Sequence[str], quantity: str, modality: str) -> tuple[str, ...]:
    """Names of the physical channels that these bands make.

    Complex bands give real and imaginary parts in turn; a co- and cross-polarised pair of
    amplitudes gives its ratio as a third channel, as is common for dual-pol backscatter.
    """
    if quantity == "complex":
        return tuple(f"{b}_{part}" for b in bands for part in ("re", "im"))
    if modality == "sar-l2" and tuple(bands) in (("vv", "vh"), ("hh", "hv")):
        return (*bands, f"{bands[0]}/{bands[1]}")
    return tuple(bands)


def bands_of_channels(channels: Sequence[str]) -> tuple[str, ...]:
    """Inverse of `channel_names`: the bands to read for these channels, in their order."""
    polarised = tuple(c[:-3] for c in channels if c[:-3] in ("hh", "hv", "vh", "vv"))
    if polarised and all(c.endswith(("_re", "_im")) for c in channels):
        return tuple(dict.fromkeys(polarised))
    return tuple(c for c in channels if "/" not in c)
