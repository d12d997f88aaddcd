"""The first three bands of a map as a small picture."""

from pathlib import Path

import numpy as np
import rasterio

LONGEST = 1024
"""Longest side of the picture in pixels."""


def draw_bands(source: Path, picture: Path) -> None:
    """Draw bands 1-3 as red, green, blue, each from its 2nd to its 98th percentile; nodata black.

    A map with fewer bands is drawn grey.
    """
    from PIL import Image

    name = f"ZARR:{source}:/features" if source.suffix == ".zarr" else source
    with rasterio.open(name) as dataset:
        shrink = max(1.0, max(dataset.shape) / LONGEST)
        shape = (round(dataset.height / shrink), round(dataset.width / shrink))
        bands = [1, 2, 3] if dataset.count >= 3 else [1, 1, 1]
        values = dataset.read(bands, out_shape=(3, *shape)).astype(np.float32)
        valid = dataset.read_masks(bands, out_shape=(3, *shape)) > 0
    channels = []
    for band, ok in zip(values, valid & np.isfinite(values), strict=True):
        low, high = np.percentile(band[ok], (2, 98)) if ok.any() else (0, 1)
        grey = (np.where(ok, band, low) - low) / max(high - low, 1e-9)
        channels.append(np.where(ok, 1 + np.clip(grey, 0, 1) * 254, 0).astype(np.uint8))
    fresh = picture.with_name(picture.name + ".new")
    Image.fromarray(np.stack(channels, axis=-1)).save(fresh, "PNG")
    fresh.replace(picture)
