"""Parameters that stand whole on every rank: their gradients are summed while backward goes on."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

LARGE = 1 << 18
"""Elements of a gradient that travels by itself, for copying it costs more than a message."""


class Replicas:
    """Sums the gradients of some parameters over all ranks, the small ones in one message.

    The messages leave when the last gradient is there and are waited for at the end of the
    backward pass. Every parameter needs a gradient in every backward pass, if only of zeros.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.large = [p for p in parameters if p.numel() >= LARGE]
        self.small = [p for p in parameters if p.numel() < LARGE]
        self.first = dist.get_rank() == 0
        self.missing = len(parameters)
        self.flat: Tensor | None = None
        self.journeys: list[Any] = []
        for parameter in parameters:
            parameter.register_hook(lambda _, p=parameter: self.count_once(p))
            parameter.register_post_accumulate_grad_hook(self.arrived)

    def count_once(self, parameter: nn.Parameter) -> None:
        """A sum of earlier backward passes is the same on all ranks and must count once."""
        if parameter.grad is not None and not self.first:
            parameter.grad.zero_()

    def arrived(self, _: Tensor) -> None:
        """A gradient is there; the last one sends them all, in the same order on all ranks."""
        if self.missing == len(self.parameters):
            Variable._execution_engine.queue_callback(self.finish)
        self.missing -= 1
        if self.missing == 0:
            self.send()

    def send(self) -> None:
        """Send all gradients on their way."""
        parts = [p.grad.flatten() for p in self.small if p.grad is not None]
        self.flat = torch.cat(parts) if parts else torch.zeros(0)
        for parameter in self.large:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
                self.journeys.append(dist.all_reduce(parameter.grad, async_op=True))
        self.journeys.append(dist.all_reduce(self.flat, async_op=True))

    def finish(self) -> None:
        """Wait for the sums; small gradients become parts of their message.

        Raises:
            RuntimeError: if a parameter got no gradient.
        """
        missing, self.missing = self.missing, len(self.parameters)
        if self.flat is None:
            raise RuntimeError(f"{missing} of {len(self.parameters)} parameters got no gradient")
        for journey in self.journeys:
            journey.wait()
        sizes = [p.numel() for p in self.small]
        for parameter, part in zip(self.small, self.flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        self.journeys, self.flat = [], None
