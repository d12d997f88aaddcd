"""Images with boxes as training and held-out windows."""

import numpy as np
import pytest
import torch
from PIL import Image

from ringmoe_cli.errors import LabelError
from ringmoe_cli.jobs.taskdata import DataRequest, open_task_data
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labelled.box_images import boxes_in, drawn, side_of
from ringmoe_cli.scene.labelled.boxes_io import Boxes


def picture(path, boxes, size=(96, 96)):
    """A dark image, each box bright."""
    pixels = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = 200
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def yolo(folder, count=6, split=""):
    """Images with one box each, and one without."""
    for n in range(count):
        box = (8 + 4 * n, 16, 40 + 4 * n, 32)
        picture(folder / split / "images" / f"{n}.png", [box])
        text = f"0 {(box[0] + 16) / 96} {24 / 96} {32 / 96} {16 / 96}\n"
        label = folder / split / "labels" / f"{n}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text if n else "")
    return folder


def request(path, task="detection", **more):
    return DataRequest([path], task, 64, modalities=("opt",), **more)


def ready(data):
    for side in (data.training, data.held_out):
        side.normalisation = data.measure()
    return data


def test_boxes_lie_on_the_bright_pixels_after_every_turn(tmp_path):
    data = ready(open_task_data(request(yolo(tmp_path))))
    batch = next(data.training.training(16, seed=0))
    whole = [
        (x, b)
        for x, boxes in zip(batch.images["opt"], batch.targets["boxes"], strict=True)
        for b in boxes[~boxes.ignored].corners().round().int().tolist()
    ]
    assert len(whole) > 5
    for image, (x0, y0, x1, y1) in whole:
        inside = image[0, 0, y0:y1, x0:x1]
        assert (inside > 0).all(), "the box is bright"
        assert image[0, 0].gt(0).sum() == inside.numel(), "and nothing else is"


def test_held_out_images_of_the_data_itself(tmp_path):
    yolo(tmp_path, split="train")
    yolo(tmp_path, count=3, split="val")
    data = open_task_data(request(tmp_path))
    held = {data.held_out.items[p.item].split for p in data.held_out.places}
    seen = {data.training.items[p.item].split for p in data.training.places}
    assert (held, seen) == ({"val"}, {"train"})


def test_held_out_images_by_seed(tmp_path):
    yolo(tmp_path, count=10)
    first, again = (open_task_data(request(tmp_path, seed=1)) for _ in range(2))
    held = {p.item for p in first.held_out.places}
    assert held == {p.item for p in again.held_out.places}
    assert len(held) == 2
    assert held.isdisjoint(p.item for p in first.training.places)


def test_one_large_image_is_held_out_by_block(tmp_path):
    boxes = [(x, y, x + 12, y + 12) for x in range(20, 380, 64) for y in range(20, 380, 64)]
    picture(tmp_path / "a.png", boxes, (384, 384))
    lines = [f"0 {(x + 6) / 384} {(y + 6) / 384} {12 / 384} {12 / 384}" for x, y, *_ in boxes]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    data = ready(open_task_data(request(tmp_path)))
    mask = data.training.kept_out[0]
    assert 0 < mask.mean() < 0.5
    for place in data.held_out.places:
        assert side_of(mask, place.window) == "held out"
    drawn_places = [data.training.draw(0, n)[0] for n in range(60)]
    assert all(side_of(mask, p.window) == "training" for p in drawn_places)


def clips(folder, names, frames=6):
    for clip in names:
        rows = []
        for t in range(1, frames + 1):
            box = (5 + 5 * t, 30, 17 + 5 * t, 40)
            picture(folder / clip / "img1" / f"{t:06d}.png", [box])
            rows.append(f"{t},7,{box[0]},{box[1]},12,10,1,1,1")
        (folder / clip / "gt").mkdir()
        (folder / clip / "gt" / "gt.txt").write_text("\n".join(rows))
    return folder


def test_pairs_of_frames(tmp_path):
    data = ready(open_task_data(request(clips(tmp_path, ["a", "b", "c"]), "tracking")))
    batch = next(data.held_out.once(3))
    assert batch.images["opt"].shape == (3, 2, 3, 64, 64)
    assert len(batch.targets["boxes"]) == 6
    clip, first, second, row, col = batch.keys[0].rsplit(":", 4)
    assert (first, second, row, col) == ("1", "2", "0", "0")
    held = {data.held_out.items[p.item].clip for p in data.held_out.places}
    assert held == {clip}
    assert held.isdisjoint(data.training.items[p.item].clip for p in data.training.places)


def test_the_end_of_a_single_clip_is_held_out_and_shares_no_frame(tmp_path):
    data = open_task_data(request(clips(tmp_path, ["a"], frames=11), "tracking"))

    def frames(side):
        names = {side.items[p.item].name for p in side.places}
        return {int(t) for name in names for t in name.split(":")[1:]}

    assert frames(data.held_out) == {9, 10, 11}
    assert frames(data.training) == set(range(1, 9))


def test_boxes_mostly_outside_a_window_are_ignored():
    boxes = Boxes.from_corners([[0, 0, 10, 10], [58, 0, 70, 10], [62, 0, 82, 10], [90, 0, 95, 9]])
    shown = boxes_in(boxes, Window(0, 0, 64, 64))
    assert shown.corners().tolist() == [[0, 0, 10, 10], [58, 0, 64, 10], [62, 0, 64, 10]]
    assert shown.ignored.tolist() == [False, False, True]
    moved = boxes_in(boxes, Window(0, 60, 64, 64))
    assert moved.corners()[1].tolist() == [2, 0, 22, 10]


def test_few_images_are_not_drawn():
    assert drawn([], 0.2, 0) == []


def test_polygons_over_a_scene_need_labels(tmp_path):
    (tmp_path / "tiles.zarr").mkdir()
    (tmp_path / "tiles.zarr" / ".zgroup").write_text("{}")
    with pytest.raises(LabelError, match="pass --labels"):
        open_task_data(request(tmp_path / "tiles.zarr"))
    with pytest.raises(LabelError, match="clips in folders"):
        open_task_data(request(tmp_path / "tiles.zarr", "tracking"))


def test_still_images_are_no_clips(tmp_path):
    with pytest.raises(LabelError, match="clips of at least two frames"):
        open_task_data(request(yolo(tmp_path), "tracking"))


def test_boxes_beside_the_image_are_counted(tmp_path, capsys):
    picture(tmp_path / "a.png", [], (128, 128))
    (tmp_path / "a.csv").write_text(
        "image_path,xmin,ymin,xmax,ymax,label\n"
        "a.png,10,10,20,20,x\na.png,70,80,90,90,x\na.png,300,10,320,20,x\na.png,5,5,5,9,x\n"
    )
    open_task_data(request(tmp_path))
    assert "boxes left out: 1 outside the image, 1 with zero area" in capsys.readouterr().err


def test_normalisation_comes_from_the_training_images(tmp_path):
    data = ready(open_task_data(request(yolo(tmp_path))))
    norm = data.training.normalisation["opt"]
    assert norm.bands == ("red", "green", "blue")
    assert torch.isfinite(next(data.training.training(2, 0)).images["opt"]).all()
