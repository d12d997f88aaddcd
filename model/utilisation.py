"""Share of a device's arithmetic that training uses: MFU (Chowdhery et al. 2022, PaLM, App. B)."""

import time
from dataclasses import dataclass
from typing import Self

import torch

from model.config import ModelConfig
from model.counts import multiply_adds

PASSES = 3
"""The backward pass costs twice the forward pass; recomputed activations do not count as use."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product stands for what a device can do."""
TRIES = 3


@dataclass(frozen=True)
class Utilisation:
    """What an image costs, and what the devices together could do."""

    image_flops: float
    """Of one image through the encoder, forward and backward; 2 per multiply-add."""
    peak: float
    """Floating point operations per second of all devices."""

    @classmethod
    def of(cls, config: ModelConfig, device: str, dtype: torch.dtype, devices: int = 1) -> Self:
        """For training chips on devices like this one, whose peak is measured now."""
        side = config.image_size
        flops = 2.0 * PASSES * multiply_adds(config, side, side)
        return cls(flops, devices * matrix_peak(device, dtype))

    def share(self, images: int, seconds: float) -> float:
        """Share of the peak that a step used: 1 if it were all matrix products at full speed."""
        return images * self.image_flops / seconds / self.peak


def matrix_peak(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Floating point operations per second of one large matrix product, the best of a few."""
    kind = torch.device(device).type
    side = SIDE.get(kind, SIDE["cpu"])
    a = torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)
