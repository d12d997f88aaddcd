"""Every way to make a layer dense, on the same parent and the same calibration tokens.

    python benchmarks/prune_methods.py MODEL DATA [--tiles a.zarr --tiles b.zarr] [--modality opt]

Feature error: squared error after the block's second LayerNorm over the variance of the parent's
features, on chips that no method has seen; 1 = predicting the mean. Without --tiles the chips are
EuroSAT images that the parent was pre-trained on and the probe does not use. `alone` is the mean
over the layers on the student's own inputs, `path` the error of the tokens after the last layer.
Baselines get the same ridge regression of their second matrix on the same tokens. Accuracy: probes
on frozen features (EuroSAT pooled; Dubai per patch, images 0-31 against 32-47), and a short
fine-tuning.
"""

import argparse
import copy
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

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
from ringmoe_cli.jobs.calibration import calibration_chips, routing_mass

STRENGTHS = 10.0 ** np.arange(-1, 5)
"""Ridge penalties tried by every probe, leaving one out."""
CHIPS = 2200
"""Of EuroSAT: half to test, a third to train the probe."""
BASELINES = ("ka", "kc", "ks", "shared", "random", "linear")


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


@torch.no_grad()
def pooled(net: RingMoE, images: Tensor, modality: str) -> np.ndarray:
    """Mean and deviation of the four stages, (N, 30D)."""
    out = []
    for part in images.split(64):
        features = net({modality: part})[modality]
        moments = [m for f in features for m in (f.mean((2, 3)), f.std((2, 3)))]
        out.append(torch.cat(moments, dim=1))
    return torch.cat(out).numpy()


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


def divided(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """EuroSAT images of pre-training and those kept from it (`pretrain_data.py`), shuffled."""
    mixed = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    kept = {f for f in mixed if int(hashlib.md5(f.name.encode()).hexdigest(), 16) % 5 == 0}
    return [f for f in mixed if f not in kept], [f for f in mixed if f in kept]


def calibration(data: Path, count: int) -> Tensor:
    """Images of pre-training that `eurosat` leaves."""
    files = sorted((data / "05_scene_classification" / "eurosat_rgb").glob("*/*.jpg"))
    some = divided(files)[0][CHIPS : CHIPS + count]
    pixels = np.stack([np.asarray(Image.open(f)) for f in some]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels.astype(np.float32))


def eurosat(data: Path, normalise: Callable[[Tensor], Tensor]) -> tuple[Tensor, np.ndarray]:
    """Some chips and their classes."""
    files = sorted((data / "05_scene_classification" / "eurosat_rgb").glob("*/*.jpg"))
    names = sorted({f.parent.name for f in files})
    own, unseen = divided(files)
    some = [*unseen[: CHIPS // 2], *own[: CHIPS - CHIPS // 2]]
    pixels = np.stack([np.asarray(Image.open(f)) for f in some]).transpose(0, 3, 1, 2)
    labels = np.array([names.index(f.parent.name) for f in some])
    return normalise(torch.from_numpy(pixels.astype(np.float32))), labels


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
        for _ in range(6):
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


def finetuned(
    net: RingMoE,
    sets: tuple[Tensor, np.ndarray, Tensor, np.ndarray],
    modality: str,
    steps: int,
    seed: int,
) -> float:
    """Accuracy after training the whole network with a linear head."""
    x, labels, test, truth = sets
    torch.manual_seed(seed)
    head = torch.nn.Linear(net.config.widths[-1], int(labels.max()) + 1)
    optimiser = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=5e-4)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 5e-4 * (1 + np.cos(np.pi * step / steps)) / 2
        rows = rng.integers(0, len(x), 32)
        logits = head(net({modality: x[rows]})[modality][-1].mean((2, 3)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[rows]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*net.parameters(), *head.parameters()], 5.0)
        optimiser.step()
    with torch.no_grad():
        found = [
            head(net({modality: p})[modality][-1].mean((2, 3))).argmax(1) for p in test.split(64)
        ]
    return float((torch.cat(found).numpy() == truth).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiles", type=Path, action="append", default=[])
    parser.add_argument("--modality", default="opt")
    parser.add_argument("--chips", type=int, default=512)
    parser.add_argument("--steps", type=int, default=600, help="Of the fit, per layer.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stages", default="dense,one")
    parser.add_argument("--methods", default=f"fit,raw-ka,raw-kc,raw-shared,{','.join(BASELINES)}")
    parser.add_argument("--finetune", type=int, default=0, help="Steps; 0: none.")
    arguments = parser.parse_args()
    about = read_config(arguments.model)
    modality, config = arguments.modality, about.model
    part = sub_model(config, (modality,))

    def normalise(pixels: Tensor) -> Tensor:
        return (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)

    if arguments.tiles:
        chips = calibration_chips(arguments.tiles, about, (modality,), arguments.chips)
    else:
        chips = {modality: normalise(calibration(arguments.data, arguments.chips))}
    sets = eurosat(arguments.data, normalise)
    crops, truth, training = dubai(arguments.data, normalise, config.image_size)
    parent = RingMoE.from_pretrained(arguments.model, modality=modality).float()
    scores = accuracies(parent, sets, (crops, truth, training), arguments)
    print(json.dumps({"stage": "sub-model", "method": "-", **scores}), flush=True)
    for stage in arguments.stages.split(","):
        plan = plan_of(stage, config, modality, part, arguments.model, chips)
        for method in arguments.methods.split(","):
            imitate = (
                fit
                if method == "fit"
                else baseline(method.removeprefix("raw-"), not method.startswith("raw-"))
            )
            ffns, errors = walk(arguments.model, plan, chips, imitate, FitSettings(arguments.steps))
            net = student(arguments.model, plan, ffns)
            scores = accuracies(net, sets, (crops, truth, training), arguments)
            print(json.dumps({"stage": stage, "method": method, **errors, **scores}), flush=True)


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


def accuracies(
    net: RingMoE,
    sets: tuple[Tensor, np.ndarray],
    scenes: tuple[Tensor, np.ndarray, np.ndarray],
    arguments: argparse.Namespace,
) -> dict[str, list[float]]:
    """Frozen probes for every draw of the training data; fine-tuning for the first."""
    modality = arguments.modality
    x, labels = sets
    test = np.arange(CHIPS) < CHIPS // 2
    crops, truth, training = scenes
    features = pooled(net, x, modality)
    patches = per_patch(net, crops, modality).reshape(len(crops), -1, 15 * net.config.embed_dim)
    truth = truth.reshape(len(truth), -1)[:, ::4]
    result: dict[str, list[float]] = {"probe": [], "segmentation": []}
    for seed in range(arguments.seeds):
        rng = np.random.default_rng(seed)
        own = rng.permutation(np.flatnonzero(~test))[: CHIPS // 3]
        found = probe(features[own], labels[own], features[test])
        result["probe"].append(float((found == labels[test]).mean()))
        few = rng.permutation(np.flatnonzero(training))[:120]
        seen, asked = truth[few] >= 0, truth[~training] >= 0
        classes = probe(patches[few][seen], truth[few][seen], patches[~training][asked])
        result["segmentation"].append(miou(classes, truth[~training][asked]))
        if arguments.finetune and seed == 0:
            whole = (x[own], labels[own], x[test], labels[test])
            score = finetuned(copy.deepcopy(net), whole, modality, arguments.finetune, seed)
            result.setdefault("finetuned", []).append(score)
    return {k: [round(v, 4) for v in values] for k, values in result.items()}


if __name__ == "__main__":
    sys.exit(main())
