"""Parameter groups and the schedule."""

from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig, PretrainConfig
from model.optim import adamw, learning_rate
from model.pretrain import MaskedImageModel


def small_model(**changes: object) -> MaskedImageModel:
    config = ModelConfig.preset("nano", depths=(1, 1, 1, 1), embed_dim=8, **changes)
    return MaskedImageModel(config, PretrainConfig())


def test_schedule_equals_the_released_one(oracle_dir: Path) -> None:
    released = np.load(oracle_dir / "lr_schedule.npz")["lr"]
    ours = [learning_rate(t, 1000, 2.5e-4, 5e-7, 200) for t in range(1000)]
    np.testing.assert_allclose(ours, released, rtol=1e-5, atol=1e-9)


def test_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(0, 100, 1e-3, 1e-6, 0) == pytest.approx(1e-3)
    assert learning_rate(100, 100, 1e-3, 1e-6, 0) == pytest.approx(1e-6)


@pytest.mark.parametrize("attention", ["swin_v2", "swin_v1"])
def test_only_matrices_of_projections_experts_and_convolutions_decay(attention: str) -> None:
    model = small_model(attention=attention)
    optimiser = adamw(model, 1e-3, 0.05)
    decayed = {id(p) for p in optimiser.param_groups[0]["params"]}
    assert optimiser.param_groups[0]["weight_decay"] == 0.05
    assert optimiser.param_groups[1]["weight_decay"] == 0.0
    for name, parameter in model.named_parameters():
        spared = (
            name.endswith("bias")
            or any(word in name for word in ("norm", ".router.", "attn.position", "logit_scale"))
            or name == "mask_token"
        )
        assert (id(parameter) in decayed) == (not spared), name


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none() -> None:
    model = small_model()
    model.encoder.patch_embeds.requires_grad_(False)
    optimiser = adamw(model, 1e-3, 0.05)
    grouped = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
