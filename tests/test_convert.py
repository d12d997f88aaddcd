"""Import: the released network by its names, a dense Swin V2 upcycled, random weights."""

import json

import numpy as np
import pytest
import torch
from ckpt_files import write_ckpt
from safetensors.torch import save_file
from typer.testing import CliRunner

from model.batch import Batch
from model.checkpoint import read_config, weight_map
from model.config import ModelConfig
from model.encoder import RingMoE
from model.pretrain import MaskedImageModel, batch_masks
from model.random_weights import random_specs
from model.weights import open_weights
from ringmoe_cli.app import app


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *(str(a) for a in arguments)])


def converted(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    return RingMoE.from_pretrained(arguments[-1])


# --- the release --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_the_released_backbone_gives_its_features(oracle_dir, tmp_path, kind):
    oracle = np.load(oracle_dir / "backbone_dense_v1_released.npz")
    params = {k.removeprefix("param/"): oracle[k] for k in oracle.files if k.startswith("param/")}
    path = tmp_path / f"weights.{kind}"
    if kind == "npz":
        np.savez(path, **params)
    else:
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in params.items()}
        save_file({k: v for k, v in tensors.items() if v.ndim}, path)
    net = converted(path, "-o", tmp_path / "dense")
    assert net.config.depths == (2, 2, 2, 2)
    assert net.config.image_size == 96
    with torch.no_grad():
        last = net({"opt": torch.from_numpy(oracle["x"])})["opt"][-1]
    pooled = last.mean((2, 3)).numpy()
    assert np.abs(pooled - oracle["y"]).max() / max(1, np.abs(oracle["y"]).max()) < 1e-5


def released_names(net: RingMoE) -> dict[str, np.ndarray]:  # noqa: C901
    """A mixture's weights under the release's names, written out the other way round."""
    order = ("opt", "sar-l1", "sar-l2", "ms")
    out: dict[str, np.ndarray] = {}

    def put(name, tensor):
        out[name] = tensor.detach().numpy()

    def norm(name, module):
        put(f"{name}.gamma", module.weight)
        put(f"{name}.beta", module.bias)

    for m, embed in net.patch_embeds.items():
        put(f"patch_embed_{order.index(m)}.projection.weight", embed.projection.weight)
        put(f"patch_embed_{order.index(m)}.projection.bias", embed.projection.bias)
        norm(f"patch_embed_{order.index(m)}.norm", embed.norm)
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage.blocks):
            base = f"layers.{s}.blocks.{b}"
            norm(f"{base}.norm1", block.norm1)
            norm(f"{base}.norm2", block.norm2)
            attn = block.attn
            biases = (attn.q_bias, attn.k_bias, attn.v_bias)
            for part, weight, bias in zip("qkv", attn.qkv.weight.chunk(3), biases, strict=True):
                put(f"{base}.attn.{part}.weight", weight)
                put(f"{base}.attn.{part}.bias", bias)
            put(f"{base}.attn.proj.weight", attn.proj.weight)
            put(f"{base}.attn.proj.bias", attn.proj.bias)
            table = "attn.relative_position_bias.relative_position_bias_table"
            put(f"{base}.{table}", attn.position.table)
            moe = block.moe
            banks = {f"special_ffn.{order.index(m)}": bank for m, bank in moe.specialised.items()}
            for name, bank in {**banks, "cross_ffn": moe.collaborative}.items():
                for theirs, ours in (("mapping", bank.fc1), ("projection", bank.fc2)):
                    put(f"{base}.mlp.{name}.{theirs}.weight", ours.weight.transpose(1, 2))
                    put(f"{base}.mlp.{name}.{theirs}.bias", ours.bias[None, :, None])
            for theirs, ours in (("mapping", moe.shared.fc1), ("projection", moe.shared.fc2)):
                put(f"{base}.mlp.public_ffn.{theirs}.weight", ours.weight[0].T)
                put(f"{base}.mlp.public_ffn.{theirs}.bias", ours.bias[0])
            put(f"{base}.mlp.cross_router.dense.weight", moe.router["collaborative"].weight)
            for m, router in moe.router["specialised"].items():
                name = f"{base}.mlp.special_router.{order.index(m)}.dense.weight"
                put(name, router.weight)
        if stage.downsample is not None:
            put(f"layers.{s}.downsample.reduction.weight", stage.downsample.reduction.weight)
            norm(f"layers.{s}.downsample.norm", stage.downsample.norm)
    norm("norm", net.norm)
    return out


