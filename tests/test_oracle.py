"""The released encoder blocks' own numbers, from their weights: outputs and gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from released import MODALITIES, attention, backbone, block, merging, patch_embed, rmoe, tensor
from torch import Tensor, nn

from model.attention import WindowAttention, WindowGrid, grid_mask
from model.config import ModelConfig
from model.encoder import Block, RingMoE
from model.experts import RMoE
from model.patch import PatchEmbed, PatchMerging
from model.router import LayerRouting, balance_loss

CHANNELS = {"opt": 3, "sar-l1": 8, "sar-l2": 3, "ms": 4}


def released(**changes: object) -> ModelConfig:
    """The released arithmetic at the size of the recorded blocks."""
    sizes = {"embed_dim": 32, "depths": (2,), "num_heads": (4,), "image_size": 96, "window": 6}
    arithmetic = {"attention": "swin_v1", "gate": "normalized", "channels": CHANNELS}
    return ModelConfig(**{**sizes, **arithmetic, **changes})  # type: ignore[arg-type]


def dense(**changes: object) -> ModelConfig:
    return released(specialised=0, collaborative=0, channels={"opt": 3}, **changes)


def load(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module


def close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    """max |error| / max(1, |reference|) < 1e-5."""
    error = (ours - theirs).abs() / theirs.abs().clamp(min=1)
    assert error.max() < 1e-5, f"{name}: {error.max()}"


def agree(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every gradient equals the recorded one, also beside its tensor's largest entry.

    The bias of the keys has no gradient but rounding (softmax ignores a constant).
    """
    assert expected
    for name, grad in expected.items():
        ours = module.get_parameter(name).grad
        close(ours, grad, name)
        if not name.endswith("k_bias"):
            assert (ours - grad).abs().max() < 1e-4 * grad.abs().max(), name


