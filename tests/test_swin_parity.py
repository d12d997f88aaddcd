"""Swin V2 as others wrote it, with the same weights: features of all four stages to 1e-4."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.encoder import RingMoE

SIZES = {"embed_dim": 24, "depths": (2, 2, 2, 2), "num_heads": (2, 3, 4, 6)}


def ours(image_size: int, window: int) -> RingMoE:
    """A dense RingMoE in the arithmetic of Swin V2: shared expert only, erf GELU, eps 1e-5."""
    torch.manual_seed(0)
    config = ModelConfig(
        **SIZES, image_size=image_size, window=window, channels={"opt": 3}, gelu="erf",
        specialised=0, collaborative=0, norm_eps=1e-5, merge_eps=1e-5,
    )  # fmt: skip
    net = RingMoE(config).eval()
    for name, parameter in net.named_parameters():
        if "logit_scale" not in name:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    return net


def linear(state: Mapping[str, Tensor], theirs: str, name: str, **parts: str) -> dict[str, Tensor]:
    return {f"{theirs}.{p}": state[f"{name}.{q}"] for p, q in parts.items()}


WB = {"weight": "weight", "bias": "bias"}


def hugging_face_block(state: Mapping[str, Tensor], a: str, b: str) -> dict[str, Tensor]:
    q, k, v = state[f"{a}attn.qkv.weight"].chunk(3)
    at = f"{b}attention.self."
    return {
        f"{at}query.weight": q, f"{at}key.weight": k, f"{at}value.weight": v,
        f"{at}query.bias": state[f"{a}attn.q_bias"], f"{at}value.bias": state[f"{a}attn.v_bias"],
        f"{at}logit_scale": state[f"{a}attn.logit_scale"],
        **linear(state, f"{at}continuous_position_bias_mlp.0", f"{a}attn.position.fc1", **WB),
        f"{at}continuous_position_bias_mlp.2.weight": state[f"{a}attn.position.fc2.weight"],
        **linear(state, f"{b}attention.output.dense", f"{a}attn.proj", **WB),
        **linear(state, f"{b}layernorm_before", f"{a}norm1", **WB),
        **linear(state, f"{b}layernorm_after", f"{a}norm2", **WB),
        f"{b}intermediate.dense.weight": state[f"{a}moe.shared.fc1.weight"][0],
        f"{b}intermediate.dense.bias": state[f"{a}moe.shared.fc1.bias"][0],
        f"{b}output.dense.weight": state[f"{a}moe.shared.fc2.weight"][0],
        f"{b}output.dense.bias": state[f"{a}moe.shared.fc2.bias"][0],
    }  # fmt: skip


def hugging_face_state(net: RingMoE) -> dict[str, Tensor]:
    state = net.state_dict()
    found = linear(
        state, "embeddings.patch_embeddings.projection", "patch_embeds.opt.projection", **WB
    )
    found |= linear(state, "embeddings.norm", "patch_embeds.opt.norm", **WB)
    for s, depth in enumerate(net.config.depths):
        for b in range(depth):
            ours, theirs = f"stages.{s}.blocks.{b}.", f"encoder.layers.{s}.blocks.{b}."
            found |= hugging_face_block(state, ours, theirs)
        if s < len(net.config.depths) - 1:
            ours, theirs = f"stages.{s}.downsample.", f"encoder.layers.{s}.downsample."
            found[f"{theirs}reduction.weight"] = state[f"{ours}reduction.weight"]
            found |= linear(state, f"{theirs}norm", f"{ours}norm", **WB)
    return found | linear(state, "layernorm", "norm", **WB)


@pytest.mark.parametrize(("image_size", "window"), [(128, 8), (192, 12)])
def test_hugging_face(image_size, window):
    transformers = pytest.importorskip("transformers")
    net = ours(image_size, window)
    config = transformers.Swinv2Config(
        image_size=image_size, embed_dim=SIZES["embed_dim"], depths=list(SIZES["depths"]),
        num_heads=list(SIZES["num_heads"]), window_size=window, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.Swinv2Model(config, add_pooling_layer=False).eval()
    missing = theirs.load_state_dict(hugging_face_state(net), strict=False)
    assert not missing.unexpected_keys
    assert all("relative" in name for name in missing.missing_keys), missing.missing_keys
    stages: list[Tensor] = []
    for layer in theirs.encoder.layers:
        layer.blocks[-1].register_forward_hook(lambda _, __, out: stages.append(out))
    image = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        final = theirs(image).last_hidden_state
        features = net({"opt": image})["opt"]
    stages = [s[0] if isinstance(s, tuple) else s for s in stages]
    for s, expected in enumerate([*stages[:3], final]):
        tokens = features[s].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1


TIMM = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def timm_block(state: Mapping[str, Tensor], a: str, b: str) -> dict[str, Tensor]:
    found = {
        f"{b}attn.{n}": state[f"{a}attn.{n}"]
        for n in ("qkv.weight", "q_bias", "v_bias", "logit_scale")
    }
    found |= linear(state, f"{b}attn.cpb_mlp.0", f"{a}attn.position.fc1", **WB)
    found[f"{b}attn.cpb_mlp.2.weight"] = state[f"{a}attn.position.fc2.weight"]
    for part in ("attn.proj", "norm1", "norm2"):
        found |= linear(state, f"{b}{part}", f"{a}{part}", **WB)
    for layer, theirs in TIMM.items():
        for kind in WB:
            found[f"{b}{theirs}.{kind}"] = state[f"{a}moe.shared.{layer}.{kind}"][0]
    return found


@pytest.mark.parity
def test_timm():
    timm = pytest.importorskip("timm")
    net = ours(192, 12)
    state = net.state_dict()
    found = linear(state, "patch_embed.proj", "patch_embeds.opt.projection", **WB)
    found |= linear(state, "patch_embed.norm", "patch_embeds.opt.norm", **WB)
    for s, depth in enumerate(net.config.depths):
        for b in range(depth):
            found |= timm_block(state, f"stages.{s}.blocks.{b}.", f"layers.{s}.blocks.{b}.")
        if s:
            ours_at, at = f"stages.{s - 1}.downsample.", f"layers.{s}.downsample."
            found[f"{at}reduction.weight"] = state[f"{ours_at}reduction.weight"]
            found |= linear(state, f"{at}norm", f"{ours_at}norm", **WB)
    found |= linear(state, "norm", "norm", **WB)
    theirs = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=192, window_size=12, num_classes=0, **SIZES
    ).eval()
    missing = theirs.load_state_dict(found, strict=False)
    assert not missing.unexpected_keys
    image = torch.randn(2, 3, 192, 192)
    with torch.no_grad():
        final, stages = theirs.forward_intermediates(image, indices=4, norm=False)
        features = net({"opt": image})["opt"]
    expected = [*stages[:3], final.movedim(-1, 1)]
    for s in range(4):
        torch.testing.assert_close(features[s], expected[s], rtol=1e-4, atol=1e-4)
