"""What SAR-L1 reconstructs, against formulas, draws and the released pipeline."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from model.normalisation import Normalisation
from model.physics import (
    CLIP,
    linear_floor,
    local_looks,
    log_floor,
    paper_power_target,
    power_target,
    span,
)

SCALE = 0.37


UNIT = Normalisation(("hh_re",) * 8, (0.0,) * 8, (1.0,) * 8)


def normalisation(mean: float = -8.0, std: float = 6.0) -> Normalisation:
    return Normalisation(("hh_re",) * 8, (0.0,) * 8, (SCALE,) * 8, (mean, std))


def scattering(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 2, 2) complex scattering matrices with HV = VH."""
    draw = torch.randn(
        count, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)
    )
    hh, hv, vv = draw.unbind(1)
    return torch.stack([torch.stack([hh, hv], 1), torch.stack([hv, vv], 1)], 1)


def channels(matrices: torch.Tensor) -> torch.Tensor:
    """(N, 2, 2) complex -> (1, 8, 1, N): re, im of HH, HV, VH, VV."""
    return torch.view_as_real(matrices.flatten(1)).flatten(1).T[None, :, None, :]


def test_span_is_the_sum_of_the_four_powers() -> None:
    matrices = scattering(50)
    expected = matrices.abs().square().sum((1, 2))
    torch.testing.assert_close(span(channels(matrices), UNIT)[0, 0, 0], expected)


def test_span_does_not_change_when_the_polarisation_basis_rotates() -> None:
    matrices = scattering(50)
    angle, delay = 0.7, 0.3
    basis = torch.tensor(
        [
            [math.cos(angle), 1j * math.sin(angle) * np.exp(1j * delay)],
            [1j * math.sin(angle) * np.exp(-1j * delay), math.cos(angle)],
        ],
        dtype=torch.complex64,
    )
    turned = basis.T @ matrices @ basis
    torch.testing.assert_close(span(channels(turned), UNIT), span(channels(matrices), UNIT))


def test_span_is_the_trace_of_the_coherency_matrix() -> None:
    matrices = scattering(50)
    hh, hv, vv = matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 1]
    pauli = torch.stack([hh + vv, hh - vv, 2 * hv], 1) / math.sqrt(2)
    coherency = pauli[:, :, None] * pauli[:, None].conj()
    elements = [coherency[:, 0, 0].real, coherency[:, 0, 1].imag, coherency[:, 1, 1].real]
    elements.append(coherency[:, 2, 2].real)
    names = ("t11", "t12_im", "t22", "t33")
    matrix = Normalisation(names, (0.0,) * 4, (SCALE,) * 4)
    images = torch.stack(elements)[None, :, None] / SCALE
    torch.testing.assert_close(span(images, matrix), span(channels(matrices), UNIT))


def test_power_target_is_the_standardised_decibel_span_of_physical_units() -> None:
    physical = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1)) * SCALE
    target = power_target(physical / SCALE, normalisation())
    decibels = 10 * torch.log10(physical.square().sum(1, keepdim=True))
    torch.testing.assert_close(target, ((decibels + 8.0) / 6.0).clamp(-3, 3), rtol=1e-4, atol=1e-4)


def test_power_target_is_clipped_also_at_zero_power() -> None:
    target = power_target(torch.zeros(1, 8, 4, 4), normalisation())
    assert torch.equal(target, torch.full((1, 1, 4, 4), -CLIP))


def test_power_target_says_when_statistics_are_missing() -> None:
    with pytest.raises(ValueError, match="power_db"):
        power_target(torch.zeros(1, 8, 4, 4), UNIT)


def test_paper_power_equals_the_released_channel(oracle_dir: Path) -> None:
    arrays = np.load(oracle_dir / "data_pipeline.npz")
    images = torch.from_numpy(arrays["power_in_chw"])[None]
    valid = torch.ones(1, 1, *images.shape[-2:], dtype=torch.bool)
    ours = paper_power_target(images, UNIT, valid)[0, 0].numpy()
    np.testing.assert_allclose(ours, arrays["power_out_chw"][0], atol=1e-5)


def test_paper_power_ignores_invalid_pixels_and_undoes_the_normalisation() -> None:
    physical = torch.rand(1, 8, 6, 6, generator=torch.Generator().manual_seed(2)) * 0.4
    valid = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    valid[..., :2] = False
    spoilt = torch.where(valid, physical, torch.zeros(()))
    whole = paper_power_target(physical[..., 2:] / SCALE, normalisation(), valid[..., 2:])
    part = paper_power_target(spoilt / SCALE, normalisation(), valid)[..., 2:]
    torch.testing.assert_close(part, whole)
    assert whole.min() == 0
    assert whole.max() == 1


@pytest.mark.parametrize("looks", [1.0, 2.5])
def test_floors_are_what_draws_of_speckle_give(looks: float) -> None:
    gain = np.random.default_rng(0).gamma(looks, 1 / looks, 400_000)
    decibels = 10 * np.log10(gain)
    assert log_floor(looks) == pytest.approx(
        np.abs(decibels - np.median(decibels)).mean(), rel=0.01
    )
    assert linear_floor(looks) == pytest.approx(np.abs(gain - np.median(gain)).mean(), rel=0.01)
    power = torch.from_numpy(gain).reshape(1, 1, 500, 800)
    assert local_looks(power) == pytest.approx(looks, rel=0.1)


def test_looks_of_a_constant_are_not_measured() -> None:
    assert local_looks(torch.ones(1, 1, 16, 16)) == 1.0


def test_single_look_floor_is_ln_2() -> None:
    assert linear_floor(1.0) == pytest.approx(math.log(2), rel=1e-3)
