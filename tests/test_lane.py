"""The way to a device and back; on a GPU with bfloat16 and two batches in flight."""
# ruff: noqa: F401, F811 - fixtures are imported

import numpy as np
import pytest
import rasterio
import torch
from mapping import Brightness, model, normalised, scene, whole, write_scene

from model.batch import Batch
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.jobs.lane import Fetched, Lane
from ringmoe_cli.jobs.maps import load_mapper
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.jobs.ways import Ways


def test_on_a_cpu_nothing_is_copied_or_rounded():
    lane, batch = Lane("cpu"), Batch(images={"ms": torch.ones(1, 1, 4, 8, 8)})
    assert lane.send(batch) is batch
    dense = torch.randn(2, 3, 4, 4)
    with lane.precision():
        assert (dense @ dense).dtype == torch.float32
    assert Fetched(dense).numpy().ctypes.data == dense.data_ptr()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")  # the compiler has many of its own
def test_a_compiled_model_makes_the_same_map(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 64, 64, hole=False)
    maps = []
    for compiled in (False, True):
        wish = Wish(output=tmp_path / f"{compiled}.tif")
        load_mapper(model, wish, "cpu", ways=Ways(compiled=compiled)).map_scene(str(path))
        maps.append(rasterio.open(wish.output).read(1))
    assert (maps[0] == maps[1]).mean() > 0.999


def test_a_streamed_model_is_not_compiled(model):
    with pytest.raises(RingmoeError, match="--compile"):
        load_mapper(model, Wish(), "cpu", ways=Ways(streamed=True, compiled=True))


@pytest.mark.gpu
def test_answers_come_back_in_order_from_a_gpu(tmp_path):
    path = write_scene(tmp_path / "s.tif", 300, 400, hole=False)
    here, valid = whole(Brightness(), normalised(path))
    there, same = whole(Brightness(), normalised(path), device="cuda")
    np.testing.assert_array_equal(valid, same)
    np.testing.assert_allclose(there, here, atol=1e-5)


@pytest.mark.gpu
def test_a_gpu_makes_nearly_the_same_map_in_bfloat16(model, tmp_path):
    path = write_scene(tmp_path / "s.tif", 300, 400, hole=False)
    maps = []
    for device in ("cpu", "cuda"):
        wish = Wish(output=tmp_path / f"{device}.tif")
        load_mapper(model, wish, device).map_scene(str(path))
        maps.append(rasterio.open(wish.output).read(1))
    assert (maps[0] == maps[1]).mean() > 0.97
