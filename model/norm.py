"""Layer normalisation that keeps its precision."""

import torch
from torch import Tensor, nn


class Norm(nn.LayerNorm):
    """LayerNorm in the precision of its own parameters, whatever autocast says.

    Under bf16 autocast the residual stream stays float32; a model converted to bf16 stays bf16
    (the statistics are float32 inside the kernel).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
