"""The loop: it learns, stops for bad numbers, saves what it says."""

import json
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import training
from torch import Tensor, nn

from model.batch import Batch
from model.checkpoint import read_config
from model.journal import Journal
from model.optim import learning_rate
from model.train import (
    NonFiniteLossError,
    StepReport,
    TrainConfig,
    compile_blocks,
    recompute_blocks,
    train,
)


@dataclass
class Error:
    loss: Tensor
    parts: dict[str, Tensor]


class Line(nn.Module):
    """y = wx, the loss of which is NaN where x is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))

    def loss(self, batch: Batch) -> Error:
        parts = {m: (x * self.weight - 2 * x).square().mean() for m, x in batch.images.items()}
        return Error(torch.stack([*parts.values()]).sum(), parts)


def numbers(value: float, step: int) -> Batch:
    images = {"opt": torch.ones(2, 1, 1, 1, 1), "ms": torch.full((2, 1, 1, 1, 1), value)}
    return Batch(images, keys=[f"town:{step}:{i}" for i in range(6)])


def spoilt_at(bad: int, value: float = math.nan):
    def batches(start: int) -> Iterator[Batch]:
        step = start
        while True:
            yield numbers(value if step == bad else 1.0, step)
            step += 1

    return batches


def train_line(folder: Path, bad: int = -1, value: float = math.nan, **changes: object) -> Line:
    settings = {"steps": 6, "batch_size": 4, "lr": 0.1, "warmup_steps": 0, "save_every": 2}
    net = Line()
    train(
        net,
        spoilt_at(bad, value),
        TrainConfig(**{**settings, **changes}),
        folder,
        publish=lambda step: None,
    )
    return net


def test_loss_falls_and_every_step_is_a_row(tmp_path: Path) -> None:
    config = training.settings(steps=60, save_every=60)
    seen: list[StepReport] = []
    assert training.run(tmp_path, config, on_step=seen.append) == 60
    rows = Journal(tmp_path / "metrics.jsonl").rows()
    assert [row["step"] for row in rows] == [*range(1, 61)]
    assert [report.row() for report in seen] == rows
    for name in ("loss", "opt", "sar-l1", "balance", "lr", "grad_norm", "images_per_s"):
        assert all(math.isfinite(row[name]) for row in rows)
    for name, share in (("sar-l1", 0.6), ("loss", 0.85)):
        assert sum(r[name] for r in rows[-5:]) < share * sum(r[name] for r in rows[:5])
    assert rows[7]["lr"] == learning_rate(7, 60, config.lr, config.min_lr, 2)
    assert all(report.images == 4 for report in seen)
    assert read_config(tmp_path).provenance == {"step": 60}


def test_accumulated_halves_make_the_same_update_as_the_whole(tmp_path: Path) -> None:
    whole = train_line(tmp_path / "a", steps=3)
    halves = train_line(tmp_path / "b", steps=3, accumulate=2)
    torch.testing.assert_close(whole.weight, halves.weight)
    rows = Journal(tmp_path / "b" / "metrics.jsonl").rows()
    assert len(rows) == 3


def test_gradient_is_clipped(tmp_path: Path) -> None:
    norms: list[float] = []
    net = Line()
    batches = spoilt_at(-1)
    config = TrainConfig(steps=1, batch_size=4, clip=0.5, warmup_steps=0)

    def remember(report: StepReport) -> None:
        norms.extend([report.grad_norm, net.weight.grad.norm().item()])

    train(net, batches, config, tmp_path, publish=lambda step: None, on_step=remember)
    assert norms[0] == pytest.approx(8.0)
    assert norms[1] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_loss_names_step_modality_and_samples_and_keeps_the_last_state(
    tmp_path: Path, value: float
) -> None:
    with pytest.raises(NonFiniteLossError, match=r"step 4: loss of ms .* town:3:0") as refusal:
        train_line(tmp_path, bad=3, value=value)
    assert "\n" not in str(refusal.value)
    assert (tmp_path / "state" / "latest").read_text() == "2\n"
    net = train_line(tmp_path, bad=-1)
    assert torch.isfinite(net.weight).all()


def test_bad_update_is_left_out_when_asked(tmp_path: Path) -> None:
    net = train_line(tmp_path, bad=3, skip_nan=True)
    rows = Journal(tmp_path / "metrics.jsonl").rows()
    assert [row.get("skipped", False) for row in rows] == [False] * 3 + [True] + [False] * 2
    assert torch.isfinite(net.weight).all()
    assert len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])) > 3


def test_states_rotate(tmp_path: Path) -> None:
    train_line(tmp_path, steps=10, save_every=1, keep_last=2, keep_every=4)
    states = sorted(p.name for p in (tmp_path / "state").glob("step-*"))
    assert states == [f"step-{s:08d}" for s in (4, 8, 9, 10)]


def test_failed_save_keeps_the_state_before(tmp_path: Path) -> None:
    config = training.settings(steps=6)
    training.run(tmp_path, config, stop=lambda: True)
    before = sorted(p.name for p in (tmp_path / "state").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match=r"step 3 could not be saved: .*; step 1 is kept") as full:
            training.run(tmp_path, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(full.value)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == before
    assert training.run(tmp_path, config) == 6


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch_size", 0), ("accumulate", 3), ("keep_last", 0)]
)
def test_impossible_settings_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{"batch_size": 4, field: value})


def test_bf16_trains_like_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        training.run(tmp_path / precision, training.settings(steps=5, lr=1e-4, precision=precision))
        rows = Journal(tmp_path / precision / "metrics.jsonl").rows()
        losses[precision] = [row["loss"] for row in rows]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_recomputed_activations_give_the_same_losses(tmp_path: Path) -> None:
    for recompute in (False, True):
        net = training.network()
        if recompute:
            recompute_blocks(net)
        settings = training.settings(steps=3)
        folder = tmp_path / str(recompute)
        train(net, training.stream(settings), settings, folder, publish=lambda step: None)
    rows = [Journal(tmp_path / str(r) / "metrics.jsonl").rows() for r in (False, True)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert [r["grad_norm"] for r in rows[0]] == [r["grad_norm"] for r in rows[1]]


def test_recomputation_keeps_fewer_activations() -> None:
    kept = []
    for recompute in (False, True):
        net = training.network()
        if recompute:
            recompute_blocks(net)
        sizes: dict[int, int] = {}

        def remember(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        batch = next(training.stream(training.settings(batch_size=16))(0))
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            net.loss(batch)
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # the compiler has many of its own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_give_the_same_losses(tmp_path: Path, backend: str) -> None:
    for compiled in (False, True):
        net = training.network()
        names = list(net.state_dict())
        if compiled:
            compile_blocks(net, backend)
        settings = training.settings(steps=2)
        folder = tmp_path / str(compiled)
        train(net, training.stream(settings), settings, folder, publish=lambda step: None)
        assert list(net.state_dict()) == names
    rows = [Journal(tmp_path / str(c) / "metrics.jsonl").rows() for c in (False, True)]
    assert [r["loss"] for r in rows[1]] == pytest.approx([r["loss"] for r in rows[0]], rel=1e-4)
