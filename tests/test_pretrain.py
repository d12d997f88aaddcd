"""The objective: masks, depth-to-space, losses, validity, parameter counts."""

from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.counts import by_component
from model.normalisation import Normalisation
from model.pretrain import (
    MaskedImageModel,
    batch_masks,
    depth_to_space,
    masked_l1,
    random_mask,
    upsample,
    with_masks,
)

SAR = {"sar-l1": Normalisation(("hh_re",) * 8, (0.0,) * 8, (1.0,) * 8, (8.0, 4.0))}


def tiny_config(**changes: object) -> ModelConfig:
    sizes = {"depths": (1, 1, 1, 1), "embed_dim": 8, "image_size": 64, "window": 4}
    return ModelConfig.preset("nano", **{**sizes, **changes})


def images_of(config: ModelConfig, count: int = 2, side: int = 64, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    return Batch(
        {
            m: torch.randn(count, 1, c, side, side, generator=random)
            for m, c in config.channels.items()
        }
    )


def model_of(config: ModelConfig, **objective: object) -> MaskedImageModel:
    torch.manual_seed(0)
    return MaskedImageModel(config, PretrainConfig(**objective), SAR)


# masks


def test_mask_hides_22_of_36_cells_as_the_release_does(oracle_dir: Path) -> None:
    config = ModelConfig()
    for released in np.load(oracle_dir / "data_pipeline.npz")["masks_seed2022"]:
        ours = random_mask(config, 0.6, (192, 192), 0).numpy()
        for mask in (ours, released.astype(bool)):
            cells = mask.reshape(6, 8, 6, 8).mean((1, 3))
            assert set(np.unique(cells)) == {0.0, 1.0}
            assert cells.sum() == 22
        assert ours.shape == released.shape


def test_upsample_equals_the_released_repeat(oracle_dir: Path) -> None:
    arrays = np.load(oracle_dir / "mask_upsample.npz")
    assert np.array_equal(upsample(torch.from_numpy(arrays["x"]), 4).numpy(), arrays["y"])


@given(
    st.integers(1, 200), st.integers(1, 200), st.sampled_from([4, 8, 16, 32]), st.floats(0.01, 0.99)
)
@example(65, 137, 4, 0.2)  # 0.2 * 17 * 35 is more than 119, 0.2 * 595 is not
@settings(max_examples=50, deadline=None)
def test_mask_of_any_size_hides_the_stated_share_of_cells(
    height: int, width: int, cell: int, ratio: float
) -> None:
    config = ModelConfig(mask_cell=cell)
    mask = random_mask(config, ratio, (height, width), 1, 2, 3)
    assert mask.shape == (ceil(height / 4), ceil(width / 4))
    corners = mask[:: cell // 4, :: cell // 4]
    cells = ceil(height / cell) * ceil(width / cell)
    assert corners.sum() == ceil(ratio * cells)


def test_masks_are_a_function_of_seed_step_and_image() -> None:
    config = ModelConfig()
    batch = Batch({m: torch.zeros(3, 1, c, 192, 192) for m, c in config.channels.items()})
    first = batch_masks(config, 0.6, batch, seed=5, step=7)
    again = batch_masks(config, 0.6, batch, seed=5, step=7)
    assert all(torch.equal(first[m], again[m]) for m in first)
    drawn = {m.numpy().tobytes() for masks in first.values() for m in masks}
    assert len(drawn) == 12
    for other in (
        batch_masks(config, 0.6, batch, 6, 7),
        batch_masks(config, 0.6, batch, 5, 8),
    ):
        assert not any(torch.equal(first[m], other[m]) for m in first)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_have_the_masks_of_their_images_in_the_whole_batch(world: int) -> None:
    config = ModelConfig()
    counts = {"opt": 5, "ms": 3, "sar-l2": 1}

    def blank(numbers: dict[str, int]) -> Batch:
        return Batch({m: torch.zeros(n, 1, 1, 192, 192) for m, n in numbers.items() if n})

    whole = torch.cat([*batch_masks(config, 0.6, blank(counts), 0, 3).values()])
    everything = [m for m, n in counts.items() for _ in range(n)]
    for rank in range(world):
        held = everything[rank::world]
        batch = blank({m: held.count(m) for m in counts})
        masks = torch.cat([*batch_masks(config, 0.6, batch, 0, 3, rank, world).values()])
        assert torch.equal(masks, whole[rank::world])


def test_cells_are_hidden_equally_often() -> None:
    config = ModelConfig()
    drawn = torch.stack([random_mask(config, 0.6, (192, 192), 0, 0, i) for i in range(2000)])
    share = drawn[:, ::8, ::8].float().mean(0)
    assert (share - 22 / 36).abs().max() < 5 * (22 / 36 * 14 / 36 / 2000) ** 0.5


def test_batches_carry_the_masks_of_their_step() -> None:
    config = tiny_config()
    stream = (images_of(config) for _ in range(2))
    carried = list(with_masks(stream, config, 0.6, seed=1, step=10))
    expected = batch_masks(config, 0.6, images_of(config), 1, 11)
    assert torch.equal(carried[1].targets["masks"]["ms"], expected["ms"])


# depth to space and loss


def test_depth_to_space_equals_the_release(oracle_dir: Path) -> None:
    arrays = np.load(oracle_dir / "depth_to_space.npz")
    ours = depth_to_space(torch.from_numpy(arrays["x"]), 4).numpy()
    np.testing.assert_array_equal(ours, arrays["y"])


def test_depth_to_space_by_the_loop() -> None:
    x = torch.randn(2, 3 * 3 * 2, 2, 4)
    ours = depth_to_space(x, 3)
    for row in range(6):
        for col in range(12):
            for channel in range(2):
                source = ((row % 3) * 3 + col % 3) * 2 + channel
                assert torch.equal(ours[:, channel, row, col], x[:, source, row // 3, col // 3])


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_masked_l1_by_the_loop(batch: int, channels: int, side: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, batch, channels, side, side, generator=random, dtype=torch.float64)
    counts = (torch.rand(batch, 1, side, side, generator=random) < 0.4).double()
    error, weight = 0.0, 0.0
    for b, r, c in np.ndindex(batch, side, side):
        weight += counts[b, 0, r, c].item()
        error += sum(abs(x[b, k, r, c] - y[b, k, r, c]).item() for k in range(channels)) * (
            counts[b, 0, r, c].item()
        )
    expected = error / (weight + 1e-5) / channels
    assert masked_l1(x, y, counts).item() == pytest.approx(expected)


def test_loss_is_the_sum_over_modalities_plus_weighted_balance() -> None:
    config = tiny_config()
    batch = images_of(config)
    output = model_of(config, balance_weight=0.5)(batch, batch_masks(config, 0.6, batch, 0, 0))
    expected = sum(loss.item() for loss in output.losses.values()) + 0.5 * output.balance.item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert set(output.losses) == set(config.modalities)
    assert output.parts["balance"].item() == pytest.approx(output.balance.item() / 8, rel=1e-6)


def test_only_masked_pixels_count_and_hidden_pixels_are_not_seen() -> None:
    config = tiny_config(channels={"opt": 3})
    model = model_of(config)
    batch = images_of(config, side=64)
    masks = batch_masks(config, 0.6, batch, 0, 0)
    hidden = upsample(masks["opt"], 4)[:, None, None]
    before = model(batch, masks)
    noise = torch.randn_like(batch.images["opt"])
    changed = Batch({"opt": torch.where(hidden, noise, batch.images["opt"])})
    after = model(changed, masks)
    torch.testing.assert_close(after.reconstructions["opt"], before.reconstructions["opt"])
    assert after.loss != before.loss
    target, counts = model.target(batch, "opt", masks["opt"])
    error = (target - before.reconstructions["opt"]).abs()
    assert before.losses["opt"].item() == pytest.approx(
        error[hidden[:, 0].expand_as(error)].mean().item(), rel=1e-5
    )
    assert counts.sum() == 3 * hidden.sum()


# validity


def test_chip_without_valid_masked_pixels_contributes_nothing() -> None:
    config = tiny_config(channels={"opt": 3})
    model = model_of(config)
    batch = images_of(config, count=1)
    masks = batch_masks(config, 0.6, batch, 0, 0)
    valid = ~upsample(masks["opt"], 4)[:, None, None]
    output = model(Batch(batch.images, valid={"opt": valid}), masks)
    assert output.losses["opt"] == 0
    output.losses["opt"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(not g.any() for g in gradients)


def test_invalid_pixels_change_neither_loss_nor_gradient() -> None:
    config = tiny_config(channels={"ms": 4})
    model = model_of(config)
    batch = images_of(config)
    masks = batch_masks(config, 0.6, batch, 0, 0)
    valid = torch.rand(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(3)) < 0.7
    losses = []
    for fill in (0.0, 1e3):
        images = torch.where(valid, batch.images["ms"], torch.tensor(fill))
        target, counts = model.target(Batch({"ms": images}, {"ms": valid}), "ms", masks["ms"])
        losses.append(masked_l1(torch.zeros_like(target), target, counts).item())
    assert losses[0] == losses[1]


def test_span_counts_only_where_all_channels_were_measured() -> None:
    config = tiny_config(channels={"sar-l1": 8})
    batch = images_of(config)
    masks = batch_masks(config, 0.6, batch, 0, 0)
    dual = torch.ones(2, 8, dtype=torch.bool)
    dual[1, 4:] = False
    batch.channels["sar-l1"] = dual
    _, power = model_of(config).target(batch, "sar-l1", masks["sar-l1"])
    assert power[0].any()
    assert not power[1].any()
    _, pixels = model_of(config, sar_l1_target="pixels").target(batch, "sar-l1", masks["sar-l1"])
    assert pixels[1, :4].any()
    assert not pixels[1, 4:].any()


@pytest.mark.parametrize("target", ["power", "power_paper", "pixels"])
def test_every_sar_target_trains(target: str) -> None:
    config = tiny_config(channels={"sar-l1": 8})
    model = model_of(config, sar_l1_target=target)
    batch = images_of(config)
    output = model(batch, batch_masks(config, 0.6, batch, 0, 0))
    output.loss.backward()
    assert output.reconstructions["sar-l1"].shape[1] == (8 if target == "pixels" else 1)
    assert model.decoders["sar-l1"].weight.grad.abs().sum() > 0


def test_power_target_without_statistics_is_refused() -> None:
    config = tiny_config(channels={"sar-l1": 8})
    model = MaskedImageModel(config, PretrainConfig())
    batch = images_of(config)
    with pytest.raises(ValueError, match="statistics"):
        model(batch, batch_masks(config, 0.6, batch, 0, 0))


@pytest.mark.parametrize("side", [64, 60, 37])
def test_images_need_not_be_a_multiple_of_the_stride(side: int) -> None:
    config = tiny_config(channels={"opt": 3})
    batch = images_of(config, side=side)
    output = model_of(config)(batch, batch_masks(config, 0.6, batch, 0, 0))
    assert output.reconstructions["opt"].shape == (2, 3, side, side)
    assert torch.isfinite(output.loss)


# routers


def test_default_gate_gives_the_routers_task_gradient_and_the_released_gate_none() -> None:
    for gate, learns in (("softmax", True), ("normalized", False)):
        config = tiny_config(gate=gate)
        model = model_of(config, balance_weight=0.0)
        batch = images_of(config)
        model(batch, batch_masks(config, 0.6, batch, 0, 0)).loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if ".router." in n]
        assert len(gradients) == 4 * 5
        found = [g is not None and bool(g.abs().max() > 1e-8) for g in gradients]
        assert all(found) if learns else not any(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"specialised": 0},
        {"collaborative": 0},
        {"shared": 0},
        {"specialised": 0, "collaborative": 0},
        {"top_k": 2},
        {"capacity_factor": 1.2},
        {"gate": "normalized"},
        {"attention": "swin_v1"},
        {"mask_cell": 8},
        {"channels": {"ms": 13}},
    ],
    ids=str,
)
def test_every_ablation_trains(changes: dict) -> None:
    config = tiny_config(**changes)
    model = model_of(config)
    batch = images_of(config)
    output = model(batch, batch_masks(config, 0.4, batch, 0, 0))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert model.mask_token.grad.abs().sum() > 0


# counts


def test_parameters_of_the_decoders_and_the_mask_token() -> None:
    config = ModelConfig.preset("14b", attention="swin_v1")
    with torch.device("meta"):
        model = MaskedImageModel(config, PretrainConfig(sar_l1_target="pixels"))
    counts = by_component((n, p.numel()) for n, p in model.named_parameters())
    assert counts["decoders"] == 66_078_720
    assert counts["mask token"] == 448
    assert sum(counts.values()) == 14_746_061_540 + 66_078_720 + 448
    assert sum(counts.values()) + 22_848 == 14_812_163_556
