"""Labelled folders: layouts, label codes, windows, splits; what is wrong is said by name."""

import numpy as np
import pytest
from PIL import Image

from model.batch import Batch
from ringmoe_cli.errors import LabelError
from ringmoe_cli.jobs.taskdata import DataRequest, open_task_data
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labelled.examples import LabelledWindows, Place, turned
from ringmoe_cli.scene.labelled.folder_images import FolderImage, Images, measure
from ringmoe_cli.scene.labelled.folders import find_examples, from_csv
from ringmoe_cli.scene.labelled.labelcode import ClassList, LabelCode
from ringmoe_cli.scene.labelled.splits import split_by_block, split_by_image, tiled


def image(path, side=32, value=None, size=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size or (side, side)
    shape = (*shape, 3) if mode == "RGB" else shape
    rng = np.random.default_rng(abs(hash(path.name)) % 1000)
    pixels = rng.integers(1, 255, shape) if value is None else np.broadcast_to(value, shape)
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(path)
    return path


def class_folders(root, classes=("field", "town"), count=5):
    for c in classes:
        for i in range(count):
            image(root / c / f"{c}_{i}.png")
    return root


def test_class_folders_are_classes(tmp_path):
    examples, classes = find_examples(class_folders(tmp_path), "classification")
    assert classes == ("field", "town")
    assert [e.label for e in examples] == [0] * 5 + [1] * 5


def test_split_folders_are_splits_with_one_class_list(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test", classes=("town",))
    examples, classes = find_examples(tmp_path, "classification")
    assert classes == ("field", "town")
    assert {(e.split, e.label) for e in examples} == {("train", 0), ("train", 1), ("test", 1)}


def test_a_csv_lists_images_and_classes(tmp_path):
    image(tmp_path / "x/a.png"), image(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text("file,class,split\nx/a.png,town,train\nb.png,field,val\n")
    examples, classes = from_csv(tmp_path / "list.csv")
    assert [(e.label, e.split) for e in examples] == [(1, "train"), (0, "val")]
    assert classes == ("field", "town")
    (tmp_path / "list.csv").write_text("x/a.png,town\nmissing.png,field\n")
    with pytest.raises(LabelError, match=r"entry 2: missing.png is not a file"):
        from_csv(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("task", "folders"),
    [
        ("segmentation", ("images", "masks")),
        ("segmentation", ("image", "label")),
        ("change", ("A", "B", "label")),
        ("depth", ("rgb", "dsm")),
    ],
)
def test_images_and_labels_meet_by_name(tmp_path, task, folders):
    for split in ("train", "val"):
        for folder in folders:
            for name in ("tile_1", "tile_02"):
                image(tmp_path / split / folder / f"{name}.png")
    examples, _ = find_examples(tmp_path, task)
    assert [(e.name, e.split) for e in examples] == [
        ("tile_1", "train"), ("tile_2", "train"), ("tile_1", "val"), ("tile_2", "val"),
    ]  # fmt: skip
    dates = next(iter(examples[0].images.values()))
    assert len(dates) == (2 if task == "change" else 1)
    assert examples[0].label.parent.name == folders[-1]


def test_an_image_without_label_is_named(tmp_path):
    image(tmp_path / "images/a.png"), image(tmp_path / "images/b.png")
    image(tmp_path / "masks/a.png")
    with pytest.raises(LabelError, match=r"images/b.png has no label of the same name"):
        find_examples(tmp_path, "segmentation")


def test_a_folder_of_something_else_says_what_is_expected(tmp_path):
    with pytest.raises(LabelError, match=r"expected images/<id>, masks/<id>"):
        find_examples(tmp_path, "segmentation")


class Drawn:
    """An image whose first channel is its row, second its column; labelled where told."""

    def __init__(self, height, width, labelled=None, name="drawn"):
        self.name, self.grid, self.gsd = name, Grid(height, width), {}
        self.channels = {"opt": ("red", "green", "blue")}
        self.mask = np.ones((height, width), bool) if labelled is None else labelled

    def read(self, window):
        rows, cols = np.mgrid[: window.height, : window.width]
        rows, cols = rows + window.row, cols + window.col
        valid = (rows < self.grid.height) & (cols < self.grid.width) & (rows >= 0) & (cols >= 0)
        values = np.stack([rows, cols, rows * 0]).astype(np.float32)
        return {"opt": [(values, valid)]}

    def label(self, window):
        values, valid = self.read(window)["opt"][0]
        out = np.full(valid.shape, 255, np.int64)
        rows, cols = values[:2].astype(int)
        out[valid] = np.where(self.mask[rows[valid], cols[valid]], (rows + cols)[valid] % 2, 255)
        return out


def plain(windows):
    from model.normalisation import Normalisation

    windows.normalisation = {"opt": Normalisation(("r", "g", "b"), (0.0,) * 3, (1.0,) * 3)}
    return windows


def test_image_and_label_are_moved_and_turned_together():
    item = Drawn(100, 90)
    windows = plain(LabelledWindows([item], tiled(0, item, 32), 32))
    seen = set()
    stream = windows.training(4, seed=3)
    for _ in range(6):
        batch = next(stream)
        rows, cols, _ = batch.images["opt"][:, 0].unbind(1)
        valid = batch.valid["opt"][:, 0, 0] if batch.valid else rows >= 0
        expected = (rows + cols) % 2
        assert (batch.targets["classes"][valid] == expected[valid].long()).all()
        seen |= {tuple(np.sign([float(r[1, 0] - r[0, 0]), float(r[0, 1] - r[0, 0])])) for r in rows}
    assert len(seen) >= 4  # turned in several ways


def test_radar_amplitudes_are_moved_and_given_other_gains_but_never_turned():
    from model.normalisation import Normalisation

    item = Drawn(100, 90)
    item.channels = {"sar-l2": ("red", "green", "blue")}
    item.read = lambda window: {"sar-l2": Drawn.read(item, window)["opt"]}
    item.label = lambda window: np.ones((32, 32), np.int64)
    places = [Place(0, Window(80, 70, 32, 32)), *tiled(0, Drawn(100, 90), 32)[:3]]
    windows = LabelledWindows([item], places, 32)
    windows.normalisation = {"sar-l2": Normalisation(("r", "g", "b"), (0.0,) * 3, (1.0,) * 3)}
    batch = next(windows.training(16, seed=3))
    rows, cols, _ = batch.images["sar-l2"][:, 0].unbind(1)
    assert (rows[:, 1, 0] > rows[:, 0, 0]).all()
    assert (cols[:, 0, 1] > cols[:, 0, 0]).all()
    steps = rows[:, 1, 0] - rows[:, 0, 0]
    assert 0.02 < steps.std() < 0.3  # at another gain each, only in training
    at_edge = windows.batch(places[:1], [0], [(1.2, 5.0)])
    void = ~at_edge.valid["sar-l2"].expand(-1, -1, 3, -1, -1)
    assert (at_edge.images["sar-l2"][void] == 0).all()
    assert at_edge.images["sar-l2"][0, 0, 0, 0, 0] == pytest.approx(80 * 1.2 + 5)
    rows = next(windows.once(4)).images["sar-l2"][1, 0, 0]
    assert rows[1, 0] - rows[0, 0] == 1


def test_a_mask_with_a_palette_is_read_by_its_colours(tmp_path):
    image(tmp_path / "images/a.png", 8)
    mask = Image.new("P", (8, 8), 1)
    mask.putpalette([200, 200, 200, 10, 20, 30, 90, 0, 0])
    mask.paste(2, (0, 0, 4, 8))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/a.png")
    examples, _ = find_examples(tmp_path, "segmentation")
    code = LabelCode(colours={(90, 0, 0): 0, (10, 20, 30): 1})
    item = FolderImage(examples[0], Images("opt"), ClassList(("house", "lawn"), (), code))
    label = item.label(Window(0, 0, 8, 8))
    assert (label[:, :4] == 0).all()
    assert (label[:, 4:] == 1).all()


def test_training_batches_are_a_function_of_seed_and_number():
    item = Drawn(100, 90)
    windows = plain(LabelledWindows([item], tiled(0, item, 32), 32))
    stream = windows.training(4, seed=1)
    for _ in range(5):
        wanted = next(stream)
    again = next(windows.training(4, seed=1, start=4))
    assert again.keys == wanted.keys
    assert (again.images["opt"] == wanted.images["opt"]).all()
    halves = [next(windows.training(2, 1, 4, rank, 2)) for rank in range(2)]
    assert halves[0].keys + halves[1].keys == wanted.keys
    assert next(windows.training(4, seed=2, start=4)).keys != wanted.keys


def test_an_epoch_visits_every_window():
    item = Drawn(128, 128)
    windows = LabelledWindows([item], tiled(0, item, 32), 32)
    order = [np.random.default_rng((0, e)).permutation(16).tolist() for e in range(2)]
    assert sorted(order[0]) == list(range(16))
    assert order[0] != order[1]
    assert len(windows.places) == 16


def test_scoring_counts_every_labelled_pixel_once():
    item = Drawn(70, 50)
    windows = plain(LabelledWindows([item], tiled(0, item, 32), 32))
    known = sum(int((b.targets["classes"] != 255).sum()) for b in windows.once(4))
    assert known == 70 * 50


def test_windows_without_labels_are_left_out():
    mask = np.zeros((96, 96), bool)
    mask[40, 40] = True
    assert [p.window[:2] for p in tiled(0, Drawn(96, 96, mask), 32)] == [(32, 32)]
    item = Drawn(96, 96, np.zeros((96, 96), bool))
    with pytest.raises(LabelError, match="no labelled pixels in this split"):
        LabelledWindows([item], tiled(0, item, 32), 32)


@pytest.mark.parametrize("side", [130, 300])
def test_no_training_window_touches_a_held_out_pixel(side):
    items = [Drawn(side, side + 40, name=n) for n in ("a", "b")]
    split = split_by_block(items, 32, 0.2, seed=0)
    held = [np.zeros((side, side + 40), bool) for _ in items]
    for place in split.held_out.places:
        r, c, h, w = place.window
        held[place.item][r : r + h, c : c + w] = True
    drawn = [split.training.draw(0, n)[0] for n in range(300)] + split.training.places
    for place in drawn:
        r, c, h, w = place.window
        assert not held[place.item][r : r + h, c : c + w].any()
    share = np.mean([h.mean() for h in held])
    assert 0.05 < share < 0.4
    moved = [p for p in drawn[:300] if p.window.row % 32 or p.window.col % 32]
    assert len(moved) > 150  # random positions, not the lattice only


def test_sensors_and_dates_of_one_place_hold_out_the_same_ground():
    place = Grid(300, 300, "EPSG:32632", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    items = [Drawn(300, 300, name=n) for n in ("ms", "ms+sar", "later")]
    for item in items:
        item.grid = place
    split = split_by_block(items, 32, 0.2, seed=0)
    held = [{p.window for p in split.held_out.places if p.item == i} for i in range(3)]
    assert held[0] == held[1] == held[2]
    elsewhere = Drawn(300, 300, name="ms")
    elsewhere.grid = Grid(300, 300, "EPSG:32632", (10.0, 0.0, 6e5, 0.0, -10.0, 5e6))
    other = split_by_block([elsewhere], 32, 0.2, seed=0)
    assert {p.window for p in other.held_out.places} != held[0]


def test_a_scene_too_small_to_divide_says_so():
    with pytest.raises(LabelError, match="too small to hold out a part"):
        split_by_block([Drawn(30, 30)], 32, 0.2, seed=0)


def test_images_are_held_out_whole_and_by_class(tmp_path):
    examples, classes = find_examples(class_folders(tmp_path, count=10), "classification")
    images = Images()
    items = [FolderImage(e, images, ClassList(classes)) for e in examples]
    split = split_by_image(items, 32, 0.2, seed=0, whole=True)
    held = [items[p.item].example.label for p in split.held_out.places]
    assert sorted(held) == [0, 0, 1, 1]
    assert not {p.item for p in split.held_out.places} & {p.item for p in split.training.places}


def test_statistics_are_those_of_the_pixels(tmp_path):
    for i in range(4):
        image(tmp_path / f"images/{i}.png", 40)
        image(tmp_path / f"masks/{i}.png", 40, value=1, mode="L")
    examples, _ = find_examples(tmp_path, "segmentation")
    images = Images()
    items = [FolderImage(e, images, ClassList(("a", "b"))) for e in examples]
    found = measure(items)["opt"]
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"images/{i}.png")) for i in range(4)])
    np.testing.assert_allclose(found.mean, pixels.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.std, pixels.std((0, 1, 2)), rtol=1e-5)


