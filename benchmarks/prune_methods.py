"""Every way to make a layer dense, on the same parent and the same calibration tokens.

    python benchmarks/prune_methods.py MODEL DATA >> rows.jsonl     # for each parent
    python benchmarks/prune_methods.py --table rows.jsonl

Feature error: squared error after the block's second LayerNorm over the variance of the parent's
features, on chips that no method has seen; 1 = predicting the mean. The chips are EuroSAT images
that the parent was pre-trained on and the probe does not use. `alone` is the mean over the layers
on the student's own inputs, `path` the error of the tokens after the last layer. Baselines get the
same ridge regression of their second matrix on the same tokens; `raw-` ones do not. Accuracy:
probes on frozen features (EuroSAT pooled, split by md5; Dubai per patch, every third image for
testing), and fine-tuning of everything from the linear probe on, with equal steps.
"""

import argparse
import copy
import hashlib
import json
import tempfile
import time
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

from model.budget import heaviest, layers, pruned
from model.calibration import Calibration, Moe, banks
from model.checkpoint import read_config
from model.config import ModelConfig
from model.encoder import RingMoE
from model.integrate import FitSettings, Task, Tokens, fit, joined, refitted, ridge
from model.merge import FFN, merge
from model.prune import Plan, plan_pruning, sub_model
from model.rewrite import prune_checkpoint, result_config
from ringmoe_cli.jobs.calibration import routing_mass

RATE = 3e-4
"""Of fine-tuning."""
STRENGTHS = 10.0 ** np.arange(-1, 5)
"""Ridge penalties tried by every probe, leaving one out."""
DRAW = 1250
"""EuroSAT images in a draw of a probe's training data."""
DRAWS = 3
TESTED = 1080
"""EuroSAT images for testing."""
CROPS = 12
"""Of each Dubai image."""
SEEN = 240
"""Dubai crops in a draw."""
BASELINES = ("kc", "ka", "ks", "shared", "random", "linear")
RAW = {"dense": ("raw-kc", "raw-ka"), "one": ("raw-shared",)}
"""Without ridge regression; raw-shared beside kept experts is expert pruning as published."""
SCORED = ("fit", "kc", "shared", "raw-kc", "raw-shared")
"""Methods whose accuracy is measured."""
TUNED = ("-", "fit", "kc")
"""Those that are fine-tuned, when dense."""


def experts(task: Task) -> dict[str, list[FFN]]:
    """The parent layer's experts by branch."""
    assert isinstance(task.parent, Moe)
    return {
        name: [
            FFN(*(t[e] for t in (b.fc1.weight, b.fc1.bias, b.fc2.weight, b.fc2.bias)))
            for e in range(len(b))
        ]
        for name, b in banks(task.parent.layer).items()
    }


def linear(tokens: Tokens, task: Task) -> FFN:
    """The best linear map, as an FFN whose neurons stay on the straight part of the GELU."""
    x = joined(tokens)
    y = task.parent(tokens) - (task.kept(tokens) if task.kept else 0)
    weight, bias = ridge(x, y)
    width, far = x.shape[1], float(x.abs().max()) + 10
    fc1, fc2 = torch.zeros(4 * width, width), torch.zeros(width, 4 * width)
    fc1[:width], fc2[:, :width] = torch.eye(width), weight
    return FFN(fc1, torch.full((4 * width,), far), fc2, bias - far * weight.sum(1))


def baseline(name: str, refit: bool = True) -> Callable[..., FFN]:
    """A method without gradient descent."""

    @torch.no_grad()
    def imitate(_: object, tokens: Tokens, __: Tensor, task: Task, ___: FitSettings) -> FFN:
        if name == "linear":
            return linear(tokens, task)
        shared = experts(task)["shared"][0]
        if name == "shared":
            first = shared
        elif name == "random":
            noise = torch.randn(shared.fc1_weight.shape, generator=torch.Generator().manual_seed(0))
            first = shared._replace(fc1_weight=noise * shared.fc1_weight.std())
        else:
            first = merge(experts(task), name)  # type: ignore[arg-type]
        return refitted(first, tokens, task) if refit else first

    return imitate


def student(source: Path, plan: Plan, ffns: dict[str, FFN]) -> RingMoE:
    """The pruned encoder with given dense layers."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Plan(plan.source, plan.chosen, plan.result, "ka" if plan.dense else None, 0, 0)
        out = Path(folder) / "out"
        prune_checkpoint(source, out, bare, result_config(read_config(source), bare, None))
        net = RingMoE.from_pretrained(out)
    for layer, ffn in ffns.items():
        stage, block = (int(n) for n in layer.split("."))
        shared = net.stages[stage].blocks[block].moe.shared
        for slot, part in zip(
            (shared.fc1.weight, shared.fc1.bias, shared.fc2.weight, shared.fc2.bias),
            ffn,
            strict=True,
        ):
            slot.data[0] = part
    return net


def walk(
    source: Path,
    plan: Plan,
    chips: dict[str, Tensor],
    imitate: Callable[..., FFN],
    settings: FitSettings,
) -> tuple[dict[str, FFN], dict[str, float]]:
    """Make every layer; the errors on held-out chips."""
    start = time.process_time()
    walking = Calibration(source, plan, chips, settings, imitate=imitate)
    ffns = {layer: walking(layer) for layer in layers(plan.source)}
    alone = [e.error for e in walking.errors]
    facts = {"alone": float(np.mean(alone)), "worst": max(alone), "path": walking.errors[-1].path}
    return ffns, {**facts, "cpu_s": time.process_time() - start}


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
    parts = {"train": own[: DRAW * DRAWS], "test": unseen[:TESTED], "rest": own[DRAW * DRAWS :]}
    return parts, sorted({f.parent.name for f in files})


def pictures(files: list[Path], normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, 3, H, W)."""
    pixels = np.stack([np.asarray(Image.open(f)) for f in files]).transpose(0, 3, 1, 2)
    return normalise(torch.from_numpy(pixels.astype(np.float32)))


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


