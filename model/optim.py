"""AdamW, its two parameter groups, and the learning rate of each step."""

import re
from collections.abc import Callable
from math import cos, pi

from torch import nn
from torch.optim import AdamW

NO_DECAY = re.compile(
    r"(bias|mask_token|logit_scale|relative_position_bias_table)$"
    r"|\battn\.(cpb|position)|\brouters?\."
)
"""Names of parameters that are not pulled towards zero, besides all vectors (norms)."""


def adamw(
    network: nn.Module,
    lr: float,
    weight_decay: float,
    rate: Callable[[str], float] = lambda name: 1.0,
) -> AdamW:
    """AdamW .9/.999, eps 1e-8; no decay on biases, norms, mask token, position biases, routers.

    Frozen parameters are left out. Each group carries `rate`, the factor of its learning rate,
    by parameter name.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            whole = type(parameter) is nn.Parameter  # one call cannot have shards as well
            key = (rate(name), decays(name, parameter), whole)
            groups.setdefault(key, []).append(parameter)
    return AdamW(
        [
            {"params": members, "weight_decay": weight_decay * decay, "rate": factor}
            for (factor, decay, _), members in sorted(
                groups.items(), key=lambda g: g[0], reverse=True
            )
        ],
        lr=lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,  # one pass over the memory: a third of the time on CPUs
    )


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter."""
    return parameter.ndim > 1 and NO_DECAY.search(name) is None


def learning_rate(
    step: int, steps: int, peak: float, lowest: float, warmup: int, start: float = 1e-6
) -> float:
    """Learning rate of update `step` = 0, 1, … of `steps`: linear warm-up, then cosine.

    The cosine is counted from step 0, as in the release, so that it is already below the peak
    when the warm-up ends.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    return lowest + (peak - lowest) * (1 + cos(pi * step / steps)) / 2
