"""Published data sets as downloaded, in tiny imitations: found, paired, decoded."""

import json

import numpy as np
import pytest
from PIL import Image

from ringmoe_cli.errors import LabelError
from ringmoe_cli.jobs.taskdata import DataRequest, find_items
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labelled.benchmarks import BENCHMARKS, benchmark
from ringmoe_cli.scene.labelled.folder_images import FolderImage, Images

SIDE = 16


def put(path, values=7, bands=3):
    """A raster of one value, or of one colour, in whatever format its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        put_tiff(path, values, bands)
        return
    shape = (SIDE, SIDE) if isinstance(values, int) and bands == 1 else (SIDE, SIDE, 3)
    Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, shape), np.uint8)).save(path)


def put_tiff(path, values, bands):
    import rasterio
    from rasterio.transform import Affine

    profile = {
        "driver": "GTiff", "width": SIDE, "height": SIDE, "count": bands, "dtype": "uint8",
        "crs": "EPSG:32633", "transform": Affine(1, 0, 4e5, 0, -1, 5e6),
    }  # fmt: skip
    each = [values] * bands if isinstance(values, int) else values
    with rasterio.open(path, "w", **profile) as file:
        file.write(np.stack([np.full((SIDE, SIDE), v, np.uint8) for v in each]))


LAYOUTS = {
    "nwpu-resisc45": {"airplane/airplane_001.jpg": 9, "beach/beach_001.jpg": 9},
    "aid": {"Airport/airport_1.jpg": 9, "Beach/beach_1.jpg": 9},
    "levir-cd": {
        "train/A/train_1.png": 9, "train/B/train_1.png": 8, "train/label/train_1.png": (255,) * 3,
        "val/A/val_1.png": 9, "val/B/val_1.png": 8, "val/label/val_1.png": (0,) * 3,
    },
    "isaid": {
        "train/images/P0000.png": 9,
        "train/Semantic_masks/images/P0000_instance_color_RGB.png": (0, 127, 255),
        "val/images/P0003.png": 9,
        "val/Semantic_masks/images/P0003_instance_color_RGB.png": (0, 0, 63),
    },
    "potsdam": {
        "2_Ortho_RGB/top_potsdam_2_10_RGB.tif": 9,
        "5_Labels_all/top_potsdam_2_10_label.tif": (0, 0, 255),
    },
    "potsdam-height": {
        "2_Ortho_RGB/top_potsdam_2_10_RGB.tif": 9, "1_DSM/dsm_potsdam_02_10.tif": 5,
    },
    "loveda": {
        "Train/Train/Rural/images_png/0.png": 9, "Train/Train/Rural/masks_png/0.png": 4,
        "Val/Val/Urban/images_png/1366.png": 9, "Val/Val/Urban/masks_png/1366.png": 0,
    },
    "whu-opt-sar": {
        "optical/NH49E001013.tif": 9, "sar/NH49E001013.tif": 9, "lbl/NH49E001013.tif": 40,
    },
    "dfc23": {
        "train/rgb/P_0001.tif": 9, "train/sar/P_0001.tif": 9, "train/dsm/P_0001.tif": 12,
    },
}  # fmt: skip
"""Set -> relative path -> value or colour."""

FIRST = {
    "levir-cd": "changed", "isaid": "plane", "potsdam": "building", "loveda": "water",
    "whu-opt-sar": "water",
}  # fmt: skip
"""Class of every pixel of the first label."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_download_is_read_as_it_is(tmp_path, name):
    for path, value in LAYOUTS[name].items():
        grey = path.split("/")[-2] in ("masks_png", "lbl", "dsm", "1_DSM", "sar")
        bands = 1 if grey else 4 if path.startswith("optical") else 3
        put(tmp_path / path, value, bands)
    task = benchmark(name).task
    found = find_items(DataRequest([tmp_path], task, 16, benchmark=name, bands=None))
    whole = Window(0, 0, SIDE, SIDE)
    label = found.items[0].label(whole)
    if task == "classification":
        assert [i.example.label for i in found.items] == [0, 1]
    elif task == "depth":
        assert (label == (12 if name == "dfc23" else 5)).all()
    else:
        assert found.classes.names[label[0, 0]] == FIRST[name]
        assert (label == label[0, 0]).all()
    if name in ("levir-cd", "isaid", "loveda"):
        assert list(found.splits) == ["train", "val"]
    if name == "loveda":
        assert (found.items[1].label(whole) == 255).all()
    if name == "levir-cd":
        images = Images("opt")
        item = FolderImage(found.items[0].example, images, found.classes)
        assert len(item.read(whole)["opt"]) == 2
    if name == "whu-opt-sar":
        assert set(found.items[0].example.images) == {"ms", "sar-l2"}


@pytest.mark.parametrize("place", ["", "annotations"])
def test_buildings_of_dfc23_are_drawn_from_their_outlines(tmp_path, place):
    for split, name in (("train", "P_0001"), ("train", "P_0002"), ("val", "P_0003")):
        put(tmp_path / split / "rgb" / f"{name}.tif")
        put(tmp_path / split / "sar" / f"{name}.tif", bands=1)
    square, hole = [2, 2, 10, 2, 10, 8, 2, 8], [4, 4, 6, 4, 6, 6, 4, 6]
    content = {
        "images": [{"id": 1, "file_name": "P_0001.tif"}, {"id": 2, "file_name": "P_0002.tif"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": [square, hole]},
            {"image_id": 2, "category_id": 1, "segmentation": {"counts": "x", "size": [16, 16]}},
        ],
        "categories": [{"id": 1, "name": "building"}],
    }
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "buildings_only_train.json").write_text(json.dumps(content))
    request = DataRequest([tmp_path], "segmentation", 16, benchmark="dfc23-buildings")
    found = find_items(request)
    assert list(found.splits) == ["train", "train"]
    assert found.classes.names == ("background", "building")
    wanted = np.zeros((SIDE, SIDE), int)
    wanted[2:8, 2:10] = 1
    wanted[4:6, 4:6] = 0
    assert (found.items[0].label(Window(0, 0, SIDE, SIDE)) == wanted).all()
    assert (found.items[0].label(Window(1, 3, 8, 8)) == wanted[1:9, 3:11]).all()
    assert not found.items[1].label(Window(0, 0, SIDE, SIDE)).any()
    assert set(found.items[0].example.images) == {"opt", "sar-l2"}
    (tmp_path / place / "buildings_only_train.json").write_text("{}")
    with pytest.raises(LabelError, match="is no COCO file of outlines"):
        find_items(request)


def test_every_layout_has_an_imitation():
    twins = {"ucmerced": "aid", "whu-rs19": "aid", "cdd": "levir-cd"}
    assert set(BENCHMARKS) == set(LAYOUTS) | set(twins) | {"dfc23-buildings"}
    for name, twin in twins.items():
        assert benchmark(name) is benchmark(twin)


def test_another_folder_is_refused_by_name(tmp_path):
    with pytest.raises(LabelError, match="is not laid out as downloaded: no optical"):
        find_items(DataRequest([tmp_path], "segmentation", 16, benchmark="whu-opt-sar"))
    with pytest.raises(LabelError, match="unknown benchmark 'imagenet'; choose from nwpu"):
        benchmark("imagenet")