def tuned(net: RingMoE, scenes: "Scenes", modality: str, steps: int, seed: int) -> float:
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


def accuracies(
    net: RingMoE, scenes: Scenes, modality: str, steps: int
) -> dict[str, list[float] | float]:
    """Frozen probes for every draw of the training data; fine-tuning, if it has steps."""
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
    result: dict[str, list[float] | float] = {"probe": probes, "segmentation": maps}
    if steps:
        result["tuned"] = tuned(copy.deepcopy(net).train(), scenes, modality, steps, 0)
    return result


def measured(arguments: argparse.Namespace) -> None:
    """All rows of one parent, as lines of JSON."""
    about = read_config(arguments.model)
    modality, config = arguments.modality, about.model
    norm = about.normalisation[modality]
    mean, std = (torch.tensor(v)[:, None, None] for v in (norm.mean, norm.std))
    parts, names = eurosat(arguments.data)

    def normalise(pixels: Tensor) -> Tensor:
        return (pixels - mean) / std

    def classes(files: list[Path]) -> np.ndarray:
        return np.array([names.index(f.parent.name) for f in files])

    train, test = parts["train"], parts["test"]
    scenes = Scenes(
        pictures(train, normalise), classes(train), pictures(test, normalise), classes(test),
        *dubai(arguments.data, normalise, config.image_size),
    )  # fmt: skip
    chips = {modality: pictures(parts["rest"][: arguments.chips], normalise)}
    part = sub_model(config, (modality,))

    def tell(stage: str, method: str, net: RingMoE | None, facts: dict[str, float]) -> None:
        steps = arguments.finetune if method in TUNED and stage != "one" else 0
        scores = accuracies(net, scenes, modality, steps) if net is not None else {}
        row = {"parent": str(arguments.model), "stage": stage, "method": method, **facts, **scores}
        print(json.dumps(row), flush=True)

    stages = arguments.stages.split(",")
    if "sub-model" in stages:
        parent = RingMoE.from_pretrained(arguments.model, modality=modality).float()
        tell("sub-model", "-", parent, {})
    for stage in (s for s in stages if s != "sub-model"):
        plan = plan_of(stage, config, modality, part, arguments.model, chips)
        wanted = arguments.methods or ",".join(("fit", *BASELINES, *RAW[stage]))
        for method in wanted.split(","):
            refit = not method.startswith("raw-")
            imitate = fit if method == "fit" else baseline(method.removeprefix("raw-"), refit)
            ffns, errors = walk(arguments.model, plan, chips, imitate, FitSettings())
            net = student(arguments.model, plan, ffns) if method in SCORED else None
            tell(stage, method, net, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, help="Summarise rows instead.")
    parser.add_argument("--modality", default="opt")
    parser.add_argument("--chips", type=int, default=512)
    parser.add_argument("--stages", default="sub-model,dense,one")
    parser.add_argument("--methods", default="")
    parser.add_argument("--finetune", type=int, default=200, help="Steps; 0: none.")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
    else:
        measured(arguments)


def table(rows: list[dict[str, Any]]) -> str:
    """Means over parents of errors and of what accuracy is lost, with their standard errors."""
    parents = {r["parent"]: r for r in rows if r["stage"] == "sub-model"}
    lines = []
    for stage, method in dict.fromkeys((r["stage"], r["method"]) for r in rows):
        own = [r for r in rows if (r["stage"], r["method"]) == (stage, method)]
        cells = [stage, method, str(len(own))]
        for key in ("alone", "worst", "path", "cpu_s"):
            values = [f"{r[key]:.3g}" for r in own if key in r]
            cells.append(" ".join(values))
        scores = ("probe", "segmentation", "tuned")
        cells += [change([r for r in own if key in r], parents, key) for key in scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def change(rows: list[dict[str, Any]], parents: dict[str, dict[str, Any]], key: str) -> str:
    """Points of accuracy above the sub-model of the same parent: mean ± standard error."""
    if not rows:
        return ""
    if rows[0]["stage"] == "sub-model":
        return " ".join(f"{100 * np.mean(r[key]):.2f}" for r in rows)
    gains = [100 * (np.mean(r[key]) - np.mean(parents[r["parent"]][key])) for r in rows]
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return f"{np.mean(gains):+.2f} ± {error:.2f}"


def plan_of(
    stage: str,
    config: ModelConfig,
    modality: str,
    part: ModelConfig,
    source: Path,
    chips: dict[str, Tensor],
) -> Plan:
    """Dense, or one collaborative expert beside the specialised ones."""
    mass = routing_mass(source, part, chips)
    if stage == "dense":
        return plan_pruning(config, (modality,), None, mass, "fit")
    chosen = pruned(part, heaviest(part, mass, "collaborative", 0.25))
    return Plan(config, chosen, chosen, "fit", 0, 0)


if __name__ == "__main__":
    main()
