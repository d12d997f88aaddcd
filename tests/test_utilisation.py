"""How much arithmetic a step is, and what share of the device that makes."""

import math

import pytest
import torch
import training
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.journal import Journal
from model.train import StepReport, train
from model.utilisation import Utilisation, matrix_peak


def linear_flops(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * math.prod(x) * weight[0]


def test_flops_of_an_image_are_those_of_its_matrix_products() -> None:
    """Without routed branches every product is torch's own, so that torch can count them."""
    from model.encoder import RingMoE

    sizes = {"specialised": 0, "collaborative": 0, "channels": {"opt": 3}}
    config = ModelConfig.preset("nano", attention="swin_v1", **sizes)
    images = {"opt": torch.randn(1, 3, 64, 64, requires_grad=True)}
    network = RingMoE(config)
    fused = {torch.ops.mkldnn._linear_pointwise: linear_flops}  # torch counts its own only
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        network(images)["opt"][-1].sum().backward()
    ours = Utilisation(1.0, 1.0).of(config, "cpu", torch.float32).image_flops
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.15)


def test_share_is_of_all_devices() -> None:
    one = Utilisation(image_flops=2e9, peak=1e12)
    assert one.share(images=100, seconds=0.5) == pytest.approx(0.4)
    config = ModelConfig.preset("nano")
    four = Utilisation.of(config, "cpu", torch.float32, devices=4)
    assert four.image_flops > 0
    assert four.peak > 0


def test_peak_is_that_of_a_real_machine() -> None:
    assert 1e8 < matrix_peak("cpu") < 1e15


def test_steps_report_it_where_it_is_known(tmp_path) -> None:
    settings = training.settings(steps=2)
    seen: list[StepReport] = []
    known = Utilisation(image_flops=1e6, peak=1e9)
    train(
        training.network(), training.stream(settings), settings, tmp_path,
        publish=lambda step: None, on_step=seen.append, utilisation=known,
    )  # fmt: skip
    rows = Journal(tmp_path / "metrics.jsonl").rows()
    for row, report in zip(rows, seen, strict=True):
        assert report.mfu == pytest.approx(4 * 1e6 / report.seconds / 1e9)
        assert row["mfu"] == round(report.mfu, 4)
    assert "mfu" not in StepReport(1, 0.0, {}, 0.0, 0.0, 4, 1.0, 0.0).row()