def test_mismatched_sizes_are_named(tmp_path):
    image(tmp_path / "A/x.png", 64), image(tmp_path / "B/x.png", 60)
    image(tmp_path / "label/x.png", 64, mode="L")
    examples, _ = find_examples(tmp_path, "change")
    item = FolderImage(examples[0], Images(), ClassList(("no", "yes")))
    with pytest.raises(LabelError, match=r"B/x.png has 60 x 60 pixels, but its image has 64 x 64"):
        item.read(Window(0, 0, 32, 32))
    image(tmp_path / "images/y.png", 64), image(tmp_path / "masks/y.png", 30, 1, mode="L")
    examples, _ = find_examples(tmp_path, "segmentation")
    item = FolderImage(examples[0], Images(), ClassList(("no", "yes")))
    with pytest.raises(LabelError, match=r"masks/y.png has 30 x 30 pixels"):
        item.label(Window(0, 0, 32, 32))


def test_a_folder_becomes_training_and_held_out_batches(tmp_path):
    for i in range(6):
        image(tmp_path / f"images/{i}.png", size=(40, 70))
        image(tmp_path / f"masks/{i}.png", size=(40, 70), value=i % 2, mode="L")
    data = open_task_data(DataRequest([tmp_path], "segmentation", 32, classes="bare,green"))
    data.training.normalisation = data.held_out.normalisation = data.measure()
    batch = next(data.training.training(4, 0))
    assert isinstance(batch, Batch)
    assert batch.images["opt"].shape == (4, 1, 3, 32, 32)
    assert data.classes == ("bare", "green")
    with pytest.raises(LabelError, match="does not say its classes"):
        open_task_data(DataRequest([tmp_path], "segmentation", 32))
    with pytest.raises(LabelError, match="nowhere does not exist"):
        open_task_data(DataRequest([tmp_path / "nowhere"], "segmentation", 32))


