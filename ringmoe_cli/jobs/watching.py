"""What a user sees of a pre-training run: progress, JSON lines, routing, TensorBoard."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from model.activity import DeadExperts, ExpertActivity, drop_rates, entropy
from model.encoder import RingMoE
from model.journal import Journal
from model.train import StepReport, TrainConfig
from ringmoe_cli import console

ROUTING = "routing.jsonl"
REPORTS_BEFORE_WARNING = 10
"""An expert is called dead after so many reports without a token."""


class Watch:
    """Live progress on a terminal, one JSON line per log step elsewhere; routing in a journal."""

    def __init__(
        self,
        config: TrainConfig,
        done: int,
        *,
        as_json: bool = False,
        tensorboard: Path | None = None,
    ) -> None:
        self.config, self.done, self.as_json = config, done, as_json
        self.tensorboard = tensorboard
        self.last: dict[str, float] = {}
        self.advance: Callable[..., None] | None = None
        self.writer: Any = None
        self.stack = ExitStack()

    def __enter__(self) -> "Watch":
        if console.on_terminal():
            left = self.config.steps - self.done
            self.advance = self.stack.enter_context(console.progress(left, "pretrain", "step"))
        if self.tensorboard and console.is_main_process():
            self.writer = self.stack.enter_context(open_tensorboard(self.tensorboard, self.done))
        return self

    def __exit__(self, *failure: Any) -> None:
        self.stack.close()

    def on_step(self, report: StepReport) -> None:
        """Show one update."""
        row = report.row()
        self.last = {"loss": report.loss, **report.parts}
        if self.advance:
            self.advance(1, described(report))
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, report.step)
        if not logs(self.config, report.step):
            return
        if self.as_json:
            console.result(row)
        elif not self.advance:
            console.say(json.dumps(row))


def logs(config: TrainConfig, step: int) -> bool:
    """Whether an update is one that is reported."""
    return step % config.log_every == 0 or step == config.steps


def described(report: StepReport) -> str:
    """One update in a few words: losses, learning rate, speed, waiting."""
    parts = "  ".join(f"{name} {value:.3f}" for name, value in report.parts.items())
    speed = f"{report.images / report.seconds:.0f} img/s"
    used = "" if report.mfu is None else f"  mfu {report.mfu:.0%}"
    return f"{parts}  lr {report.lr:.1e}  {speed}{used}  wait {report.wait / report.seconds:.0%}"


def open_tensorboard(folder: Path, done: int) -> Any:
    """A TensorBoard writer that drops what lies after step `done`.

    Raises:
        ValueError: if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the tensorboard package: pip install 'ringmoe[tensorboard]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=done + 1)


class RoutingLog:
    """Writes `routing.jsonl` at every log step and warns of experts that no token meets."""

    def __init__(
        self,
        encoder: RingMoE,
        config: TrainConfig,
        run: Path,
        done: int,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.activity, self.config, self.total = ExpertActivity(encoder), config, total
        self.journal, self.dead = Journal(run / ROUTING), DeadExperts()
        if console.is_main_process():
            self.journal.cut(done)
        for row in self.journal.rows():
            self.dead.add(row["shares"])
        self.activity.watching = logs(config, done + 1)

    def on_step(self, report: StepReport) -> None:
        """Report on the update just done, if it was watched, and decide about the next."""
        if self.activity.watching:
            shares = self.activity.take(self.total)
            self.dead.add(shares)
            row = {
                "step": report.step,
                "shares": rounded(shares),
                "entropy": rounded(entropy(shares)),
                "dropped": rounded(drop_rates(report.output.routing)),
            }
            if console.is_main_process():
                self.journal.append(row)
            if self.dead.reports == REPORTS_BEFORE_WARNING or report.step == self.config.steps:
                self.warn()
        self.activity.watching = logs(self.config, report.step + 1)

    def warn(self) -> None:
        """Name the experts without a token, if there are any."""
        names = self.dead.named()
        if names and self.dead.reports >= REPORTS_BEFORE_WARNING:
            console.warn(
                f"no token has met {names[0]}"
                + (f" and {len(names) - 1} more experts" if len(names) > 1 else "")
                + f" in {self.dead.reports} reports; raise objective.balance_weight"
            )


def rounded(value: Any, digits: int = 5) -> Any:
    """The same nested mappings and lists with shorter numbers."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return round(value, digits)
