"""From stored numbers to physical ones: the only place that does it.

Statistics, the loader and predict all come through `to_physical`, so that what normalises
training chips normalises prediction windows.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.scene import Band, Calibration, Scene

FLOOR = 1e-10
"""Smallest power that has a decibel value here: -100 dB."""


def to_physical(raw: NDArray[Any], scene: Scene) -> NDArray[np.float32]:
    """Physical channels of raw bands, (bands, H, W) -> (channels, H, W) float32.

    Reflectance and counts get their scale and offset. SAR-L2 becomes decibels, from amplitude
    or linear backscatter, with the ratio of a dual-pol pair as third channel. Complex bands
    become real and imaginary parts in turn (hh_re, hh_im, hv_re …). Values of invalid pixels
    mean nothing, but are finite where the raw ones are.
    """
    if scene.quantity == "complex":
        return interleaved(raw, scene.bands)
    values = scaled(raw, scene.bands)
    if scene.modality != "sar-l2":
        return values
    if scene.quantity != "db":
        factor = 20 if scene.quantity == "amplitude" else 10
        values = np.float32(factor) * np.log10(np.maximum(values, np.float32(FLOOR)))
    if len(scene.channels) > len(values):
        values = np.concatenate([values, values[:1] - values[1:]])
    return values


def scaled(raw: NDArray[Any], bands: tuple[Band, ...]) -> NDArray[np.float32]:
    """Raw · scale + offset of each band, as float32 (converted before the sum: no wrapping)."""
    scale = np.array([b.scale for b in bands], np.float32)[:, None, None]
    offset = np.array([b.offset for b in bands], np.float32)[:, None, None]
    values: NDArray[np.float32] = np.multiply(raw, scale, dtype=np.float32, casting="unsafe")
    if (offset != 0).any():
        values += offset
    return values


def interleaved(raw: NDArray[Any], bands: tuple[Band, ...]) -> NDArray[np.float32]:
    """Complex (C, H, W) as real and imaginary parts in turn, (2C, H, W) float32."""
    scale = np.array([b.scale for b in bands], np.float32)[:, None, None]
    values = raw.astype(np.complex64) * scale
    parts = np.stack([values.real, values.imag], axis=1)  # (C, 2, H, W)
    return parts.reshape(-1, *raw.shape[1:])


def span_db(physical: NDArray[np.float32], scene: Scene) -> NDArray[np.float32]:
    """Total backscattered power of sar-l1 channels in dB, (channels, H, W) -> (H, W).

    Complex channels: |HH|² + |HV|² + |VH|² + |VV|². Matrices: their trace.
    """
    if scene.quantity == "complex":
        power = np.square(physical).sum(0)
    else:
        power = physical[[b.name[1:] in TRACE for b in scene.bands]].sum(0)
    decibels: NDArray[np.float32] = np.float32(10) * np.log10(np.maximum(power, np.float32(FLOOR)))
    return decibels


TRACE = ("11", "22", "33")
"""Diagonal elements of a coherency or covariance matrix."""


def valid_pixels(raw: NDArray[Any], scene: Scene) -> NDArray[np.bool_]:
    """Where every measured band holds a measurement, (bands, H, W) -> (H, W).

    Invalid are a band's nodata and saturation values, NaN and infinities; backscatter that is
    not above zero (it has no decibels); complex or matrix pixels that are zero in every band.
    """
    valid = np.ones(raw.shape[1:], np.bool_)
    measured = [(band, b) for band, b in zip(raw, scene.bands, strict=True) if b.measured]
    for values, band in measured:
        for void in (band.nodata, band.saturated):
            value = as_type(void, values.dtype)
            if value is not None:
                valid &= values != value
        if values.dtype.kind in "fc":
            valid &= np.isfinite(values)
    if scene.quantity in ("amplitude", "sigma0"):
        for values, _ in measured:
            valid &= values > 0
    elif scene.quantity in ("complex", "coherency"):
        valid &= np.any([values != 0 for values, _ in measured], axis=0)
    return valid


def as_type(value: float | None, dtype: np.dtype[Any]) -> Any:
    """A nodata value in the raw type; None if the type cannot hold it (nothing equals it)."""
    if value is None or np.isnan(value):
        return None
    if dtype.kind in "fc":
        return np.asarray(value).astype(dtype)
    info = np.iinfo(dtype)
    if value != int(value) or not info.min <= value <= info.max:
        return None
    return dtype.type(int(value))


def calibrate(
    raw: NDArray[Any], calibration: Calibration, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> NDArray[Any]:
    """Counts of a radar product as σ⁰ (amplitude counts) or calibrated complex amplitude.

    Args:
        raw: (H, W) counts; real, or complex.
        calibration: the product's table.
        rows: H line numbers of the product.
        cols: W pixel numbers of the product.
    """
    divisor = calibration.divisor(rows, cols)
    if np.iscomplexobj(raw):
        return (raw.astype(np.complex64) / divisor).astype(np.complex64)
    backscatter: NDArray[np.float32] = np.square(raw.astype(np.float32) / divisor)
    return backscatter