def test_a_val_folder_is_held_out_and_a_test_folder_is_not_seen(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 4)):
        for i in range(count):
            image(tmp_path / split / f"images/{split}{i}.png")
            image(tmp_path / split / f"masks/{split}{i}.png", value=1, mode="L")
    data = open_task_data(DataRequest([tmp_path], "segmentation", 32, classes="a,b"))
    assert len(data.training.places) == 3
    assert len(data.held_out.places) == 2


@pytest.mark.parametrize("k", range(8))
def test_turns_are_the_symmetries_of_the_square(k):
    x = np.arange(12).reshape(1, 3, 4)
    seen = turned(x, k)
    assert sorted(seen.ravel()) == list(range(12))
    assert len({turned(np.arange(9).reshape(3, 3), j).tobytes() for j in range(8)}) == 8
    assert Place(0, Window(0, 0, 1, 1)).item == 0


def test_a_list_of_names_says_what_is_held_out(tmp_path):
    for i in range(4):
        image(tmp_path / f"images/tile_{i}.png")
        image(tmp_path / f"masks/tile_{i}.png", value=1, mode="L")
    (tmp_path / "val.txt").write_text("tile_2.png\ntile_3\n")
    request = DataRequest(
        [tmp_path], "segmentation", 32, classes="a,b", validation=tmp_path / "val.txt"
    )
    data = open_task_data(request)
    held = {data.held_out.items[p.item].name for p in data.held_out.places}
    assert held == {"tile_2", "tile_3"}
    (tmp_path / "val.txt").write_text("tile_9\n")
    with pytest.raises(LabelError, match=r"val.txt names tile_9, which is not among the images"):
        open_task_data(request)