class RecordedNorm(torch.autograd.Function):
    """LayerNorm whose backward forgets eps, as the kernel behind the recorded gradients does."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight, bias)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        rstd = (variance + 1e-12).rsqrt()
        backward = torch.ops.aten.native_layer_norm_backward
        grads = backward(dy.contiguous(), x, weight.shape, mean, rstd, weight, bias, [True] * 3)
        return *grads, None


def recorded_norms(module: nn.Module) -> None:
    for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
        norm.forward = lambda x, n=norm: RecordedNorm.apply(x, n.weight, n.bias, n.eps)


def named(arrays: np.lib.npyio.NpzFile, kind: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{kind}/"): arrays[k] for k in arrays.files if k.startswith(f"{kind}/")}


def test_gelu_is_the_tanh_form(oracle_dir):
    arrays = np.load(oracle_dir / "gelu.npz")
    moe = RMoE(dense(embed_dim=1, num_heads=(1,), mlp_ratio=1), 0, 0)  # one neuron, unit weights
    for parameter in moe.parameters():
        nn.init.constant_(parameter, float(parameter.ndim == 3))
    x = tensor(arrays, "x")
    close(moe(x[:, None], {"opt": len(x)})[0][:, 0], tensor(arrays, "y"))


@pytest.mark.parametrize("channels", [3, 4, 8])
def test_patch_embedding(oracle_dir, channels):
    arrays = np.load(oracle_dir / f"patch_embed_c{channels}.npz")
    embed = load(PatchEmbed(channels, released(embed_dim=16)), patch_embed(arrays, "param/", ""))
    close(embed(tensor(arrays, "x")).flatten(1, 2), tensor(arrays, "y"))


def test_patch_merging(oracle_dir):
    arrays = np.load(oracle_dir / "patch_merging.npz")
    merge = load(PatchMerging(16, 1e-4), merging(arrays, "param/", ""))
    close(merge(tensor(arrays, "x").view(2, 8, 12, 16)).flatten(1, 2), tensor(arrays, "y"))


def test_attention(oracle_dir):
    arrays = np.load(oracle_dir / "attn_v1_released.npz")
    attn = load(WindowAttention(32, 4, 6, "swin_v1"), attention(arrays, "param/", ""))
    plain, shifted = WindowGrid(12, 12, 6), WindowGrid(12, 12, 6, 3)
    windows = tensor(arrays, "x")
    ours = plain.split(attn(plain.join(windows), plain))
    close(ours, tensor(arrays, "y_nomask"))
    mask = tensor(arrays, "mask").view(4, 36, 36)
    assert torch.equal(grid_mask(shifted, windows.device)[0], mask)
    close(shifted.split(attn(shifted.join(windows), shifted)), tensor(arrays, "y_mask"))


def test_dense_mlp(oracle_dir):
    arrays = np.load(oracle_dir / "mlp_dense.npz")
    moe = load(RMoE(dense(embed_dim=16), 0, 0), rmoe(arrays, "param/", ""))
    out, _ = moe(tensor(arrays, "x").flatten(0, 1), {"opt": 18})
    close(out.view(2, 9, 16), tensor(arrays, "y"))


@pytest.mark.parametrize(("size", "shift"), [(24, 0), (24, 3), (3, 3)])
def test_dense_block_and_its_gradients(oracle_dir, size, shift):
    arrays = np.load(oracle_dir / f"block_dense_v1_released_res{size}_shift{shift}.npz")
    config = dense(image_size=4 * size)
    module = load(Block(config, 0, 1 if shift else 0), block(arrays, "param/", ""))
    recorded_norms(module)
    x = tensor(arrays, "x")
    out, _ = module(x.view(2, size, size, 32), {"opt": 2})
    close(out.flatten(1, 2), tensor(arrays, "y"))
    out.square().mean().backward()
    close(out.square().mean(), tensor(arrays, "meansq"))
    agree(module, block(named(arrays, "grad"), "", ""))


def test_dense_backbone(oracle_dir):
    arrays = np.load(oracle_dir / "backbone_dense_v1_released.npz")
    config = dense(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
    net = load(RingMoE(config), backbone(arrays, "param/", config.depths))
    features = net({"opt": tensor(arrays, "x")})["opt"]
    close(features[-1].flatten(2).mean(-1), tensor(arrays, "y"))
    for s in range(3):  # recorded after merging
        merged = net.stages[s].downsample(features[s].movedim(1, -1)).flatten(1, 2)
        close(merged, tensor(arrays, f"stage{s}"), f"stage {s}")


def paid(routing: LayerRouting) -> Tensor:
    """The balance loss at the released weight."""
    return 0.004 * balance_loss([routing])


@pytest.mark.parametrize("shift", [0, 3])
def test_rmoe_block(oracle_dir, shift):
    arrays = np.load(oracle_dir / f"block_moe_v1_released_shift{shift}.npz")
    config = released(image_size=48, capacity_factor=1.2)
    module = load(Block(config, 0, 1 if shift else 0), block(arrays, "param/", ""))
    x = tensor(arrays, "x").view(8, 12, 12, 32)
    out, routing = module(x, dict.fromkeys(MODALITIES, 2))
    close(out.flatten(1, 2), tensor(arrays, "y"))
    close(paid(routing), tensor(arrays, "aux"))


@pytest.mark.parametrize(
    ("name", "factor"), [("nodrop", 4.0), ("nodrop", None), ("cf1.2_drop", 1.2)]
)
def test_rmoe_layer(oracle_dir: Path, name, factor):
    arrays = np.load(oracle_dir / f"moe_modal_{name}.npz")
    config = released(embed_dim=16, capacity_factor=factor)
    moe = load(RMoE(config, 0, 0), rmoe(arrays, "param/", ""))
    x_TD = tensor(arrays, "x").flatten(0, 1)
    out_TD, routing = moe(x_TD, dict.fromkeys(MODALITIES, 72))
    out = out_TD.view(8, 36, 16)
    close(out, tensor(arrays, "y"))
    close(paid(routing), tensor(arrays, "aux"))
    out.square().mean().backward(retain_graph=True)
    grads = named(arrays, "grad")
    routers = {n: np.zeros_like(v) for n, v in named(arrays, "param").items() if "router" in n}
    agree(moe, {k: v for k, v in rmoe({**routers, **grads}, "", "").items() if "router" not in k})
    for router in (p for n, p in moe.named_parameters() if "router" in n):
        assert router.grad is None or not router.grad.abs().max() > 1e-7
        router.grad = None
    paid(routing).backward()
    theirs = {"router.collaborative.weight": tensor(arrays, "gradaux/cross_router.dense.weight")}
    for i, modality in enumerate(MODALITIES):
        recorded = tensor(arrays, f"gradaux/special_router.{i}.dense.weight")
        theirs[f"router.specialised.{modality}.weight"] = recorded
    agree(moe, theirs)


@pytest.mark.parametrize(("name", "factor"), [("nodrop", 4.0), ("cf1.2_drop", 1.2)])
def test_routes_and_drops(oracle_dir, name, factor):
    arrays = np.load(oracle_dir / f"moe_modal_{name}.npz")
    config = released(embed_dim=16, capacity_factor=factor)
    moe = load(RMoE(config, 0, 0), rmoe(arrays, "param/", ""))
    x_TD = tensor(arrays, "x").flatten(0, 1)
    for branch, _, router, first, count in moe.branches(dict.fromkeys(MODALITIES, 72)):
        key = "cross"
        if branch != "collaborative":
            key = f"spec{MODALITIES.index(branch.partition('.')[2])}"
        assignment, routing = router(x_TD[first : first + count])
        expert = torch.full((count,), -1)
        experts = torch.arange(4).repeat_interleave(assignment.counts_E)
        expert[assignment.rows_N] = experts
        recorded = tensor(arrays, f"{key}/expert").flatten().long()
        assert torch.equal(expert, recorded)
        assert routing.dropped == int((recorded == -1).sum())
