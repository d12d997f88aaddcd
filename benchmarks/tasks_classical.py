"""What needs no network: the commonest answer, linear models and random forests."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tasks_sets import Bench, Case

from model.batch import Batch
from model.metrics import ConfusionMatrix, RegressionErrors
from model.tasks.change import ChangeScores
from model.tasks.head import pixel_classes

Describe = Callable[[Batch, Case], tuple[Any, Any]]
"""Features (N, F) and truths (N,) of a batch."""


def trivial(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Always the commonest class, or the mean value, of the training part."""
    found, case = bench.found(), bench.case
    if case.task == "depth":
        known = [v[np.isfinite(v)] for v in (b.targets["values"].numpy()
                 for b in found.training.once(16))]  # fmt: skip
        mean = float(np.concatenate(known).mean())
        errors = RegressionErrors()
        for batch in found.held_out.once(16):
            errors.update(torch.full_like(batch.targets["values"], mean), batch.targets["values"])
        yield "mean of the training heights", {**errors.compute(), "cpu": 0.0}
        return
    counts = sum(np.bincount(truth_of(b)[1], minlength=256)[:255]
                 for b in found.training.once(16))  # fmt: skip
    common, confusion = int(np.argmax(counts)), confusion_of(case, len(found.classes))
    for batch in found.held_out.once(16):
        y = torch.from_numpy(truth_of(batch)[1])
        confusion.update(torch.full_like(y, common), y)
    yield "commonest class", {**summed(case, confusion), "cpu": 0.0}


def truth_of(batch: Batch) -> tuple[Any, Any]:
    """Mask of labelled pixels (None for windows), and their classes."""
    y = batch.targets["classes"]
    if y.ndim == 1:
        return None, y.numpy()
    y = pixel_classes(batch)
    return y != 255, y[y != 255].numpy()


def confusion_of(case: Case, classes: int) -> ConfusionMatrix:
    """An empty confusion matrix."""
    return ConfusionMatrix(classes)


def summed(case: Case, confusion: ConfusionMatrix) -> dict[str, Any]:
    """The task's scores from a confusion matrix."""
    if case.task != "change":
        return confusion.compute()
    scores = ChangeScores(2)
    scores.confusion = confusion
    scores.calibration.update(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    return {k: v for k, v in scores.compute().items() if k != "ece"}


def forest(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """100 trees on the same features."""
    yield "random forest", classical(bench, trees(bench.case), described)


def forest_pixels(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """100 trees on the statistics and the pixels of windows."""
    yield "random forest, pixels too", classical(bench, trees(bench.case), both)


def trees(case: Case) -> Any:
    """100 trees."""
    kind = RandomForestRegressor if case.task == "depth" else RandomForestClassifier
    return kind(100, n_jobs=1, random_state=0, min_samples_leaf=2)


def linear(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Logistic or ridge regression on the same features."""
    depth = bench.case.task == "depth"
    model = Ridge() if depth else LogisticRegression(max_iter=300)
    yield "linear", classical(bench, make_pipeline(StandardScaler(), model), described)


def pixels(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Logistic regression on the pixels of windows, 16 x 16 of them."""
    model = LogisticRegression(max_iter=300, C=0.01)
    yield "linear on pixels", classical(bench, make_pipeline(StandardScaler(), model), grid)


def classical(bench: Bench, model: Any, described: Describe) -> dict[str, Any]:
    """Fit on up to 20,000 samples of the training part, score on all of the test part."""
    found, case, start = bench.found(), bench.case, time.process_time()
    rng, batches = np.random.default_rng(1), 1 + len(found.training.places) // 16
    pairs = [thinned(described(b, case), 60_000 // batches, rng)
             for b in found.training.once(16)]  # fmt: skip
    x, y = (np.concatenate(p) for p in zip(*pairs, strict=True))
    if len(y) > 20_000:
        chosen = np.random.default_rng(0).choice(len(y), 20_000, replace=False)
        x, y = x[chosen], y[chosen]
    model.fit(x, y)
    seconds = time.process_time() - start
    if case.task == "depth":
        errors = RegressionErrors()
        for batch in found.held_out.once(16):
            x, y = described(batch, case)
            errors.update(torch.from_numpy(model.predict(x)).float(), torch.from_numpy(y).float())
        return {**errors.compute(), "cpu": seconds}
    confusion = confusion_of(case, len(found.classes))
    for batch in found.held_out.once(16):
        x, y = described(batch, case)
        if len(y):
            confusion.update(torch.from_numpy(model.predict(x)), torch.from_numpy(y))
    return {**summed(case, confusion), "cpu": seconds}


def thinned(pair: tuple[Any, Any], most: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Some of the samples of a batch, so that memory stays small."""
    x, y = pair
    if len(y) <= max(most, 16):
        return x, y
    chosen = rng.choice(len(y), max(most, 16), replace=False)
    return x[chosen], y[chosen]


def described(batch: Batch, case: Case) -> tuple[Any, Any]:
    """What a classical model sees of a batch: (N, F) features and (N,) truths.

    Windows: means, deviations and histograms of 16 bins of every band. Pixels: every band with its
    means and deviations over 5 x 5 pixels; of both dates, and their difference, for change.
    """
    dates = [torch.cat([v[:, t] for v in batch.images.values()], 1)
             for t in range(next(iter(batch.images.values())).shape[1])]  # fmt: skip
    x = torch.cat([*dates, *([(dates[1] - dates[0]).abs()] if len(dates) == 2 else [])], 1)
    if case.task == "classification":
        counts = torch.stack([torch.stack([torch.histc(c, 16, -2, 3) for c in image]).flatten()
                              for image in x])  # fmt: skip
        parts = [x.mean((2, 3)), x.std((2, 3)), counts]
        return torch.cat(parts, 1).numpy(), batch.targets["classes"].numpy()
    pool = torch.nn.AvgPool2d(5, 1, 2, count_include_pad=False)
    mean = pool(x)
    spread = (pool(x * x) - mean**2).clamp(min=0).sqrt()
    every = torch.cat([x, mean, spread], 1).movedim(1, -1)
    if case.task == "depth":
        truth = batch.targets["values"][:, 0]
        known = torch.isfinite(truth)
        return every[known].numpy(), truth[known].numpy()
    known, y = truth_of(batch)
    return every[known].numpy(), y


def grid(batch: Batch, case: Case) -> tuple[Any, Any]:
    """Windows as 16 x 16 pixels."""
    x = torch.cat([v[:, 0] for v in batch.images.values()], 1)
    small = torch.nn.functional.adaptive_avg_pool2d(x, 16)
    return small.flatten(1).numpy(), batch.targets["classes"].numpy()


def both(batch: Batch, case: Case) -> tuple[Any, Any]:
    """Windows as statistics and pixels."""
    (statistics, truth), (small, _) = described(batch, case), grid(batch, case)
    return np.concatenate([statistics, small], 1), truth


CLASSICAL: Mapping[str, Callable[[Bench], Iterator[tuple[str, dict[str, Any]]]]] = {
    "trivial": trivial, "linear": linear, "pixels": pixels, "forest": forest,
    "forest-pixels": forest_pixels,
}  # fmt: skip
