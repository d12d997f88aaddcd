"""The way to a GPU and back: batches and answers travel beside the computation."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.batch import Batch


class Fetched:
    """An answer on its way to main memory."""

    def __init__(self, dense: Tensor) -> None:
        """Start the copy, into pinned memory if it comes from a GPU."""
        self.arrived: torch.cuda.Event | None = None
        if dense.is_cuda:
            self.host = torch.empty(dense.shape, dtype=torch.float32, pin_memory=True)
            self.host.copy_(dense, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.host = dense.float().cpu()

    def numpy(self) -> NDArray[np.float32]:
        """The answer; waits until it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.host.numpy()


class Lane:
    """Sends batches to a device.

    To a GPU they go from pinned memory on a stream of their own, so that the next one travels while
    the last one is computed; computation waits for its own batch only.
    """

    def __init__(self, device: str) -> None:
        """Prepare; a lane to the CPU does nothing."""
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def send(self, batch: Batch) -> Batch:
        """The batch on the device; what is computed next there may use it."""
        if self.stream is None:
            return batch if self.device == "cpu" else batch.to(self.device)
        with torch.cuda.stream(self.stream):
            there = Batch(
                images={m: self.copied(x) for m, x in batch.images.items()},
                valid={m: self.copied(x) for m, x in batch.valid.items()},
                channels={m: self.copied(x) for m, x in batch.channels.items()},
            )
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for part in (there.images, there.valid, there.channels):
            for x in part.values():
                x.record_stream(computing)
        return there

    def copied(self, x: Tensor) -> Tensor:
        """A tensor on the device, in time."""
        return x.pin_memory().to(self.device, non_blocking=True)

    def precision(self) -> AbstractContextManager[object]:
        """Matrix products in bfloat16 on a GPU, as they are elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.stream else nullcontext()
