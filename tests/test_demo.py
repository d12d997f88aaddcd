"""The demo, small: the whole line through the same functions as the other commands."""

import json
import shutil

import numpy as np
import pytest

from ringmoe_cli.errors import CheckpointError, OutputExistsError, RingmoeError
from ringmoe_cli.jobs.demo import DemoRequest, demo, divide, height_of, rivals, score_map
from ringmoe_cli.jobs.quicklook import draw_curves
from ringmoe_cli.jobs.reconstruction import reconstructions
from ringmoe_cli.scene.picture import NODATA
from ringmoe_cli.scene.simulate import read_raster, simulate_scene
from ringmoe_cli.scene.simulated.baselines import linear_map, majority_map, with_neighbourhood


def small(folder, **changes):
    return DemoRequest(
        folder,
        width=256,
        training_height=320,
        held_out_height=128,
        pretraining=("train.steps=2", "train.batch_size=8"),
        finetuning=("train.steps=3", "train.batch_size=4"),
        **changes,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "ringmoe-demo"
    return folder, demo(small(folder))


def test_everything_is_written(finished):
    folder, report = finished
    names = {p.name for p in folder.iterdir()}
    expected = {"training", "held_out", "tiles.zarr", "runs", "map.tif", "picture.png"}
    assert expected | {"report.json", "demo.json"} <= names
    assert not list(folder.rglob("*.part*"))
    assert set(report["scores"]) == {"ringmoe", "majority", "linear", "linear_5x5", "bayes"}
    assert all(0 <= s["miou"] <= 1 for s in report["scores"].values())
    stored = json.loads((folder / "report.json").read_text())
    assert stored == {k: v for k, v in report.items() if k != "seconds"}


def test_scores_are_those_of_the_files(finished):
    folder, report = finished
    guess = read_raster(folder / "map.tif")[0]
    truth = read_raster(folder / "held_out" / "landcover.tif")[0]
    assert guess.shape == truth.shape == (128, 256)
    assert score_map(guess, truth, 6) == report["scores"]["ringmoe"]


def test_a_finished_demo_is_kept(finished):
    folder, _ = finished
    with pytest.raises(OutputExistsError, match="overwrite"):
        demo(small(folder))


def test_an_interrupted_demo_goes_on_to_the_same_result(finished, tmp_path):
    folder, report = finished
    copy = tmp_path / "ringmoe-demo"
    shutil.copytree(folder, copy)
    for name in ("report.json", "picture.png", "map.tif"):
        (copy / name).unlink()
    shutil.rmtree(copy / "held_out")
    before = (copy / "runs" / "seg" / "metrics.jsonl").stat().st_mtime_ns
    again = demo(small(copy))
    assert again["scores"] == report["scores"]
    assert (copy / "runs" / "seg" / "metrics.jsonl").stat().st_mtime_ns == before
    assert (copy / "map.tif").read_bytes() == (folder / "map.tif").read_bytes()
    assert (copy / "picture.png").read_bytes() == (folder / "picture.png").read_bytes()


def test_reconstructions_show_what_was_hidden(finished, tmp_path, capsys):
    folder, _ = finished
    rows = reconstructions(folder / "runs" / "pre")
    assert set(rows) == {"opt", "ms", "sar-l1", "sar-l2"}
    for images in rows.values():
        assert list(images) == ["input", "masked", "reconstructed"]
        assert {i.shape for i in images.values()} == {(64, 2 * 64 + 3, 3)}
        hidden = (images["masked"] == NODATA).all(axis=2)
        assert 0.55 < hidden[:, :64].mean() < 0.75  # 10 of 16 cells
        assert np.array_equal(images["input"][~hidden], images["reconstructed"][~hidden])
        assert not np.array_equal(images["input"][hidden], images["reconstructed"][hidden])
    draw_curves(str(folder / "runs" / "pre"), tmp_path / "curves.png")
    draw_curves(str(folder / "runs" / "seg"), tmp_path / "short.png")
    assert (tmp_path / "curves.png").stat().st_size > (tmp_path / "short.png").stat().st_size
    with pytest.raises(CheckpointError, match="reconstructs nothing"):
        reconstructions(folder / "runs" / "seg")
    store, away = folder / "tiles.zarr", folder / "away"
    store.rename(away)
    with pytest.raises(CheckpointError, match="not here"):
        reconstructions(folder / "runs" / "pre")
    draw_curves(str(folder / "runs" / "pre"), tmp_path / "only.png")
    away.rename(store)
    assert "not here" in capsys.readouterr().err
    assert (tmp_path / "only.png").stat().st_size < (tmp_path / "curves.png").stat().st_size


def test_other_seeds_and_other_folders_are_left_alone(finished, tmp_path):
    folder, _ = finished
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(folder / "demo.json", half)
    with pytest.raises(RingmoeError, match="another seed"):
        demo(small(half, seed=1))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            demo(small(mine, overwrite=overwrite))
    assert (mine / "thesis.txt").exists()


def test_training_and_held_out_parts_do_not_touch():
    request = small(None)
    world = simulate_scene(0, (height_of(request), request.width))
    training, held_out = divide(world, request)
    gap = (training.origin[1] - held_out.origin[1]) / 5 - training.labels.shape[0]
    assert gap == request.guard >= 64
    maps = rivals(training, held_out)
    assert all(m.shape == held_out.labels.shape for m in maps.values())
    accuracy = {name: (m == held_out.labels).mean() for name, m in maps.items()}
    assert accuracy["majority"] < accuracy["linear"] < accuracy["bayes"]


def test_linear_map_finds_the_optimum_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    centres = rng.normal(size=(3, 4)).astype(np.float32)
    bands = centres[labels].transpose(2, 0, 1) + rng.normal(size=(4, 40, 50)).astype(np.float32)
    labels[:5] = 255
    ours = linear_map(bands, labels, bands, 3)
    known = labels.ravel() != 255
    pixels = bands.reshape(4, -1).T
    theirs = LogisticRegression(C=1e4, max_iter=500).fit(pixels[known], labels.ravel()[known])
    assert (ours.ravel() == theirs.predict(pixels)).mean() > 0.995


def test_neighbourhood_is_mean_and_deviation():
    bands = np.random.default_rng(0).normal(size=(2, 12, 14)).astype(np.float32)
    wide = with_neighbourhood(bands)
    patch = bands[:, 3:8, 5:10]
    assert wide.shape == (6, 12, 14)
    assert wide[:2] == pytest.approx(bands)
    assert wide[2:4, 5, 7] == pytest.approx(patch.mean(axis=(1, 2)), abs=1e-5)
    assert wide[4:, 5, 7] == pytest.approx(patch.std(axis=(1, 2)), abs=1e-5)


def test_majority_ignores_the_unlabelled():
    labels = np.array([[255, 255, 255], [2, 2, 1]], np.uint8)
    assert (majority_map(labels, (2, 2)) == 2).all()
