"""Chips are pure functions of their number, and mean what the scene means."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasters import noise, write_raster

from ringmoe_cli.errors import StoreError
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.loader import grid_batches, mix, pretraining_batches, store_normalisation
from ringmoe_cli.scene.radiometry import span_db
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store.augment import Turn, mirror_signs, resized, turned
from ringmoe_cli.scene.store.chips import ChipDataset
from ringmoe_cli.scene.tiles import open_store
from ringmoe_cli.scene.tiling import Labelled, Settings, tile_scenes

WEIGHTS = {"opt": 0.7, "ms": 0.2, "sar-l1": 0.05, "sar-l2": 0.05}
SIDE = 32
POLARISATIONS = ("HH", "HV", "VH", "VV")


def echo(bands, height, width, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(2, bands, height, width))
    return (parts[0] + 1j * parts[1]).astype(np.complex64)


def write_scenes(folder):
    """One scene per modality; the multi-spectral one has a large hole."""
    ms = noise(4, 150, 170)
    ms[:, :60, :60] = 0
    amplitude = noise(2, 140, 140)
    amplitude[:, :, 100:] = 0
    return {
        "opt": write_raster(folder / "opt.tif", noise(3, 130, 140, "uint8"), photometric="RGB"),
        "ms": write_raster(
            folder / "ms.tif", ms, names=("blue", "green", "red", "nir"), nodata=0,
            scales=(1e-4,) * 4, offsets=(-0.1,) * 4,
        ),
        "sar-l1": write_raster(folder / "l1.tif", echo(4, 128, 128), names=POLARISATIONS),
        "sar-l2": write_raster(folder / "l2.tif", amplitude, names=("VV", "VH")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    paths = write_scenes(folder)
    labelled = [Labelled(open_scene(p)) for p in paths.values()]
    tile_scenes(labelled, folder / "t.zarr", Settings(tile=64, min_valid=0.5))
    return paths, open_store(folder / "t.zarr")


@pytest.fixture(scope="module")
def norms(tiled):
    return store_normalisation([tiled[1]])


def batches(tiled, norms, count=3, **changes):
    about = {"size": SIDE, "batch_size": 16, "weights": WEIGHTS, "seed": 5, **changes}
    return list(islice(pretraining_batches([tiled[1]], norms, **about), count))


def same(first, second):
    assert first.keys == second.keys
    for part in ("images", "valid", "channels"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert ours.keys() == theirs.keys()
        for m in ours:
            assert torch.equal(ours[m], theirs[m])


def test_a_batch_has_every_modality_normalised(tiled, norms):
    drawn = batches(tiled, norms, 8)
    shapes = {m: tuple(x.shape) for m, x in drawn[0].images.items()}
    assert shapes == {
        "opt": (11, 1, 3, SIDE, SIDE),
        "ms": (3, 1, 4, SIDE, SIDE),
        "sar-l1": (1, 1, 8, SIDE, SIDE),
        "sar-l2": (1, 1, 3, SIDE, SIDE),
    }
    for m in WEIGHTS:
        x = torch.cat([b.images[m] for b in drawn])
        assert abs(float(x.mean())) < 0.2
        assert 0.8 < float(x.std()) < 1.2
    assert len(drawn[0].keys) == 16


@pytest.mark.parametrize("modality", list(WEIGHTS))
def test_loader_and_reader_give_the_same_numbers(tiled, norms, modality):
    """What normalises training chips normalises prediction windows."""
    paths, store = tiled
    data = ChipDataset(store.scenes_of(modality), norms[modality], SIDE, augment=False)
    with SceneReader(open_scene(paths[modality])) as reader:
        for i in range(6):
            chip = data.sample(i)
            _, row, col = chip.key.split(":")
            values, valid = reader.physical(Window(int(row), int(col), SIDE, SIDE))
            want = norms[modality].apply(values, valid[None])
            np.testing.assert_array_equal(chip.values.numpy(), want)
            np.testing.assert_array_equal(chip.valid[0].numpy(), valid)


def test_statistics_normalise_the_whole_scene(tiled, norms):
    paths, _ = tiled
    for modality, norm in norms.items():
        with SceneReader(scene := open_scene(paths[modality])) as reader:
            values, valid = reader.physical(Window(0, 0, scene.grid.height, scene.grid.width))
        x = norm.apply(values, valid[None])[:, valid].astype(float)
        if modality == "sar-l1":
            assert norm.mean == (0.0,) * 8
            assert len(set(norm.std)) == 1
            assert np.sqrt((x**2).mean()) == pytest.approx(1, rel=1e-5)
            power = span_db(values, scene)[valid].astype(float)
            assert norm.power_db == pytest.approx((power.mean(), power.std()), rel=1e-5)
        else:
            np.testing.assert_allclose(x.mean(1), 0, atol=1e-5)
            np.testing.assert_allclose(x.std(1), 1, atol=1e-5)


def test_a_run_resumes_at_any_step(tiled, norms):
    whole = batches(tiled, norms, 5)
    for ours, theirs in zip(batches(tiled, norms, 2, start_step=3), whole[3:], strict=True):
        same(ours, theirs)
    assert batches(tiled, norms, 1, seed=6)[0].keys != whole[0].keys


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_divide_the_same_batch(tiled, norms, world):
    whole = batches(tiled, norms, 2)
    parts = [batches(tiled, norms, 2, rank=r, world=world) for r in range(world)]
    for step in range(2):
        keys = sorted(k for p in parts for k in p[step].keys)
        assert keys == sorted(whole[step].keys)
        for m, images in whole[step].images.items():
            pieces = torch.cat([p[step].images[m] for p in parts if m in p[step].images])
            assert torch.equal(
                pieces.sum((1, 2, 3, 4)).sort()[0], images.sum((1, 2, 3, 4)).sort()[0]
            )
        assert max(len(p[step].keys) for p in parts) - min(len(p[step].keys) for p in parts) <= 1


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_workers_give_the_same_batches(tiled, norms):
    for ours, theirs in zip(
        batches(tiled, norms, 4, workers=2), batches(tiled, norms, 4), strict=True
    ):
        same(ours, theirs)


def test_an_epoch_visits_every_place_once(tiled, norms):
    data = ChipDataset(tiled[1].scenes_of("opt"), norms["opt"], SIDE, augment=False)
    keys = [data.sample(i).key for i in range(len(data))]
    assert len(data) == 5 * 5
    assert len(set(keys)) > 0.9 * len(keys)
    again = [data.sample(len(data) + i).key for i in range(len(data))]
    assert again != keys


def test_a_grid_visits_every_window_as_it_is(tiled, norms):
    paths, store = tiled
    drawn = list(grid_batches([store], norms, size=SIDE, batch_size=7))
    keys = [k for b in drawn for k in b.keys]
    assert len(set(keys)) == len(keys)
    assert [k for k in keys if k.startswith("opt:")] == [
        f"opt:{r}:{c}" for r in range(0, 130, SIDE) for c in range(0, 140, SIDE)
    ]
    with SceneReader(open_scene(paths["opt"])) as reader:
        values, valid = reader.physical(Window(0, 128, SIDE, SIDE))
    want = norms["opt"].apply(values, valid[None])
    np.testing.assert_array_equal(drawn[0].images["opt"][4, 0], want)
    assert not any(k == "sar-l2:0:128" for k in keys)


def test_empty_places_and_dark_amplitude_chips_are_left_out(tiled, norms):
    store = tiled[1]
    for modality, least in (("ms", 0.5), ("sar-l2", 0.85)):
        data = ChipDataset(store.scenes_of(modality), norms[modality], SIDE)
        shares = [float(data.sample(i).valid.float().mean()) for i in range(2 * len(data))]
        assert all(s >= least or s == 0 for s in shares)
        assert np.mean([s == 0 for s in shares]) < 0.1
    with_zeros = ChipDataset(store.scenes_of("sar-l2"), norms["sar-l2"], SIDE)
    assert with_zeros.accepts(0, 0.86)
    assert not with_zeros.accepts(0, 0.85)


def test_a_scene_without_enough_valid_pixels_is_named(tmp_path, norms):
    dark = np.zeros((3, 64, 64), np.uint8)
    path = write_raster(tmp_path / "dark.tif", dark, photometric="RGB", nodata=0)
    store = tile_scenes([Labelled(open_scene(path))], tmp_path / "t.zarr", Settings(tile=32))
    assert store.scenes[0].valid_fractions.max() == 0
    with pytest.raises(StoreError, match="dark: no 32-pixel window"):
        ChipDataset(store.scenes, norms["opt"], SIDE)


def test_a_scene_smaller_than_a_chip_is_padded(tmp_path, norms):
    path = write_raster(tmp_path / "s.tif", noise(3, 10, 90, "uint8"), photometric="RGB")
    store = tile_scenes([Labelled(open_scene(path))], tmp_path / "t.zarr", Settings(tile=32))
    chip = ChipDataset(store.scenes, norms["opt"], SIDE, augment=False).sample(0)
    assert chip.valid.sum() == 10 * SIDE
    assert not chip.values[:, 10:].any()


def test_missing_polarisations_are_marked(tmp_path, norms):
    path = write_raster(tmp_path / "d.tif", echo(2, 64, 64), names=("VV", "VH"))
    store = tile_scenes([Labelled(open_scene(path))], tmp_path / "d.zarr", Settings(tile=32))
    norm = store_normalisation([store])
    assert norm["sar-l1"].std[0] == pytest.approx(1, rel=0.05)  # the zeros do not count
    (batch,) = islice(
        pretraining_batches([store], norm, size=SIDE, batch_size=2, weights=WEIGHTS), 1
    )
    want = torch.tensor([False] * 4 + [True] * 4)
    assert torch.equal(batch.channels["sar-l1"], want.expand(2, 8))


def test_bands_are_chosen_by_name(tiled):
    norm = store_normalisation([tiled[1]], {"ms": ("nir", "red")})
    assert norm["ms"].bands == ("nir", "red")
    chip = ChipDataset(tiled[1].scenes_of("ms"), norm["ms"], SIDE).sample(0)
    assert chip.values.shape == (2, SIDE, SIDE)
    with pytest.raises(StoreError, match="lacks swir16"):
        store_normalisation([tiled[1]], {"ms": ("swir16",)})


def test_counts_and_reflectances_are_not_averaged(tiled, tmp_path):
    path = write_raster(tmp_path / "c.tif", noise(4, 64, 64), names=("b", "g", "r", "n"))
    other = tile_scenes([Labelled(open_scene(path))], tmp_path / "c.zarr", Settings(tile=32))
    with pytest.raises(StoreError, match="c holds plain counts and ms reflectances"):
        store_normalisation([tiled[1], other])


@given(
    st.integers(1, 200),
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 5), min_size=1),
)
def test_the_mix_is_the_nearest_whole_numbers(batch, weights):
    shares = mix(batch, weights)
    assert sum(shares.values()) == batch
    assert min(shares.values()) >= 1
    total = sum(weights.values())
    if batch >= len(weights):
        assert set(shares) == set(weights)
    if all(batch * w / total >= 1 for w in weights.values()):
        assert all(abs(shares[m] - batch * w / total) < 1 for m, w in weights.items())


def test_the_papers_mix():
    assert mix(64, WEIGHTS) == {"opt": 45, "ms": 13, "sar-l1": 3, "sar-l2": 3}
    assert mix(4, WEIGHTS) == {"opt": 1, "ms": 1, "sar-l1": 1, "sar-l2": 1}


def scattering(channels):
    """Complex bands of interleaved channels."""
    return channels[0::2] + 1j * channels[1::2]


L1 = tuple(f"{p}_{part}" for p in ("hh", "hv", "vh", "vv") for part in ("re", "im"))


@pytest.mark.parametrize("turn", [Turn(True), Turn(False, True), Turn(True, True), Turn(phase=1.1)])
def test_polarimetric_chips_keep_their_power_and_change_as_physics_says(turn):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 6, 7)).astype(np.float32)
    valid = rng.random((6, 7)) < 0.8
    got, got_valid = turned((values, valid), turn, L1)
    mirrored = values[..., ::-1] if turn.left_right else values
    mirrored = mirrored[..., ::-1, :] if turn.up_down else mirrored
    sign = -1 if turn.left_right != turn.up_down else 1
    want = scattering(mirrored) * np.exp(1j * turn.phase)
    want[1:3] *= sign
    np.testing.assert_allclose(scattering(got), want, atol=1e-5)
    power = np.square(mirrored).sum(0)
    np.testing.assert_allclose(np.square(got).sum(0), power, rtol=1e-5)
    assert got_valid.sum() == valid.sum()


def test_mirror_signs_of_matrices_follow_from_the_scattering_vector():
    """T3 = k k^H of k = (HH+VV, HH-VV, 2HV)/√2; C3 of (HH, √2 HV, VV). HV changes sign."""
    hh, hv, vv = (complex(*np.random.default_rng(i).normal(size=2)) for i in range(3))

    def elements(letter, s):
        k = [hh + vv, hh - vv, 2 * s * hv] if letter == "t" else [hh, 2**0.5 * s * hv, vv]
        m = np.outer(k, np.conj(k))
        upper = [(0, 1), (0, 2), (1, 2)]
        named = {f"{letter}{i + 1}{i + 1}": m[i, i].real for i in range(3)}
        for i, j in upper:
            named[f"{letter}{i + 1}{j + 1}_re"] = m[i, j].real
            named[f"{letter}{i + 1}{j + 1}_im"] = m[i, j].imag
        return named

    for letter in "tc":
        plain, mirrored = elements(letter, 1), elements(letter, -1)
        names = tuple(plain)
        ratio = [mirrored[n] / plain[n] for n in names]
        np.testing.assert_allclose(ratio, mirror_signs(names))


def test_enlarged_crops_are_optical_only(tiled, norms):
    store = tiled[1]
    data = ChipDataset(store.scenes_of("opt"), norms["opt"], SIDE, resize=(0.2, 0.5))
    assert data.sample(0).values.shape == (3, SIDE, SIDE)
    sides = [data.crop_side(np.random.default_rng(i)) for i in range(50)]
    assert min(sides) >= 0.43 * SIDE
    assert max(sides) <= 0.71 * SIDE
    with pytest.raises(ValueError, match="never resized"):
        ChipDataset(store.scenes_of("sar-l1"), norms["sar-l1"], SIDE, resize=(0.2, 0.5))


def test_enlarging_spreads_no_invalid_pixel():
    values = np.ones((2, 10, 10), np.float32)
    valid = np.ones((10, 10), bool)
    values[:, 3, 3], valid[3, 3] = 1e6, False
    fine, kept = resized((values, valid), 32)
    np.testing.assert_allclose(fine[:, kept], 1)
    assert 0 < (~kept).sum() < 100


def test_no_scene_of_a_wanted_modality_is_said(tiled, norms):
    with pytest.raises(StoreError, match="no scene of none"):
        batches(tiled, norms, weights={"none": 1.0})
