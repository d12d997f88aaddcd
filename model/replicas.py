"""Parameters that stand whole on every rank: their gradients are summed while backward goes on."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable


class Replicas:
    """Sums the gradients of some parameters over all ranks, in one message for all of them.

    The message leaves when the last gradient is there and is waited for at the end of the backward
    pass. Every parameter needs a gradient in every backward pass, if only of zeros.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.first = dist.get_rank() == 0
        self.missing = len(parameters)
        self.message: tuple[Tensor, Any] | None = None
        for parameter in parameters:
            parameter.register_hook(lambda _, p=parameter: self.count_once(p))
            parameter.register_post_accumulate_grad_hook(self.arrived)

    def count_once(self, parameter: nn.Parameter) -> None:
        """A sum of earlier backward passes is the same on all ranks and must count once."""
        if parameter.grad is not None and not self.first:
            parameter.grad.zero_()

    def arrived(self, _: Tensor) -> None:
        """A gradient is there; the last one sends them all."""
        if self.missing == len(self.parameters):
            Variable._execution_engine.queue_callback(self.finish)
        self.missing -= 1
        if self.missing == 0:
            flat = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])
            self.message = flat, dist.all_reduce(flat, async_op=True)

    def finish(self) -> None:
        """Wait for the sum; gradients become parts of the message.

        Raises:
            RuntimeError: if a parameter got no gradient.
        """
        missing, self.missing = self.missing, len(self.parameters)
        if self.message is None:
            raise RuntimeError(f"{missing} of {len(self.parameters)} parameters got no gradient")
        (flat, work), self.message = self.message, None
        work.wait()
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
