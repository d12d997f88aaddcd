"""Which target should complex SAR reconstruct: power in decibels, the paper's form, or the pixels?

    RINGMOE_DATA=/path/to/data OMP_NUM_THREADS=1 python benchmarks/pretrain_sar.py [--seeds 0 1 2]

Single-look images k ~ CN(0, T3) are drawn from AIRSAR's coherency matrices (San Francisco): every
pixel is one sample of its own matrix, so speckle is full and the scattering mechanism is known only
on average. One nano encoder per seed and target is pre-trained on the first strip, without labels;
all targets of a seed start from the same weights and see the same draws, chips and masks.

The frozen encoder is read out pixel by pixel: four stages, enlarged to the first one's grid,
standardised; ridge regression to one-hot classes with every class weighing the same, penalty chosen
on every fifth block of the training part. The score is the mean IoU on the other part, over the
classes with at least `ENOUGH` labelled pixels in both. Two readouts: `strips`, from the first strip
to the third with the 256 columns of the second between them as guard band; and `halves` of the
third, which pre-training never saw, with a guard band of 32 columns. In the first the incidence
angle changes: water is 7 dB brighter in T11 on the other side. One JSON line per seed and target,
then the paired differences with 95 % intervals.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as student

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig, SarTarget
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.pretrain import MaskedImageModel, with_masks
from model.train import TrainConfig, train

Part = tuple[int, int, int]
"""Strip of 256 columns, first column, column after the last. Strip 1 is not used at all."""
READOUTS: dict[str, tuple[Part, Part]] = {
    "strips": ((0, 0, 256), (2, 0, 256)),
    "halves": ((2, 0, 112), (2, 144, 256)),
}
"""Where the readout is trained, and where it is tested."""
ENOUGH = 1000
"""Labelled pixels that a class needs in both strips."""
SIDE, CELL = 32, 8
"""Chips and masked cells in pixels: small, so that a run takes a minute of one core."""
DRAWS = 2
"""Single-look images of each strip that the readout sees."""
STRENGTHS = 10.0 ** np.arange(-4, 4)
"""Ridge penalties tried, per training sample."""
TARGETS: tuple[SarTarget, ...] = ("power", "power_paper", "pixels")
BANDS = tuple(f"{p}_{part}" for p in ("hh", "hv", "vh", "vv") for part in ("re", "im"))


@dataclass(frozen=True)
class Strip:
    """One strip of the scene."""

    root: NDArray[np.complex128]
    """(H, W, 3, 3) Cholesky factor of every pixel's coherency matrix."""
    labels: NDArray[np.int64]
    """(H, W), 0 unlabelled."""

    def draw(self, seed: int) -> torch.Tensor:
        """A single-look image, (8, H, W): k = L·z, z ~ CN(0, 1), from Pauli to linear basis."""
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(2, *self.root.shape[:3])) / np.sqrt(2)
        k = np.einsum("hwij,hwj->hwi", self.root, z[0] + 1j * z[1])
        hh, vv, hv = k[..., 0] + k[..., 1], k[..., 0] - k[..., 1], k[..., 2]
        scattering = np.stack([hh, hv, hv, vv]) / np.sqrt(2)
        parts = np.stack([scattering.real, scattering.imag], axis=1)
        return torch.from_numpy(parts.reshape(8, *self.labels.shape).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    given = parser.parse_args()
    strips = {n: read_strip(Path(os.environ["RINGMOE_DATA"]), n) for n in (0, 2)}
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in given.seeds:
        for row in compare(strips, seed, given.steps, given.batch):
            print(json.dumps(row), flush=True)
            for name in READOUTS:
                scores.setdefault((name, row["target"]), []).append(row[name]["miou"])
    for name in READOUTS:
        for other in ("power_paper", "pixels", "none"):
            found = paired(scores[name, "power"], scores[name, other])
            print(json.dumps({"readout": name, "power minus": other, **found}))


def compare(
    strips: dict[int, Strip], seed: int, steps: int, batch: int
) -> Iterator[dict[str, Any]]:
    """Scores of one seed: the encoder as it starts, and after each target."""
    looks = {n: [strips[n].draw(1000 * seed + 10 * n + d) for d in range(DRAWS)] for n in strips}
    norm = normalisation(looks[0][0])
    images = {n: torch.stack(drawn) / norm.std[0] for n, drawn in looks.items()}
    config = ModelConfig.preset("nano", image_size=SIDE, mask_cell=CELL, channels={"sar-l1": 8})
    for target in ("none", *TARGETS):
        torch.manual_seed(seed)
        objective = PretrainConfig(sar_l1_target="pixels" if target == "none" else target)
        network = MaskedImageModel(config, objective, {"sar-l1": norm})
        busy = time.process_time()
        if target != "none":
            pretrain(network, strips[0], seed, steps, batch)
        spent = round(time.process_time() - busy, 1)
        score = {
            name: readout(network.encoder, *(cut(strips, images, part) for part in parts))
            for name, parts in READOUTS.items()
        }
        yield {"seed": seed, "target": target, "cpu_seconds": spent, **score}


def pretrain(network: MaskedImageModel, strip: Strip, seed: int, steps: int, size: int) -> None:
    """Masked image modelling on chips of fresh single-look draws of a strip."""
    scale = network.normalisation["sar-l1"].std[0]

    def chips(first: int) -> Iterator[Batch]:
        pool = [strip.draw(10**6 * (seed + 1) + n) / scale for n in range(8)]
        height, width = strip.labels.shape
        for step in range(first, steps):
            rng = np.random.default_rng((seed, step))
            places = zip(
                rng.integers(0, len(pool), size),
                rng.integers(0, height - SIDE + 1, size),
                rng.integers(0, width - SIDE + 1, size),
                strict=True,
            )
            drawn = [pool[n][:, y : y + SIDE, x : x + SIDE] for n, y, x in places]
            yield Batch({"sar-l1": torch.stack(drawn)[:, None]})

    loop = TrainConfig(
        steps=steps, batch_size=size, lr=1e-3, warmup_steps=20, seed=seed, save_every=steps
    )
    ratio = network.objective.mask_ratio
    with tempfile.TemporaryDirectory() as folder:
        train(
            network,
            lambda first: with_masks(chips(first), network.config, ratio, seed, first),
            loop,
            Path(folder),
            publish=lambda step: None,
        )


def normalisation(look: torch.Tensor) -> Normalisation:
    """One scale for all channels, and the moments of the span in decibels."""
    scale = float(look.square().mean().sqrt())
    decibels = 10 * torch.log10(look.square().sum(0))
    moments = (float(decibels.mean()), float(decibels.std()))
    return Normalisation(BANDS, (0.0,) * 8, (scale,) * 8, moments)


def cut(
    strips: dict[int, Strip], images: dict[int, torch.Tensor], part: Part
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Images and labels of some columns of a strip."""
    strip, first, last = part
    return images[strip][..., first:last], strips[strip].labels[:, first:last]


def readout(
    encoder: RingMoE,
    seen: tuple[torch.Tensor, NDArray[np.int64]],
    unseen: tuple[torch.Tensor, NDArray[np.int64]],
) -> dict[str, Any]:
    """Mean IoU in percent of the ridge classifier trained on one part, on the other."""
    classes = shared_classes(seen[1], unseen[1])
    x, y, block = samples(encoder, *seen, classes)
    mean, std = x.mean(0), x.std(0) + 1e-9
    x = (x - mean) / std
    held = block % 5 == 0
    tried = [iou((x[held] @ w).argmax(1), y[held]).mean() for w in ridge(x[~held], y[~held])]
    weights = ridge(x, y)[int(np.argmax(tried))]
    test, truth, _ = samples(encoder, *unseen, classes)
    scores = iou(((test - mean) / std @ weights).argmax(1), truth)
    named = {str(c): round(100 * float(s), 2) for c, s in zip(classes, scores, strict=True)}
    return {"miou": round(100 * float(scores.mean()), 2), "iou": named}


def shared_classes(*labels: NDArray[np.int64]) -> list[int]:
    """Classes with enough labels on both sides of the guard band."""
    counts = [np.bincount(part.ravel(), minlength=6) for part in labels]
    return [c for c in range(1, 6) if min(n[c] for n in counts) >= ENOUGH]


@torch.inference_mode()
def samples(
    encoder: RingMoE, images: torch.Tensor, labels: NDArray[np.int64], classes: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Features, class and block number of tokens whose middle pixel has one of the classes."""
    encoder.eval()
    xs, ys, blocks = [], [], []
    middle = labels[2::4, 2::4]
    index = np.full(6, -1)
    index[classes] = np.arange(len(classes))
    rows, cols = np.indices(middle.shape)
    for image in images:
        stages = encoder({"sar-l1": image[None]})["sar-l1"]
        size = stages[0].shape[-2:]
        whole = torch.cat([F.interpolate(s, size, mode="bilinear") for s in stages], dim=1)[0]
        known = index[middle] >= 0
        xs.append(whole.permute(1, 2, 0).numpy()[: known.shape[0], : known.shape[1]][known])
        ys.append(index[middle][known])
        blocks.append((rows // 16 * 4 + cols // 16)[known])
    encoder.train()
    return np.concatenate(xs).astype(np.float64), np.concatenate(ys), np.concatenate(blocks)


def ridge(x: NDArray[np.float64], labels: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Weights of the class-balanced ridge regression for every penalty."""
    counts = np.bincount(labels)
    weight = (len(labels) / len(counts) / counts)[labels][:, None]
    targets = np.eye(len(counts))[labels] - 1 / len(counts)
    values, vectors = np.linalg.eigh((x * weight).T @ x / len(x))
    right = vectors.T @ ((x * weight).T @ targets) / len(x)
    return [vectors @ (right / (values[:, None] + s)) for s in STRENGTHS]


def iou(found: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class."""
    classes = range(int(truth.max()) + 1)
    both = [((found == c) & (truth == c)).sum() for c in classes]
    either = [((found == c) | (truth == c)).sum() for c in classes]
    return np.array(both) / np.maximum(either, 1)


def paired(ours: list[float], others: list[float]) -> dict[str, Any]:
    """Mean difference over seeds and its 95 % interval (Student's t)."""
    differences = np.array(ours) - np.array(others)
    n, mean = len(differences), float(differences.mean())
    half = float(student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)) if n > 1 else 0
    interval = [round(mean - half, 2), round(mean + half, 2)]
    return {"mean": round(mean, 2), "interval": interval, "seeds": n}


def read_strip(data: Path, number: int) -> Strip:
    """Matrices and labels of a strip of the AIRSAR scene."""
    folder = data / "04_sar_complex" / "airsar_sf_T3" / f"strip{number}"
    file = data / "06_segmentation" / "airsar_polsf_labels" / f"labels_strip{number}.png"
    labels = np.asarray(Image.open(file)).astype(np.int64)

    def element(name: str) -> NDArray[np.float64]:
        return np.fromfile(folder / f"{name}.bin", "<f4").reshape(labels.shape).astype(float)

    matrix = np.zeros((*labels.shape, 3, 3), complex)
    for i in range(3):
        matrix[..., i, i] = element(f"T{i + 1}{i + 1}")
        for j in range(i + 1, 3):
            name = f"T{i + 1}{j + 1}"
            matrix[..., i, j] = element(f"{name}_real") + 1j * element(f"{name}_imag")
            matrix[..., j, i] = matrix[..., i, j].conj()
    return Strip(root_of(matrix), labels)


def root_of(matrix: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """A with A·Aᴴ = T, through the eigenvalues: rounding leaves some slightly negative."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.sqrt(values.clip(min=0))[..., None, :])


if __name__ == "__main__":
    main()
