"""Objects of whole scenes: merged across windows, written on the ground."""

import json

import geopandas
import numpy as np
import pytest
import torch

from model.batch import Batch, Prediction
from model.boxes import Boxes
from model.config import TaskConfig
from model.normalisation import Normalisation
from model.tasks.detection import Detection
from model.tasks.tracking import Tracking
from ringmoe_cli.jobs import object_maps, objects
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.scene import Band, Scene

UTM = "EPSG:32633"
PLACE = (2.0, 0.0, 500_000.0, 0.0, -2.0, 5_400_000.0)


class Picture:
    """A scene in memory."""

    def __init__(self, values, crs=UTM):
        height, width = values.shape
        grid = Grid(height, width, crs, PLACE) if crs else Grid(height, width)
        self.values = values
        self.scene = Scene("s", "opt", (Band("red"),), grid, "float32", "dn")

    def physical(self, window):
        row, col, height, width = window
        out = np.zeros((1, height, width), np.float32)
        valid = np.zeros((height, width), bool)
        part = self.values[row : row + height, col : col + width]
        out[0, : part.shape[0], : part.shape[1]] = part
        valid[: part.shape[0], : part.shape[1]] = True
        return out, valid


def scene(values, dates=1, crs=UTM):
    norm = {"opt": Normalisation(("red",), (0.0,), (1.0,))}
    return Normalised([{"opt": Picture(values, crs)} for _ in range(dates)], norm)


class Finder:
    """Finds every bright rectangle of a window, as much of it as the window shows."""

    def __init__(self, name="detection"):
        self.task = TaskConfig(name, ("dark", "bright"), modalities=("opt",), window=64)
        widths = (4, 8, 16, 32)
        self.head = (Tracking if name == "tracking" else Detection)(self.task, widths)

    def predict(self, batch: Batch) -> Prediction:
        from scipy.ndimage import find_objects, label

        found = []
        for image in batch.images["opt"].flatten(0, 1):
            slices = find_objects(label(image[0].numpy() > 0)[0])
            rows = [[x.start, y.start, x.stop, y.stop] for y, x in slices]
            size = torch.tensor([(r[2] - r[0]) * (r[3] - r[1]) / 10_000 for r in rows])
            labels = torch.ones(len(rows), dtype=torch.int64)
            found.append(
                Boxes.from_corners(rows, scores=0.5 + size, labels=labels)
                if rows
                else Boxes.empty()
            )
        if self.task.name == "classification":
            bright = batch.images["opt"].mean((1, 2, 3, 4))
            return Prediction(scores=torch.stack([1 - bright, bright], 1))
        return Prediction(boxes=found)


RECTANGLES = [(3, 5, 30, 25), (50, 40, 78, 66), (100, 120, 130, 140), (60, 90, 64, 100)]


def drawn(shift=0, size=(150, 170)):
    values = np.zeros(size, np.float32)
    for x0, y0, x1, y1 in RECTANGLES:
        values[y0:y1, x0 + shift : x1 + shift] = 1
    return values


def test_every_object_is_told_once_and_whole():
    """Windows of 64 with 32 shared: objects across any window border come whole."""
    settings = objects.settings_of(64)
    (found,) = objects.boxes_of_scene(Finder(), scene(drawn()), settings)
    assert sorted(map(tuple, found.corners().tolist())) == sorted(RECTANGLES)


@pytest.mark.parametrize("shift", range(0, 32, 3))
def test_wherever_the_objects_lie(shift):
    (found,) = objects.boxes_of_scene(Finder(), scene(drawn(shift)), objects.settings_of(64))
    expected = [(x0 + shift, y0, x1 + shift, y1) for x0, y0, x1, y1 in RECTANGLES]
    assert sorted(map(tuple, found.corners().tolist())) == sorted(expected)


def test_scenes_smaller_than_a_window_and_without_objects():
    small, settings = scene(drawn(size=(28, 40))), objects.settings_of(64)
    (found,) = objects.boxes_of_scene(Finder(), small, settings)
    assert found.corners().tolist() == [[3, 5, 30, 25]]
    (none,) = objects.boxes_of_scene(Finder(), scene(np.zeros((90, 90))), settings)
    assert len(none) == 0


