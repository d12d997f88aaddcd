"""The training loop of pre-training and fine-tuning: exact to resume, silent, single-device.

A step is a pure function of (weights, moments, step number): batches, masks and dropout depend on
the step, never on what ran before. So a run that was stopped continues with the same losses.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from model.attention import WindowAttention
from model.batch import Batch
from model.encoder import Block
from model.journal import Journal
from model.optim import adamw, learning_rate
from model.patch import PatchMerging
from model.state import TrainingState
from model.utilisation import Utilisation

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
    ep: int = 1
    """Processes among which the experts of a branch are split; 1: each has them all."""
    recompute: bool = False
    """Forget the blocks' activations and compute them again for the gradient: less memory."""
    compile: bool = False
    """Compile attention and patch merging (`torch.compile`): faster after a minute of compiling."""

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


@dataclass(frozen=True)
class Crew:
    """What the loop must know of other processes; by default there are none."""

    main: bool = True
    """Whether this one writes files."""
    total: Callable[[Tensor], Tensor] = lambda values: values
    """Sum over processes."""
    clip: Callable[[Iterable[nn.Parameter], float], Tensor] = nn.utils.clip_grad_norm_
    """Scales gradients and returns their norm before."""
    parts: tuple[str, ...] = ()
    """Parts of the loss that any process may have; each has its share of loss and parts."""

    def wait(self, device: str) -> None:
        """Until all processes are here."""
        self.total(torch.zeros((), device=device)).item()


ALONE = Crew()


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
    mfu: float | None = None
    """Share of the devices' arithmetic that was used, where it is known."""

    def row(self) -> dict[str, Any]:
        """The line of `metrics.jsonl`."""
        row = {"step": self.step, "loss": self.loss, **self.parts, "lr": self.lr}
        row |= {"grad_norm": self.grad_norm, "images_per_s": round(self.images / self.seconds, 2)}
        row |= {"seconds": round(self.seconds, 5), "data_wait": round(self.wait, 5)}
        row |= {} if self.mfu is None else {"mfu": round(self.mfu, 4)}
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
    crew: Crew = ALONE,
    utilisation: Utilisation | None = None,
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
        stop: asked in every update; true saves and returns after it.
        device: where to compute.
        rate: factor of the learning rate by parameter name (layer-wise decay).
        crew: the other processes; the network is distributed already.
        utilisation: for the MFU of every step; None: not reported.

    Returns:
        The last step done; less than `config.steps` if stopped.

    Raises:
        NonFiniteLossError: naming step, part of the loss and samples.
        OSError: if a save fails; the previous state stays good.
    """
    network.to(device).train()
    optimiser = adamw(network, config.lr, config.weight_decay, rate)
    state, metrics = TrainingState(run / "state"), Journal(run / "metrics.jsonl")
    done = state.load(network, optimiser)
    if crew.main:
        run.mkdir(parents=True, exist_ok=True)
        metrics.cut(done)
    stream = batches(done * config.accumulate)
    while done < config.steps:
        report, stopped = update(network, optimiser, stream, config, done, device, stop, crew)
        done = report.step
        if utilisation:
            report.mfu = utilisation.share(report.images, report.seconds)
        if crew.main:
            metrics.append(report.row())
        on_step(report)
        if stopped or done == config.steps or done % config.save_every == 0:
            save(state, network, optimiser, config, done, publish, crew, device)
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
    stop: Callable[[], bool] = lambda: False,
    crew: Crew = ALONE,
) -> tuple[StepReport, bool]:
    """One update of the weights from `config.accumulate` batches.

    Returns:
        What happened, and whether any process was asked to stop.
    """
    start, wait, images = time.perf_counter(), 0.0, 0
    torch.manual_seed(config.seed * 1_000_003 + done)
    optimiser.zero_grad(set_to_none=True)
    seen: list[tuple[dict[str, float], Batch]] = []
    for _ in range(config.accumulate):
        asked = time.perf_counter()
        batch = next(stream).to(device)
        wait += time.perf_counter() - asked
        with computing_in(config.precision, device):
            output = network.loss(batch)  # type: ignore[operator]
        (output.loss / config.accumulate).backward()
        seen.append((scalars(output, crew.parts), batch))
        images += sum(len(x) for x in batch.images.values())
    norm = crew.clip(network.parameters(), config.clip).item()
    mean = {k: sum(v[k] for v, _ in seen) / len(seen) for k in seen[0][0]}
    sums = [*mean.values(), float(images), float(stop())]
    *values, images_all, stops = crew.total(torch.tensor(sums, device=device).double()).tolist()
    mean = dict(zip(mean, values, strict=True))
    skipped = not (math.isfinite(mean["loss"]) and math.isfinite(norm))
    if skipped and not config.skip_nan:
        raise non_finite(done + 1, seen, norm)
    lr = learning_rate(done, config.steps, config.lr, config.min_lr, config.warmup_steps)
    if not skipped:
        for group in optimiser.param_groups:
            group["lr"] = lr * group["rate"]
        optimiser.step()
    loss, seconds = mean.pop("loss"), time.perf_counter() - start
    report = StepReport(
        done + 1, loss, mean, lr, norm, int(images_all), seconds, wait, skipped, output
    )
    return report, stops > 0


def computing_in(precision: Precision, device: str) -> AbstractContextManager[Any]:
    """Autocast for the forward pass, or nothing for fp32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def scalars(output: LossOutput, parts: tuple[str, ...] = ()) -> dict[str, float]:
    """Loss and parts as numbers, with one transfer from the device.

    Args:
        output: of the network.
        parts: names that must be there, 0 if the output lacks them.
    """
    nothing = {name: torch.zeros_like(output.loss) for name in parts}
    named = {"loss": output.loss, **nothing, **output.parts}
    values = torch.stack([v.detach().float() for v in named.values()]).tolist()
    return dict(zip(named, values, strict=True))


def non_finite(
    step: int, seen: list[tuple[dict[str, float], Batch]], norm: float
) -> NonFiniteLossError:
    """Names the part of the loss, which is a modality, and the samples."""
    advice = "the last state is kept; lower train.lr, mend the data, or pass --skip-nan"
    for values, batch in seen:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            parts = ", ".join([name for name in bad if name != "loss"] or bad)
            where = f"loss of {parts} is not finite; {names(batch)}"
            return NonFiniteLossError(f"step {step}: {where}; {advice}")
    where = f"gradient norm is {norm}; {names(seen[-1][1])}"
    return NonFiniteLossError(f"step {step}: {where}; {advice}")


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
    crew: Crew = ALONE,
    device: str = "cpu",
) -> None:
    """Training state first, then the checkpoint, then the pointer that makes the state count.

    Raises:
        OSError: naming the step that is still good.
    """
    try:
        if crew.main:
            state.prepare(step)
        crew.wait(device)
        state.write(step, network, optimiser)
        publish(step)
        crew.wait(device)
        if crew.main:
            state.commit(step, config.keep_last, config.keep_every)
        crew.wait(device)
    except Exception as failure:
        state.discard(step)
        raise OSError(
            f"step {step} could not be saved: {failure}; "
            f"step {state.latest()} is kept, run the same command to go on from there"
        ) from failure


def recompute_blocks(network: nn.Module) -> None:
    """Make every block forget its activations and compute them again for the gradient.

    Memory for activations falls to one block's plus every block's input; a step costs about a
    third more.
    """
    for block in [m for m in network.modules() if isinstance(m, Block)]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile what has the same shapes in every step; experts see other numbers of tokens each."""
    for module in network.modules():
        if isinstance(module, WindowAttention | PatchMerging):
            module.compile(backend=backend)
