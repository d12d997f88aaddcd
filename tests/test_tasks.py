"""Heads on the encoder: every task learns a batch, ignores what it must, survives a checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.optim import adamw
from model.tasks import TASKS
from model.tasks.classification import pooled
from model.tasks.depth import chamfer
from model.tasks.network import TaskNetwork, fuse, load_task_network
from model.tasks.segmentation import missed_overlap

CONFIG = ModelConfig(
    embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
    channels={"opt": 3, "ms": 4}, specialised=2, collaborative=2,
)  # fmt: skip
DENSE = ("segmentation", "change", "depth")


def task_of(name, modalities=("opt",), **changes):
    classes = {"depth": (), "change": ("same", "changed")}.get(name, ("a", "b", "c"))
    task = TaskConfig(name, classes, modalities=modalities, channels=16, value_range=(0.0, 10.0))
    return replace(task, **changes)


def network_of(task, **options):
    torch.manual_seed(0)
    return TaskNetwork(RingMoE(CONFIG.with_modalities(task.modalities)), task, **options)


def batch_of(task, count=3, side=32):
    """Images whose label follows from the pixels, so that it can be learned by heart."""
    generator = torch.Generator().manual_seed(1)
    dates = TASKS[task.name].dates or 1
    base = F.interpolate(torch.rand(count, dates, 4, 4, generator=generator), side)
    images = {
        m: base[:, :, None] + 0.1 * torch.randn(count, dates, CONFIG.channels[m], side, side,
                                                generator=generator)
        for m in task.modalities
    }  # fmt: skip
    if task.name == "classification":
        targets = {"classes": torch.arange(count) % 3}
    elif task.name == "depth":
        targets = {"values": base[:, :1] * 10}
    elif task.name == "change":
        targets = {"classes": ((base[:, 0] - base[:, 1]).abs() > 0.3).long()}
    else:
        targets = {"classes": (base[:, 0] * 3).long().clamp(max=2)}
    return Batch(images, targets=targets)


@pytest.mark.parametrize("name", ["segmentation", "classification", "change", "depth"])
def test_every_task_learns_one_batch_by_heart(name):
    task = task_of(name)
    network, batch = network_of(task), batch_of(task)
    steps, rate = (20, 1e-3) if name == "classification" else (80, 5e-3)
    optimiser = adamw(network, rate, 0.0)
    first = network.loss(batch).task.item()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 15)
        optimiser.zero_grad()
        network.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
    metric = network.head.metric()
    metric.update(network.eval().predict(batch), batch)
    scores = metric.compute()
    if name == "depth":
        assert scores["rmse"] < 1.0  # of a spread of 2.9
    else:
        assert scores[network.head.score] > 0.9
    assert network.loss(batch).task.item() < 0.5 * first


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("size", [(32, 32), (30, 45), (9, 33)])
@pytest.mark.parametrize("detail", [0, 4])
def test_dense_answers_have_the_size_of_the_image(name, size, detail):
    task = task_of(name, detail=detail)
    network = network_of(task).eval()
    dates = network.head.dates
    answer = network.predict(Batch({"opt": torch.randn(2, dates, 3, *size)})).dense
    assert answer.shape == (2, max(1, len(task.classes)), *size)
    if name != "depth":
        torch.testing.assert_close(answer.sum(1), torch.ones(2, *size))
    else:
        assert answer.min() >= 0
        assert answer.max() <= 10


def test_a_classifier_begins_as_a_linear_probe_of_its_encoder():
    generator = torch.Generator().manual_seed(0)
    task = task_of("classification")
    head = network_of(task).head
    widths = (16, 32, 64, 128)
    truth = torch.arange(60) % 3
    stages = [torch.randn(60, w, 2, 2, generator=generator) for w in widths]
    for k in range(3):
        stages[0][truth == k, k] += 3.0
    head.start_from(pooled(stages), truth)
    logits = head(stages, (8, 8))
    assert (logits.argmax(1) == truth).float().mean() > 0.95
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_an_embedding_says_level_and_texture_of_every_map():
    flat, rough = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 5.0], [1.0, 5.0]]]])
    said = pooled([flat, rough, flat[..., :1, :1]])
    torch.testing.assert_close(
        said, torch.tensor([[3.0, 3.0, 3.0, 0.0, 2.0, 0.0]]), atol=2e-3, rtol=0
    )


def test_a_classifier_sees_levels_past_the_encoder():
    level = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1, 1).expand(3, 1, 3, 32, 32)
    told = {d: network_of(task_of("classification", detail=d)).embed(Batch({"opt": level}))
            for d in (0, 4)}  # fmt: skip
    assert told[4].shape[1] == told[0].shape[1] + 8
    assert torch.pdist(told[0]).max() < 0.1 * torch.pdist(told[4]).max()


def test_every_class_counts_the_same_in_the_overlap_however_rare_it_is():
    truth = torch.tensor([0] * 98 + [1] * 2)
    certain = F.one_hot(truth, 3).float()
    assert missed_overlap(certain, truth) == 0
    never = F.one_hot(torch.zeros_like(truth), 3).float()
    torch.testing.assert_close(missed_overlap(never, truth), torch.tensor(1 - 0.98 / 2))
    assert missed_overlap(certain[:0], truth[:0]) == 0


def test_detail_lets_a_map_see_levels_that_the_norm_of_the_patches_takes_out():
    """Constant images differ in level alone, and so do the classes."""
    level = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1, 1).expand(3, 1, 3, 32, 32)
    truth = torch.arange(3).view(3, 1, 1).expand(3, 32, 32).contiguous()
    losses = {}
    for detail in (0, 8):
        network = network_of(task_of("segmentation", detail=detail), balance_weight=0.0)
        network.encoder.requires_grad_(False)
        optimiser = adamw(network, 5e-3, 0.0)
        for _ in range(60):
            optimiser.zero_grad()
            loss = network.loss(Batch({"opt": level}, targets={"classes": truth})).task
            loss.backward()
            optimiser.step()
        losses[detail] = loss.item()
    assert losses[8] < 0.3 < losses[0]


def test_channels_that_were_not_measured_are_not_seen_past_the_encoder():
    network = network_of(task_of("segmentation", detail=4)).eval()
    x = torch.randn(1, 1, 3, 32, 32)
    other, known = x.clone(), torch.tensor([[True, True, False]])
    other[:, :, 2] = 9.0
    there, back = (network.predict(Batch({"opt": y}, channels={"opt": known})) for y in (x, other))
    torch.testing.assert_close(there.dense, back.dense)


@pytest.mark.parametrize("name", DENSE)
def test_unlabelled_and_invalid_pixels_change_neither_loss_nor_score(name):
    task = task_of(name)
    network, batch = network_of(task).eval(), batch_of(task)
    valid = torch.ones(3, network.head.dates, 1, 32, 32, dtype=torch.bool)
    valid[:, -1, :, :, 20:] = False
    batch.valid["opt"] = valid
    other = replace(batch, targets={k: v.clone() for k, v in batch.targets.items()})
    key = "values" if name == "depth" else "classes"
    other.targets[key][..., 20:] = 7.0 if name == "depth" else 1  # where nothing was seen
    unknown = float("nan") if name == "depth" else 255
    for b in (batch, other):
        b.targets[key][..., :4] = unknown
    with torch.no_grad():
        torch.testing.assert_close(network.loss(batch).task, network.loss(other).task)
    assert scores_of(network, batch) == pytest.approx(scores_of(network, other), nan_ok=True)
    assert scores_of(network, batch)["pixels"] == 3 * 32 * 16


def scores_of(network, batch):
    metric = network.head.metric()
    metric.update(network.predict(batch), batch)
    return {k: v for k, v in metric.compute().items() if not isinstance(v, list)}


@pytest.mark.parametrize("name", DENSE)
def test_a_batch_without_labels_costs_nothing_and_has_gradients(name):
    task = task_of(name)
    network, batch = network_of(task, balance_weight=0.0), batch_of(task)
    for key, value in batch.targets.items():
        value[:] = float("nan") if key == "values" else 255
    loss = network.loss(batch).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("detail", [0, 4])
def test_swapping_the_dates_changes_nothing(detail):
    network = network_of(task_of("change", detail=detail)).eval()
    x = torch.randn(2, 2, 3, 32, 32)
    there, back = (network.predict(Batch({"opt": y})).dense for y in (x, x.flip(1)))
    torch.testing.assert_close(there, back)


def test_fusion_is_the_mean_over_modalities_that_see_the_place():
    features = {m: [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)] for m in ("opt", "ms")}
    weights = {m: torch.ones(2, 1, 32, 32) for m in features}
    weights["opt"][0, :, :16] = 0  # upper half of the first image is clouded
    weights["ms"][1] = 0  # the second image has no ms at all
    fused = fuse(features, weights)
    for s, half in ((0, 4), (1, 2)):
        opt, ms = features["opt"][s], features["ms"][s]
        torch.testing.assert_close(fused[s][0, :, :half], ms[0, :, :half])
        torch.testing.assert_close(fused[s][0, :, half:], (opt + ms)[0, :, half:] / 2)
        torch.testing.assert_close(fused[s][1], opt[1])


def test_a_missing_modality_is_as_one_that_is_invalid_everywhere():
    task = task_of("segmentation", ("opt", "ms"), detail=4)
    network = network_of(task).eval()
    batch = batch_of(task)
    alone = network.predict(Batch({"opt": batch.images["opt"]})).dense
    batch.valid["ms"] = torch.zeros(3, 1, 1, 32, 32, dtype=torch.bool)
    batch.valid["opt"] = torch.ones(3, 1, 1, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(network.predict(batch).dense, alone)


def test_modality_dropout_hides_all_but_one_and_only_in_training():
    task = task_of("classification", ("opt", "ms"))
    network = network_of(task, modality_dropout=1.0)
    batch = batch_of(task)
    single = [network.head(network.encode(batch).features[m], (32, 32)) for m in task.modalities]
    mixed = network(batch)
    for row in range(3):
        assert any(torch.allclose(mixed[row], s[row], atol=1e-5) for s in single)
    network.eval()
    assert not any(torch.allclose(network(batch), s, atol=1e-4) for s in single)


def test_wrong_modalities_and_tasks_are_one_clear_line():
    with pytest.raises(ValueError, match="the model reads opt, not sar-l2"):
        TaskNetwork(RingMoE(CONFIG.with_modalities(("opt",))), task_of("change", ("sar-l2",)))
    with pytest.raises(ValueError, match="unknown task 'poetry'; choose from"):
        TaskNetwork(RingMoE(CONFIG), TaskConfig("poetry"))
    network = network_of(task_of("segmentation"))
    with pytest.raises(ValueError, match="this model reads opt; the input has ms"):
        network.predict(Batch({"ms": torch.randn(1, 1, 4, 32, 32)}))


@pytest.mark.parametrize(("adapter", "detail"), [(0, 0), (4, 0), (0, 4)])
def test_a_network_survives_its_checkpoint(tmp_path, adapter, detail):
    from model.adapt import insert_convpass

    task = task_of("segmentation", adapter=adapter, detail=detail)
    network = network_of(task).eval()
    insert_convpass(network.encoder, adapter)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    config = CheckpointConfig(network.config, "task", task=task)
    save_checkpoint(tmp_path, config, disk_tensors(network))
    again, read = load_task_network(tmp_path)
    assert read.task == task
    batch = batch_of(task)
    torch.testing.assert_close(again.predict(batch).dense, network.predict(batch).dense)


def test_an_encoder_is_not_a_task_network(tmp_path):
    save_checkpoint(tmp_path, CheckpointConfig(CONFIG), disk_tensors(RingMoE(CONFIG)))
    with pytest.raises(ValueError, match="has an encoder but no task head"):
        load_task_network(tmp_path)


def test_the_bin_term_is_the_chamfer_distance():
    centres = torch.tensor([[0.0, 1.0, 4.0]])
    values = torch.tensor([[0.5, 4.0, float("nan")]])
    # To the nearest value: .25, .25, 0; to the nearest centre: .25, 0.
    assert chamfer(centres, values).item() == pytest.approx(0.5 / 3 + 0.25 / 2)


def test_whole_images_are_moved_by_up_to_an_eighth_and_mirrored_at_the_edge():
    from ringmoe_cli.scene.labelled.examples import drawn_move, with_moves

    ramp = torch.arange(5.0).expand(1, 1, 1, 5, 5)
    right, left = (with_moves(ramp, [(0, k)])[0, 0, 0, 0].tolist() for k in (2, -1))
    assert right == [2, 1, 0, 1, 2]
    assert left == [1, 2, 3, 4, 3]
    down = with_moves(ramp.mT.contiguous(), [(1, 0)])[0, 0, 0]
    assert down[:, 0].tolist() == [1, 0, 1, 2, 3]
    drawn = np.array([drawn_move(0, n, 64) for n in range(200)])
    assert drawn.min() == -8
    assert drawn.max() == 8
    assert drawn_move(0, 5, 64) == drawn_move(0, 5, 64)
