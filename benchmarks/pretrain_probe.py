"""Does pre-training learn? Frozen nano encoders, read out by a linear probe and by k-NN.

    RINGMOE_DATA=/path/to/data OMP_NUM_THREADS=1 python benchmarks/pretrain_probe.py RUNS \
        [--recipe pretrain-nano] [--seeds 0 1 2] [--only pretrain|score]

Pre-trains with the recipe on the real data of `pretrain_data.py` into RUNS/seed0, RUNS/seed1, …:
ordinary run folders, continued if they were stopped. Test images take no part in anything but the
score.

Readout, the same for everyone: mean and deviation of the four stages, standardised; ridge
regression to one-hot classes, its strength chosen on a fifth of the training set; k-NN with five
neighbours by cosine. Beside the encoders stand pixels and histograms with the same ridge readout.
One JSON line per set and encoder on stdout.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pretrain_data import Chips, Sources, centre, sources

from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.encoder import RingMoE
from model.journal import Journal
from model.pretrain import MaskedImageModel, with_masks
from model.state import TrainingState
from model.train import StepReport, train
from ringmoe_cli.jobs.watching import RoutingLog
from ringmoe_cli.recipe import PretrainRecipe, load_pretrain_recipe, settings

STRENGTHS = 10.0 ** np.arange(-3, 5)
"""Ridge penalties tried, per training sample."""
FRACTIONS = (1, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 1 / 16)
"""Shares of the training labels."""
NEIGHBOURS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--recipe", default="pretrain-nano")
    parser.add_argument("--set", dest="changes", action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["pretrain", "score"])
    given = parser.parse_args()
    data = sources(Path(os.environ["RINGMOE_DATA"]), given.runs / "stores")
    if given.only != "pretrain":
        for name, chips in data.sets.items():
            print(json.dumps({"set": name, "encoder": "none", **baselines(chips)}), flush=True)
    for seed in given.seeds:
        recipe = load_pretrain_recipe(given.recipe, [*given.changes, f"train.seed={seed}"])
        folder = given.runs / f"seed{seed}"
        if given.only != "score":
            pretrain(data, recipe, folder)
        if given.only != "pretrain":
            for row in compare(data, recipe, folder):
                print(json.dumps({"seed": seed, **row}), flush=True)


def start(data: Sources, recipe: PretrainRecipe) -> MaskedImageModel:
    """The network of a seed before its first step."""
    torch.manual_seed(recipe.train.seed)
    config = recipe.model_config({m: len(n.bands) for m, n in data.norms.items()})
    return MaskedImageModel(config, recipe.objective, data.norms)


def pretrain(data: Sources, recipe: PretrainRecipe, folder: Path) -> None:
    """Train, or go on training, and save as `ringmoe pretrain` does."""
    folder.mkdir(parents=True, exist_ok=True)
    network, loop = start(data, recipe), recipe.train
    about = CheckpointConfig(
        model=network.config, kind="pretraining", normalisation=data.norms,
        pretraining=recipe.objective, provenance={"recipe": settings(recipe)},
    )  # fmt: skip
    weights = {m: mix.weight for m, mix in recipe.modalities.items()}
    routing = RoutingLog(network.encoder, loop, folder, TrainingState(folder / "state").latest())
    spent, busy = Journal(folder / "processor.jsonl"), time.process_time()

    def publish(step: int) -> None:
        save_checkpoint(folder, about.with_provenance(step=step), disk_tensors(network))

    def on_step(report: StepReport) -> None:
        nonlocal busy
        routing.on_step(report)
        busy, before = time.process_time(), busy
        spent.append({"step": report.step, "seconds": busy - before})

    train(
        network,
        lambda first: with_masks(
            data.batches(loop.batch_size, weights, loop.seed, first),
            network.config, recipe.objective.mask_ratio, loop.seed, first,
        ),
        loop, folder, publish=publish, on_step=on_step,
    )  # fmt: skip


def compare(data: Sources, recipe: PretrainRecipe, folder: Path) -> Iterator[dict[str, object]]:
    """Scores of one seed's encoder before and after pre-training."""
    random = start(data, recipe).encoder
    for name, chips in data.sets.items():
        yield {"set": name, "encoder": "random", **readout(random, chips)}
    if not (folder / "config.json").exists():
        return
    trained = RingMoE.from_pretrained(folder)
    seconds = sum(row["seconds"] for row in Journal(folder / "processor.jsonl").rows())
    facts = {"steps": TrainingState(folder / "state").latest(), "cpu_minutes": seconds / 60}
    for name, chips in data.sets.items():
        yield {"set": name, "encoder": "pre-trained", **facts, **readout(trained, chips)}


