"""How accurate encoders are before and after pruning: frozen probes, and fine-tuning.

    python benchmarks/prune_accuracy.py DATA MODEL STUDENT… [--finetune 200] >> accuracy.jsonl
    python benchmarks/prune_accuracy.py --table accuracy.jsonl

Probes: ridge classifiers on frozen features; EuroSAT pooled, split by md5 as in `pretrain_data.py`;
Dubai per patch, every third image for testing. Fine-tuning trains everything from the linear probe
on, with equal steps. Students are named PARENT-STAGE-METHOD (`prune_methods.py`).
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from model.checkpoint import CheckpointConfig, read_config
from model.encoder import RingMoE

RATE = 3e-4
"""Of fine-tuning."""
STRENGTHS = 10.0 ** np.arange(-1, 5)
"""Ridge penalties tried by every probe, leaving one out."""
DRAW = 1250
"""EuroSAT images in a draw of a probe's training data."""
DRAWS = 3
CROPS = 12
"""Of each Dubai image."""
SEEN = 240
"""Dubai crops in a draw."""


def moments(net: RingMoE, images: Tensor, modality: str) -> Tensor:
    """Mean and deviation of the four stages, (N, 30D)."""
    features = net({modality: images})[modality]
    return torch.cat([m for f in features for m in (f.mean((2, 3)), f.std((2, 3)))], dim=1)


@torch.no_grad()
def pooled(net: RingMoE, images: Tensor, modality: str) -> np.ndarray:
    """The same without gradients, in parts."""
    return torch.cat([moments(net, part, modality) for part in images.split(64)]).numpy()


@torch.no_grad()
def per_patch(net: RingMoE, images: Tensor, modality: str) -> np.ndarray:
    """All stages at every fourth patch, (N, H/4·W/4/4, 15D)."""
    out = []
    for part in images.split(32):
        features = net({modality: part})[modality]
        size = features[0].shape[-2:]
        maps = [torch.nn.functional.interpolate(f, size, mode="bilinear") for f in features]
        out.append(torch.cat(maps, dim=1).movedim(1, -1).flatten(1, 2)[:, ::4])
    return torch.cat(out).numpy()


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Classes that a ridge classifier on frozen features predicts."""
    scale = StandardScaler().fit(train)
    model = RidgeClassifierCV(alphas=STRENGTHS).fit(scale.transform(train), labels)
    return model.predict(scale.transform(test))


def eurosat(data: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Files to calibrate with, to train probes and to test (`pretrain_data.py`); the classes."""
    files = sorted((data / "05_scene_classification" / "eurosat_rgb").glob("*/*.jpg"))
    mixed = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    kept = {f for f in mixed if int(hashlib.md5(f.name.encode()).hexdigest(), 16) % 5 == 0}
    own = [f for f in mixed if f not in kept]
    unseen = [f for f in mixed if f in kept]
    parts = {"train": own[: DRAW * DRAWS], "test": unseen, "rest": own[DRAW * DRAWS :]}
    return parts, sorted({f.parent.name for f in files})


def pictures(files: list[Path]) -> Tensor:
    """(B, 3, H, W), grey values."""
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.astype(np.float32))


def normaliser(about: CheckpointConfig, modality: str) -> Callable[[Tensor], Tensor]:
    """From grey values to the input of a model."""
    norm = about.normalisation[modality]
    mean, std = (torch.tensor(v)[:, None, None] for v in (norm.mean, norm.std))
    return lambda pixels: (pixels - mean) / std


DUBAI = ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41))


