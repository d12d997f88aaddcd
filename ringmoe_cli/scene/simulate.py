"""A seeded scene in all four modalities, with everything known about it: the built-in data set.

One landscape (`landcover.py`) is seen by four instruments on one grid: an 8-bit colour camera, a
four-band multi-spectral scanner, a quad-pol complex radar and its multilooked amplitude
(`spectra.py`, `speckle.py`). Log reflectance is Gaussian within a surface, so the best possible
per-pixel classifier is known exactly: `bayes_posterior`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.simulated.landcover import FIELD_SURFACES, Ground, make_ground, smooth_field
from ringmoe_cli.scene.simulated.speckle import (
    draw_scattering,
    multilook_amplitude,
    point_spread,
    quad_pol,
)
from ringmoe_cli.scene.simulated.spectra import BANDS, COVER_OF, COVERS, SURFACES

CRS = "EPSG:32632"
ORIGIN = (500_000.0, 5_400_000.0)
"""Upper left corner in metres."""
GSD = 5.0
"""Pixel size in metres."""
MS_SCALE = 1e-4
"""Reflectance per digital number of the multi-spectral scene."""
OPT_SCALE = 1.6e-3
"""Reflectance per digital number of the optical scene."""
SAR_SCALE = 1e-4
"""Amplitude (square root of sigma-nought) per digital number of the SAR-L2 scene."""
SHADING = 0.08
"""Standard deviation of log illumination over the slopes, common to all bands."""
GRAIN = 1.2
"""Smoothing scale in pixels of the texture within a surface."""
NEIGHBOURHOOD = 14.0
"""Smoothing scale in pixels of what woods, lakes and towns have in common."""
LOOKS = 4
"""Looks of the SAR-L2 amplitude; the SAR-L1 scene is the first of them."""
RADAR_WIDTH = 0.55
"""Standard deviation of the radar's point spread in pixels."""


@dataclass(frozen=True)
class SimulatedScene:
    """Co-registered images and truth on one grid."""

    opt: NDArray[np.uint8]
    """(3, H, W) red, green, blue; times `OPT_SCALE` = reflectance."""
    ms: NDArray[np.uint16]
    """(4, H, W) blue, green, red, nir; times `MS_SCALE` = reflectance."""
    sar_l1: NDArray[np.complex64]
    """(4, H, W) HH, HV, VH, VV; |.|² = sigma-nought, single look."""
    sar_l2: NDArray[np.uint16]
    """(2, H, W) VV, VH; times `SAR_SCALE` = amplitude, four looks."""
    surfaces: NDArray[np.uint8]
    """(H, W) index into `SURFACES`."""
    terrain: NDArray[np.float32]
    """(H, W) terrain height in metres."""
    objects: NDArray[np.float32]
    """(H, W) height of trees and buildings above the terrain in metres."""
    buildings: NDArray[np.float32]
    """(N, 5) x, y of the centre, width, height in pixels, angle in radians (y points down)."""
    opt_after: NDArray[np.uint8]
    """(3, H, W) the optical scene at a second date."""
    surfaces_after: NDArray[np.uint8]
    """(H, W) surfaces at the second date."""
    origin: tuple[float, float] = ORIGIN
    """World x, y of the upper left corner."""

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(H, W) class index into `COVERS`."""
        return cover(self.surfaces)

    @property
    def changed(self) -> NDArray[np.uint8]:
        """(H, W) 1 where the class differs at the second date."""
        differs = cover(self.surfaces) != cover(self.surfaces_after)
        return np.where(differs, np.uint8(1), np.uint8(0))

    def crop(self, row: int, col: int, height: int, width: int) -> "SimulatedScene":
        """A rectangle of the scene, at its own place in the world."""
        window = (..., slice(row, row + height), slice(col, col + width))
        arrays = {
            name: value[window]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name != "buildings"
        }
        boxes = self.buildings - np.array([col, row, 0, 0, 0], np.float32)
        inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 0] < width) & (boxes[:, 1] < height)
        origin = (self.origin[0] + col * GSD, self.origin[1] - row * GSD)
        return replace(self, **arrays, buildings=boxes[inside], origin=origin)


def cover(surfaces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Class index of each surface index."""
    classes: NDArray[np.uint8] = COVER_OF[surfaces]
    return classes