def test_a_class_folder_of_the_held_out_data_is_matched_by_name(tmp_path):
    class_folders(tmp_path / "a", classes=("field", "sea", "town"))
    class_folders(tmp_path / "b", classes=("town",), count=2)
    request = DataRequest([tmp_path / "a"], "classification", 32, validation=tmp_path / "b")
    held = open_task_data(request).held_out
    assert [held.items[p.item].example.label for p in held.places] == [2, 2]
    class_folders(tmp_path / "b", classes=("moon",), count=2)
    with pytest.raises(LabelError, match="class 'moon' is not among field, sea, town"):
        open_task_data(request)


def test_complex_images_are_mirrored_with_their_cross_polarisation_and_never_resized():
    from model.normalisation import Normalisation

    class Matrix(Drawn):
        def __init__(self, side):
            super().__init__(side, side)
            self.channels = {"sar-l1": ("t11", "t13_re", "t22")}

        def read(self, window):
            return {"sar-l1": super().read(window)["opt"]}

        def label(self, window):
            return np.zeros((window.height, window.width), np.int64)

    item = Matrix(32)
    whole = Place(0, Window(0, 0, 32, 32))
    windows = LabelledWindows([item], [whole], 32)
    names = ("t11", "t13_re", "t22")
    windows.normalisation = {"sar-l1": Normalisation(names, (0.0,) * 3, (1.0,) * 3)}
    plain_, mirrored, quarter = (
        windows.batch([whole], [k]).images["sar-l1"][0, 0] for k in (0, 4, 1)
    )
    assert (mirrored[0] == plain_[0].flip(-1)).all()
    assert (mirrored[1] == -plain_[1].flip(-1)).all()
    assert (quarter == plain_).all()  # no quarter turns
    small = LabelledWindows([item], [whole], 16)
    small.normalisation = windows.normalisation
    with pytest.raises(LabelError, match=r"cannot be resized to 16; use --set task\.window=32"):
        small.batch([whole])


def test_an_empty_class_folder_is_no_class_and_said_so(tmp_path, capsys):
    class_folders(tmp_path)
    (tmp_path / "desert").mkdir()
    _, classes = find_examples(tmp_path, "classification")
    assert classes == ("field", "town")
    assert "no images in desert; not a class here" in capsys.readouterr().err
