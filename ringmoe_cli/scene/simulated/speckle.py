"""Fully developed speckle: circular complex Gaussian scattering vectors."""

import numpy as np
from numpy.typing import NDArray


def draw_scattering(
    rng: np.random.Generator, covariances: NDArray[np.complex128], surfaces: NDArray[np.uint8]
) -> NDArray[np.complex64]:
    """Draw k = (HH, HV, VV) ~ CN(0, C of each pixel's surface), independent between pixels.

    Args:
        rng: source of the draws.
        covariances: (S, 3, 3) Hermitian C = E[k kᴴ] per surface.
        surfaces: (H, W) index of each pixel's surface.

    Returns:
        (3, H, W) complex64.
    """
    height, width = surfaces.shape
    parts = rng.standard_normal((2, 3, height, width), np.float32)
    white = (parts[0] + 1j * parts[1]) * np.float32(np.sqrt(0.5))
    roots = np.linalg.cholesky(covariances).astype(np.complex64)
    drawn = np.empty((3, height, width), np.complex64)
    for row in range(3):
        drawn[row] = sum(roots[surfaces, row, column] * white[column] for column in range(row + 1))
    return drawn


def point_spread(field: NDArray[np.complex64], width: float) -> NDArray[np.complex64]:
    """The focused image of a reflectivity: separable Gaussian response of unit energy.

    Mean power is kept where the surface is uniform; neighbouring pixels become correlated, as in
    an image sampled finer than its resolution.

    Args:
        field: (..., H, W) complex reflectivity.
        width: standard deviation of the response in pixels; 0 leaves the field as it is.
    """
    if width <= 0:
        return field
    reach = int(np.ceil(3 * width))
    response = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    response = (response / np.sqrt((response**2).sum())).astype(np.float32)
    for axis in (-2, -1):
        padding = [(0, 0)] * field.ndim
        padding[axis] = (reach, reach)
        padded = np.pad(field, padding, mode="symmetric")
        size = field.shape[axis]
        field = sum(
            weight * np.take(padded, np.arange(shift, shift + size), axis)
            for shift, weight in enumerate(response)
        )
    return field


def quad_pol(scattering: NDArray[np.complex64]) -> NDArray[np.complex64]:
    """(4, H, W) HH, HV, VH, VV of a reciprocal medium seen by one antenna: VH = HV."""
    return scattering[[0, 1, 1, 2]]


def multilook_amplitude(looks: list[NDArray[np.complex64]]) -> NDArray[np.float32]:
    """Square root of the mean intensity over independent looks of equal shape."""
    intensity = sum(look.real**2 + look.imag**2 for look in looks)
    return np.sqrt(intensity / len(looks)).astype(np.float32)