@pytest.mark.parametrize("kind", ["npz", "ckpt"])
def test_a_released_mixture_comes_back(tmp_path, kind):
    torch.manual_seed(0)
    config = ModelConfig(
        embed_dim=8, depths=(1, 2), num_heads=(1, 2), image_size=32, window=4, specialised=2,
        collaborative=3, attention="swin_v1", gate="normalized",
        channels={"opt": 3, "sar-l1": 8, "ms": 4},
    )  # fmt: skip
    net = RingMoE(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    arrays = released_names(net)
    arrays["patch_embed_4.projection.weight"] = np.zeros(3)
    arrays["mask_token"] = np.ones((1, 1, 8), np.float32)
    for i in (0, 1, 3):  # opt, sar-l1, ms
        arrays[f"decoder_{i}.weight"] = np.full((5, 16, 1, 1), i, np.float32)
        arrays[f"decoder_{i}.bias"] = np.zeros(5, np.float32)
    save = {"npz": lambda path, named: np.savez(path, **named), "ckpt": write_ckpt}[kind]
    path = tmp_path / f"w.{kind}"
    moments = {"adam_m.backbone.layers.0.blocks.0.norm1.gamma": np.zeros(8, np.float32)}
    save(path, {**moments, **{f"backbone.{k}": v for k, v in arrays.items()}})
    again = converted(path, "-o", tmp_path / "out")
    assert dict(again.config.channels) == dict(config.channels)
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    about = read_config(tmp_path / "out")
    assert about.kind == "pretraining"
    assert {"decoders.ms.weight", "mask_token"} < set(weight_map(tmp_path / "out"))
    del arrays["layers.1.blocks.1.mlp.cross_ffn.mapping.bias"]
    save(path, arrays)
    result = run(path, "-o", tmp_path / "less")
    assert "has no layers.1.blocks.1.mlp.cross_ffn.mapping.bias" in str(result.exception)
    assert not (tmp_path / "less").exists()


def released_loss(net, arrays, images, masks):
    """The release's formulas, written out; features and routing come from the encoder."""
    order, losses = ("opt", "sar-l1", "sar-l2", "ms"), []
    token = torch.from_numpy(arrays["mask_token"]).flatten()
    encoding = net.encode(images, masks=masks, mask_token=token)
    for m, x in images.items():
        number, channels, height = order.index(m), x.shape[1], x.shape[2]
        weight = torch.from_numpy(arrays[f"decoder_{number}.weight"])[:, :, 0, 0]
        last = encoding.features[m][-1]
        depth = torch.einsum("oc,bchw->bohw", weight, last)
        depth = depth + torch.from_numpy(arrays[f"decoder_{number}.bias"])[:, None, None]
        block = height // last.shape[-1]
        pixels = torch.empty_like(x)
        for row in range(block):
            for column in range(block):
                first = (row * block + column) * channels
                pixels[:, :, row::block, column::block] = depth[:, first : first + channels]
        hidden = masks[m].float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        error = ((x - pixels).abs() * hidden).sum()
        losses.append(error / (hidden.sum() + 1e-5) / channels)
    balance = []
    for layer in encoding.routing:
        uneven = {}
        for name, branch in layer.branches.items():
            chosen, probability = (
                branch.counts_E / branch.tokens,
                branch.probability_E / branch.tokens,
            )
            uneven[name] = 64 * (chosen * probability).mean()
        cross = uneven.pop("collaborative")
        balance.append(0.001 * (cross + torch.stack([*uneven.values()]).mean()))
    return torch.stack(losses).sum() + torch.stack(balance).sum()


def test_released_decoders_give_the_released_loss(tmp_path):
    torch.manual_seed(0)
    channels = {"opt": 3, "sar-l1": 8, "ms": 4}
    config = ModelConfig(
        embed_dim=8, depths=(1, 2), num_heads=(1, 2), image_size=32, window=4, mask_cell=8,
        attention="swin_v1", gate="normalized", channels=channels,
    )  # fmt: skip
    net = RingMoE(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    arrays = released_names(net)
    draw = np.random.default_rng(0)
    arrays["mask_token"] = draw.normal(size=(1, 1, 8)).astype(np.float32)
    for i, m in ((0, "opt"), (1, "sar-l1"), (3, "ms")):
        shape = (8 * 8 * channels[m], 16, 1, 1)
        arrays[f"decoder_{i}.weight"] = draw.normal(size=shape).astype(np.float32)
        arrays[f"decoder_{i}.bias"] = draw.normal(size=shape[0]).astype(np.float32)
    np.savez(tmp_path / "w.npz", **arrays)
    assert run(tmp_path / "w.npz", "-o", tmp_path / "out").exit_code == 0
    again = MaskedImageModel.from_pretrained(tmp_path / "out")
    images = {m: torch.randn(2, c, 32, 32) for m, c in channels.items()}
    batch = Batch({m: x[:, None] for m, x in images.items()})
    masks = batch_masks(config, 0.6, batch, 0, 0)
    with torch.no_grad():
        expected = released_loss(net, arrays, images, masks)
        assert again(batch, masks).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    del arrays["decoder_3.weight"]
    np.savez(tmp_path / "w.npz", **arrays)
    assert run(tmp_path / "w.npz", "-o", tmp_path / "less").exit_code == 0
    with pytest.raises(ValueError, match="no mask token and decoders"):
        MaskedImageModel.from_pretrained(tmp_path / "less")


# --- Swin V2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swin():
    from transformers import Swinv2Config, Swinv2Model

    torch.manual_seed(0)
    config = Swinv2Config(
        image_size=64, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4,
    )  # fmt: skip
    net = Swinv2Model(config, add_pooling_layer=False).eval()
    for parameter in net.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return net


def theirs(swin, x):
    with torch.no_grad():
        return swin(x, output_hidden_states=True)


def test_an_upcycled_hugging_face_model_has_its_features(swin, tmp_path):
    swin.save_pretrained(tmp_path / "hf")
    net = converted(tmp_path / "hf", "--modality", "opt=3,ms=4", "-o", tmp_path / "up")
    assert net.config.specialised == net.config.collaborative == 4
    assert (net.config.window, net.config.image_size) == (4, 64)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = theirs(swin, x).last_hidden_state.transpose(1, 2).reshape(2, 16, 8, 8)
    with torch.no_grad():
        features = net({"opt": x})["opt"]
        torch.testing.assert_close(features[-1], expected, atol=1e-4, rtol=1e-4)
        grey = x.mean(1, keepdim=True)
        ms = net({"ms": grey.expand(-1, 4, -1, -1)})["ms"]
        opt = net({"opt": grey.expand(-1, 3, -1, -1)})["opt"]
    torch.testing.assert_close(ms[-1], opt[-1], atol=1e-4, rtol=1e-4)


def renamed(swin, layout: str) -> dict[str, torch.Tensor]:
    """The same weights under timm's or torchvision's names."""
    out = {}
    state = swin.state_dict()

    def put(name, source):
        out[name] = state[source].clone()

    timm = layout == "timm"
    patch = "patch_embed.proj" if timm else "features.0.0"
    norm = "patch_embed.norm" if timm else "features.0.2"
    for last in ("weight", "bias"):
        put(f"{patch}.{last}", f"embeddings.patch_embeddings.projection.{last}")
        put(f"{norm}.{last}", f"embeddings.norm.{last}")
        put(f"norm.{last}", f"layernorm.{last}")
    for s in range(2):
        for b in range(2):
            there = f"encoder.layers.{s}.blocks.{b}."
            here = f"layers.{s}.blocks.{b}." if timm else f"features.{2 * s + 1}.{b}."
            own = there + "attention.self."
            out[here + "attn.qkv.weight"] = torch.cat(
                [state[f"{own}{p}.weight"] for p in ("query", "key", "value")]
            )
            q, v = state[own + "query.bias"], state[own + "value.bias"]
            if timm:
                out[here + "attn.q_bias"], out[here + "attn.v_bias"] = q.clone(), v.clone()
            else:
                out[here + "attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
            put(here + "attn.logit_scale", own + "logit_scale")
            for i in ("0.weight", "0.bias", "2.weight"):
                put(f"{here}attn.cpb_mlp.{i}", f"{own}continuous_position_bias_mlp.{i}")
            pairs = {
                "attn.proj": "attention.output.dense", "norm1": "layernorm_before",
                "norm2": "layernorm_after", "mlp.fc1" if timm else "mlp.0": "intermediate.dense",
                "mlp.fc2" if timm else "mlp.3": "output.dense",
            }  # fmt: skip
            for ours, name in pairs.items():
                for last in ("weight", "bias"):
                    put(f"{here}{ours}.{last}", f"{there}{name}.{last}")
    merging = "layers.1.downsample." if timm else "features.2."
    for last in ("reduction.weight", "norm.weight", "norm.bias"):
        put(merging + last, f"encoder.layers.0.downsample.{last}")
    return out


@pytest.mark.parametrize(
    ("layout", "prefix"), [("timm", ""), ("torchvision", "backbone.backbone.")]
)
def test_other_layouts_of_the_same_network(swin, tmp_path, layout, prefix):
    save_file({prefix + k: v for k, v in renamed(swin, layout).items()}, tmp_path / "w.safetensors")
    (tmp_path / "fields.json").write_text(json.dumps({"window": 4, "image_size": 64}))
    config = ["--config", tmp_path / "fields.json"]
    net = converted(tmp_path / "w.safetensors", *config, "-o", tmp_path / layout)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = theirs(swin, x).last_hidden_state.transpose(1, 2).reshape(2, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(net({"opt": x})["opt"][-1], expected, atol=1e-4, rtol=1e-4)


# --- random, and what goes wrong ----------------------------------------------------------------


def test_random_weights_are_seeded_and_complete(tmp_path):
    for name in ("a", "b"):
        arguments = ["--random", "nano", "--task", "segmentation", "--dtype", "float32"]
        assert run(*arguments, "-o", tmp_path / name).exit_code == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    about = read_config(tmp_path / "a")
    assert about.task is not None
    assert set(about.normalisation) == {"opt", "ms", "sar-l1", "sar-l2"}
    net = RingMoE.from_pretrained(tmp_path / "a", modality="opt")
    features = net({"opt": torch.randn(1, 3, 64, 64)})["opt"]
    assert features[-1].isfinite().all()
    assert features[-1].std() > 0.1


def test_the_largest_preset_in_bfloat16_has_29_gigabytes():
    specs = random_specs(ModelConfig.preset("14b"), None, torch.bfloat16)
    assert sum(spec.nbytes for spec in specs) == pytest.approx(29.5e9, rel=0.01)


def test_files_that_can_hold_code_are_refused(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"\x80\x04")
    result = run(tmp_path / "w.pth", "-o", tmp_path / "out")
    assert "can hold code" in str(result.exception)
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not weights"):
        open_weights(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "damaged"), (b"PK\x03\x04 nonsense", "damaged"), (None, "does not exist")],
)
def test_damaged_archives_are_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "w.npz").write_bytes(content)
    result = run(tmp_path / "w.npz", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert words in str(result.exception)


def test_weights_of_something_else(tmp_path):
    np.savez(tmp_path / "w.npz", resnet=np.zeros(3, np.float32))
    result = run(tmp_path / "w.npz", "-o", tmp_path / "out")
    assert "its first name is resnet" in str(result.exception)
    assert run("-o", tmp_path / "out").exit_code == 2
