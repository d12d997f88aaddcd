"""The training loop of pre-training and fine-tuning: exact to resume, silent, single-device.

A step is a pure function of (weights, moments, step number): batches, masks and dropout depend on
the step, never on what ran before. So a run that was stopped continues with the same losses.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.batch import Batch
from model.journal import Journal
from model.optim import adamw, learning_rate
from model.state import TrainingState

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast to train."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 64
    """Images of one update, over all ranks and accumulated batches."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 5e-7
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 20
    """Updates of linear warm-up."""
    weight_decay: float = 0.05
    """AdamW's, on matrices only."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of weights, data order, masks and augmentation."""
    save_every: int = 200
    """Updates between two saves; the last step is always saved."""
    keep_last: int = 1
    """Training states kept."""
    keep_every: int = 0
    """States of every so many updates are kept for good; 0: none."""
    precision: Precision = "fp32"
    """`bf16` computes matrix products in bfloat16; weights, norms and routers stay fp32."""
    accumulate: int = 1
    """Batches whose gradients make one update."""
    log_every: int = 10
    """Updates between two reports; `metrics.jsonl` has them all."""
    skip_nan: bool = False
    """Leave out an update whose loss or gradient is not finite instead of stopping."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep_last", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}"
            )


class LossOutput(Protocol):
    """What a network says about a batch."""

    @property
    def loss(self) -> Tensor:
        """Scalar to minimise."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """Scalars to log: loss per modality, balance and the like."""


class NonFiniteLossError(ValueError):
    """A loss or gradient is NaN or infinite."""


@dataclass
class StepReport:
    """What happened in one update."""

    step: int
    """Number of the update, from 1."""
    loss: float
    """Mean over the accumulated batches."""
    parts: dict[str, float]
    """The network's `parts`, likewise."""
    lr: float
    grad_norm: float
    """Before clipping."""
    images: int
    """In this update."""
    seconds: float
    """Whole update, waiting for data included."""
    wait: float
    """Seconds spent waiting for data."""
    skipped: bool = False
    """The weights were left alone because something was not finite."""
    output: Any = None
    """The network's output on the last batch, for pictures and routing statistics."""

    def row(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        row = {"step": self.step, "loss": self.loss, **self.parts, "lr": self.lr}
        row |= {"grad_norm": self.grad_norm, "images_per_s": round(self.images / self.seconds, 2)}
        row |= {"seconds": round(self.seconds, 5), "data_wait": round(self.wait, 5)}
        return {**row, "skipped": True} if self.skipped else row


def train(
    network: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    config: TrainConfig,
    run: Path,
    *,
    publish: Callable[[int], None],
    on_step: Callable[[StepReport], None] = lambda report: None,
    stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
    rate: Callable[[str], float] = lambda name: 1.0,
) -> int:
    """Train, or go on training, until `config.steps`.

    Args:
        network: has `loss(batch) -> LossOutput`.
        batches: called once with the number of the first batch wanted (updates x accumulate);
            gives batches of batch_size / accumulate images without end.
        config: how long and how fast.
        run: folder for `metrics.jsonl` and `state/`.
        publish: writes the model's checkpoint; called with the step at every save.
        on_step: called after every update.
        stop: asked after every update; true saves and returns.
        device: where to compute.
        rate: factor of the learning rate by parameter name (layer-wise decay).

    Returns:
        The last step done; less than `config.steps` if stopped.

    Raises:
        NonFiniteLossError: naming step, part of the loss and samples.
        OSError: if a save fails; the previous state stays good.
    """
    network.to(device).train()
    optimiser = adamw(network, config.lr, config.weight_decay, rate)
    state, metrics = TrainingState(run / "state"), Journal(run / "metrics.jsonl")
    run.mkdir(parents=True, exist_ok=True)
    done = state.load(network, optimiser)
    metrics.cut(done)
    stream = batches(done * config.accumulate)
    while done < config.steps:
        report = update(network, optimiser, stream, config, done, device)
        done = report.step
        metrics.append(report.row())
        on_step(report)
        stopped = stop()
        if stopped or done == config.steps or done % config.save_every == 0:
            save(state, network, optimiser, config, done, publish)
        if stopped:
            break
    return done


def update(
    network: nn.Module,
    optimiser: Optimizer,
    stream: Iterator[Batch],
    config: TrainConfig,
    done: int,
    device: str,
) -> StepReport:
    """One update of the weights from `config.accumulate` batches."""
    start, wait, images = time.perf_counter(), 0.0, 0
    torch.manual_seed(config.seed * 1_000_003 + done)
    optimiser.zero_grad(set_to_none=True)
    values: list[dict[str, float]] = []
    for _ in range(config.accumulate):
        asked = time.perf_counter()
        batch = next(stream).to(device)
        wait += time.perf_counter() - asked
        with computing_in(config.precision, device):
            output = network.loss(batch)  # type: ignore[operator]
        (output.loss / config.accumulate).backward()
        values.append(scalars(output))
        images += sum(len(x) for x in batch.images.values())
        if not config.skip_nan:
            refuse_non_finite(values[-1], done + 1, batch)
    mean = {k: sum(v[k] for v in values) / len(values) for k in values[-1]}
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.clip).item()
    skipped = not (math.isfinite(mean["loss"]) and math.isfinite(norm))
    if skipped and not config.skip_nan:
        raise NonFiniteLossError(f"step {done + 1}: the gradient is {norm}; {names(batch)}")
    lr = learning_rate(done, config.steps, config.lr, config.min_lr, config.warmup_steps)
    if not skipped:
        for group in optimiser.param_groups:
            group["lr"] = lr * group["rate"]
        optimiser.step()
    seconds = time.perf_counter() - start
    loss = mean.pop("loss")
    return StepReport(done + 1, loss, mean, lr, norm, images, seconds, wait, skipped, output)


def computing_in(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """Autocast for the forward pass, or nothing for fp32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def scalars(output: LossOutput) -> dict[str, float]:
    """Loss and parts as numbers, with one transfer from the device."""
    named = {"loss": output.loss, **output.parts}
    values = torch.stack([v.detach().float() for v in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def refuse_non_finite(values: dict[str, float], step: int, batch: Batch) -> None:
    """Stop before a bad loss reaches the weights.

    Raises:
        NonFiniteLossError: naming the part of the loss, which is a modality, and the samples.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        named = [name for name in bad if name != "loss"] or bad
        raise NonFiniteLossError(
            f"step {step}: loss of {', '.join(named)} is not finite; {names(batch)}; "
            "the last state is kept, lower train.lr, mend the data, or pass --skip-nan"
        )


def names(batch: Batch, most: int = 4) -> str:
    """The samples of a batch, for a message."""
    shown = ", ".join(batch.keys[:most]) or "unnamed"
    return f"samples {shown}{' …' if len(batch.keys) > most else ''}"


def save(
    state: TrainingState,
    network: nn.Module,
    optimiser: Optimizer,
    config: TrainConfig,
    step: int,
    publish: Callable[[int], None],
) -> None:
    """Training state first, then the checkpoint, then the pointer that makes the state count.

    Raises:
        OSError: naming the step that is still good.
    """
    try:
        state.write(step, network, optimiser)
        publish(step)
        state.commit(step, config.keep_last, config.keep_every)
    except Exception as failure:
        state.discard(step)
        raise OSError(
            f"step {step} could not be saved: {failure}; "
            f"step {state.latest()} is kept, run the same command to go on from there"
        ) from failure
