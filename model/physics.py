"""What complex SAR measures: backscattered power, and how well speckle lets anyone predict it.

The span P = |HH|² + |HV|² + |VH|² + |VV|² is the total power. It does not change when the
polarisation basis is rotated, and equals the trace of the coherency and covariance matrices when
HV = VH (RingMoE, "physics-informed" reconstruction).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.normalisation import Normalisation

FLOOR = 1e-10
"""Smallest power that has a decibel value: -100 dB."""
CLIP = 3.0
"""Standardised decibels are clipped at this many deviations."""
DIAGONAL = ("11", "22", "33")
"""What the names of the diagonal elements of a coherency or covariance matrix end in."""


def span(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Total backscattered power in physical units, (B, C, H, W) -> (B, 1, H, W).

    Args:
        images: re/im channels or matrix elements, normalised by scalars.
        normalisation: names the channels and holds the scalars.
    """
    scale = torch.tensor(normalisation.std, dtype=images.dtype, device=images.device)
    physical = images * scale[:, None, None]
    diagonal = [i for i, name in enumerate(normalisation.bands) if name[1:] in DIAGONAL]
    powers = physical[:, diagonal] if diagonal else physical.square()
    return powers.sum(dim=1, keepdim=True)


def power_target(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Standardised span in decibels: (10·log10 P - mean) / std, within ±`CLIP`.

    Args:
        images: (B, C, H, W) SAR-L1 channels after normalisation.
        normalisation: of SAR-L1, with `power_db`.

    Raises:
        ValueError: if the normalisation has no `power_db`.
    """
    if normalisation.power_db is None:
        raise ValueError("the SAR-L1 normalisation has no power_db; tile the SAR-L1 scenes again")
    mean, std = normalisation.power_db
    decibels = 10 * torch.log10(span(images, normalisation).clamp(min=FLOOR))
    return ((decibels - mean) / std).clamp(-CLIP, CLIP)


def paper_power_target(images: Tensor, normalisation: Normalisation, valid: Tensor) -> Tensor:
    """Span clipped at 1 and stretched to [0, 1] per chip over its valid pixels, as in the paper.

    A chip whose pixels all exceed 1 becomes constant 0: the linear clip needs calibrated products.

    Args:
        images: (B, C, H, W) SAR-L1 channels after normalisation.
        normalisation: of SAR-L1; its scalars restore physical units.
        valid: (B, 1, H, W) bool.
    """
    power = span(images, normalisation).clamp(max=1.0)
    lowest = power.masked_fill(~valid, 1.0).amin(dim=(2, 3), keepdim=True)
    highest = power.masked_fill(~valid, 0.0).amax(dim=(2, 3), keepdim=True)
    return ((power - lowest) / (highest - lowest).clamp(min=FLOOR)).clamp(0.0, 1.0)


def local_looks(power: Tensor, side: int = 7) -> float:
    """Equivalent number of looks of (B, 1, H, W) power: median over windows of mean²/variance.

    Windows that straddle surfaces count as rougher than speckle, so this errs to the low side.
    """
    mean = F.avg_pool2d(power.double(), side)
    variance = F.avg_pool2d(power.double().square(), side) - mean.square()
    seen = variance > 0
    return float((mean.square()[seen] / variance[seen]).median()) if seen.any() else 1.0


def log_floor(looks: float, points: int = 20001) -> float:
    """Least mean absolute error, in decibels, of any prediction of speckled power.

    Even who knows the true mean sees multiplicative Gamma(looks, 1/looks) noise G, and the best
    constant under an L1 loss is the median: E|10·log10 G - median|.
    """
    log_gain = torch.linspace(-25.0, 6.0, points, dtype=torch.float64)
    density = torch.softmax(looks * (log_gain - log_gain.exp()), dim=0)
    median = log_gain[int(torch.searchsorted(density.cumsum(0), 0.5))]
    return float((density * (log_gain - median).abs()).sum() * 10 / torch.tensor(10.0).log())


def linear_floor(looks: float, points: int = 20001) -> float:
    """The same for linear power, as a share of the mean: ln 2 = 0.69 for a single look."""
    log_gain = torch.linspace(-25.0, 6.0, points, dtype=torch.float64)
    density = torch.softmax(looks * (log_gain - log_gain.exp()), dim=0)
    gain = log_gain.exp()
    median = gain[int(torch.searchsorted(density.cumsum(0), 0.5))]
    return float((density * (gain - median).abs()).sum())
