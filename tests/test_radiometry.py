"""Numbers become physical in one place; here is each rule, written out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.scene.radiometry import calibrate, span_db, to_physical, valid_pixels
from ringmoe_cli.scene.scene import Band, Calibration, Scene
from ringmoe_cli.scene.store.statistics import Moments, channel_keys, region_moments


def scene(names, quantity, modality, dtype="float32", **band):
    bands = tuple(Band(n, "file", i + 1, **band) for i, n in enumerate(names))
    return Scene("s", modality, bands, Grid(4, 5), dtype, quantity)


def test_offsets_do_not_wrap():
    raw = np.array([[[0, 900, 1000, 65535]]], np.uint16)
    s = scene(["red"], "reflectance", "ms", "uint16", scale=1e-4, offset=-0.1)
    np.testing.assert_allclose(to_physical(raw, s)[0, 0], [-0.1, -0.01, 0, 6.4535], atol=1e-6)


@pytest.mark.parametrize(("quantity", "factor"), [("amplitude", 20), ("sigma0", 10)])
def test_backscatter_becomes_decibels_with_its_ratio(quantity, factor):
    raw = np.random.default_rng(0).uniform(0.01, 9, (2, 4, 5)).astype(np.float32)
    s = scene(["vv", "vh"], quantity, "sar-l2")
    got = to_physical(raw, s)
    want = factor * np.log10(raw.astype(float))
    np.testing.assert_allclose(got[:2], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[2], factor * np.log10(raw[0] / raw[1]), rtol=1e-3, atol=1e-3)
    assert s.channels == ("vv", "vh", "vv/vh")


def test_decibels_stay_as_they_are():
    raw = np.full((1, 2, 2), -12.5, np.float32)
    np.testing.assert_array_equal(to_physical(raw, scene(["vv"], "db", "sar-l2")), raw)


def test_complex_bands_become_parts_in_turn_and_keep_their_power():
    rng = np.random.default_rng(1)
    raw = (rng.normal(size=(4, 4, 5)) + 1j * rng.normal(size=(4, 4, 5))).astype(np.complex64)
    s = scene(["hh", "hv", "vh", "vv"], "complex", "sar-l1", "complex64")
    got = to_physical(raw, s)
    assert s.channels[:3] == ("hh_re", "hh_im", "hv_re")
    for i in range(4):
        np.testing.assert_array_equal(got[2 * i], raw[i].real)
        np.testing.assert_array_equal(got[2 * i + 1], raw[i].imag)
    want = 10 * np.log10((np.abs(raw) ** 2).sum(0))
    np.testing.assert_allclose(span_db(got, s), want, atol=1e-4)


def test_the_power_of_a_matrix_is_its_trace():
    names = ("t11", "t12_re", "t12_im", "t13_re", "t13_im", "t22", "t23_re", "t23_im", "t33")
    raw = np.random.default_rng(2).uniform(0.1, 2, (9, 4, 5)).astype(np.float32)
    got = span_db(to_physical(raw, s := scene(names, "coherency", "sar-l1")), s)
    np.testing.assert_allclose(got, 10 * np.log10(raw[0] + raw[5] + raw[8]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32", "float64"])
def test_nodata_in_one_band_is_no_measurement(dtype):
    raw = np.arange(1, 41).reshape(2, 4, 5).astype(dtype)
    raw[0, 1, 1], raw[1, 2, 2] = 7, 9
    bands = (Band("red", "f", 1, nodata=7), Band("nir", "f", 2, nodata=9))
    s = Scene("s", "ms", bands, Grid(4, 5), dtype, "dn")
    want = (raw[0] != 7) & (raw[1] != 9)
    np.testing.assert_array_equal(valid_pixels(raw, s), want)


@pytest.mark.parametrize("nodata", [-999.0, 0.5, 1e30, float("nan")])
def test_a_nodata_value_the_type_cannot_hold_hides_nothing(nodata):
    raw = np.zeros((1, 4, 5), np.uint8)
    assert valid_pixels(raw, scene(["red"], "dn", "ms", "uint8", nodata=nodata)).all()


def test_nan_infinity_and_saturation_are_invalid():
    raw = np.ones((1, 4, 5), np.float32)
    raw[0, 0, :3] = [np.nan, np.inf, -np.inf]
    raw[0, 1, 0] = 65535
    valid = valid_pixels(raw, scene(["red"], "dn", "ms", saturated=65535.0))
    assert valid.sum() == 16


def test_zero_amplitude_and_empty_complex_pixels_are_invalid():
    raw = np.ones((2, 4, 5), np.float32)
    raw[0, 0, 0] = 0
    assert valid_pixels(raw, scene(["vv", "vh"], "amplitude", "sar-l2")).sum() == 19
    assert valid_pixels(raw, scene(["vv", "vh"], "db", "sar-l2")).all()
    part = np.ones((2, 4, 5), np.complex64)
    part[0, 0, 0] = part[:, 1, 1] = 0
    assert valid_pixels(part, scene(["hh", "vv"], "complex", "sar-l1", "complex64")).sum() == 19


def test_calibration_is_bilinear_in_the_table():
    table = Calibration((0.0, 10.0), (0.0, 20.0), ((100.0, 200.0), (300.0, 400.0)))
    rows, cols = np.array([0, 5, 10, 15]), np.array([0, 10, 20])
    want = np.array([[100, 150, 200], [200, 250, 300], [300, 350, 400], [300, 350, 400]])
    np.testing.assert_allclose(table.divisor(rows, cols), want)
    counts = np.full((4, 3), 50, np.uint16)
    np.testing.assert_allclose(calibrate(counts, table, rows, cols), (50 / want) ** 2, rtol=1e-6)
    echo = np.full((4, 3), 30 + 40j, np.complex64)
    got = calibrate(echo, table, rows, cols)
    assert got.dtype == np.complex64
    np.testing.assert_allclose(np.abs(got) ** 2, (50 / want) ** 2, rtol=1e-5)


def test_moments_of_missing_polarisations_are_those_of_zeros():
    rng = np.random.default_rng(3)
    raw = (rng.normal(size=(4, 9, 8)) + 1j * rng.normal(size=(4, 9, 8))).astype(np.complex64)
    raw[[0, 2]] = 0
    valid = rng.random((9, 8)) < 0.7
    bands = tuple(
        Band(n, "file" if m else "")
        for n, m in (("hh", False), ("hv", True), ("vh", False), ("vv", True))
    )
    whole = scene(["hh", "hv", "vh", "vv"], "complex", "sar-l1", "complex64")
    part = Scene("s", "sar-l1", bands, Grid(9, 8), "complex64", "complex")
    assert region_moments(raw, valid, part) == region_moments(raw, valid, whole)


CASES = [
    (("red", "nir"), "reflectance", "ms", "uint16", {"scale": 1e-4, "offset": -0.1}),
    (("red", "nir"), "dn", "ms", "uint8", {}),
    (("vv", "vh"), "sigma0", "sar-l2", "float32", {}),
    (("vv",), "amplitude", "sar-l2", "uint16", {}),
    (("hh", "hv", "vh", "vv"), "complex", "sar-l1", "complex64", {}),
]


@pytest.mark.parametrize(("names", "quantity", "modality", "dtype", "band"), CASES)
@given(share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
def test_moments_are_numpys_over_valid_physical_values(
    names, quantity, modality, dtype, band, share, seed
):
    rng = np.random.default_rng(seed)
    raw = rng.integers(1, 200, (len(names), 16, 20)).astype(dtype)
    if dtype == "complex64":
        raw = raw + 1j * rng.integers(1, 200, raw.shape).astype(np.float32)
        raw = raw.astype(np.complex64)
    valid = rng.random((16, 20)) < share
    s = scene(names, quantity, modality, dtype, **band)
    physical = to_physical(raw, s)
    channels = [*physical, span_db(physical, s)] if modality == "sar-l1" else list(physical)
    half = [region_moments(raw[:, r], valid[r], s) for r in (slice(0, 7), slice(7, 16))]
    got = [Moments.merged(pair) for pair in zip(*half, strict=True)]
    assert len(got) == len(channel_keys(s)) == len(channels)
    for m, values in zip(got, channels, strict=True):
        kept = values[valid].astype(float)
        assert m.count == kept.size
        if kept.size:
            assert m.mean == pytest.approx(kept.mean(), rel=1e-5, abs=1e-5)
            assert m.std == pytest.approx(kept.std(), rel=1e-4, abs=1e-4)
            assert m.rms == pytest.approx(np.sqrt((kept**2).mean()), rel=1e-5)
            assert (m.low, m.high) == pytest.approx((kept.min(), kept.max()), rel=1e-5, abs=1e-5)
