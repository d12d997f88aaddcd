"""`ringmoe evaluate`: what is written down, on which split, and that maps and windows agree."""

import csv
import json

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import Affine
from sklearn.metrics import confusion_matrix
from typer.testing import CliRunner

from model.batch import Batch, Prediction
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import TaskNetwork
from ringmoe_cli.app import app
from ringmoe_cli.jobs.evaluation import Gathered, translation
from ringmoe_cli.scene.simulate import simulate_scene, write_scene

CLASSES = ("water", "forest", "grassland", "cropland", "built-up", "bare soil")
BANDS = {"ms": ("blue", "green", "red", "nir"), "opt": ("red", "green", "blue")}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def line(result):
    assert result.exit_code == 1, result.output
    return str(result.exception)


def save_model(folder, task, provenance=None):
    torch.manual_seed(0)
    channels = {m: len(BANDS[m]) for m in task.modalities}
    config = ModelConfig(
        embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), image_size=32, window=4,
        mask_cell=8, channels=channels,
    )  # fmt: skip
    network = TaskNetwork(RingMoE(config), task)
    normal = {m: Normalisation(BANDS[m], (0.1,) * n, (0.1,) * n) for m, n in channels.items()}
    about = CheckpointConfig(config, "task", normal, {"ms": 5.0}, task, provenance=provenance or {})
    save_checkpoint(folder, about, disk_tensors(network))
    return folder


def seg_task(name="segmentation", classes=CLASSES, modality="ms", **changes):
    return TaskConfig(name, classes, modalities=(modality,), window=32, channels=8, **changes)


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return write_scene(simulate_scene(4, 128), tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="session")
def store(scene, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated-store") / "tiles.zarr"
    labels = ("--labels", scene["labels"], "--labels", f"depth={scene['height']}")
    assert run("tile", scene["ms"], "-o", out, *labels).exit_code == 0
    return out


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("seg"), seg_task())


