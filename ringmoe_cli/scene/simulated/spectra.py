"""What the simulated surfaces look like to an optical and to a radar instrument.

Reflectances are rounded means at 490, 560, 660 and 830 nm of the material families in the USGS
Spectral Library Version 7 (Kokaly et al. 2017, doi:10.3133/ds1035) and the ECOSTRESS library
(Meerdink et al. 2019, doi:10.1016/j.rse.2019.05.015). Backscatter is rounded C-band means near 35
degrees of incidence after Ulaby & Dobson 1989 ("Handbook of Radar Scattering Statistics for
Terrain"); co-polar coherence follows the usual reading of Bragg, volume and double-bounce
scattering (Lee & Pottier 2009). They are round numbers of the right size, not measurements.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BANDS = ("blue", "green", "red", "nir")
WAVELENGTHS = (490.0, 560.0, 660.0, 830.0)
"""Band centres in nanometres."""


@dataclass(frozen=True)
class LandCover:
    """A class of the label raster."""

    name: str
    """Name in the legend."""
    colour: tuple[int, int, int]
    """RGB in maps and legends."""


@dataclass(frozen=True)
class Surface:
    """One kind of surface; a class is a mixture of several."""

    name: str
    """What lies there."""
    cover: int
    """Index of its class in `COVERS`."""
    reflectance: tuple[float, float, float, float]
    """Geometric mean reflectance in `BANDS`, in percent."""
    spread: float
    """Standard deviation of log reflectance in every band."""
    correlation: float
    """Of log reflectance between any two bands."""
    common: float
    """Share of that variance that a whole field, wood or lake has in common."""
    backscatter: tuple[float, float, float]
    """Sigma-nought of HH, HV and VV in dB."""
    coherence: complex
    """Of HH and VV; HV is uncorrelated with both (reflection symmetry)."""

    def covariance(self) -> NDArray[np.float64]:
        """(4, 4) covariance of log reflectance."""
        bands = len(BANDS)
        mix = np.full((bands, bands), self.correlation) + (1 - self.correlation) * np.eye(bands)
        return self.spread**2 * mix

    def polarimetric_covariance(self) -> NDArray[np.complex128]:
        """(3, 3) covariance C of k = (HH, HV, VV), in linear sigma-nought."""
        hh, hv, vv = (10 ** (db / 10) for db in self.backscatter)
        cross = self.coherence * np.sqrt(hh * vv)
        return np.array([[hh, 0, cross], [0, hv, 0], [np.conj(cross), 0, vv]], np.complex128)


COVERS = (
    LandCover("water", (62, 116, 188)),
    LandCover("forest", (28, 92, 58)),
    LandCover("grassland", (148, 190, 92)),
    LandCover("cropland", (232, 196, 92)),
    LandCover("built-up", (196, 60, 60)),
    LandCover("bare soil", (164, 124, 92)),
)
WATER, FOREST, GRASSLAND, CROPLAND, BUILT_UP, BARE = range(len(COVERS))

BOUNCE = 0.35 * np.exp(1j * np.deg2rad(150))

SURFACES = (
    Surface("clear water", WATER, (3.6, 3.2, 2.0, 1.2), 0.30, 0.6, 0.3, (-25, -34, -19), 0.9),
    Surface("turbid water", WATER, (6.0, 7.8, 6.8, 4.0), 0.30, 0.6, 0.3, (-24, -33, -18), 0.9),
    Surface("broadleaf wood", FOREST, (2.6, 4.6, 2.8, 36.0), 0.30, 0.7, 0.3, (-8, -13, -8.5), 0.35),
    Surface("conifers", FOREST, (2.1, 3.6, 2.4, 23.0), 0.30, 0.7, 0.3, (-9, -14, -9), 0.35),
    Surface("meadow", GRASSLAND, (5.0, 8.4, 7.4, 31.0), 0.24, 0.6, 0.3, (-14, -21, -13), 0.6),
    Surface("dry grass", GRASSLAND, (6.8, 9.8, 11.2, 26.5), 0.24, 0.6, 0.3, (-15, -22, -14), 0.6),
    Surface("green cereal", CROPLAND, (3.2, 6.2, 3.4, 42.0), 0.24, 0.6, 0.3, (-11, -18, -12), 0.45),
    Surface("maize", CROPLAND, (3.9, 7.2, 4.9, 36.5), 0.24, 0.6, 0.3, (-10, -16, -10.5), 0.4),
    Surface("ripe cereal", CROPLAND, (7.8, 12.6, 17.0, 29.0), 0.24, 0.6, 0.3, (-13, -20, -12), 0.5),
    Surface("roof", BUILT_UP, (12.5, 14.5, 18.5, 23.5), 0.38, 0.8, 0.0, (-1, -11, -4), BOUNCE),
    Surface("asphalt", BUILT_UP, (8.5, 9.5, 10.5, 13.0), 0.26, 0.8, 0.0, (-12, -23, -12), 0.6),
    Surface("garden", BUILT_UP, (4.5, 7.4, 5.6, 27.0), 0.30, 0.6, 0.0, (-9, -15, -9), 0.4),
    Surface("dark soil", BARE, (6.6, 8.6, 11.2, 16.5), 0.24, 0.7, 0.3, (-15, -27, -13), 0.8),
    Surface("light soil", BARE, (9.6, 13.4, 18.0, 25.0), 0.24, 0.7, 0.3, (-14, -25, -12), 0.8),
)  # fmt: skip
(
    CLEAR_WATER, TURBID_WATER, BROADLEAF, CONIFERS, MEADOW, DRY_GRASS, GREEN_CEREAL, MAIZE,
    RIPE_CEREAL, ROOF, ASPHALT, GARDEN, DARK_SOIL, LIGHT_SOIL,
) = range(len(SURFACES))  # fmt: skip

COVER_OF = np.array([surface.cover for surface in SURFACES], np.uint8)
"""Surface index -> class index."""
