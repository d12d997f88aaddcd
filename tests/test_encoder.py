"""The whole encoder: sizes, modalities, padding, validity, masks, precision, meta device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from model.config import ModelConfig
from model.encoder import RingMoE
from model.router import balance_loss


def network(**changes: object) -> RingMoE:
    """A small encoder with weights large enough that every part matters."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "image_size": 32, "window": 4}
    net = RingMoE(ModelConfig(**{**sizes, "channels": {"opt": 3, "ms": 5}, **changes}))  # type: ignore[arg-type]
    for name, parameter in net.named_parameters():
        if "norm" not in name and "logit_scale" not in name:
            nn.init.normal_(parameter, std=0.3)
    return net.eval()


NET = network()


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for first, second in zip(a, b, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(4, 70), width=st.integers(4, 70), images=st.integers(1, 3),
    other=st.integers(4, 40),
)  # fmt: skip
def test_any_size_gives_four_maps_of_the_right_size(height, width, images, other):
    batch = {"ms": torch.randn(1, 5, other, other), "opt": torch.randn(images, 3, height, width)}
    with torch.no_grad():
        features = NET(batch)
    assert list(features) == ["ms", "opt"]
    for name, (b, h, w) in {"opt": (images, height, width), "ms": (1, other, other)}.items():
        shapes = [tuple(f.shape) for f in features[name]]
        assert shapes == [(b, 8 * 2**s, -(-h // (4 << s)), -(-w // (4 << s))) for s in range(2)]
        assert all(torch.isfinite(f).all() for f in features[name])


@pytest.mark.parametrize("size", [32, 45])
def test_modalities_and_images_do_not_influence_each_other(size):
    opt, ms = torch.randn(3, 3, 32, 32), torch.randn(2, 5, size, size)
    with torch.no_grad():
        together = NET.encode({"opt": opt, "ms": ms})
        apart = [NET.encode({"opt": opt}), NET.encode({"ms": ms})]
        same(NET({"opt": opt[1:2]})["opt"], [f[1:2] for f in together.features["opt"]])
    same(together.features["opt"], apart[0].features["opt"])
    same(together.features["ms"], apart[1].features["ms"])
    for layer, first, second in zip(
        together.routing, apart[0].routing, apart[1].routing, strict=True
    ):
        expected = (first + second).branches
        assert set(layer.branches) == {"collaborative", "specialised.opt", "specialised.ms"}
        for name, branch in layer.branches.items():
            assert torch.equal(branch.counts_E, expected[name].counts_E)
            assert branch.tokens == expected[name].tokens


@settings(max_examples=20, deadline=None)
@given(height=st.integers(17, 60), width=st.integers(17, 60), seed=st.integers(0, 99))
def test_invalid_surroundings_equal_a_cropped_image(height, width, seed):
    """Reader padding marked invalid changes nothing, whatever it holds, and is not routed."""
    torch.manual_seed(seed)
    net = network(depths=(2,), num_heads=(1,))
    image = torch.randn(1, 3, height, width)
    canvas = torch.randn(1, 3, 64, 64)
    canvas[:, :, height:], canvas[:, :, :, width:] = 0, 0
    canvas[:, :, :height, :width] = image
    rows, columns = -(-height // 4), -(-width // 4)
    outside = torch.randn(1, 3, 64, 64)
    outside[:, :, : 4 * rows, : 4 * columns] = canvas[:, :, : 4 * rows, : 4 * columns]
    valid = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    valid[:, :, :height, :width] = True
    with torch.no_grad():
        alone = net.encode({"opt": image})
        framed = net.encode({"opt": outside}, valid={"opt": valid})
    same(alone.features["opt"], [framed.features["opt"][0][:, :, :rows, :columns]])
    for a, b in zip(alone.routing, framed.routing, strict=True):
        assert a.branches["collaborative"].tokens == b.branches["collaborative"].tokens
        assert torch.equal(
            a.branches["specialised.opt"].counts_E, b.branches["specialised.opt"].counts_E
        )


def test_validity_reaches_later_stages_and_other_modalities():
    opt, ms = torch.randn(2, 3, 40, 40), torch.randn(1, 5, 40, 40)
    valid = torch.ones(2, 40, 40, dtype=torch.bool)
    valid[0, :, 13:] = False
    noisy = torch.where(valid[:, None], opt, 99.0)
    noisy[:, :, :, 13:16] = opt[:, :, :, 13:16]  # the patch that is still partly valid
    with torch.no_grad():
        first = NET.encode({"opt": opt, "ms": ms}, valid={"opt": valid})
        second = NET.encode({"opt": noisy, "ms": ms}, valid={"opt": valid})
    same(first.features["opt"], second.features["opt"])
    same(first.features["ms"], NET({"ms": ms})["ms"])
    assert not first.features["opt"][0][0, :, :, 4:].any()
    seen = 10 * 4 + 10 * 10
    assert first.routing[0].branches["specialised.opt"].tokens == seen


def test_an_image_without_valid_pixels_is_harmless():
    net = network().train()
    valid = {"opt": torch.zeros(2, 1, 32, 32, dtype=torch.bool)}
    out = net.encode({"opt": torch.randn(2, 3, 32, 32)}, valid=valid)
    loss = sum(f.square().sum() for f in out.features["opt"]) + balance_loss(out.routing)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())


def test_masked_patches_are_hidden_behind_the_token():
    image, token = torch.randn(2, 3, 32, 32), torch.randn(8)
    mask = torch.rand(2, 8, 8) < 0.5
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        first = NET.encode({"opt": image}, masks={"opt": mask}, mask_token=token)
        other = torch.where(pixels, torch.randn_like(image), image)
        second = NET.encode({"opt": other}, masks={"opt": mask}, mask_token=token)
        plain = NET({"opt": image})
    same(first.features["opt"], second.features["opt"])
    assert not torch.allclose(first.features["opt"][0], plain["opt"][0])
    with pytest.raises(ValueError, match="mask_token"):
        NET.encode({"opt": image}, masks={"opt": mask})


def test_channels_that_were_not_measured_do_not_matter():
    image = torch.randn(2, 5, 32, 32)
    measured = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]).bool()
    other = image.clone()
    other[0, [2, 4]] = 7
    with torch.no_grad():
        first = NET.encode({"ms": image}, channels={"ms": measured})
        second = NET.encode({"ms": other}, channels={"ms": measured})
    same(first.features["ms"], second.features["ms"])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({}, "no images"),
        ({"thermal": torch.zeros(1, 1, 32, 32)}, "no modality 'thermal'"),
        ({"opt": torch.zeros(1, 4, 32, 32)}, r"expected \(B, 3, H, W\)"),
        ({"opt": torch.zeros(1, 3, 2, 32)}, "smaller than a patch"),
    ],
)
def test_impossible_input_is_named(images, words):
    with pytest.raises(ValueError, match=words):
        NET(images)


