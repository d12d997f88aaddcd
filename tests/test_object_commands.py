"""Detection and tracking from the shell: finetune, evaluate, predict."""

import json

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
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


def test_clips(tmp_path):
    for clip in ("a", "b"):
        rows = []
        for t in range(1, 5):
            left, frame = 5 + 6 * t, tmp_path / "mot" / clip / "img1" / f"{t:06d}.png"
            image(frame, (left, 30, left + 20, 42))
            rows.append(f"{t},3,{left},30,20,12,1,1,1")
        (tmp_path / "mot" / clip / "gt").mkdir()
        (tmp_path / "mot" / clip / "gt" / "gt.txt").write_text("\n".join(rows))
    run = tmp_path / "run"
    data = tmp_path / "mot"
    learned = said("finetune", data, "--task", "tracking", "-o", run, "--classes", "bar", *SMALL)
    assert {"hota", "mota", "idf1", "map50"} <= set(learned["scores"])
    scores = said("evaluate", data, "-m", run, "-o", tmp_path / "e", "--modality", "opt")["scores"]
    assert scores["labels"] == 4
    frames = sorted((tmp_path / "mot" / "a" / "img1").glob("*.png"))
    done = said("predict", *frames, "-m", run, "-o", tmp_path / "t.txt")
    assert done["frames"] == 4
    assert (tmp_path / "t.txt").is_file()
    assert (tmp_path / "t.geojson").is_file()


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
