"""Fitted layers: better than merged ones, exact where they can be, and able to continue."""

import pytest
import torch

from model.budget import Kept, layers, pruned
from model.calibration import Calibration, starts
from model.checkpoint import CheckpointConfig, disk_tensors, read_config, save_checkpoint
from model.config import ModelConfig
from model.distill import distill, feature_loss
from model.encoder import RingMoE
from model.integrate import (
    Coordinates,
    FitSettings,
    feature_error,
    joined,
    neighbours,
    refitted,
    ridge,
)
from model.merge import FFN
from model.prune import Plan, plan_pruning, size_of, sub_model
from model.rewrite import prune_checkpoint, result_config

SMALL = ModelConfig(
    embed_dim=8, depths=(1, 2), num_heads=(1, 2), image_size=32, window=4,
    channels={"opt": 3, "ms": 4},
)  # fmt: skip
QUICK = FitSettings(steps=50, tokens=1024)


def random_encoder(config: ModelConfig) -> RingMoE:
    torch.manual_seed(0)
    net = RingMoE(config)
    for name, parameter in net.named_parameters():
        if ".moe." in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return net.eval()


@pytest.fixture
def source(tmp_path):
    net = random_encoder(SMALL)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    save_checkpoint(tmp_path / "all", CheckpointConfig(SMALL), tensors)
    return tmp_path / "all"


def chips(*modalities, count=12):
    generator = torch.Generator().manual_seed(1)
    return {
        m: torch.randn(count, SMALL.channels[m], 32, 32, generator=generator) for m in modalities
    }


def dense_plan(*modalities) -> Plan:
    return plan_pruning(SMALL, modalities, "1b", {}, "fit")


def errors(source, plan, images, **how):
    walk = Calibration(source, plan, images, **how)
    for layer in layers(SMALL):
        walk(layer)
    return [e.error for e in walk.errors], walk.errors[-1].path


def ridge_only(candidates, tokens, wanted, task, settings):
    """The best baseline: every start refitted, the best taken on the training tokens."""
    with torch.no_grad():
        refits = [refitted(ffn, tokens, task) for ffn in candidates]
        found = [feature_error(task.output(ffn, tokens), wanted) for ffn in refits]
    return refits[found.index(min(found))]


def merged_only(candidates, *_):
    _, average, _ = candidates
    return average


def test_feature_error_is_one_for_the_mean():
    wanted = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert feature_error(wanted, wanted) == 0
    assert feature_error(wanted.mean(0).expand(50, 4), wanted) == pytest.approx(1)


def test_ridge_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator)
    weight, bias = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    found = ridge(x, x @ weight.T + bias, penalty=1e-9)
    torch.testing.assert_close(found, (weight, bias), atol=1e-4, rtol=0)


def test_ridge_is_the_same_with_fewer_tokens_than_inputs():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    weight, bias = ridge(x, y)
    ones = torch.cat([x, torch.ones(20, 1)], 1)
    gram = ones.T @ ones
    gram += 1e-3 * gram.diagonal().mean() * torch.eye(31)
    slow = torch.linalg.inv(gram) @ ones.T @ y
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], 1), slow.T)


def test_made_up_tokens_stay_where_the_real_ones_are():
    x = torch.zeros(500, 3)
    x[:, 0] = torch.randn(500, generator=torch.Generator().manual_seed(0))
    near = neighbours(x, torch.Generator().manual_seed(0))
    assert near[:, 1:].abs().max() == 0
    assert 0 < (near - x).std() < 0.5 * x.std()