def test_every_parameter_learns():
    net = network(attention="swin_v1", top_k=2).train()
    batch = {"opt": torch.randn(4, 3, 64, 64), "ms": torch.randn(4, 5, 64, 64)}
    out = net.encode(batch)
    loss = sum(f.square().mean() for maps in out.features.values() for f in maps)
    (loss + balance_loss(out.routing)).backward()
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("attention", ["swin_v1", "swin_v2"])
def test_bfloat16_features_stay_close(attention):
    net, image = network(attention=attention), {"opt": torch.randn(2, 3, 40, 40)}
    with torch.no_grad():
        exact = net(image)["opt"]
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(image)["opt"]
        whole = net.bfloat16()({"opt": image["opt"].bfloat16()})["opt"]
    for a, b, c in zip(exact, rough, whole, strict=True):
        assert b.dtype == torch.float32  # the residual stream keeps its precision
        assert (a - b).abs().mean() < 0.10 * a.abs().mean()
        assert (a - c).abs().mean() < 0.10 * a.abs().mean()


def test_meta_device_knows_every_shape():
    with torch.device("meta"):
        net = RingMoE(ModelConfig.preset("14b"))
    assert all(p.is_meta for p in net.parameters())
    assert not list(net.buffers())


def test_pruned_layers_run():
    kept = {"0.1": {"collaborative": (), "specialised.ms": (1, 3)}, "1.0": {"specialised.ms": ()}}
    net = network(kept=kept)
    assert net.stages[0].blocks[1].moe.collaborative is None
    with torch.no_grad():
        out = net.encode({"ms": torch.randn(1, 5, 32, 32), "opt": torch.randn(1, 3, 32, 32)})
    assert "collaborative" not in out.routing[1].branches
    assert out.routing[1].branches["specialised.ms"].counts_E[[0, 2]].tolist() == [0, 0]
    assert "specialised.ms" not in out.routing[2].branches


def test_a_checkpoint_of_one_modality(tmp_path):
    from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint

    tensors = ((f"encoder.{name}", t) for name, t in disk_tensors(NET))
    save_checkpoint(tmp_path, CheckpointConfig(NET.config), tensors)
    image = {"ms": torch.randn(1, 5, 32, 32)}
    with torch.no_grad():
        same(RingMoE.from_pretrained(tmp_path)(image)["ms"], NET(image)["ms"])
        one = RingMoE.from_pretrained(tmp_path, modality="ms")
        same(one(image)["ms"], NET(image)["ms"])
    assert one.config.modalities == ("ms",)
    with pytest.raises(ValueError, match="no modality 'sar-l1'"):
        RingMoE.from_pretrained(tmp_path, modality="sar-l1")


def test_a_gate_that_the_norm_cancels_is_announced():
    with pytest.warns(UserWarning, match="cancels the gate"):
        net = network(specialised=0, shared=0)
    image = {"opt": torch.randn(2, 3, 32, 32)}
    net.train()(image)["opt"][1].square().sum().backward()
    router = net.stages[0].blocks[0].moe.router["collaborative"].weight.grad
    bank = net.stages[0].blocks[0].moe.collaborative.fc2.weight.grad
    assert router.abs().max() < 1e-3 * bank.abs().max()
