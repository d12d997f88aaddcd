"""What a trained map has to beat: majority class and linear classifiers of single pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Classes = NDArray[np.uint8]

MOST_PIXELS = 200_000
"""Training pixels a linear classifier is fitted to; more change nothing but the time."""
UNLABELLED = 255
"""Label of pixels that are neither learned from nor scored."""


def majority_map(labels: Classes, shape: tuple[int, int]) -> Classes:
    """The most frequent class of the training labels, everywhere."""
    known = labels[labels != UNLABELLED]
    return np.full(shape, np.bincount(known).argmax(), np.uint8)


def with_neighbourhood(bands: Floats, side: int = 5) -> Floats:
    """Bands, their means and their standard deviations over side×side pixels: (3C, H, W)."""
    x = torch.from_numpy(bands)[None].double()
    padded = F.pad(x, [side // 2] * 4, mode="reflect")
    mean = F.avg_pool2d(padded, side, 1)
    variance = F.avg_pool2d(padded**2, side, 1) - mean**2
    everything = torch.cat([x, mean, variance.clamp(min=0).sqrt()], dim=1)
    return everything[0].float().numpy()


def linear_map(
    train: Floats, labels: Classes, test: Floats, classes: int, steps: int = 60
) -> Classes:
    """Multinomial logistic regression on the features of single pixels, fitted to the optimum.

    Args:
        train: (F, H, W) features of the training scene.
        labels: (H, W) its classes; 255 is left out.
        test: (F, H', W') features of the scene to map.
        classes: number of classes.
        steps: at most so many L-BFGS iterations.

    Returns:
        (H', W') the most probable class.
    """
    x, y = torch.from_numpy(train).flatten(1).T, torch.from_numpy(labels).flatten().long()
    x, y = x[y != UNLABELLED], y[y != UNLABELLED]
    every = max(1, round(len(y) / MOST_PIXELS))
    x, y = x[::every], y[::every]
    mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    x = (x - mean) / std
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + 1e-6 * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    with torch.no_grad():
        pixels = (torch.from_numpy(test).flatten(1).T - mean) / std
        best = (pixels @ weight + bias).argmax(1)
    return best.to(torch.uint8).numpy().reshape(test.shape[1:])
