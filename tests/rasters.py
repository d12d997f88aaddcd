"""Small rasters for tests of reading and tiling."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

UTM = "EPSG:32630"
PLACE = Affine(10, 0, 500000, 0, -10, 6000000)


def write_raster(
    path: Path,
    values: np.ndarray,
    *,
    names: tuple[str, ...] = (),
    crs: str | None = UTM,
    transform: Affine | None = PLACE,
    scales: tuple[float, ...] = (),
    offsets: tuple[float, ...] = (),
    tags: dict[str, str] | None = None,
    **profile: object,
) -> Path:
    """A GeoTIFF (or what `driver` says) of values (bands, rows, columns)."""
    about = {"driver": "GTiff", "dtype": values.dtype, **profile}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            count=values.shape[0],
            height=values.shape[1],
            width=values.shape[2],
            crs=crs,
            transform=transform,
            **about,
        ) as out:
            out.write(values)
            if names:
                out.descriptions = names
            if scales:
                out.scales = scales
            if offsets:
                out.offsets = offsets
            if tags:
                out.update_tags(**tags)
    return path


def noise(bands: int, height: int, width: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    """Random values between 1 and 3000 (200 for bytes), smooth enough to be no pure noise."""
    rng = np.random.default_rng(seed)
    top = 200 if np.dtype(dtype).itemsize == 1 else 3000
    return rng.integers(1, top, (bands, height, width)).astype(dtype)


def write_calibrated(path: Path) -> Path:
    """Four named bands with scale, offset, holes and nodata 0, in blocks of 64."""
    values = noise(4, 300, 350)
    values[:, 100:180, 40:90] = 0
    values[1, 5, 5] = 0
    return write_raster(
        path,
        values,
        names=("blue", "green", "red", "nir"),
        nodata=0,
        tiled=True,
        blockxsize=64,
        blockysize=64,
        scales=(1e-4,) * 4,
        offsets=(-0.1,) * 4,
    )