def test_whitened_coordinates_describe_the_same_function():
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (6,), (4, 6), (4,))
    ffn = FFN(*(torch.randn(*shape, generator=generator) for shape in shapes))
    x = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3
    frame = Coordinates.of(x, ffn)
    inside = frame.into(ffn)
    z = (x - frame.mean) @ frame.narrow
    torch.testing.assert_close(z.T @ z / 50, torch.eye(4), atol=1e-4, rtol=0)
    for found, wanted in zip(frame.back(inside), ffn, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    before = torch.tanh(x @ ffn.fc1_weight.T + ffn.fc1_bias)
    after = torch.tanh(z @ inside.fc1_weight.T + inside.fc1_bias)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_fitting_beats_merging_and_refitting(source):
    images = chips("opt", count=96)
    fitted, path = errors(source, dense_plan("opt"), images, settings=QUICK)
    refit, refit_path = errors(source, dense_plan("opt"), images, imitate=ridge_only)
    merged, merged_path = errors(source, dense_plan("opt"), images, imitate=merged_only)
    assert sum(fitted) < 0.9 * sum(refit) < 0.9 * sum(merged)
    assert path < refit_path < merged_path


def test_a_layer_that_is_dense_already_is_reproduced(tmp_path):
    config = ModelConfig(**{**SMALL.to_dict(), "specialised": 0, "collaborative": 0})
    net = random_encoder(config)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(net)]
    save_checkpoint(tmp_path / "dense", CheckpointConfig(config), tensors)
    plan = plan_pruning(config, ("opt",), "1b", {}, "fit")
    walk = Calibration(tmp_path / "dense", plan, chips("opt"), FitSettings(steps=0))
    for layer in layers(config):
        walk(layer)
    assert max(e.error for e in walk.errors) < 1e-3


def test_experts_that_stay_do_their_own_work(source):
    part = sub_model(SMALL, ("opt", "ms"))
    kept: Kept = {layer: {"specialised.opt": (0, 2)} for layer in layers(SMALL)}
    kept["0.0"]["specialised.opt"] = (0, 1, 2, 3)
    chosen = pruned(part, kept)
    plan = Plan(SMALL, chosen, chosen, "fit", size_of(SMALL), size_of(chosen))
    walk = Calibration(source, plan, chips("opt", "ms"), FitSettings(steps=0))
    walk("0.0")
    assert walk.errors[0].error < 1e-3  # nothing went, so the shared expert has nothing to add
    walk("1.0")
    assert walk.errors[1].error > 1e-3


def test_starts_are_merged_experts_and_the_shared_one():
    moe = random_encoder(SMALL).stages[0].blocks[0].moe
    _, average, shared = starts(moe)
    assert torch.equal(shared.fc1_weight, moe.shared.fc1.weight[0])
    everyone = [*moe.specialised["opt"].fc1.weight, *moe.specialised["ms"].fc1.weight]
    everyone += [*moe.collaborative.fc1.weight, *moe.shared.fc1.weight]
    torch.testing.assert_close(average.fc1_weight, torch.stack(everyone).mean(0))


class StoppedError(Exception):
    pass


def test_an_interrupted_fit_continues_to_the_same_bytes(source, tmp_path, monkeypatch):
    plan, images = dense_plan("opt", "ms"), chips("opt", "ms")
    config = result_config(read_config(source), plan, "1b")

    def write(name, **how):
        prune_checkpoint(source, tmp_path / name, plan, config, chips=images, **how)

    monkeypatch.setattr("model.calibration.FitSettings", lambda: FitSettings(steps=3, tokens=64))
    write("whole")

    def stop(_):
        if len(list((tmp_path / "broken.part").glob("model-*"))) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        write("broken", advance=stop)
    assert (tmp_path / "broken.part" / ".calibration").is_file()
    write("broken")
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "broken").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_chips_of_every_modality_are_needed(source):
    with pytest.raises(ValueError, match="no ms chips"):
        Calibration(source, dense_plan("opt", "ms"), chips("opt"))


def test_distillation_brings_the_student_nearer():
    torch.manual_seed(1)
    parent, student = random_encoder(SMALL), RingMoE(plan_pruning(SMALL, ("opt",), "1b", {}).result)
    images = {"opt": chips("opt")["opt"]}
    with torch.no_grad():
        before = feature_loss(student(images), parent(images))
    losses: list[float] = []
    distill(student, parent, [images] * 30, 30, rate=3e-3, on_step=losses.append)
    with torch.no_grad():
        after = feature_loss(student(images), parent(images))
    assert len(losses) == 30
    assert after < 0.7 * before
    assert joined({"a": torch.ones(2, 1), "b": torch.zeros(1, 1)}).shape == (3, 1)
