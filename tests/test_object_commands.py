"""Detection and tracking from the shell: finetune, evaluate, predict."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch
from PIL import Image
from rasterio.transform import Affine
from typer.testing import CliRunner

from ringmoe_cli.app import app
from ringmoe_cli.errors import OutputExistsError, RingmoeError
from ringmoe_cli.recipe import load_finetune_recipe

SMALL = [
    "--set", "model={preset: nano, embed_dim: 8, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}",
    "--set", "task.channels=16", "--set", "task.window=64", "--set", "train.batch_size=2",
    "--steps", "2", "--quiet", "--modality", "opt",
]  # fmt: skip


def ringmoe(*words):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*words):
    result = ringmoe(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def image(path, box, size=96):
    pixels = np.random.default_rng(0).integers(0, 60, (size, size, 3)).astype(np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A YOLO folder and a model that has seen it."""
    folder = tmp_path_factory.mktemp("yolo")
    for n in range(6):
        image(folder / "images" / f"{n}.png", (10 + 5 * n, 20, 40 + 5 * n, 36))
        (folder / "labels").mkdir(exist_ok=True)
        row = f"0 {(25 + 5 * n) / 96} {28 / 96} {30 / 96} {16 / 96}\n"
        (folder / "labels" / f"{n}.txt").write_text(row)
    run = folder.parent / "det"
    scores = said("finetune", folder, "--task", "detection", "-o", run, "--classes", "bar", *SMALL)
    return folder, run, scores["scores"]


def test_a_detector_learns_and_is_scored(still, tmp_path):
    folder, run, scores = still
    assert {"map", "map50", "ap_per_class"} <= set(scores)
    found = said("evaluate", folder, "--model", run, "-o", tmp_path, "--modality", "opt")["scores"]
    assert found["split"] == "held-out"
    assert found["support_per_class"] == [1]
    assert (tmp_path / "evaluation.csv").is_file()
    assert (tmp_path / "worst_1.png").is_file()
    everything = said(
        "evaluate", folder, "--model", run, "-o", tmp_path, "--modality", "opt", "--split", "all"
    )
    assert everything["scores"]["support_per_class"] == [6]


@pytest.mark.parametrize("suffix", [".parquet", ".gpkg", ".geojson"])
def test_boxes_of_a_scene(still, tmp_path, suffix):
    folder, run, _ = still
    output = tmp_path / f"boxes{suffix}"
    done = said("predict", folder / "images" / "0.png", "-m", run, "-o", output, "--score", 0)
    table = geopandas.read_parquet(output) if suffix == ".parquet" else geopandas.read_file(output)
    assert done["objects"] == {"bar": len(table)}
    assert done["output"] == str(output)
    with pytest.raises(OutputExistsError):
        ringmoe("predict", folder / "images" / "0.png", "-m", run, "-o", output)


def test_boxes_beside_the_scenes(still):
    folder, run, _ = still
    scenes = [folder / "images" / f"{n}.png" for n in (1, 2)]
    result = ringmoe("predict", *scenes, "-m", run, "--quiet")
    assert result.stdout.split() == [
        str(folder / "images" / f"{n}_detection.geojson") for n in (1, 2)
    ]


def test_a_format_that_cannot_be_written(still, tmp_path):
    folder, run, _ = still
    with pytest.raises(RingmoeError, match="vector results are"):
        ringmoe("predict", folder / "images" / "0.png", "-m", run, "-o", tmp_path / "a.shp")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A MOT clip and a model that has seen two of them."""
    root = tmp_path_factory.mktemp("mot")
    for name in ("a", "b"):
        rows = []
        for t in range(1, 6):
            left, frame = 5 + 6 * t, root / name / "img1" / f"{t:06d}.png"
            image(frame, (left, 30, left + 20, 42))
            rows.append(f"{t},3,{left},30,20,12,1,1,1")
        (root / name / "gt").mkdir()
        (root / name / "gt" / "gt.txt").write_text("\n".join(rows))
    run = root.parent / "track"
    learned = said("finetune", root, "--task", "tracking", "-o", run, "--classes", "bar", *SMALL)
    return root, run, learned["scores"]


def test_clips(clip, tmp_path):
    root, run, learned = clip
    assert {"hota", "mota", "idf1", "map50"} <= set(learned)
    scores = said("evaluate", root, "-m", run, "-o", tmp_path / "e", "--modality", "opt")["scores"]
    assert scores["labels"] == 5
    frames = sorted((root / "a" / "img1").glob("*.png"))
    done = said("predict", *frames, "-m", run, "-o", tmp_path / "t.txt")
    assert done["frames"] == 5
    assert (tmp_path / "t.txt").is_file()
    assert (tmp_path / "t.geojson").is_file()


@pytest.fixture
def one_thread():
    """As Dask's workers have: how sums are split decides their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.distributed