def test_pairs_cover_every_frame():
    assert [list(objects.pairs(n)) for n in (1, 2, 3, 4)] == [
        [(0, 0)], [(0, 1)], [(0, 1), (1, 2)], [(0, 1), (2, 3)],
    ]  # fmt: skip


def test_boxes_on_the_ground(tmp_path):
    source = scene(drawn())
    said = object_maps.write_objects(
        Finder(), source, source, tmp_path / "b.parquet", objects.settings_of(64)
    )
    table = geopandas.read_parquet(said["output"])
    assert said["objects"] == {"dark": 0, "bright": 4}
    assert table.geometry.area.sum() == pytest.approx(
        sum((x1 - x0) * (y1 - y0) * 4 for x0, y0, x1, y1 in RECTANGLES)
    )
    fewer = object_maps.write_objects(
        Finder(), source, source, tmp_path / "c.parquet", objects.settings_of(64), sure=0.55
    )
    assert fewer["objects"]["bright"] == 3


def test_a_resampled_scene_gives_boxes_on_its_own_grid():
    source, coarse = scene(np.zeros((300, 340))), scene(np.zeros((150, 170)))
    boxes = Boxes.from_corners([[10, 20, 30, 40]])
    assert object_maps.on_own_grid(boxes, source, coarse).corners().tolist() == [[20, 40, 60, 80]]


def test_clips_become_tracks(tmp_path):
    frames = [scene(drawn(4 * t)) for t in range(5)]
    finder = Finder("tracking")
    boxes = objects.boxes_of_clip(finder, frames, objects.settings_of(64))
    said = object_maps.write_clip(finder.task, frames, boxes, tmp_path / "t.txt")
    assert said["tracks"] == {"dark": 0, "bright": 4}
    rows = (tmp_path / "t.txt").read_text().splitlines()
    assert len(rows) == 20
    lines = geopandas.read_file(said["lines"])
    assert sorted(lines["last"]) == [5] * 4
    assert lines["length"].to_numpy() == pytest.approx(16 * 2 / 0.9996, rel=1e-3)
    content = json.loads((tmp_path / "t.geojson").read_text())
    assert content["features"][0]["geometry"]["type"] == "LineString"


def test_tiles_of_a_scene(tmp_path):
    values = np.zeros((100, 128), np.float32)
    values[:64, 64:] = 1
    source = scene(values)
    said = object_maps.write_scene_tiles(
        Finder("classification"), source, source, tmp_path / "t.parquet", objects.settings_of(64)
    )
    assert said["tiles"] == {"dark": 3, "bright": 1}
    table = geopandas.read_parquet(said["output"])
    assert table.geometry.area.sum() == pytest.approx(100 * 128 * 4)
    assert table["class"].tolist() == ["dark", "bright", "dark", "dark"]


def test_f1_of_an_image():
    from ringmoe_cli.scene.labelled.box_images import BoxScene

    truth = Boxes.from_corners([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    image = BoxScene(None, (truth,))
    rows = [[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [60, 0, 70, 10], [40, 0, 50, 10]]
    scores, labels = torch.tensor([0.9, 0.8, 0.9, 0.9, 0.1]), torch.tensor([0, 0, 1, 0, 0])
    found = Boxes.from_corners(rows, scores=scores, labels=labels)
    assert objects.Judged(image, 0, found).f1 == pytest.approx(2 * 1 / (4 + 3))
    assert objects.Judged(image, 0, truth).f1 == 1
    assert objects.Judged(BoxScene(None, (Boxes.empty(),)), 0, Boxes.empty()).f1 == 1


def test_windows_answer_for_their_own_middle():
    from ringmoe_cli.scene.stitch import Lattice

    lattice = Lattice(96, 160, 64, 32)
    boxes = Boxes.from_corners([[0, 0, 8, 8], [28, 28, 36, 36], [56, 28, 64, 36]])
    assert len(objects.own(boxes, lattice, 0, 0)) == 2
    middle = objects.own(boxes, lattice, 0, 1)
    assert middle.corners().tolist() == [[60, 28, 68, 36]]
    last = objects.own(boxes, lattice, 1, 3)
    assert last.corners().tolist() == [[124, 60, 132, 68], [152, 60, 160, 68]]
    assert Window(0, 32, 64, 64).col == lattice.stride
