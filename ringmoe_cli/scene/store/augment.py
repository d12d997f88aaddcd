"""What may be done to a training chip without changing what it shows."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Sample = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""Channels (C, h, w) and validity (h, w)."""


@dataclass(frozen=True)
class Turn:
    """One draw of the augmentation."""

    left_right: bool = False
    """Mirror the columns."""
    up_down: bool = False
    """Mirror the rows."""
    phase: float = 0.0
    """Phase in radians that all complex channels of the chip are turned by."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Turn":
        """Mirrors with probability one half each, and any phase."""
        across, down = rng.random(2) < 0.5
        return cls(bool(across), bool(down), float(rng.uniform(0, 2 * np.pi)))


def turned(sample: Sample, turn: Turn, channels: tuple[str, ...]) -> Sample:
    """Mirror a chip and turn the common phase of its complex channels.

    A mirror image turns the sense of the cross-polarised axes: HV and VH change sign, and so do
    the matrix elements that are linear in them. Two mirrors are a rotation and cancel that.
    """
    values, valid = sample
    if turn.left_right:
        values, valid = values[..., ::-1], valid[..., ::-1]
    if turn.up_down:
        values, valid = values[..., ::-1, :], valid[..., ::-1, :]
    if turn.left_right != turn.up_down:
        signs = mirror_signs(channels)
        if (signs < 0).any():
            values = values * signs[:, None, None]
    if channels[0].endswith("_re") and channels[0][:2] in ("hh", "hv", "vh", "vv"):
        values = phase_turned(values, turn.phase)
    return np.ascontiguousarray(values), np.ascontiguousarray(valid)


def mirror_signs(channels: tuple[str, ...]) -> NDArray[np.float32]:
    """-1 for channels that are odd in the cross-polarised amplitude, else 1.

    In T3 the third Pauli component is cross-polarised, in C3 the second lexicographic one.
    """
    odd = ("hv_", "vh_", "t13", "t23", "c12", "c23")
    return np.array([-1 if c.startswith(odd) else 1 for c in channels], np.float32)


def phase_turned(values: NDArray[np.float32], phase: float) -> NDArray[np.float32]:
    """Real and imaginary parts in turn, (2C, h, w), multiplied by e^{i·phase}."""
    cos, sin = np.float32(np.cos(phase)), np.float32(np.sin(phase))
    re, im = values[0::2], values[1::2]
    out = np.empty_like(values, order="C")
    out[0::2], out[1::2] = cos * re - sin * im, sin * re + cos * im
    return out


def resized(sample: Sample, size: int) -> Sample:
    """A chip at another size: values bilinear, validity only where all sources are valid."""
    values, valid = sample
    if values.shape[-2:] == (size, size):
        return sample
    x = torch.from_numpy(np.ascontiguousarray(values))[None]
    void = torch.from_numpy(np.ascontiguousarray(~valid)).float()[None, None]
    how = {"size": (size, size), "mode": "bilinear", "align_corners": False}
    fine = F.interpolate(x, **how)[0].numpy()  # type: ignore[arg-type]
    return fine, F.interpolate(void, **how)[0, 0].numpy() == 0  # type: ignore[arg-type]
