"""The plan's arithmetic against a real forward pass, and the layouts it chooses."""

import pytest
import torch

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.plan import Cluster, Layout, Workload, activation_bytes, estimate, plan, smallest
from model.pretrain import MaskedImageModel, batch_masks

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
    kept = estimate(work, cluster, Layout(1, 8, 1, checkpointing=False))
    again = estimate(work, cluster, Layout(1, 8, 1, checkpointing=True))
    assert again.activations < kept.activations / 3
    assert again.flops == pytest.approx(kept.flops * 4 / 3)


def test_one_rank_receives_nothing() -> None:
    cost = estimate(
        Workload.of(ModelConfig.preset("nano")),
        Cluster(1, GB),
        Layout(1, 1, 1, checkpointing=False),
    )
    assert cost.shard_traffic == cost.token_traffic == cost.gathered == 0
