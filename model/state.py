"""Training state: what a run needs to go on as if it had never stopped.

`state/step-00000400/` holds weights and optimiser as torch DCP in safetensors (no pickle), sharded
by rank and resharded on load. `state/latest` names the newest complete one and is replaced
atomically, so that a half-written directory is never loaded.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.optim import Optimizer

from model.checkpoint import synced, write_text

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of each parameter."""


class TrainingState:
    """The `state/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> int:
        """Step of the newest complete state; 0 if there is none."""
        pointer = self.folder / "latest"
        return int(pointer.read_text()) if pointer.is_file() else 0

    def path(self, step: int) -> Path:
        """Folder of one state."""
        return self.folder / f"step-{step:08d}"

    def prepare(self, step: int) -> None:
        """Make an empty folder for a state."""
        shutil.rmtree(self.path(step), ignore_errors=True)
        self.path(step).mkdir(parents=True)

    def write(self, step: int, network: nn.Module, optimiser: Optimizer) -> None:
        """Write a state, or this rank's part; `commit` makes it the one to resume from."""
        path = self.path(step)
        with plain_errors():
            writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
            state_dict_saver.save(tensors_of(network, optimiser), storage_writer=writer)

    def discard(self, step: int) -> None:
        """Remove what a failed `write` left, unless it is the state to resume from."""
        if step != self.latest():
            shutil.rmtree(self.path(step), ignore_errors=True)

    def commit(self, step: int, keep_last: int, keep_every: int = 0) -> None:
        """Point `latest` to a written state and remove those rotated out.

        Args:
            step: of the state.
            keep_last: how many of the newest states stay.
            keep_every: states of every so many steps stay for good; 0 for none.
        """
        for file in [*self.path(step).iterdir(), self.path(step)]:
            synced(file)
        write_text(self.folder / "latest", f"{step}\n")
        others = [int(p.name[5:]) for p in self.folder.glob("step-*")]
        recent = sorted((s for s in others if s <= step), reverse=True)[: max(keep_last, 1)]
        for other in others:
            kept = other in recent or (other < step and keep_every and other % keep_every == 0)
            if not kept:
                shutil.rmtree(self.path(other))

    def load(self, network: nn.Module, optimiser: Optimizer) -> int:
        """Fill network and optimiser from the latest state and return its step (0: none).

        Raises:
            ValueError: if the state is damaged or belongs to another network.
        """
        step = self.latest()
        if step == 0:
            return 0
        try:
            with plain_errors():
                reader = HuggingFaceStorageReader(str(self.path(step)))
                state_dict_loader.load(tensors_of(network, optimiser), storage_reader=reader)
        except OSError as damage:
            raise ValueError(f"{self.path(step)} cannot be resumed: {damage}") from damage
        return step


@contextmanager
def plain_errors() -> Iterator[None]:
    """DCP in one process without its warning, and its failures as an OSError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        causes = [str(cause) for cause, _ in failure.failures.values()]
        raise OSError(causes[0].splitlines()[0]) from failure


def tensors_of(network: nn.Module, optimiser: Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by name; they share memory with network and optimiser."""
    fill_moments(optimiser)
    tensors = {f"network.{name}": t.detach() for name, t in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for moment in MOMENTS if parameter.requires_grad else ():
            tensors[f"optimiser.{name}.{moment}"] = optimiser.state[parameter][moment]
    return tensors


def fill_moments(optimiser: Optimizer) -> None:
    """Give parameters that were never updated the moments that AdamW would start from."""
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            if not optimiser.state[parameter]:
                optimiser.state[parameter].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
