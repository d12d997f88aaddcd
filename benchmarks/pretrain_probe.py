"""Does pre-training learn? Frozen nano encoders, read out by a linear probe and by k-NN.

    RINGMOE_DATA=/path/to/data python benchmarks/pretrain_probe.py [--steps N] [--seeds 0 1 2]

Pre-trains on real data of all four modalities: EuroSAT training chips (opt), Sentinel-2 (ms),
AIRSAR coherency matrices (sar-l1), MSTAR training chips (sar-l2). EuroSAT is divided 80/20 by the
md5 of the file name, MSTAR as published (17 degrees for training, 15 for testing); test images
take no part in anything but the score.

Readout, the same for everyone: mean and deviation of the four stages, standardised; ridge
regression to one-hot classes, its strength chosen on a fifth of the training set; k-NN with five
neighbours by cosine. Beside the encoders stand pixels and histograms with the same ridge readout.
One JSON line per set and encoder on stdout.
"""

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image

from model.batch import Batch
from model.config import ModelConfig, PretrainConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.pretrain import MaskedImageModel, with_masks
from model.train import TrainConfig, train
from ringmoe_cli.scene.loader import pretraining_batches, store_normalisation
from ringmoe_cli.scene.tiles import Store, open_store

SIDE = 64
"""Chips the encoder sees; MSTAR's 128-pixel chips are cropped, the target is in the middle."""
SCENE_CHIPS = {"ms": 4, "sar-l1": 4}
"""Chips per step from the scenes; the rest of a batch is half EuroSAT, half MSTAR."""
STRENGTHS = 10.0 ** np.arange(-3, 5)
"""Ridge penalties tried, per training sample."""
FRACTIONS = (1, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 1 / 16)
"""Shares of the training labels."""
NEIGHBOURS = 5