def simulate_scene(seed: int = 0, size: int | tuple[int, int] = 512) -> SimulatedScene:
    """Draw a scene; the same seed and size give the same arrays.

    Args:
        seed: any non-negative integer.
        size: side in pixels, or (height, width); at least 64.
    """
    height, width = (size, size) if isinstance(size, int) else size
    ground = make_ground(seed, (height, width))

    def rng(part: int) -> np.random.Generator:
        return np.random.default_rng([seed, 100 + part])

    reflectance = draw_reflectance(rng(0), ground, ground.surfaces)
    later = draw_reflectance(rng(1), ground, ground.surfaces_after)
    looks = draw_looks(rng(2), ground.surfaces)
    return SimulatedScene(
        opt=to_colour(rng(3), reflectance),
        ms=np.clip(np.rint(reflectance / MS_SCALE), 1, 65534).astype(np.uint16),
        sar_l1=looks[0],
        sar_l2=to_amplitude(looks),
        surfaces=ground.surfaces,
        terrain=ground.terrain,
        objects=ground.objects,
        buildings=ground.buildings,
        opt_after=to_colour(rng(4), later),
        surfaces_after=ground.surfaces_after,
    )


def draw_reflectance(
    rng: np.random.Generator, ground: Ground, surfaces: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(4, H, W) reflectance, log-normal within a surface and shaded by the relief.

    Part of the variation is common to a whole field (elsewhere: to a neighbourhood), the rest is
    a fine texture.
    """
    shape = (surfaces.shape[0], surfaces.shape[1])
    per_field = rng.standard_normal((len(BANDS), int(ground.fields.max()) + 1), np.float32)
    around = np.stack([smooth_field(rng, shape, NEIGHBOURHOOD) for _ in BANDS])
    common = np.where(np.isin(surfaces, FIELD_SURFACES), per_field[:, ground.fields], around)
    texture = np.stack([smooth_field(rng, shape, GRAIN) for _ in BANDS])
    share = np.array([s.common for s in SURFACES], np.float32)[surfaces]
    unit = np.sqrt(share) * common + np.sqrt(1 - share) * texture
    roots = np.linalg.cholesky(np.stack([s.covariance() for s in SURFACES])).astype(np.float32)
    means = np.log(np.array([s.reflectance for s in SURFACES], np.float32) / 100)
    log = np.empty_like(unit)
    for band in range(len(BANDS)):
        log[band] = means[surfaces, band] + SHADING * ground.shading
        for source in range(band + 1):
            log[band] += roots[surfaces, band, source] * unit[source]
    return np.exp(log)


def draw_looks(
    rng: np.random.Generator, surfaces: NDArray[np.uint8]
) -> list[NDArray[np.complex64]]:
    """`LOOKS` independent quad-pol single-look images, each (4, H, W) HH, HV, VH, VV."""
    covariances = np.stack([s.polarimetric_covariance() for s in SURFACES])
    return [
        quad_pol(point_spread(draw_scattering(rng, covariances, surfaces), RADAR_WIDTH))
        for _ in range(LOOKS)
    ]


def to_colour(rng: np.random.Generator, reflectance: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, H, W) red, green, blue in 8 bits, with the camera's own noise of one digital number."""
    exact = reflectance[[2, 1, 0]] / OPT_SCALE
    noisy = exact + rng.standard_normal(exact.shape, np.float32)
    counts: NDArray[np.uint8] = np.clip(np.rint(noisy), 1, 255).astype(np.uint8)
    return counts


def to_amplitude(looks: list[NDArray[np.complex64]]) -> NDArray[np.uint16]:
    """(2, H, W) VV, VH multilooked amplitude as digital numbers."""
    amplitude = multilook_amplitude([look[[3, 2]] for look in looks])
    counts = np.clip(np.rint(amplitude / SAR_SCALE), 1, 65534)
    return np.asarray(counts, np.uint16)


def bayes_posterior(
    reflectance: NDArray[np.float32], shares: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Class probabilities of single pixels from the densities the scene was drawn from.

    Within a surface, log reflectance is N(log mean, C + shading² 11ᵀ); a class is the mixture of
    its surfaces. No classifier that sees one pixel at a time has a higher expected accuracy.

    Args:
        reflectance: (4, H, W) multi-spectral reflectance.
        shares: (S,) share of each surface of `SURFACES` in the scene.

    Returns:
        (K, H, W) posterior probabilities.
    """
    log = np.log(reflectance.astype(np.float64)).reshape(len(BANDS), -1)
    scores = np.full((len(SURFACES), log.shape[1]), -np.inf)
    for index, (surface, share) in enumerate(zip(SURFACES, shares, strict=True)):
        if share > 0:
            root = np.linalg.cholesky(surface.covariance() + SHADING**2)
            away = np.linalg.solve(root, log - np.log(np.array(surface.reflectance) / 100)[:, None])
            scores[index] = np.log(share) - np.log(np.diag(root)).sum() - 0.5 * (away**2).sum(0)
    likely = np.exp(scores - scores.max(axis=0))
    classes = np.stack([likely[k == COVER_OF].sum(axis=0) for k in range(len(COVERS))])
    posterior: NDArray[np.float32] = (classes / classes.sum(axis=0)).astype(np.float32)
    return posterior.reshape(-1, *reflectance.shape[1:])


def shares_of(surfaces: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(S,) share of each surface."""
    return np.bincount(surfaces.ravel(), minlength=len(SURFACES)) / surfaces.size


def write_scene(scene: SimulatedScene, folder: Path) -> dict[str, Path]:
    """Write the scene as GeoTIFFs that any GIS opens.

    Returns:
        modality, or `labels`, `terrain`, `height`, `opt-after`, `change` -> its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    legend = [(c.name, c.colour) for c in COVERS]
    files: dict[str, tuple[NDArray[Any], tuple[str, ...], float]] = {
        "opt": (scene.opt, ("red", "green", "blue"), OPT_SCALE),
        "ms": (scene.ms, BANDS, MS_SCALE),
        "sar-l1": (scene.sar_l1, ("HH", "HV", "VH", "VV"), 1.0),
        "sar-l2": (scene.sar_l2, ("VV", "VH"), SAR_SCALE),
        "opt-after": (scene.opt_after, ("red", "green", "blue"), OPT_SCALE),
        "terrain": (scene.terrain[None], ("terrain height [m]",), 1.0),
        "height": (scene.objects[None], ("height above terrain [m]",), 1.0),
    }
    written = {}
    for name, (values, bands, scale) in files.items():
        written[name] = folder / f"{name.replace('-', '_')}.tif"
        write_raster(written[name], values, bands, scale, scene.origin)
    changes = [("unchanged", (220, 220, 220)), ("changed", (200, 40, 40))]
    for name, values, classes in (
        ("labels", scene.labels, legend),
        ("change", scene.changed, changes),
    ):
        written[name] = folder / ("landcover.tif" if name == "labels" else f"{name}.tif")
        write_raster(written[name], values[None], (name,), 1.0, scene.origin, classes)
    return written


def write_raster(
    path: Path,
    values: NDArray[Any],
    bands: tuple[str, ...],
    scale: float,
    origin: tuple[float, float],
    classes: list[tuple[str, tuple[int, int, int]]] | None = None,
) -> None:
    """One tiled GeoTIFF with named bands; class rasters get names and a colour table."""
    import rasterio
    from affine import Affine

    part = path.with_suffix(".part.tif")
    profile = {
        "driver": "GTiff", "dtype": values.dtype, "count": values.shape[0],
        "height": values.shape[1], "width": values.shape[2], "crs": CRS,
        "transform": Affine(GSD, 0, origin[0], 0, -GSD, origin[1]), "tiled": True,
        "blockxsize": 256, "blockysize": 256, "compress": "zstd",
    }  # fmt: skip
    with rasterio.open(part, "w", **profile) as out:
        out.write(values)
        out.descriptions = bands
        if scale != 1.0:
            out.scales = [scale] * len(bands)
        if classes:
            out.write_colormap(1, {i: (*colour, 255) for i, (_, colour) in enumerate(classes)})
            out.update_tags(CLASS_NAMES=json.dumps([name for name, _ in classes]))
    part.replace(path)


def read_raster(path: Path) -> NDArray[Any]:
    """All bands of a raster, (C, H, W)."""
    import rasterio

    with rasterio.open(path) as source:
        values: NDArray[Any] = source.read()
    return values
