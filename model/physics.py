"""What complex SAR measures: backscattered power, and how well speckle lets anyone predict it.

The span P = |HH|² + |HV|² + |VH|² + |VV|² is the total power. It does not change when the
polarisation basis is rotated, and equals the trace of the coherency and covariance matrices when
HV = VH (RingMoE §3.3, "physics-informed" reconstruction).
"""

from math import log10

import torch
from torch import Tensor

from model.normalisation import Normalisation

EPS = 1e-8
"""Added to the span of network inputs (whose components have unit scale) before the logarithm."""
CLIP = 3.0
"""Standardised decibels are clipped at this many deviations."""


def span(images: Tensor) -> Tensor:
    """Total backscattered power, (B, C, H, W) re/im channels -> (B, 1, H, W)."""
    return images.square().sum(dim=1, keepdim=True)


def power_target(images: Tensor, normalisation: Normalisation) -> Tensor:
    """Standardised span in decibels: (10·log10 P - mean) / std, within ±`CLIP`.

    Args:
        images: (B, C, H, W) re/im channels after normalisation by one scalar.
        normalisation: of SAR-L1; its `power_db` is in physical units.

    Raises:
        ValueError: if the normalisation has no `power_db`.
    """
    if normalisation.power_db is None:
        raise ValueError("the SAR-L1 normalisation has no power_db; tile the SAR-L1 scenes again")
    mean, std = normalisation.power_db
    decibels = 10 * torch.log10(span(images) + EPS) + 20 * log10(normalisation.std[0])
    return ((decibels - mean) / std).clamp(-CLIP, CLIP)


def paper_power_target(images: Tensor, normalisation: Normalisation, valid: Tensor) -> Tensor:
    """Span clipped at 1 and stretched to [0, 1] per chip over its valid pixels, as in the paper.

    A chip whose pixels all exceed 1 becomes constant 0: the linear clip needs calibrated products.

    Args:
        images: (B, C, H, W) re/im channels after normalisation by one scalar.
        normalisation: of SAR-L1; its scalar restores physical units.
        valid: (B, 1, H, W) bool.
    """
    power = (span(images) * normalisation.std[0] ** 2).clamp(max=1.0)
    lowest = power.masked_fill(~valid, 1.0).amin(dim=(2, 3), keepdim=True)
    highest = power.masked_fill(~valid, 0.0).amax(dim=(2, 3), keepdim=True)
    return ((power - lowest) / (highest - lowest).clamp(min=EPS)).clamp(0.0, 1.0)


def equivalent_looks(power: Tensor) -> float:
    """Equivalent number of looks, mean²/variance, of (N,) powers drawn from one surface."""
    return float(power.mean().square() / power.var())


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
