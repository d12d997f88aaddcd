"""How physical values become network input; decided at training, carried by the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Normalisation:
    """Per-band standardisation of one modality: (x - mean) / std, invalid pixels 0.

    The input is physical: reflectance, dB for SAR-L2, calibrated re/im for SAR-L1 (scaled by one
    scalar, no mean, so that power survives).
    """

    bands: tuple[str, ...]
    """Band names in channel order."""
    mean: tuple[float, ...]
    """Mean of each band over valid pixels, in physical units."""
    std: tuple[float, ...]
    """Standard deviation of each band, in physical units."""
    power_db: tuple[float, float] | None = None
    """SAR-L1 only: mean and standard deviation of 10·log10(span)."""

    def apply(
        self,
        values: NDArray[np.float32],
        valid: NDArray[np.bool_],
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Normalise (..., C, H, W) values; where (..., 1 or C, H, W) `valid` is false, 0.

        The result is put into `out`, if given.
        """
        result = np.empty(values.shape, np.float32) if out is None else out
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        for c in range(len(mean)):  # what is centred is divided while it is in cache
            centred = np.subtract(values[..., c, :, :], mean[c], dtype=np.float32)
            np.divide(centred, std[c], out=result[..., c, :, :])
        if not valid.all():
            np.copyto(result, np.float32(0), where=~valid)
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
