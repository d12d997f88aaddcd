"""Box files as people keep them: tiny imitations of every layout, and what must be refused."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled.box_formats import Mark, parse_csv, parse_dota, parse_mot, parse_voc
from ringmoe_cli.scene.labelled.boxes_io import boxes_of, find_boxes, image_size

SIZE = (80, 100)


def image(path, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def boxes(found, number=0, rotated=False):
    item = found.images[number]
    return boxes_of(item.marks, found.classes, rotated, image_size(item.path))[0]


def coco(path, names, boxes_per_image, **more):
    rows = [
        {"id": n, "image_id": i, "category_id": 7, "bbox": [10, 20, 30, 40], "iscrowd": 0, **more}
        for n, i in enumerate(i for i, k in enumerate(boxes_per_image) for _ in range(k))
    ]
    size = {"height": 80, "width": 100}
    content = {
        "images": [{"id": i, "file_name": n, **size} for i, n in enumerate(names)],
        "categories": [{"id": 7, "name": "ship"}, {"id": 3, "name": "car"}],
        "annotations": rows,
    }  # fmt: skip
    write(path, json.dumps(content))


def test_coco_with_split_folders(tmp_path, capsys):
    """HRSID, COCO: annotations/instances_train2017.json beside train2017/."""
    for split in ("train", "val"):
        image(tmp_path / f"{split}2017" / "1.png")
        coco(tmp_path / "annotations" / f"instances_{split}2017.json", ["1.png"], [2])
    found = find_boxes(tmp_path)
    assert found.classes == ("car", "ship")
    assert [(i.path.parent.name, i.split) for i in found.images] == [
        ("train2017", "train"), ("val2017", "val"),
    ]  # fmt: skip
    assert boxes(found).corners().tolist() == [[10, 20, 40, 60]] * 2
    assert boxes(found).labels.tolist() == [1, 1]
    assert "no object of class car" in capsys.readouterr().err


def test_coco_file_alone_with_crowds_and_corners(tmp_path):
    image(tmp_path / "a.png")
    quad = [20, 20, 60, 20, 60, 40, 20, 40]
    coco(tmp_path / "labels.json", ["a.png"], [1], iscrowd=1, segmentation=[quad])
    found = find_boxes(tmp_path / "labels.json", rotated=True, classes="ship")
    assert boxes(found, rotated=True).ignored.tolist() == [True]
    assert boxes(found, rotated=True).geometry[0, :4].tolist() == pytest.approx([40, 30, 40, 20])


def test_dota_folders(tmp_path):
    image(tmp_path / "train" / "images" / "P0001.png")
    header = "imagesource:GoogleEarth\ngsd:0.146\n"
    text = header + "30 10 50 30 30 50 10 30 plane 0\n1 1 9 1 9 5 1 5 ship 1\n"
    write(tmp_path / "train" / "labelTxt" / "P0001.txt", text)
    found = find_boxes(tmp_path, rotated=True)
    assert found.classes == ("plane", "ship")
    assert found.images[0].split == "train"
    turned = boxes(found, rotated=True)
    side = 20 * math.sqrt(2)
    assert turned.geometry[0, :4].tolist() == pytest.approx([30, 30, side, side], rel=1e-4)
    assert math.cos(4 * float(turned.geometry[0, 4])) == pytest.approx(-1, abs=1e-4)
    assert turned.ignored.tolist() == [False, True]
    assert boxes(found).corners()[0].tolist() == pytest.approx([10, 10, 50, 50])


def test_yolo_folders_and_names(tmp_path):
    for split in ("train", "valid"):
        image(tmp_path / split / "images" / "a.jpg")
        write(tmp_path / split / "labels" / "a.txt", "1 0.5 0.5 0.2 0.25\n")
    found = find_boxes(tmp_path)
    assert found.classes == ("class_1",)
    assert [i.split for i in found.images] == ["train", "val"]
    assert boxes(found).corners()[0].tolist() == pytest.approx([40, 30, 60, 50])
    assert find_boxes(tmp_path, classes="lake,river").classes == ("lake", "river")
    write(tmp_path / "data.yaml", "names: {0: lake, 1: river}\n")
    assert boxes(find_boxes(tmp_path)).labels.tolist() == [1]


def test_yolo_corners_beside_the_image(tmp_path):
    image(tmp_path / "frame.png")
    write(tmp_path / "frame.txt", "0 .1 .1 .3 .1 .3 .2 .1 .2\n")
    write(tmp_path / "aerial.names", "car\n")
    found = find_boxes(tmp_path, rotated=True)
    assert found.classes == ("car",)
    assert boxes(found).corners()[0].tolist() == pytest.approx([10, 8, 30, 16])


VOC = "<annotation><object><name>ship</name>{}</object></annotation>"
EDGES = "<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>30</xmax><ymax>60</ymax></bndbox>"


def test_dior_horizontal_and_rotated(tmp_path):
    tags = ("x_left_top", "y_left_top", "x_right_top", "y_right_top",
            "x_right_bottom", "y_right_bottom", "x_left_bottom", "y_left_bottom")  # fmt: skip
    corners = "".join(
        f"<{t}>{v}</{t}>" for t, v in zip(tags, (9, 9, 29, 9, 29, 19, 9, 19), strict=True)
    )
    for n, split in (("00001", "train"), ("00002", "test")):
        image(tmp_path / "JPEGImages-trainval" / f"{n}.jpg")
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", f"{n}\n")
        folder = tmp_path / "Annotations"
        write(folder / "Horizontal Bounding Boxes" / f"{n}.xml", VOC.format(EDGES))
        write(folder / "Oriented Bounding Boxes" / f"{n}.xml",
              VOC.format(f"<robndbox>{corners}</robndbox>"))  # fmt: skip
    flat, turned = find_boxes(tmp_path), find_boxes(tmp_path, rotated=True)
    assert [i.split for i in flat.images] == ["train", "test"]
    assert boxes(flat).corners().tolist() == [[10, 20, 30, 60]]
    assert boxes(turned, rotated=True).corners()[0].tolist() == pytest.approx([9, 9, 29, 19])


def test_hrsc_angles(tmp_path):
    text = (
        "<HRSC_Image><HRSC_Objects><HRSC_Object><Class_ID>100000001</Class_ID>"
        "<box_xmin>1</box_xmin><box_ymin>1</box_ymin><box_xmax>2</box_xmax><box_ymax>2</box_ymax>"
        "<mbox_cx>50</mbox_cx><mbox_cy>40</mbox_cy><mbox_w>30</mbox_w><mbox_h>8</mbox_h>"
        "<mbox_ang>0.5</mbox_ang></HRSC_Object></HRSC_Objects></HRSC_Image>"
    )
    write(tmp_path / "a.xml", text)
    assert parse_voc(tmp_path / "a.xml") == [Mark((50, 40, 30, 8, 0.5), "100000001")]


def dota_twice(root):
    image(root / "train" / "images" / "P0001.png")
    for folder, text in (
        ("labelTxt", "30 10 50 30 30 50 10 30"),
        ("reclabelTxt", "1 1 9 1 9 5 1 5"),
    ):
        write(root / "train" / folder / "P0001.txt", f"{text} plane 0\n")


def hrsc(root):
    image(root / "Test" / "AllImages" / "100000001.bmp")
    text = "".join(f"<mbox_{t}>{v}</mbox_{t}>" for t, v in zip(
        ("cx", "cy", "w", "h", "ang"), (50, 40, 30, 8, 0.5), strict=True))  # fmt: skip
    item = f"<HRSC_Object><Class_ID>100000011</Class_ID>{text}</HRSC_Object>"
    write(root / "Test" / "Annotations" / "100000001.xml", f"<HRSC_Image>{item}</HRSC_Image>")


def air_mot(root):
    for t in (1, 2):
        image(root / "test" / "7" / "img" / f"{t:06d}.jpg")
    write(root / "test" / "7" / "gt" / "gt.txt", "1,1,5,5,9,9,1,2,1\n2,1,6,5,9,9,1,2,1\n")


def aircraft(root):
    image(root / "JPEGImages" / "0000001.jpg")
    write(root / "ImageSets" / "Main" / "test.txt", "0000001\n")
    write(root / "Annotations" / "0000001.xml", VOC.replace("ship", "A220").format(EDGES))


@pytest.mark.parametrize(
    ("name", "build", "label"),
    [("dota", dota_twice, 0), ("hrsc2016", hrsc, 0), ("air-mot", air_mot, 1),
     ("sar-aircraft", aircraft, 2)],
)  # fmt: skip
def test_benchmarks_as_downloaded(tmp_path, name, build, label):
    from ringmoe_cli.jobs.taskdata import DataRequest, find_items
    from ringmoe_cli.scene.labelled.box_benchmarks import BOX_BENCHMARKS

    build(tmp_path)
    about = BOX_BENCHMARKS[name]
    request = DataRequest(
        [tmp_path], about.task, 64, modalities=("opt",), benchmark=name, rotated=about.rotated
    )
    found = find_items(request)
    assert found.classes.names == about.classes
    assert found.splits in (["train"], ["test"])
    (first, *_) = found.items[0].boxes
    assert first.labels.tolist() == [label]
    assert bool(first.geometry[0, 4] != 0) == about.rotated


def test_benchmarks_that_do_not_fit():
    from ringmoe_cli.scene.labelled.box_benchmarks import box_benchmark

    with pytest.raises(LabelError, match="unknown benchmark"):
        box_benchmark("coco", "detection", False)
    with pytest.raises(LabelError, match="is for tracking"):
        box_benchmark("air-mot", "detection", False)
    with pytest.raises(LabelError, match=r"task\.rotated=true"):
        box_benchmark("dota", "detection", False)


def test_csv_with_fields_in_any_order(tmp_path):
    image(tmp_path / "a.png")
    write(tmp_path / "truth.csv", "image_path,xmin,xmax,ymin,ymax,label\na.png,1,11,2,22,Tree\n")
    write(tmp_path / "notes.csv", "who,when\nme,now\n")
    found = find_boxes(tmp_path)
    assert boxes(found).corners().tolist() == [[1, 2, 11, 22]]


def test_mot_clips(tmp_path):
    for t in (1, 2, 3):
        image(tmp_path / "train" / "MOT-02" / "img1" / f"{t:06d}.jpg")
    rows = "1,4,10,20,30,15,1,1,1\n3,4,12,20,30,15,1,1,1\n3,5,40,40,9,9,0,1,1\n"
    write(tmp_path / "train" / "MOT-02" / "gt" / "gt.txt", rows)
    found = find_boxes(tmp_path, classes="plane")
    assert [(i.clip, i.frame, i.split, len(i.marks)) for i in found.images] == [
        ("train/MOT-02", frame, "train", count) for frame, count in ((1, 1), (2, 0), (3, 2))
    ]
    last = boxes(found, 2)
    assert last.tracks.tolist() == [4, 5]
    assert last.ignored.tolist() == [False, True]
    assert last.corners()[0].tolist() == [12, 20, 42, 35]


def test_polygons_of_another_coordinate_system(tmp_path):
    import geopandas
    import rasterio
    import shapely
    from rasterio.transform import Affine

    where = Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", height=80, width=100, count=3, dtype="uint8",
        crs="EPSG:32616", transform=where,
    ) as out:  # fmt: skip
        out.write(np.ones((3, 80, 100), np.uint8))
    square = shapely.Polygon([(30, 20), (50, 40), (40, 50), (20, 30)])  # in pixels, turned by 45°
    ground = shapely.transform(
        square, lambda p: np.stack([500_000 + p[:, 0] / 2, 4_000_000 - p[:, 1] / 2], 1)
    )
    table = geopandas.GeoDataFrame({"class": ["house"]}, geometry=[ground], crs="EPSG:32616")
    table.to_crs("EPSG:4326").to_file(tmp_path / "scene.geojson", driver="GeoJSON")
    found = find_boxes(tmp_path, rotated=True)
    assert found.classes == ("house",)
    turned = boxes(found, rotated=True).geometry[0]
    assert turned[:4].tolist() == pytest.approx([35, 35, 800**0.5, 200**0.5], abs=0.05)
    assert float(turned[4]) == pytest.approx(math.pi / 4, abs=0.01)


def test_boxes_outside_and_without_area_are_counted():
    marks = [
        Mark((10, 10, 20, 20), "a"), Mark((90, 70, 130, 90), "a"), Mark((200, 10, 220, 20), "a"),
        Mark((5, 5, 5, 9), "a"), Mark((1, 1, 9, 9), "other"),
    ]  # fmt: skip
    kept, lost = boxes_of(marks, ("a",), False, SIZE)
    assert kept.corners().tolist() == [[10, 10, 20, 20], [90, 70, 100, 80]]
    assert lost == {"outside": 1, "zero area": 1}
    assert len(boxes_of([], ("a",), False, SIZE)[0]) == 0
    assert kept.geometry.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "text", "parse", "complaint"),
    [
        ("a.txt", "1 2 3 ship\n", parse_dota, "line 1: 4 words"),
        ("a.txt", "1 2 3 4 5 6 7 x ship\n", parse_dota, "is not a box"),
        ("a.txt", "1 2 3 4 5 6 7 nan ship\n", parse_dota, "is not a box"),
        ("a.xml", "<a><object><name>x</name></object></a>", parse_voc, "has no box"),
        ("a.xml", "no xml", parse_voc, "is not XML"),
        ("a.csv", "image,label\na.png,x\n", parse_csv, "needs fields"),
        ("gt.txt", "1,2,3\n", parse_mot, "at least 6"),
    ],
)
def test_damaged_labels_say_where(tmp_path, name, text, parse, complaint):
    write(tmp_path / name, text)
    with pytest.raises(LabelError, match=complaint):
        parse(tmp_path / name)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(LabelError, match="no images with boxes"):
        find_boxes(tmp_path)
    image(tmp_path / "a.png")
    write(tmp_path / "a.txt", "0 .5 .5 7 .1\n")
    with pytest.raises(LabelError, match="not in shares"):
        find_boxes(tmp_path)
    write(tmp_path / "a.txt", "3 .5 .5 .1 .1\n")
    with pytest.raises(LabelError, match="class 3, but there are 2 names"):
        find_boxes(tmp_path, classes="a,b")
    coco(tmp_path / "boxes.json", ["missing.png"], [1])
    with pytest.raises(LabelError, match=r"speaks of missing\.png"):
        find_boxes(tmp_path)


def test_two_label_files_for_one_image(tmp_path):
    image(tmp_path / "images" / "a.png")
    for version in ("v1", "v2"):
        write(tmp_path / version / "a.txt", "0 .5 .5 .1 .1\n")
    with pytest.raises(LabelError, match="label one image"):
        find_boxes(tmp_path)


def test_real_sets(data_dir):
    """Counts as their owners give them."""
    lakes = find_boxes(data_dir / "08_detection/bhuvan_lake_river", classes="lake,river")
    assert sum(len(i.marks) for i in lakes.images if i.split == "val") == 115
    cars = find_boxes(data_dir / "10_tracking/kit_ais_munichstreet02")
    assert sum(len(i.marks) for i in cars.images) == 746
    houses = find_boxes(data_dir / "08_detection/spacenet4_atlanta_buildings", rotated=True)
    assert sum(len(i.marks) for i in houses.images) == 23
    trees = find_boxes(data_dir / "08_detection/neon_trees")
    assert sorted(len(i.marks) for i in trees.images) == [7, 61]
