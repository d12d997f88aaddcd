"""The simulated scene obeys the statistics it is drawn from."""

import numpy as np
import pytest

from ringmoe_cli.scene.simulate import (
    MS_SCALE,
    SAR_SCALE,
    bayes_posterior,
    shares_of,
    simulate_scene,
    write_scene,
)
from ringmoe_cli.scene.simulated.landcover import smooth_field
from ringmoe_cli.scene.simulated.speckle import (
    draw_scattering,
    multilook_amplitude,
    point_spread,
    quad_pol,
)
from ringmoe_cli.scene.simulated.spectra import BANDS, COVER_OF, COVERS, SURFACES

ALL = np.stack([s.polarimetric_covariance() for s in SURFACES])


@pytest.fixture(scope="module")
def scene():
    return simulate_scene(seed=3, size=(256, 320))


def looks_number(intensity):
    return intensity.mean() ** 2 / intensity.var()


@pytest.mark.parametrize("surface", range(len(SURFACES)), ids=[s.name for s in SURFACES])
def test_uncorrelated_draws_have_the_set_covariance(surface):
    drawn = draw_scattering(
        np.random.default_rng(surface), ALL, np.full((400, 400), surface, np.uint8)
    ).reshape(3, -1)
    covariance = ALL[surface]
    measured = (drawn @ drawn.conj().T) / drawn.shape[1]
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)).real)
    assert np.abs(measured / scale - covariance / scale).max() < 0.02
    pseudo = (drawn @ drawn.T) / drawn.shape[1]  # circular: E[k kᵀ] = 0
    assert np.abs(pseudo / scale).max() < 0.02
    coherence = measured[0, 2] / np.sqrt(measured[0, 0] * measured[2, 2])
    assert abs(coherence - SURFACES[surface].coherence) < 0.02


@pytest.mark.parametrize("surface", [0, 2, 9, 12])
def test_equivalent_numbers_of_looks(surface):
    drawn = quad_pol(
        draw_scattering(np.random.default_rng(5), ALL, np.full((600, 600), surface, np.uint8))
    )
    assert looks_number(np.abs(drawn[0]) ** 2) == pytest.approx(1, abs=0.03)
    # Span of the four channels is that of (HH, √2·HV, VV), whose covariance is C4.
    twice = np.diag([1, np.sqrt(2), 1])
    c4 = twice @ ALL[surface] @ twice
    expected = np.trace(c4).real ** 2 / np.trace(c4 @ c4).real
    span = (np.abs(drawn) ** 2).sum(axis=0)
    assert looks_number(span) == pytest.approx(expected, rel=0.03)
    assert span.mean() == pytest.approx(np.trace(c4).real, rel=0.02)


def test_multilooking_multiplies_the_looks():
    rng = np.random.default_rng(1)
    still = np.zeros((500, 500), np.uint8)
    looks = [draw_scattering(rng, ALL, still)[:1] for _ in range(4)]
    assert looks_number(multilook_amplitude(looks) ** 2) == pytest.approx(4, rel=0.05)


def test_point_spread_keeps_power_and_correlates_neighbours():
    drawn = draw_scattering(np.random.default_rng(2), ALL, np.zeros((500, 500), np.uint8))
    spread = point_spread(drawn, 0.8)
    power = (np.abs(drawn) ** 2).mean(axis=(1, 2))
    assert (np.abs(spread) ** 2).mean(axis=(1, 2)) == pytest.approx(power, rel=0.03)
    hh = spread[0]
    neighbour = np.vdot(hh[:, 1:], hh[:, :-1]) / np.vdot(hh, hh)
    assert neighbour.real == pytest.approx(np.exp(-1 / (4 * 0.8**2)), abs=0.03)
    assert point_spread(drawn, 0) is drawn


def test_smooth_field_has_unit_variance():
    fields = np.stack([smooth_field(np.random.default_rng(i), (96, 128), 3) for i in range(60)])
    assert fields.mean() == pytest.approx(0, abs=0.02)
    assert fields.var() == pytest.approx(1, rel=0.03)
    assert fields[:, :, 1:].shape == (60, 96, 127)
    neighbour = (fields[:, :, 3:] * fields[:, :, :-3]).mean()
    assert neighbour == pytest.approx(np.exp(-(3**2) / (4 * 3**2)), abs=0.03)


def test_same_seed_same_scene(scene):
    again = simulate_scene(seed=3, size=(256, 320))
    for name, value in vars(scene).items():
        assert np.array_equal(value, getattr(again, name)), name
    other = simulate_scene(seed=4, size=(256, 320))
    assert not np.array_equal(scene.ms, other.ms)