@dataclass(frozen=True)
class Chips:
    """A classification set in memory."""

    modality: str
    train: torch.Tensor
    """(N, C, H, W) normalised."""
    train_labels: NDArray[np.int64]
    test: torch.Tensor
    test_labels: NDArray[np.int64]
    norm: Normalisation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    data = Path(os.environ["RINGMOE_DATA"])
    sets = {"eurosat": eurosat(data), "mstar": mstar(data)}
    for name, chips in sets.items():
        print(json.dumps({"set": name, "encoder": "none", **baselines(chips)}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        stores = scenes(data, Path(folder))
        norms = {c.modality: c.norm for c in sets.values()} | store_normalisation(stores)
        for seed in given.seeds:
            for row in compare(sets, stores, norms, given.steps, given.batch, seed):
                print(json.dumps(row), flush=True)


def compare(
    sets: dict[str, Chips],
    stores: list[Store],
    norms: dict[str, Normalisation],
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[dict[str, object]]:
    """Scores of one seed's encoder before and after pre-training."""
    config = ModelConfig.preset("nano", channels={m: len(n.bands) for m, n in norms.items()})
    torch.manual_seed(seed)
    network = MaskedImageModel(config, PretrainConfig(), norms)
    for name, chips in sets.items():
        yield {"set": name, "encoder": "random", "seed": seed, **readout(network.encoder, chips)}
    loop = TrainConfig(steps=steps, batch_size=batch, lr=1e-3, seed=seed, save_every=10**9)
    start, processor = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train(
            network,
            lambda first: batches(sets, stores, norms, config, batch, seed, first),
            loop,
            Path(folder),
            publish=lambda step: None,
        )
    spent = {
        "minutes": round((time.perf_counter() - start) / 60, 2),
        "cpu_minutes": round((time.process_time() - processor) / 60, 2),
    }
    for name, chips in sets.items():
        scores = readout(network.encoder, chips)
        yield {"set": name, "encoder": "pre-trained", "seed": seed, **spent, **scores}


def batches(
    sets: dict[str, Chips],
    stores: list[Store],
    norms: dict[str, Normalisation],
    config: ModelConfig,
    size: int,
    seed: int,
    first: int,
) -> Iterator[Batch]:
    """Unpaired chips of four modalities with their masks; a pure function of the step."""

    def mixed() -> Iterator[Batch]:
        count = sum(SCENE_CHIPS.values())
        drawn = pretraining_batches(
            stores, {m: norms[m] for m in SCENE_CHIPS}, size=SIDE, batch_size=count,
            weights={m: float(n) for m, n in SCENE_CHIPS.items()}, seed=seed, start_step=first,
        )  # fmt: skip
        for step, batch in enumerate(drawn, start=first):
            rng = np.random.default_rng((seed, 7, step))
            for chips in sets.values():
                picked = rng.integers(0, len(chips.train), (size - count) // len(sets))
                batch.images[chips.modality] = augmented(chips.train[picked], rng)[:, None]
            yield batch

    return with_masks(mixed(), config, PretrainConfig().mask_ratio, seed, first)


def augmented(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Random crops of `SIDE` and mirror images."""
    row, col = (
        rng.integers(0, images.shape[-2] - SIDE + 1),
        rng.integers(0, images.shape[-1] - SIDE + 1),
    )
    images = images[..., row : row + SIDE, col : col + SIDE]
    return images.flip(-1) if rng.random() < 0.5 else images


def centre(images: torch.Tensor) -> torch.Tensor:
    """The middle `SIDE` pixels."""
    row, col = ((n - SIDE) // 2 for n in images.shape[-2:])
    return images[..., row : row + SIDE, col : col + SIDE]


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


def eurosat(data: Path) -> Chips:
    """EuroSAT RGB, a fifth of it by md5 of the file name for testing."""
    root = data / "05_scene_classification" / "eurosat_rgb"
    files = sorted(root.rglob("*.jpg"))
    names = sorted({f.parent.name for f in files})
    labels = np.array([names.index(f.parent.name) for f in files])
    test = np.array([int(hashlib.md5(f.name.encode()).hexdigest(), 16) % 5 == 0 for f in files])
    images = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    return chips_of("opt", ("red", "green", "blue"), images.transpose(0, 3, 1, 2), labels, test)


def mstar(data: Path) -> Chips:
    """MSTAR amplitude in decibels of its 8-bit magnitude, split as published."""
    root = data / "05_scene_classification" / "mstar_soc"
    files = sorted(root.rglob("*.jp*g"))
    labels = np.array([int(f.parent.name) for f in files])
    test = np.array([f.parent.parent.name == "test" for f in files])
    grey = np.stack([np.asarray(Image.open(f).convert("L")) for f in files])
    decibels = 20 * np.log10(grey.astype(np.float32) + 1)
    return chips_of("sar-l2", ("hh",), decibels[:, None], labels, test)


def chips_of(
    modality: str,
    bands: tuple[str, ...],
    images: NDArray[np.generic],
    labels: NDArray[np.int64],
    test: NDArray[np.bool_],
) -> Chips:
    """Standardise by the training images."""
    values = torch.from_numpy(images.astype(np.float32))
    seen = values[torch.from_numpy(~test)]
    mean, std = seen.mean((0, 2, 3)), seen.std((0, 2, 3))
    values = (values - mean[:, None, None]) / std[:, None, None]
    norm = Normalisation(bands, tuple(mean.tolist()), tuple(std.tolist()))
    return Chips(modality, values[~test], labels[~test], values[test], labels[test], norm)


def scenes(data: Path, folder: Path) -> list[Store]:
    """Stores of the multi-spectral and the complex scene."""
    s2 = data / "02_multispectral" / "s2_aberystwyth_10band" / "mosaic_10band.tif"
    t3 = data / "04_sar_complex" / "airsar_sf_T3" / "strip0"
    names = "blue,green,red,rededge1,rededge2,rededge3,nir,nir08,swir16,swir22"
    tile = ["ringmoe", "tile", "--min-valid", "0.5"]
    subprocess.run(
        [*tile, str(s2), "-o", str(folder / "s2.zarr"), "--modality", "ms", "--bands", names,
         "--scale", "0.001,0"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(
        [*tile, str(stacked(t3, folder / "t3.tif")), "-o", str(folder / "t3.zarr")],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return [open_store(folder / "s2.zarr"), open_store(folder / "t3.zarr")]


def stacked(folder: Path, target: Path) -> Path:
    """The nine elements of a PolSARpro T3 folder as the bands of one file."""
    files = sorted(folder.glob("*.bin"))
    with rasterio.open(files[0]) as first:
        profile = first.profile | {"driver": "GTiff", "count": len(files)}
    with rasterio.open(target, "w", **profile) as out:
        for number, file in enumerate(files, start=1):
            with rasterio.open(file) as element:
                out.write(element.read(1), number)
            out.set_band_description(number, file.stem)
    return target


if __name__ == "__main__":
    main()
