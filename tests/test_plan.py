"""The plan's arithmetic against a real forward pass, and the layouts it chooses."""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typer.testing import CliRunner

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.plan import (
    Cluster,
    Layout,
    Link,
    Workload,
    activation_bytes,
    estimate,
    most_gathered,
    plan,
    smallest,
)
from model.pretrain import MaskedImageModel, batch_masks
from model.timing import Line, Pace, pace
from ringmoe_cli.app import app

GB = 1e9


def saved_bytes(config: ModelConfig, images: int) -> int:
    """Bytes that autograd keeps for one pre-training step, parameters left out."""
    net = MaskedImageModel(config, PretrainConfig())
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    side = config.image_size
    batch = Batch({"opt": torch.randn(images, 1, 3, side, side)})
    masks = batch_masks(config, 0.6, batch, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(batch, masks)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("preset", "images"), [("nano", 8), ("tiny", 1)])
def test_activations_are_those_of_a_real_step(preset: str, images: int) -> None:
    config = ModelConfig.preset(preset, channels={"opt": 3})
    layout = Layout(ep=1, micro_batch=images, accumulate=1, checkpointing=False)
    expected = activation_bytes(config, layout, width=4, probabilities=True)
    assert saved_bytes(config, images) == pytest.approx(expected, rel=0.1)


def test_14b_fits_64_devices_of_80_gb_but_not_one() -> None:
    work = Workload.of(ModelConfig.preset("14b"))
    fits = plan(work, Cluster(64, 80 * GB), batch=512)
    assert fits
    assert all(cost.memory <= 72 * GB for _, cost in fits)
    assert plan(work, Cluster(1, 80 * GB), batch=8) == []
    assert smallest(work, Cluster(1, 80 * GB))[1].weights > 50 * GB


def test_every_image_is_seen_once_per_update_whatever_the_layout() -> None:
    work = Workload.of(ModelConfig.preset("nano"))
    for layout, _ in plan(work, Cluster(4, 10 * GB), batch=48):
        assert layout.micro_batch * layout.accumulate * 4 == 48


def test_checkpointing_trades_a_forward_pass_for_memory() -> None:
    work = Workload.of(ModelConfig.preset("tiny"))
    cluster = Cluster(1, 10 * GB)
    layouts = [Layout(1, 8, 1, checkpointing=False), Layout(1, 8, 1, checkpointing=True)]
    kept, again = (estimate(work, cluster, layout) for layout in layouts)
    most, least = (activation_bytes(work.config, layout, width=2) for layout in layouts)
    assert least < most / 3
    assert again.memory < kept.memory
    assert again.flops == pytest.approx(kept.flops * 4 / 3)


def test_one_rank_receives_nothing() -> None:
    cost = estimate(
        Workload.of(ModelConfig.preset("nano")),
        Cluster(1, GB),
        Layout(1, 1, 1, checkpointing=False),
    )
    assert cost.shard_traffic == cost.token_traffic == cost.gathered == 0


def backward_peak(config: ModelConfig, images: int) -> int:
    """Most bytes that the backward pass of a step had allocated, weights left out."""
    net, side = MaskedImageModel(config, PretrainConfig()), config.image_size
    batch = Batch({"opt": torch.randn(images, 1, 3, side, side)})
    batch.targets["masks"] = batch_masks(config, 0.6, batch, 0, 0)
    net.loss(batch).loss.backward()
    net.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with record_function("forward"):
            loss = net.loss(batch).loss
        loss.backward()
    events = seen.profiler.kineto_results.events()
    start = next(e.start_ns() for e in events if e.name() == "forward")
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for when, size in steps:
        now += size if when >= start else 0
        most = max(most, now)
    return most


def test_gradients_and_activations_are_those_of_a_real_backward_pass() -> None:
    work = Workload.of(ModelConfig.preset("nano", channels={"opt": 3}), 4, probabilities=True)
    cost = estimate(work, Cluster(1, GB), Layout(1, 8, 1, checkpointing=False))
    expected = backward_peak(work.config, 8)
    assert cost.gradients + cost.activations == pytest.approx(expected, rel=0.1)


def test_experts_on_all_ranks_leave_the_rest_whole_on_cpus() -> None:
    work = Workload.of(ModelConfig.preset("nano"), 4)
    layout = Layout(2, 8, 1, checkpointing=False)
    sharded = estimate(work, Cluster(2, GB), layout)
    whole = estimate(work, Cluster(2, GB, whole=True), layout)
    dense = work.parameters - sum(experts for _, experts in work.blocks)
    assert whole.weights - sharded.weights == pytest.approx(4 * dense / 2)
    assert whole.gathered == 0
    assert whole.shard_traffic == pytest.approx(4 * dense)


def test_seconds_are_those_of_the_measured_parts() -> None:
    work = Workload.of(ModelConfig.preset("nano"), 4)
    found = Pace(tuple(Line(0.1, s / 100) for s in range(4)), Line(0.5, 0.01), 1e-9)
    layout = Layout(1, 4, 2, checkpointing=False)
    alone = estimate(work, Cluster(1, GB, pace=found), layout).seconds
    blocks = sum(n * (0.1 + 4 * s / 100) for s, n in enumerate(work.config.depths))
    assert alone == pytest.approx(2 * (blocks + 0.54) + 1e-9 * work.parameters)
    link = Link(1e9, 1e-3)
    two = estimate(work, Cluster(2, GB, tokens=link, shards=link, beside=False, pace=found), layout)
    messages = (len(work.blocks) + 1) * 5 + round(len(work.blocks) * 4 * 0.5)
    travel = two.shard_traffic / 1e9 + 1e-3 * messages
    assert two.seconds == pytest.approx(alone - 0.5e-9 * work.parameters + travel)
    together = Cluster(2, GB, tokens=link, shards=link, pace=replace(found, together=True))
    assert estimate(work, together, layout).seconds < two.seconds


def test_a_pace_is_measured_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.timing.UPDATED", (2, 64, 64))
    found = pace(ModelConfig.preset("nano"), images=(1, 2), rounds=1)
    assert len(found.stages) == 4
    assert all(line.at(2) > 0 for line in (*found.stages, found.rest))
    assert found.update > 0
    monkeypatch.setattr("model.timing.pace", lambda *_: found)
    words = ["plan", "--preset", "nano", "--gpus", "1", "--memory", "8GB", "--batch", "4", "--json"]
    shown = CliRunner().invoke(app, [*words, "--measure", "--device", "cpu"])
    assert shown.exit_code == 0, shown.exception
    report = json.loads(shown.stdout)
    assert report["images per forward pass"] == 4
    expected = sum(2 * line.at(4) for line in found.stages) + found.rest.at(4)
    expected += found.update * Workload.of(ModelConfig.preset("nano")).parameters
    assert report["seconds per update"] == pytest.approx(expected, abs=1e-3)


def test_a_block_stands_whole_beside_the_one_before_it_and_its_gradient():
    work = Workload(ModelConfig.preset("nano"), 0, ((10, 0), (60, 80), (90, 0)))
    layout = Layout(ep=2, micro_batch=1, accumulate=1, checkpointing=False)
    assert most_gathered(work, layout) == 2 * 90 + 60 + 40
    assert most_gathered(replace(work, blocks=work.blocks[:2]), layout) == 2 * (60 + 40) + 10
