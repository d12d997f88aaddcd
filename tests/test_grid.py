"""Windows cover, crops keep their place, and the two directions of a transform agree."""

from math import cos, radians

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS
from rasterio.rpc import RPC
from rasterio.transform import Affine, GCPTransformer, RPCTransformer

from ringmoe_cli.scene.grid import IDENTITY, ControlPoint, Grid, Window

UTM = CRS.from_epsg(32630).to_wkt()
size = st.integers(1, 60)
coefficient = st.floats(-50, 50).filter(lambda v: abs(v) > 0.01)


@given(size, size, st.integers(1, 40), st.data())
def test_windows_cover_every_pixel(height, width, side, data):
    stride = data.draw(st.integers(1, side))
    seen = np.zeros((height, width), int)
    windows = list(Grid(height, width).windows(side, stride))
    for row, col, tall, wide in windows:
        seen[row : row + tall, col : col + wide] += 1
        assert (row % stride, col % stride) == (0, 0)
        assert row < height
        assert col < width
    assert seen.min() >= 1
    assert windows[0][:2] == (0, 0)
    assert len(set(windows)) == len(windows)


@given(size, size, st.integers(1, 40))
def test_without_overlap_every_pixel_is_in_one_window(height, width, side):
    seen = np.zeros((height + side, width + side), int)
    for row, col, tall, wide in Grid(height, width).windows(side):
        seen[row : row + tall, col : col + wide] += 1
    assert (seen[:height, :width] == 1).all()


@given(coefficient, st.floats(-5, 5), coefficient, st.floats(-5, 5), st.integers(-99, 99), size)
def test_rowcol_inverts_xy_and_both_agree_with_affine(a, b, e, d, row, col):
    grid = Grid(10, 10, UTM, (a, b, 500.0, d, e, -70.0))
    if abs(a * e - b * d) < 1e-3:
        return
    x, y = grid.xy(row, col)
    assert (x, y) == pytest.approx(Affine(a, b, 500.0, d, e, -70.0) @ (col, row))
    assert grid.rowcol(x, y) == pytest.approx((row, col), abs=1e-6)


@given(st.integers(-20, 20), st.integers(-20, 20), size, size)
def test_a_crop_keeps_its_place(row, col, height, width):
    grid = Grid(30, 40, UTM, (10.0, 2.0, 5e5, 1.0, -10.0, 6e6))
    part = grid.crop(Window(row, col, height, width))
    assert (part.height, part.width) == (height, width)
    assert part.xy(3, 4) == pytest.approx(grid.xy(row + 3, col + 4))


@given(st.integers(-20, 50), st.integers(-20, 50), size, size)
def test_clip_is_the_part_inside(row, col, height, width):
    inside = np.zeros((200, 200), bool)
    inside[60:90, 60:100] = True
    window = np.zeros_like(inside)
    window[60 + row : 60 + row + height, 60 + col : 60 + col + width] = True
    got = Grid(30, 40).clip(Window(row, col, height, width))
    assert got.height * got.width == (inside & window).sum()


def test_a_degenerate_transform_is_named():
    with pytest.raises(ValueError, match="line"):
        Grid(2, 2, UTM, (1.0, 1.0, 0.0, 1.0, 1.0, 0.0)).rowcol(1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        list(Grid(2, 2).windows(0))


def test_nothing_is_invented_for_a_scene_without_a_place():
    grid = Grid(20, 30)
    assert grid.crop(Window(5, 5, 4, 4)).transform == IDENTITY
    assert grid.gsd is None
    assert not grid.is_placed


@pytest.mark.parametrize(
    ("code", "transform", "expected"),
    [
        (32630, (10.0, 0, 5e5, 0, -10.0, 6e6), 10.0),
        (32630, (0.0, 2.5, 5e5, 2.5, 0.0, 6e6), 2.5),  # rotated by a right angle
        (2227, (3.0, 0, 6e6, 0, -3.0, 2e6), 3 * 0.3048006),  # US survey feet
        (4326, (0.001, 0, 10.0, 0, -0.001, 60.0), 111.32 * (1 + cos(radians(60))) / 2),
    ],
)
def test_ground_sampling_distance_is_in_metres(code, transform, expected):
    grid = Grid(2, 2, CRS.from_epsg(code).to_wkt(), transform)
    assert grid.gsd == pytest.approx(expected, rel=4e-3)


def test_ground_sampling_distance_from_control_points():
    points = tuple(
        ControlPoint(r, c, 5e5 + 7 * c + 1 * r, 6e6 - 7 * r + 1 * c)
        for r in (0, 50, 100)
        for c in (0, 80)
    )
    assert Grid(100, 80, UTM, gcps=points).gsd == pytest.approx(50**0.5, rel=1e-9)


def test_crops_and_resizes_move_control_points():
    from rasterio.control import GroundControlPoint

    points = [(0, 0, 1.0, 2.0), (0, 40, 1.4, 2.1), (30, 0, 1.1, 1.7), (30, 40, 1.5, 1.8)]
    grid = Grid(30, 40, UTM, gcps=tuple(ControlPoint(*p) for p in points))

    def place(g, row, col):
        gcps = [GroundControlPoint(p.row, p.col, p.x, p.y) for p in g.gcps]
        with GCPTransformer(gcps) as t:
            return t.xy(row, col, offset="ul")

    part = grid.crop(Window(10, 4, 5, 5))
    assert place(part, 2, 3) == pytest.approx(place(grid, 12, 7), abs=1e-6)
    half = grid.resized(15, 20)
    assert place(half, 6, 9) == pytest.approx(place(grid, 12, 18), abs=1e-6)


def test_crops_and_resizes_move_rational_polynomials(data_dir):
    import rasterio

    from ringmoe_cli.scene.raster import grid_of, open_raster

    with open_raster(str(data_dir / "09_height/s2p_pleiades_height/img_02.tif")) as source:
        grid = grid_of(source)
    assert grid.rpcs is not None

    def place(g, row, col):
        with RPCTransformer(RPC.from_gdal(g.rpcs)) as t:
            return t.xy(row, col, offset="ul")

    with rasterio.Env():
        part = grid.crop(Window(100, 50, 64, 64))
        assert place(part, 10, 20) == pytest.approx(place(grid, 110, 70), abs=1e-9)
        half = grid.resized(grid.height // 2, grid.width // 2)
        assert place(half, 10, 20) == pytest.approx(place(grid, 20, 40), abs=1e-7)
