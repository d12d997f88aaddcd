"""`ringmoe finetune` from the shell: every starting point, resuming, and every refusal."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model.checkpoint import (
    CheckpointConfig,
    disk_tensors,
    load_module,
    read_config,
    save_checkpoint,
)
from model.config import ModelConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import load_task_network
from ringmoe_cli.app import app
from ringmoe_cli.jobs.inheriting import nearest_channels
from ringmoe_cli.scene.simulate import simulate_scene, write_scene

SIZES = (
    "model.embed_dim=8", "model.depths=[1,1,1,1]", "model.num_heads=[1,1,1,1]",
    "model.image_size=32", "model.window=4", "model.mask_cell=8",
)  # fmt: skip
FAST = ("task.channels=8", "train.batch_size=4", "train.save_every=2", "train.warmup_steps=1")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def finetune(store, output, *arguments, steps=4, sizes=SIZES):
    changes = [x for c in (*sizes, *FAST) for x in ("--set", c)]
    return run("finetune", store, "-o", output, "--steps", steps, *changes, *arguments)


def line(result):
    assert result.exit_code == 1, result.output + repr(result.exception)
    return str(result.exception)


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return write_scene(simulate_scene(3, 160), tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="session")
def store(scene, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "tiles.zarr"
    made = run(
        "tile", scene["ms"], scene["opt"], "-o", out, "--labels", scene["labels"],
        "--labels", f"depth={scene['height']}",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    return out


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """An encoder of two modalities, saved with a mask token as `pretrain` does."""
    folder = tmp_path_factory.mktemp("pre")
    torch.manual_seed(5)
    config = ModelConfig(
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
        mask_cell=8, channels={"opt": 3, "ms": 4},
    )  # fmt: skip
    encoder = RingMoE(config)
    bands = {"opt": ("red", "green", "blue"), "ms": ("blue", "green", "red", "nir")}
    normal = {m: Normalisation(b, (0.1,) * len(b), (0.08,) * len(b)) for m, b in bands.items()}
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(encoder)]
    tensors.append(("mask_token", torch.zeros(8)))
    save_checkpoint(folder, CheckpointConfig(config, "pretraining", normal), tensors)
    return folder


def test_it_trains_saves_scores_and_says_so(store, tmp_path):
    result = finetune(store, tmp_path / "run", "--modality", "ms", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["output"] == str(tmp_path / "run")
    assert 0 <= said["scores"]["miou"] <= 1
    assert json.loads((tmp_path / "run/scores.json").read_text()) == said["scores"]
    steps = [
        json.loads(row)["step"] for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]
    network, config = load_task_network(tmp_path / "run")
    assert config.task.classes[0] == "water"
    assert len(config.task.colours) == len(config.task.classes) == 6
    assert (config.task.window, config.task.modalities) == (32, ("ms",))
    assert config.gsd == {"ms": 5.0}
    assert config.normalisation["ms"].bands == ("blue", "green", "red", "nir")
    assert network.config.channels == {"ms": 4}


def test_without_json_the_last_line_is_the_folder(store, tmp_path):
    result = finetune(store, tmp_path / "run", "--modality", "opt", steps=1)
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "miou" in result.stdout


def test_it_starts_from_the_encoder_of_a_pretraining(store, pretrained, tmp_path):
    result = finetune(
        store, tmp_path / "run", "--modality", "ms", "--init", pretrained, "--freeze", sizes=()
    )
    assert result.exit_code == 0, result.output
    network, config = load_task_network(tmp_path / "run")
    parent = RingMoE(read_config(pretrained).model.with_modalities(("ms",)))
    load_module(pretrained, parent, "encoder.")
    for name, tensor in parent.state_dict().items():
        torch.testing.assert_close(network.encoder.state_dict()[name], tensor)
    assert config.normalisation["ms"] == read_config(pretrained).normalisation["ms"]


def test_co_registered_modalities_are_fused(store, pretrained, tmp_path):
    result = finetune(store, tmp_path / "run", "--init", pretrained, sizes=())
    assert result.exit_code == 0, result.output
    assert set(load_task_network(tmp_path / "run")[1].task.modalities) == {"ms", "opt"}


@pytest.mark.parametrize("peft", [(), ("--peft", "convpass")])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(store, tmp_path, peft, monkeypatch):
    whole = finetune(store, tmp_path / "whole", "--modality", "ms", *peft)
    assert whole.exit_code == 0, whole.output
    from ringmoe_cli.scene.labelled.examples import LabelledWindows

    original = LabelledWindows.training

    def dies(self, *arguments, **options):
        for number, batch in enumerate(original(self, *arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(LabelledWindows, "training", dies)
    assert finetune(store, tmp_path / "run", "--modality", "ms", *peft).exit_code == 130
    monkeypatch.undo()
    again = finetune(store, tmp_path / "run", "--modality", "ms", *peft)
    assert again.exit_code == 0, again.output
    assert "going on" in again.stderr
    first, second = (losses(tmp_path / name) for name in ("whole", "run"))
    assert first == second
    assert (tmp_path / "whole/scores.json").read_text() == (
        tmp_path / "run/scores.json"
    ).read_text()


def losses(folder):
    return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_is_kept_unless_told(store, tmp_path):
    assert finetune(store, tmp_path / "run", "--modality", "ms", steps=1).exit_code == 0
    assert "run exists; choose another -o" in line(
        finetune(store, tmp_path / "run", "--modality", "ms", steps=1)
    )
    result = finetune(store, tmp_path / "run", "--modality", "ms", "--overwrite", steps=2)
    assert result.exit_code == 0
    assert len(losses(tmp_path / "run")) == 2


def test_a_folder_of_something_else_is_never_overwritten(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert "mine exists" in line(finetune(store, tmp_path / "mine", "--overwrite"))
    assert (tmp_path / "mine/thesis.txt").exists()


def test_labels_may_come_from_a_file(scene, store, tmp_path):
    bare = tmp_path / "bare.zarr"
    assert run("tile", scene["ms"], "-o", bare).exit_code == 0
    said = line(finetune(bare, tmp_path / "run"))
    assert "bare.zarr has no labels for segmentation; pass --labels FILE" in said
    given = finetune(bare, tmp_path / "a", "--labels", scene["labels"])
    assert given.exit_code == 0, given.output
    stored = finetune(store, tmp_path / "b", "--modality", "ms")
    assert stored.exit_code == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_other_held_out_data_can_be_said(store, scene, tmp_path):
    result = finetune(store, tmp_path / "run", "--modality", "ms", "--val", store, "--json")
    assert json.loads(result.stdout)["scores"]["pixels"] == 160 * 160


def test_a_checkpoint_of_other_modalities_is_refused(scene, pretrained, tmp_path):
    sar = tmp_path / "sar.zarr"
    made = run("tile", scene["sar-l2"], "-o", sar, "--labels", scene["labels"])
    assert made.exit_code == 0, made.output
    said = line(finetune(sar, tmp_path / "run", "--init", pretrained, sizes=()))
    assert "the data is sar-l2" in said
    assert not (tmp_path / "run").exists()


def test_other_units_are_noticed(store, pretrained, tmp_path):
    other = read_config(pretrained)
    high = {m: replace(n, mean=(100.0,) * len(n.bands)) for m, n in other.normalisation.items()}
    encoder = RingMoE(other.model)
    tensors = [(f"encoder.{n}", t) for n, t in disk_tensors(encoder)]
    save_checkpoint(tmp_path / "pre", replace(other, normalisation=high), tensors)
    result = finetune(
        store, tmp_path / "run", "--modality", "ms", "--init", tmp_path / "pre", sizes=(), steps=1
    )
    assert "other units; normalising with this data's own" in result.stderr
    assert read_config(tmp_path / "run").normalisation["ms"].mean[0] < 1


def test_new_bands_start_from_the_nearest_ones():
    ms = ("blue", "green", "red", "nir")
    ten = ("blue", "green", "red", "rededge1", "rededge3", "nir", "nir08", "swir16")
    assert nearest_channels(ten, ms) == [0, 1, 2, 2, 3, 3, 3, 3]
    assert nearest_channels(("nir", "blue"), ms) == [3, 0]
    assert nearest_channels(("amplitude",), ("vv", "vh", "vv/vh")) == [0]


def test_depth_learns_heights(store, tmp_path):
    result = finetune(store, tmp_path / "run", "--task", "depth", "--modality", "opt", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["scores"]["rmse"] > 0
    task = read_config(tmp_path / "run").task
    assert task.unit == "m"
    low, high = task.value_range
    assert low < high < 200


def test_several_processes_are_refused_instead_of_writing_over_each_other(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in line(finetune(store, tmp_path / "run"))


def test_wrong_words_are_usage_errors(store, tmp_path):
    assert finetune(store, tmp_path / "run", "--task", "poetry").exit_code == 2
    assert finetune(store, tmp_path / "run", "--peft", "lora").exit_code == 2


def test_a_store_without_pixels_of_the_classes_says_so(scene, tmp_path):
    import rasterio

    empty = tmp_path / "empty.tif"
    with rasterio.open(scene["labels"]) as file:
        profile, shape = file.profile, file.shape
    with rasterio.open(empty, "w", **{**profile, "nodata": 255}) as file:
        file.write(np.full((1, *shape), 255, profile["dtype"]))
    bare = tmp_path / "bare.zarr"
    assert run("tile", scene["ms"], "-o", bare).exit_code == 0
    result = finetune(bare, tmp_path / "run", "--labels", empty, "--classes", "a,b")
    assert "label" in line(result)


def test_few_shot_episodes_draw_anew_and_say_how_sure_they_are(store, tmp_path):
    arguments = ("--modality", "ms", "--shots", 2, "--episodes", 3, "--json")
    result = finetune(store, tmp_path / "run", *arguments, steps=2)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["scores"]
    each = said["miou_per_episode"]
    assert len(each) == 3
    assert len(set(each)) > 1
    assert said["miou"] == pytest.approx(np.mean(each))
    margin = 4.303 * np.std(each, ddof=1) / np.sqrt(3)
    assert said["miou_margin95"] == pytest.approx(margin)
    again = finetune(store, tmp_path / "run", *arguments, steps=2)  # finished: read, not repeated
    assert json.loads(again.stdout)["scores"] == said
    too_many = finetune(store, tmp_path / "more", "--modality", "ms", "--shots", 500, steps=1)
    assert "labelled windows, not 500" in line(too_many)


def test_shots_are_windows_of_every_class():
    from ringmoe_cli.scene.grid import Grid, Window
    from ringmoe_cli.scene.labelled.examples import LabelledWindows, Place
    from ringmoe_cli.scene.labelled.splits import few

    class Chip:
        name, grid = "chip", Grid(8, 8)

        def __init__(self, label):
            self.said = label

        def label(self, window):
            return self.said

    items = [Chip(i % 4) for i in range(40)]
    places = [Place(i, Window(0, 0, 8, 8)) for i in range(40)]
    windows = LabelledWindows(items, places, 8)
    for draw in range(3):
        drawn = few(windows, 3, draw)
        counts = np.bincount([items[p.item].said for p in drawn.places])
        assert counts.tolist() == [3, 3, 3, 3]
    assert few(windows, 3, 0).places != few(windows, 3, 1).places


def test_layers_near_the_input_learn_slower(store, pretrained, tmp_path):
    for decay, name in ((1.0, "even"), (0.1, "steep")):
        result = finetune(
            store, tmp_path / name, "--modality", "ms", "--init", pretrained,
            "--set", f"task.layer_decay={decay}", "--set", "train.lr=1e-2", sizes=(), steps=3,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    parent = RingMoE(read_config(pretrained).model.with_modalities(("ms",)))
    load_module(pretrained, parent, "encoder.")
    key = "patch_embeds.ms.projection.weight"
    moved = {
        name: load_task_network(tmp_path / name)[0].encoder.state_dict()[key]
        .sub(parent.state_dict()[key]).abs().mean()
        for name in ("even", "steep")
    }  # fmt: skip
    assert moved["steep"] < 0.01 * moved["even"]


def test_an_encoder_is_probed_by_its_neighbours(store, pretrained, tmp_path):
    result = run(
        "evaluate", store, "--model", pretrained, "--knn", 3, "--task", "segmentation",
        "--across", "ms,opt", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    assert 0 <= scores["accuracy"] <= 1
    assert sum(scores["support_per_class"]) > 0


def test_every_feature_counts_in_a_neighbour_whatever_its_scale():
    from ringmoe_cli.jobs.probe import standard

    usual = torch.tensor([[1000.0, 0.1], [0.0, -0.1], [1000.0, -0.1], [0.0, 0.1]])
    asked = standard(torch.tensor([[1000.0, 0.1]]), usual) @ standard(usual, usual).T
    torch.testing.assert_close(asked, torch.tensor([[1.0, -1.0, 0.0, 0.0]]), atol=1e-4, rtol=0)


def test_votes_count_by_likeness():
    from ringmoe_cli.jobs.probe import vote

    likeness = torch.tensor([[0.9, 0.2, 0.8, 0.1], [0.1, 0.95, 0.0, 0.9]])
    votes = vote(likeness, torch.tensor([2, 0, 2, 1]), 2, 3)
    assert votes.argmax(1).tolist() == [2, 0]
    weights = torch.exp(torch.tensor([0.95, 0.9]) / 0.07)
    torch.testing.assert_close(votes[1, :2], weights)


def test_scenes_that_nothing_places_keep_their_own_labels(scene, tmp_path):
    import rasterio

    for name in ("opt", "labels"):
        with rasterio.open(scene[name]) as file:
            profile, values = file.profile, file.read()
        for key in ("crs", "transform"):
            profile.pop(key)
        with (
            warnings.catch_warnings(action="ignore"),
            rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as file,
        ):
            file.write(values)
    store = tmp_path / "bare.zarr"
    classes = "water,forest,grassland,cropland,built-up,bare soil"
    made = run(
        "tile", tmp_path / "opt.tif", "-o", store, "--labels", tmp_path / "labels.tif",
        "--classes", classes, "--bands", "red,green,blue",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert finetune(store, tmp_path / "run", steps=1).exit_code == 0