def evaluated(store, model, out, *arguments):
    result = run("evaluate", store, "--model", model, "-o", out, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_table_json_csv_confusion_and_pictures_say_the_same(store, model, tmp_path):
    said = evaluated(store, model, tmp_path / "e", "--worst", 2)
    scores = said["scores"]
    assert said["output"] == str(tmp_path / "e")
    assert json.loads((tmp_path / "e/evaluation.json").read_text()) == scores
    with (tmp_path / "e/evaluation.csv").open() as file:
        rows = {(r["score"], r["class"]): r["value"] for r in csv.DictReader(file)}
    assert float(rows["miou", ""]) == scores["miou"]
    assert float(rows["recall", "water"]) == scores["recall_per_class"][0]
    assert scores["pixels"] == sum(scores["support_per_class"]) == 128 * 128
    assert 0 <= scores["ece"] <= 1
    made = {p.name for p in (tmp_path / "e").iterdir()}
    assert {"confusion.png", "worst_1.png", "worst_2.png"} <= made
    table = run("evaluate", store, "--model", model, "-o", tmp_path / "t", "--worst", 0)
    assert "bare soil" in table.stdout
    assert table.stdout.splitlines()[-1] == str(tmp_path / "t")
    assert f"{scores['miou']:.4f}" in table.stdout


def test_areas_are_those_of_the_map_and_of_its_errors(store, model, tmp_path):
    areas = evaluated(store, model, tmp_path / "e", "--worst", 0)["scores"]["areas"]
    assert areas["unit"] == "ha"
    hectares = 128 * 128 * 25 / 1e4
    for column in ("mapped", "estimated"):
        total = sum(a[column] for a in areas["classes"].values())
        assert total == pytest.approx(hectares)
    # All pixels are labelled: the estimate is the true area, whatever the map says.
    support = evaluated(store, model, tmp_path / "f")["scores"]["support_per_class"]
    truth = [n * 25 / 1e4 for n in support]
    assert [a["estimated"] for a in areas["classes"].values()] == pytest.approx(truth)


def test_windows_and_the_stitched_map_have_the_same_scores(scene, store, model, tmp_path):
    windows = evaluated(store, model, tmp_path / "w")["scores"]
    out = tmp_path / "map.tif"
    predicted = run("predict", scene["ms"], "--model", model, "-o", out, "--overlap", 0)
    assert predicted.exit_code == 0, predicted.output
    result = run("evaluate", out, "--labels", scene["labels"], "--json", "-o", tmp_path / "m")
    assert result.exit_code == 0, result.output
    stitched = json.loads(result.stdout)["scores"]
    assert stitched["pixels"] == windows["pixels"]
    assert stitched["accuracy"] == pytest.approx(windows["accuracy"], abs=2e-4)
    assert stitched["miou"] == pytest.approx(windows["miou"], abs=2e-4)
    truth = rasterio.open(scene["labels"]).read(1).ravel()
    answer = rasterio.open(out).read(1).ravel()
    expected = (truth == answer).mean()
    assert stitched["accuracy"] == pytest.approx(expected)


def test_training_data_is_scored_on_what_was_held_out(store, tmp_path):
    provenance = {"data": [str(store)], "recipe": {"train": {"seed": 3}}}
    model = save_model(tmp_path / "seg", seg_task(), provenance)
    said = evaluated(store, model, tmp_path / "e")["scores"]
    assert said["split"] == "held-out"
    assert 0 < said["pixels"] < 128 * 128 / 2
    whole = run("evaluate", store, "--model", model, "-o", tmp_path / "a", "--split", "all")
    assert "flatters it" in whole.stderr


def test_heights_are_scored_in_metres(store, tmp_path):
    task = seg_task("depth", (), value_range=(0.0, 30.0), unit="m")
    said = evaluated(store, save_model(tmp_path / "d", task), tmp_path / "e")["scores"]
    assert {"rmse", "mae", "bias", "r2", "abs_rel", "delta1"} <= set(said)
    assert "areas" not in said


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for split, classes in (("train", "ab"), ("test", "b")):
        for c in classes:
            folder = tmp_path / "chips" / split / c
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(1, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{c}{split}{i}.png")
    return tmp_path / "chips"


def test_class_folders_are_matched_by_name_and_the_test_split_is_taken(folders, tmp_path):
    task = seg_task("classification", ("b", "a", "c"), "opt")
    said = evaluated(folders, save_model(tmp_path / "c", task), tmp_path / "e")["scores"]
    assert said["split"] == "test"
    assert said["support_per_class"] == [4, 0, 0]  # b comes first in the model
    assert said["areas"]["unit"] == "windows"
    other = save_model(tmp_path / "o", seg_task("classification", ("a", "x"), "opt"))
    refused = run("evaluate", folders, "--model", other, "-o", tmp_path / "f")
    assert "the model does not know class 'b'; it has a, x" in line(refused)


def test_other_bands_are_refused(scene, store, tmp_path):
    model = save_model(tmp_path / "opt", seg_task(modality="opt"))
    said = line(run("evaluate", store, "--model", model, "-o", tmp_path / "e"))
    assert "is ms; opt is wanted" in said
    swapped = tmp_path / "swapped.zarr"
    tiled = run(
        "tile", scene["ms"], "-o", swapped, "--labels", scene["labels"],
        "--bands", "blue,green,red,swir16", "--modality", "ms",
    )  # fmt: skip
    assert tiled.exit_code == 0, tiled.output
    model = save_model(tmp_path / "ms", seg_task())
    said = line(run("evaluate", swapped, "--model", model, "-o", tmp_path / "e"))
    assert "the model reads ms bands blue, green, red, nir; the data has" in said


def test_a_map_needs_labels_and_a_store_needs_a_model(scene, store):
    assert run("evaluate", scene["labels"]).exit_code == 2
    result = CliRunner(env={"RINGMOE_MODEL": ""}).invoke(app, ["evaluate", str(store)])
    assert result.exit_code == 2
    assert "ringmoe demo" in result.stderr


def test_an_encoder_cannot_be_evaluated(store, tmp_path):
    config = ModelConfig(
        embed_dim=8, depths=(1, 1), num_heads=(1, 1), image_size=32, window=4, channels={"ms": 4}
    )
    save_checkpoint(tmp_path / "pre", CheckpointConfig(config), disk_tensors(RingMoE(config)))
    said = line(run("evaluate", store, "--model", tmp_path / "pre"))
    assert "no task head" in said


def test_the_worst_windows_are_the_worst():
    class Counts:
        def update(self, prediction, batch):
            pass

    gathered = Gathered(Counts(), 2, keep=3)
    for first in range(0, 12, 4):
        wrong = torch.zeros(4, 8, 8, dtype=torch.long)
        for row in range(4):
            wrong[row].view(-1)[: first + row] = 1
        dense = torch.nn.functional.one_hot(wrong, 2).movedim(-1, 1).float()
        batch = Batch(
            {"opt": torch.zeros(4, 1, 3, 8, 8)},
            targets={"classes": torch.zeros(4, 8, 8, dtype=torch.long)},
            keys=[f"w{first + row}" for row in range(4)],
        )
        gathered.add(Prediction(dense=dense), batch)
    ranked = sorted(gathered.worst, reverse=True)
    assert [w.key for _, _, w in ranked] == ["w11", "w10", "w9"]
    assert ranked[0][0] == pytest.approx(11 / 64)
    assert gathered.mapped.tolist() == [12 * 64 - sum(range(12)), sum(range(12))]


def test_class_tables_translate_by_name():
    assert translation(("a", "b"), ("a", "b")) is None
    table = translation(("b", "c"), ("a", "b", "c"))
    assert table[torch.tensor([0, 1, 255])].tolist() == [1, 2, 255]


def test_map_scores_agree_with_scikit_learn(tmp_path):
    rng = np.random.default_rng(0)
    answer, truth = (rng.integers(0, 3, (50, 40), dtype=np.uint8) for _ in range(2))
    profile = {
        "driver": "GTiff", "width": 40, "height": 50, "count": 1, "dtype": "uint8",
        "crs": "EPSG:32632", "transform": Affine(10, 0, 5e5, 0, -10, 5e6),
    }  # fmt: skip
    for name, values in (("map", answer), ("truth", truth)):
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as file:
            file.write(values, 1)
    result = run("evaluate", tmp_path / "map.tif", "--labels", tmp_path / "truth.tif", "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    counts = confusion_matrix(truth.ravel(), answer.ravel())
    assert scores["support_per_class"] == counts.sum(1).tolist()
    assert scores["accuracy"] == pytest.approx(np.trace(counts) / counts.sum())


def test_training_data_with_other_held_out_data_is_scored_on_that(store, scene, tmp_path):
    other = tmp_path / "other.zarr"
    assert run("tile", scene["ms"], "-o", other, "--labels", scene["labels"]).exit_code == 0
    provenance = {"data": [str(store)], "validation": str(other)}
    model = save_model(tmp_path / "seg", seg_task(), provenance)
    said = evaluated(store, model, tmp_path / "e")["scores"]
    assert (said["split"], said["pixels"]) == ("held-out", 128 * 128)


def test_a_store_may_hold_more_modalities_than_the_model_reads(scene, model, tmp_path):
    both = tmp_path / "both.zarr"
    tiled = run("tile", scene["opt"], scene["ms"], "-o", both, "--labels", scene["labels"])
    assert tiled.exit_code == 0, tiled.output
    assert evaluated(both, model, tmp_path / "e")["scores"]["pixels"] == 128 * 128
