"""Scores against scikit-learn and worked examples; nan, 255 and empty classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from model.metrics import Calibration, ConfusionMatrix, RegressionErrors, area_estimates


def draw(seed: int, classes: int, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (n,), generator=generator)
    wrong = torch.randint(0, classes, (n,), generator=generator)
    keep = torch.rand(n, generator=generator) < 0.6
    return torch.where(keep, truth, wrong), truth


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 7))
def test_confusion_scores_agree_with_scikit_learn(seed: int, classes: int) -> None:
    predicted, truth = draw(seed, classes)
    matrix = ConfusionMatrix(classes)
    matrix.update(predicted[:100], truth[:100])
    matrix.update(predicted[100:], truth[100:])
    ours = matrix.compute()
    labels = range(classes)
    assert (
        matrix.counts.tolist() == theirs.confusion_matrix(truth, predicted, labels=labels).tolist()
    )
    assert ours["accuracy"] == pytest.approx(theirs.accuracy_score(truth, predicted))
    assert ours["kappa"] == pytest.approx(theirs.cohen_kappa_score(truth, predicted))
    assert ours["balanced_accuracy"] == pytest.approx(
        theirs.balanced_accuracy_score(truth, predicted)
    )
    assert ours["miou"] == pytest.approx(theirs.jaccard_score(truth, predicted, average="macro"))
    assert ours["f1"] == pytest.approx(theirs.f1_score(truth, predicted, average="macro"))
    precision, recall, _, support = theirs.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=np.nan
    )
    np.testing.assert_allclose(ours["precision_per_class"], precision)
    np.testing.assert_allclose(ours["recall_per_class"], recall)
    assert ours["support_per_class"] == support.tolist()


def test_unlabelled_pixels_do_not_count() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 255], [1, 255]]))
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    scores = matrix.compute()
    assert scores["miou"] == pytest.approx(0.5)
    assert math.isnan(scores["iou_per_class"][2])


def test_a_label_outside_the_list_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"label value\(s\) \[3\] are outside the 3 classes"):
        ConfusionMatrix(3).update(torch.tensor([0, 1]), torch.tensor([3, 1]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_calibration_is_the_binned_gap(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(200, 4, generator=generator).mul(2).softmax(1)
    truth = torch.randint(0, 4, (200,), generator=generator)
    ours = Calibration(10)
    ours.update(probabilities[:50], truth[:50])
    ours.update(probabilities[50:], truth[50:])
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for b in range(10):
        inside = (confidence > b / 10) & (confidence <= (b + 1) / 10)
        if inside.any():
            right = (predicted == truth)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert ours.compute() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_regression_errors_agree_with_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(4, 1, 5, 5, generator=generator) * 20 + 0.1
    predicted = truth + torch.randn(truth.shape, generator=generator)
    unknown = torch.rand(truth.shape, generator=generator) < 0.2
    errors = RegressionErrors()
    errors.update(predicted[:1], truth[:1].masked_fill(unknown[:1], float("nan")))
    errors.update(predicted[1:], truth[1:].masked_fill(unknown[1:], float("nan")))
    ours, t, p = errors.compute(), truth[~unknown], predicted[~unknown]
    assert ours["pixels"] == len(t)
    assert ours["rmse"] == pytest.approx(theirs.root_mean_squared_error(t, p), rel=1e-5)
    assert ours["mae"] == pytest.approx(theirs.mean_absolute_error(t, p), rel=1e-5)
    assert ours["r2"] == pytest.approx(theirs.r2_score(t, p), rel=1e-4)
    assert ours["abs_rel"] == pytest.approx(float(((p - t).abs() / t).mean()), rel=1e-5)
    ratio = torch.maximum(p / t, t / p)
    assert ours["delta1"] == pytest.approx(float(((ratio < 1.25) & (p > 0)).float().mean()))


def test_area_estimates_reproduce_the_worked_example_of_the_good_practices_paper() -> None:
    # Olofsson et al. 2014, Table 8: deforestation, forest gain, stable forest, stable non-forest;
    # rows are the map, columns the reference; map areas in pixels of 30 m.
    by_map = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
    mapped = np.array([200_000.0, 150_000.0, 3_200_000.0, 6_450_000.0]) * 0.09  # hectares
    estimates = area_estimates(by_map.T, mapped)
    # The paper, in hectares: 21,158 +- 6,158 of deforestation, 11,686 +- 3,756,
    # 285,770 +- 15,510 and 581,386 +- 16,282.
    areas = [e.estimated for e in estimates]
    margins = [e.margin for e in estimates]
    np.testing.assert_allclose(areas, [21_158, 11_686, 285_770, 581_386], rtol=5e-4)
    np.testing.assert_allclose(margins, [6_158, 3_756, 15_510, 16_282], rtol=5e-3)


def test_areas_of_a_perfect_map_are_the_mapped_areas() -> None:
    estimates = area_estimates(np.diag([50, 30]), np.array([7.0, 3.0]))
    assert [e.estimated for e in estimates] == [7.0, 3.0]
    assert [e.margin for e in estimates] == [0.0, 0.0]