def dubai(
    data: Path, normalise: Callable[[Tensor], Tensor], side: int
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Crops, classes per patch (-1: none) and whether a crop is for training."""
    folder = data / "06_segmentation" / "dubai"
    images, classes, training = [], [], []
    rng = np.random.default_rng(0)
    for number, mask in enumerate(sorted(folder.rglob("*.png"))):
        picture = next(
            p for p in folder.rglob(mask.stem + ".jpg") if p.parent.parent == mask.parent.parent
        )
        x, m = (
            np.asarray(Image.open(picture).convert("RGB")),
            np.asarray(Image.open(mask).convert("RGB")),
        )
        for _ in range(CROPS):
            r, c = rng.integers(0, x.shape[0] - side + 1), rng.integers(0, x.shape[1] - side + 1)
            images.append(x[r : r + side, c : c + side].transpose(2, 0, 1))
            colours = m[r + 2 : r + side : 4, c + 2 : c + side : 4]
            found = np.full(colours.shape[:2], -1)
            for k, colour in enumerate(DUBAI):
                found[(colours == colour).all(-1)] = k
            classes.append(found)
            training.append(number % 3 != 2)
    return (
        normalise(torch.from_numpy(np.stack(images).astype(np.float32))),
        np.stack(classes),
        np.array(training),
    )


def miou(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean intersection over union of the classes that occur."""
    scores = []
    for k in np.unique(truth):
        union = ((found == k) | (truth == k)).sum()
        scores.append(((found == k) & (truth == k)).sum() / union)
    return float(np.mean(scores))


@dataclass(frozen=True)
class Scenes:
    """What accuracy is measured on."""

    train: Tensor
    labels: np.ndarray
    test: Tensor
    truth: np.ndarray
    crops: Tensor
    """Of Dubai."""
    classes: np.ndarray
    """Of their patches, -1: none."""
    training: np.ndarray
    """Whether a crop is for training."""


def tuned(net: RingMoE, scenes: Scenes, modality: str, steps: int, seed: int) -> float:
    """Accuracy after training everything from the linear probe on."""
    train = pooled(net, scenes.train, modality)
    scale = StandardScaler().fit(train)
    model = RidgeClassifierCV(alphas=STRENGTHS).fit(scale.transform(train), scenes.labels)
    head = torch.nn.Linear(train.shape[1], len(model.classes_))
    weight = model.coef_ / scale.scale_
    with torch.no_grad():  # logits from -3 to 3 where a ridge classifier says -1 to 1
        head.weight.copy_(torch.from_numpy(3 * weight))
        head.bias.copy_(torch.from_numpy(3 * (model.intercept_ - weight @ scale.mean_)))
    groups = [{"params": net.parameters(), "lr": RATE}, {"params": head.parameters(), "lr": RATE}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 + np.cos(np.pi * step / steps)) / 2
        rows = rng.integers(0, len(scenes.train), 32)
        logits = head(moments(net, scenes.train[rows], modality))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(scenes.labels[rows]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
    with torch.no_grad():
        found = [head(moments(net, p, modality)).argmax(1) for p in scenes.test.split(64)]
    return float((torch.cat(found).numpy() == scenes.truth).mean())


def probed(net: RingMoE, scenes: Scenes, modality: str) -> dict[str, list[float]]:
    """Frozen probes, for every draw of the training data."""
    train, test = (pooled(net, x, modality) for x in (scenes.train, scenes.test))
    patches = per_patch(net, scenes.crops, modality)
    patches = patches.reshape(len(scenes.crops), -1, patches.shape[-1])
    classes = scenes.classes.reshape(len(scenes.classes), -1)[:, ::4]
    probes, maps = [], []
    for draw in range(DRAWS):
        own = slice(draw * DRAW, (draw + 1) * DRAW)
        found = probe(train[own], scenes.labels[own], test)
        probes.append(float((found == scenes.truth).mean()))
        rng = np.random.default_rng(draw)
        few = rng.permutation(np.flatnonzero(scenes.training))[:SEEN]
        seen, asked = classes[few] >= 0, classes[~scenes.training] >= 0
        found = probe(patches[few][seen], classes[few][seen], patches[~scenes.training][asked])
        maps.append(miou(found, classes[~scenes.training][asked]))
    return {"probe": probes, "segmentation": maps}


def scenes_of(data: Path, about: CheckpointConfig, modality: str) -> Scenes:
    """Read and normalise everything."""
    normalise = normaliser(about, modality)
    parts, names = eurosat(data)
    train, test = (normalise(pictures(parts[part])) for part in ("train", "test"))
    labels, truth = (
        np.array([names.index(f.parent.name) for f in parts[part]]) for part in ("train", "test")
    )
    crops = dubai(data, normalise, about.model.image_size)
    return Scenes(train, labels, test, truth, *crops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--table", type=Path, help="Summarise rows instead.")
    parser.add_argument("--modality", default="opt")
    parser.add_argument("--finetune", type=int, default=0, help="Steps; 0: frozen probes.")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
        return
    modality = arguments.modality
    for path in arguments.models:
        scenes = scenes_of(arguments.data, read_config(path), modality)
        net = RingMoE.from_pretrained(path, modality=modality).float()
        if arguments.finetune:
            facts: dict[str, Any] = {"tuned": tuned(net, scenes, modality, arguments.finetune, 0)}
        else:
            facts = probed(net, scenes, modality)
        parent, _, method = path.name.partition("-")
        print(json.dumps({"parent": parent, "method": method, **facts}), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over parents of the points that a method gains or loses, with standard errors."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [change(rows, method, key) for key in ("probe", "segmentation", "tuned")]
        lines.append("| " + " | ".join([method or "sub-model", *cells]) + " |")
    return "\n".join(lines)


def change(rows: list[dict[str, Any]], method: str, key: str) -> str:
    """Percent of every parent, or points above it: mean ± standard error, (each parent)."""
    parents = {r["parent"]: np.mean(r[key]) for r in rows if not r["method"] and key in r}
    own = [r for r in rows if r["method"] == method and key in r]
    if not method:
        return " ".join(f"{100 * value:.2f}" for value in parents.values())
    gains = [100 * (np.mean(r[key]) - parents[r["parent"]]) for r in own]
    if not gains:
        return ""
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{np.mean(gains):+.2f} ± {error:.2f} ({' '.join(f'{g:+.2f}' for g in gains)})"


if __name__ == "__main__":
    main()
