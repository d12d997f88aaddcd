"""The four commands on a corner of a real Sentinel-2 scene with its class map, where it is present.

`benchmarks/real_scene.py` does the same in full and scores the map.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from rasterio.windows import Window

from ringmoe_cli.scene.grid import Window as GridWindow
from ringmoe_cli.scene.tiles import open_store

BANDS = "blue,green,red,rededge1,rededge2,rededge3,nir,nir08,swir16,swir22"

# rasterio's own arithmetic on transforms
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")


def ringmoe(*words):
    done = subprocess.run(
        [sys.executable, "-m", "ringmoe_cli", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def corner(data_dir, tmp_path):
    folder = data_dir / "02_multispectral" / "s2_aberystwyth_10band"
    with rasterio.open(folder / "mosaic_10band.tif") as source:
        window = Window(300, 200, 256, 192)
        profile = source.profile | {
            "width": 256, "height": 192, "transform": source.window_transform(window),
        }  # fmt: skip
        with rasterio.open(tmp_path / "corner.tif", "w", **profile) as out:
            out.write(source.read(window=window))
    return tmp_path / "corner.tif", folder / "sen2_20210527_aber_cls.tif"


def test_tile_pretrain_finetune_predict(corner, tmp_path):
    scene, reference = corner
    store, runs = tmp_path / "tiles.zarr", tmp_path / "runs"
    said = ("--modality", "ms", "--bands", BANDS, "--scale", "0.001,0")
    brief = ("--steps", "2", "--set", "train.batch_size=4", "--device", "cpu", "-q")
    ringmoe("tile", scene, "-o", store, *said, "--labels", reference)
    ringmoe("pretrain", store, "-o", runs / "pre", *brief)
    ringmoe("finetune", store, "--init", runs / "pre", "-o", runs / "seg", *brief)
    chart = ringmoe("predict", scene, "--model", runs / "seg", *said, "-q").strip()
    with rasterio.open(scene) as source, rasterio.open(chart) as result:
        assert (result.crs, result.transform) == (source.crs, source.transform)
        assert result.shape == source.shape
        assert set(np.unique(result.read(1))) <= {0, 1, 2, 3}
        place = source.xy(50, 60)
    stored = open_store(store).scenes[0]
    assert [n.lower() for n in stored.labels["segmentation"].classes] == [
        "forest", "grass", "urban", "water",
    ]  # fmt: skip
    with rasterio.open(reference) as classes:  # one column wider: coordinates count, not indices
        row, col = classes.index(*place)
        expected = classes.read(1)[row - 50 : row + 142, col - 60 : col + 196]
    ours = stored.read_label("segmentation", GridWindow(0, 0, 192, 256))
    assert np.array_equal(ours, np.where(expected == 0, 255, expected - 1))
    rows = (runs / "pre" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["step"] for r in rows] == [1, 2]