def test_workers_find_the_same_objects_and_tracks(still, clip, tmp_path, one_thread):
    folder, run = still[0], tmp_path / "det"
    learn = [*SMALL, "--set", "train.lr=0.01", "--steps", 50]
    said("finetune", folder, "--task", "detection", "-o", run, "--classes", "bar", *learn)
    image(tmp_path / "tall.png", (20, 30, 60, 50), 300)
    frames = sorted((clip[0] / "a" / "img1").glob("*.png"))
    for scenes, model, suffix in (
        ([tmp_path / "tall.png"], run, ".geojson"), (frames, clip[1], ".txt"),
    ):  # fmt: skip
        one, many = (tmp_path / kind / f"found{len(scenes)}{suffix}" for kind in ("one", "many"))
        words = ["predict", *scenes, "-m", model, "--score", 0.01]
        said(*words, "-o", one)
        done = said(*words, "-o", many, "--workers", 2)
        assert suffix == ".txt" or done["objects"]["bar"] > 0
        assert one.read_bytes() == many.read_bytes()
    both = [folder / "images" / f"{n}.png" for n in (3, 4)]
    ringmoe("predict", *both, "-m", run, "-o", tmp_path, "--workers", 2)
    assert {f"{n}_detection.geojson" for n in (3, 4)} <= {p.name for p in tmp_path.iterdir()}


def georeferenced(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", height=pixels.shape[1], width=pixels.shape[2],
        count=len(pixels), dtype="uint8", crs="EPSG:32633",
        transform=Affine(10, 0, 500_000, 0, -10, 4_000_000),
    ) as out:  # fmt: skip
        out.write(pixels)
    return path


def test_the_class_of_every_tile_of_a_scene(tmp_path):
    rng = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        for n in range(4):
            pixels = rng.integers(0, 100, (3, 64, 64)) + 150 * k
            georeferenced(tmp_path / "data" / name / f"{n}.tif", pixels.astype(np.uint8))
    run, tiles = tmp_path / "run", tmp_path / "tiles.gpkg"
    said("finetune", tmp_path / "data", "--task", "classification", "-o", run, *SMALL)
    scene = rng.integers(0, 100, (3, 128, 192)).astype(np.uint8)
    done = said("predict", georeferenced(tmp_path / "s.tif", scene), "-m", run, "-o", tiles)
    table = geopandas.read_file(tiles)
    assert len(table) == 6
    assert sum(done["tiles"].values()) == 6
    assert table.crs.to_epsg() == 32633
    assert table.area.tolist() == pytest.approx([640.0**2] * 6)
    assert table.union_all().bounds == (500_000, 4_000_000 - 1280, 500_000 + 1920, 4_000_000)


def test_the_changed_regions_of_two_dates(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(6):
        before = rng.integers(0, 60, (3, 64, 64)).astype(np.uint8)
        after, truth = before.copy(), np.zeros((1, 64, 64), np.uint8)
        after[:, 16:48, 16:48], truth[:, 16:48, 16:48] = 220, 255
        for kind, pixels in (("A", before), ("B", after), ("label", truth)):
            georeferenced(tmp_path / "data" / kind / f"{n}.tif", pixels)
    run, output = tmp_path / "run", tmp_path / "change.tif"
    learn = [*SMALL, "--set", "train.lr=0.01", "--steps", "40"]
    said("finetune", tmp_path / "data", "--task", "change", "-o", run, *learn)
    there = [tmp_path / "data" / kind / "0.tif" for kind in ("A", "B")]
    done = said("predict", there[1], "--before", there[0], "-m", run, "-o", output)
    regions = geopandas.read_file(done["regions"])
    assert len(regions) == done["changed"] > 0
    with rasterio.open(output) as source:
        changed = int((source.read(1) == 1).sum())
    assert regions.to_crs("EPSG:32633").area.sum() == pytest.approx(100 * changed, rel=1e-3)


def test_polygons_over_a_tile_store(tmp_path):
    """Rotated boxes from a vector file in another coordinate system, on a scene of a store."""
    pixels = np.random.default_rng(0).integers(0, 60, (3, 192, 192)).astype(np.uint8)
    place = Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)

    def to_ground(xy):
        return np.stack([place.c + place.a * xy[:, 0], place.f + place.e * xy[:, 1]], 1)

    outlines = []
    for row in range(16, 180, 40):
        for col in range(16, 180, 40):
            square = shapely.Point(col, row).buffer(8, quad_segs=1)  # on its corner
            outlines.append(shapely.transform(square, to_ground))
            pixels[:, row - 4 : row + 4, col - 4 : col + 4] = 220
    with rasterio.open(
        tmp_path / "s.tif", "w", driver="GTiff", height=192, width=192, count=3, dtype="uint8",
        crs="EPSG:32633", transform=place,
    ) as out:  # fmt: skip
        out.write(pixels)
    table = geopandas.GeoDataFrame(
        {"class": ["roof"] * len(outlines)}, geometry=outlines, crs="EPSG:32633"
    )
    table.to_crs("EPSG:4326").to_file(tmp_path / "roofs.geojson")
    store, run = tmp_path / "tiles.zarr", tmp_path / "run"
    assert ringmoe("tile", tmp_path / "s.tif", "-o", store, "--modality", "opt").exit_code == 0
    more = ["--labels", tmp_path / "roofs.geojson", "--set", "task.rotated=true"]
    said("finetune", store, "--task", "detection", "-o", run, *more, *SMALL)
    scores = said("evaluate", store, "-m", run, "-o", tmp_path / "e", *more[:2])["scores"]
    assert 0 < sum(scores["support_per_class"]) < len(outlines)
    done = said("predict", tmp_path / "s.tif", "-m", run, "-o", tmp_path / "b.gpkg", "--score", 0)
    assert geopandas.read_file(tmp_path / "b.gpkg").crs.to_epsg() == 32633
    assert done["objects"].keys() == {"roof"}


@pytest.mark.parametrize("task", ["detection", "tracking"])
def test_recipes(task):
    recipe = load_finetune_recipe(f"finetune-{task}")
    assert recipe.task.name == task