@torch.inference_mode()
def features(encoder: RingMoE, images: torch.Tensor, modality: str) -> NDArray[np.float64]:
    """(N, 2·ΣC) mean and deviation of the four stages."""
    encoder.eval()
    rows = []
    for part in centre(images).split(64):
        stages = encoder({modality: part})[modality]
        moments = [m for s in stages for m in (s.mean((2, 3)), s.std((2, 3)))]
        rows.append(torch.cat(moments, dim=1))
    encoder.train()
    return torch.cat(rows).double().numpy()


def readout(encoder: RingMoE, chips: Chips) -> dict[str, object]:
    """Scores of a frozen encoder."""
    return probe(
        features(encoder, chips.train, chips.modality),
        chips.train_labels,
        features(encoder, chips.test, chips.modality),
        chips.test_labels,
    )


def probe(
    train: NDArray[np.float64],
    labels: NDArray[np.int64],
    test: NDArray[np.float64],
    truth: NDArray[np.int64],
) -> dict[str, object]:
    """Linear probe by share of the labels, and k-NN; in percent."""
    mean, std = train.mean(0), train.std(0) + 1e-9
    train, test = (train - mean) / std, (test - mean) / std
    order = np.random.default_rng(0).permutation(len(labels))
    linear = {}
    for share in FRACTIONS:
        some = order[: round(share * len(order))]
        linear[f"{share:.4g}"] = ridge_score(train[some], labels[some], test, truth)
    return {"linear": linear, "knn": knn_score(train, labels, test, truth)}


def ridge_score(
    train: NDArray[np.float64],
    labels: NDArray[np.int64],
    test: NDArray[np.float64],
    truth: NDArray[np.int64],
) -> float:
    """Accuracy of ridge regression to one-hot classes; the penalty is chosen on every fifth row."""
    held = np.arange(len(labels)) % 5 == 0
    tried = ridge_maps(train[~held], labels[~held])
    right = [(train[held] @ w).argmax(1) == labels[held] for w in tried]
    best = int(np.argmax([r.mean() for r in right]))
    weights = ridge_maps(train, labels)[best]
    return round(100 * float(((test @ weights).argmax(1) == truth).mean()), 2)


def ridge_maps(x: NDArray[np.float64], labels: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Weights for every penalty, from one eigendecomposition."""
    targets = np.eye(labels.max() + 1)[labels] - 1 / (labels.max() + 1)
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    right = vectors.T @ (x.T @ targets) / len(x)
    return [vectors @ (right / (values[:, None] + s)) for s in STRENGTHS]


def knn_score(
    train: NDArray[np.float64],
    labels: NDArray[np.int64],
    test: NDArray[np.float64],
    truth: NDArray[np.int64],
) -> float:
    """Accuracy of the majority of the nearest neighbours by cosine."""
    near = unit(test) @ unit(train).T
    nearest = np.argpartition(-near, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
    votes = np.apply_along_axis(np.bincount, 1, labels[nearest], minlength=labels.max() + 1)
    return round(100 * float((votes.argmax(1) == truth).mean()), 2)


def unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length one."""
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


def baselines(chips: Chips) -> dict[str, object]:
    """Pixels (on a 16 x 16 grid) and histograms, with the readout of the encoders."""

    def pixels(images: torch.Tensor) -> NDArray[np.float64]:
        small = torch.nn.functional.adaptive_avg_pool2d(centre(images), 16)
        return small.flatten(1).double().numpy()

    def histograms(images: torch.Tensor) -> NDArray[np.float64]:
        edges = np.linspace(-3, 3, 31)
        flat = centre(images).flatten(2).numpy()
        return (
            np.stack([np.concatenate([np.histogram(b, edges)[0] for b in x]) for x in flat]) ** 0.5
        )

    kinds: dict[str, Callable[[torch.Tensor], NDArray[np.float64]]] = {
        "pixels": pixels,
        "histogram": histograms,
    }
    return {
        name: probe(make(chips.train), chips.train_labels, make(chips.test), chips.test_labels)
        for name, make in kinds.items()
    }


if __name__ == "__main__":
    main()