def test_scene_is_complete(scene):
    assert scene.opt.shape == (3, 256, 320)
    assert scene.ms.shape == (4, 256, 320)
    assert scene.sar_l1.shape == (4, 256, 320)
    assert scene.sar_l2.shape == (2, 256, 320)
    assert np.array_equal(scene.sar_l1[1], scene.sar_l1[2])  # HV = VH
    assert set(np.unique(simulate_scene(0, 512).labels)) == set(range(len(COVERS)))
    assert 0.02 < scene.changed.mean() < 0.3
    assert (scene.objects >= 0).all()
    assert scene.objects[COVER_OF[scene.surfaces] == 0].max() == 0


def test_surfaces_have_their_reflectance_and_backscatter():
    scene = simulate_scene(seed=1, size=512)
    for index, surface in enumerate(SURFACES):
        here = scene.surfaces == index
        if here.sum() < 4000:
            continue
        log = np.log(scene.ms[:, here] * MS_SCALE)
        expected = np.log(np.array(surface.reflectance) / 100)
        assert np.abs(log.mean(axis=1) - expected).max() < 3 * surface.spread / 2
        db = 10 * np.log10((np.abs(scene.sar_l1[0, here]) ** 2).mean())
        assert db == pytest.approx(surface.backscatter[0], abs=2.5)  # the point spread mixes edges
        amplitude = (scene.sar_l2[0, here] * SAR_SCALE) ** 2
        assert 10 * np.log10(amplitude.mean()) == pytest.approx(surface.backscatter[2], abs=2.5)


def test_buildings_are_where_the_roofs_are(scene):
    roofs = np.isin(scene.surfaces, [i for i, s in enumerate(SURFACES) if s.name == "roof"])
    assert len(scene.buildings) > 5
    y, x = np.mgrid[: roofs.shape[0], : roofs.shape[1]] + 0.5
    for cx, cy, width, height, angle in scene.buildings:
        u = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        v = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        box = (np.abs(u) <= width / 2) & (np.abs(v) <= height / 2)
        assert roofs[box].mean() > 0.75


def test_crop_moves_everything(scene):
    part = scene.crop(40, 60, 128, 200)
    assert np.array_equal(part.ms, scene.ms[:, 40:168, 60:260])
    assert part.origin == (scene.origin[0] + 300, scene.origin[1] - 200)
    assert part.labels.shape == (128, 200)
    assert (part.buildings[:, :2] >= 0).all()
    assert (part.buildings[:, :2] < [200, 128]).all()


def test_bayes_posterior_is_calibrated():
    """Of the pixels given a class with probability p, a share p belongs to it."""
    rng = np.random.default_rng(0)
    surfaces = rng.integers(0, len(SURFACES), 60_000)
    log = np.empty((len(BANDS), surfaces.size))
    for index, surface in enumerate(SURFACES):
        here = surfaces == index
        covariance = surface.covariance() + 0.08**2
        mean = np.log(np.array(surface.reflectance) / 100)
        log[:, here] = rng.multivariate_normal(mean, covariance, here.sum()).T
    posterior = bayes_posterior(
        np.exp(log).astype(np.float32)[:, None], np.full(len(SURFACES), 1 / len(SURFACES))
    )[:, 0]
    assert posterior.sum(axis=0) == pytest.approx(1, abs=1e-5)
    truth = COVER_OF[surfaces]
    for low in np.arange(0.1, 0.9, 0.2):
        k, where = np.nonzero((posterior >= low) & (posterior < low + 0.2))
        assert (truth[where] == k).mean() == pytest.approx(posterior[k, where].mean(), abs=0.02)


def test_classes_overlap_as_in_nature():
    scene = simulate_scene(seed=0, size=512)
    posterior = bayes_posterior(scene.ms * np.float32(MS_SCALE), shares_of(scene.surfaces))
    right = (posterior.argmax(axis=0) == scene.labels).mean()
    assert 0.65 < right < 0.9
    assert posterior.max(axis=0).mean() == pytest.approx(right, abs=0.05)


def test_files_carry_their_meaning(scene, tmp_path):
    import rasterio

    files = write_scene(scene, tmp_path)
    with rasterio.open(files["ms"]) as ms:
        assert ms.descriptions == BANDS
        assert ms.scales == pytest.approx([MS_SCALE] * 4)
        assert ms.crs.to_epsg() == 32632
        assert np.array_equal(ms.read(), scene.ms)
    with rasterio.open(files["sar-l1"]) as slc:
        assert slc.dtypes == ("complex64",) * 4
        assert slc.descriptions == ("HH", "HV", "VH", "VV")
        assert np.array_equal(slc.read(), scene.sar_l1)
    with rasterio.open(files["labels"]) as labels:
        assert labels.colormap(1)[0][:3] == COVERS[0].colour
        assert np.array_equal(labels.read(1), scene.labels)
    first = {name: path.read_bytes() for name, path in files.items()}
    write_scene(scene, tmp_path)
    assert all(path.read_bytes() == first[name] for name, path in files.items())
    assert not list(tmp_path.glob("*.part*"))
