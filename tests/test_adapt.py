"""Cheap adaptation: bands, bypasses, frozen weights, slower depths."""

import pytest
import torch

from model.adapt import (
    adapt_bands,
    depth_scale,
    encoder_for,
    freeze,
    insert_convpass,
    parameters,
)
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE

CONFIG = ModelConfig(
    embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    net = RingMoE(CONFIG)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_reordered_and_left_out_bands_keep_their_answer(encoder):
    x = torch.randn(2, 4, 32, 32)
    x[:, 1] = 0
    before = encoder({"ms": x})["ms"]
    adapt_bands(encoder, "ms", [3, 0, 2])
    after = encoder({"ms": x[:, [3, 0, 2]]})["ms"]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b)
    assert encoder.config.channels == {"opt": 3, "ms": 3}


def test_copies_of_a_band_count_as_that_band(encoder):
    x = torch.randn(2, 4, 32, 32)
    before = encoder({"ms": x})["ms"][-1]
    adapt_bands(encoder, "ms", [0, 1, 1, 1, 2, 3, 3])
    after = encoder({"ms": x[:, [0, 1, 1, 1, 2, 3, 3]]})["ms"][-1]
    torch.testing.assert_close(after, before)


def test_an_encoder_is_read_for_some_modalities_and_other_bands(tmp_path, encoder):
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(encoder)]
    save_checkpoint(tmp_path, CheckpointConfig(CONFIG), tensors)
    net = encoder_for(tmp_path, {"ms": [0, 1, 2, 3, 3]}).eval()
    assert net.config.channels == {"ms": 5}
    x = torch.randn(1, 4, 32, 32)
    torch.testing.assert_close(
        net({"ms": x[:, [0, 1, 2, 3, 3]]})["ms"][-1], encoder({"ms": x})["ms"][-1]
    )
    with pytest.raises(ValueError, match=r"was trained on .*, not on sar-l1"):
        encoder_for(tmp_path, {"sar-l1": [0]})


def test_fresh_bypasses_change_nothing_and_learn(encoder):
    x = {"opt": torch.randn(2, 3, 20, 32)}
    valid = {"opt": torch.rand(2, 1, 20, 32) > 0.9}
    before = encoder.encode(x, valid=valid).features["opt"]
    insert_convpass(encoder, 4)
    after = encoder.encode(x, valid=valid).features["opt"]
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b)
    freeze(encoder)
    sum(f.square().sum() for f in after).backward()
    learns = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert learns
    assert all(".bypass." in n for n in learns)
    assert all(p.grad is not None for n, p in encoder.named_parameters() if ".bypass.up" in n)


def test_bypasses_leave_tokens_without_data_at_zero(encoder):
    insert_convpass(encoder, 4)
    for name, parameter in encoder.named_parameters():
        if ".bypass." in name:
            torch.nn.init.normal_(parameter)
    valid = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    valid[..., 16:] = False
    features = encoder.encode({"opt": torch.randn(1, 3, 32, 32)}, valid={"opt": valid})
    assert features.features["opt"][0][..., 4:].abs().max() == 0
    assert features.features["opt"][0][..., :4].abs().max() > 0


@pytest.mark.parametrize("preset", ["nano", "tiny", "base", "14b"])
def test_convpass_trains_at_most_eight_percent(preset):
    with torch.device("meta"):
        net = RingMoE(ModelConfig.preset(preset, channels={"opt": 3}))
        insert_convpass(net, 16)
        freeze(net)
    learned, total = parameters(net)
    assert 0 < learned <= 0.08 * total


def test_layers_learn_slower_the_farther_they_are_from_the_head():
    depths, decay = (1, 2, 1, 1), 0.5
    scale = {
        name: depth_scale(name, depths, decay)
        for name in (
            "head.classify.weight", "encoder.norm.weight",
            "encoder.stages.3.blocks.0.attn.q.weight", "encoder.stages.2.blocks.0.norm1.weight",
            "encoder.stages.1.blocks.1.norm1.weight", "encoder.stages.1.blocks.0.norm1.weight",
            "encoder.stages.0.downsample.reduction.weight", "encoder.stages.0.blocks.0.moe.x",
            "encoder.patch_embeds.opt.projection.weight",
        )
    }  # fmt: skip
    assert list(scale.values()) == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125, 0.015625]
