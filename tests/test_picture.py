"""Pictures: the right pixels, the same bytes, no trace of a display."""

import numpy as np
import pytest
from PIL import Image

from ringmoe_cli.scene import picture

COLOURS = [(10, 20, 30), (200, 100, 50)]


def test_quicklook_stretches_between_percentiles():
    values = np.arange(3 * 100 * 100, dtype=np.float32).reshape(3, 100, 100)
    look = picture.quicklook(values)
    assert look.shape == (100, 100, 3)
    assert look[0, 0].tolist() == [0, 0, 0]
    assert look[-1, -1].tolist() == [255, 255, 255]
    assert look[50, 0, 0] == pytest.approx(127, abs=2)


def test_quicklook_leaves_invalid_pixels_out():
    values = np.ones((1, 8, 8), np.float32)
    values[0, :4] = 2
    values[0, 0, 0] = np.nan
    valid = np.ones((8, 8), bool)
    valid[7] = False
    look = picture.quicklook(values, valid)
    assert look[0, 0].tolist() == look[7, 3].tolist() == list(picture.NODATA)
    assert look[1, 1].tolist() == [255, 255, 255]
    assert look[5, 5].tolist() == [0, 0, 0]
    nothing = picture.quicklook(values, np.zeros((8, 8), bool))
    assert (nothing == picture.NODATA).all()


def test_quicklook_of_complex_values_is_power_in_decibels():
    values = np.ones((1, 10, 10), np.complex64) * np.exp(1j * np.arange(10)).astype(np.complex64)
    values[0, 5:] *= 10
    look = picture.quicklook(values)
    assert (look[:5] == 0).all()
    assert (look[5:] == 255).all()


def test_paint_uses_the_legend():
    painted = picture.paint(np.array([[0, 1], [255, 1]]), COLOURS)
    assert painted[0].tolist() == [list(COLOURS[0]), list(COLOURS[1])]
    assert painted[1, 0].tolist() == list(picture.NODATA)


def test_palette_has_different_colours():
    assert len(set(picture.palette_of(20))) == 20


def test_thinned_keeps_small_images():
    small = np.zeros((3, 40, 50))
    assert picture.thinned(small).shape == small.shape
    assert max(picture.thinned(np.zeros((3, 5000, 100))).shape) <= picture.MOST_PIXELS


def test_running_mean_of_a_line_is_the_line():
    line = np.linspace(0, 1, 200)
    assert picture.running_mean(line)[10:-10] == pytest.approx(line[10:-10])


def drawings():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3), np.uint8)
    classes = rng.integers(0, 2, (40, 60))
    rows = [{"step": i, "loss": 1 / i, "opt": 2 / i, "lr": 1e-3} for i in range(1, 50)]
    shares = {
        "collaborative": {m: rng.dirichlet(np.ones(4), 8) for m in ("opt", "ms")},
        "specialised": {"opt": rng.dirichlet(np.ones(4), 8)},
    }
    triple = {"input": image, "truth": picture.paint(classes, COLOURS), "map": image}
    return {
        "triptych": lambda p: picture.save_triptych(p, triple, ["a", "b"], COLOURS, "mIoU 0.5"),
        "curves": lambda p: picture.save_curves(p, rows),
        "reconstructions": lambda p: picture.save_curves(p, rows, {"opt": triple, "ms": triple}),
        "routing": lambda p: picture.save_routing(p, shares),
        "confusion": lambda p: picture.save_confusion(p, np.eye(3) * 7 + 1, ["a", "b", "c"]),
    }


@pytest.mark.parametrize("name", drawings())
def test_pictures_are_whole_and_repeatable(name, tmp_path):
    path, again = tmp_path / "a.png", tmp_path / "b.png"
    drawings()[name](path)
    drawings()[name](again)
    assert path.read_bytes() == again.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
    with Image.open(path) as drawn:
        assert not {"Software", "Creation Time", "date"} & set(drawn.info)
        assert min(drawn.size) > 150
        assert np.asarray(drawn.convert("L")).std() > 5


def test_triptych_shows_the_images(tmp_path):
    red = np.zeros((30, 30, 3), np.uint8)
    red[..., 0] = 255
    picture.save_triptych(tmp_path / "t.png", {"x": red}, ["a"], [(0, 0, 255)])
    pixels = np.asarray(Image.open(tmp_path / "t.png").convert("RGB")).reshape(-1, 3)
    assert (pixels == [255, 0, 0]).all(axis=1).mean() > 0.3
    assert (pixels == [0, 0, 255]).all(axis=1).any()
