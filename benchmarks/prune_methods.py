"""Every way to make a layer dense, on the same parent and the same calibration tokens.

    python benchmarks/prune_methods.py MODEL DATA STUDENTS >> errors.jsonl     # for each parent
    python benchmarks/prune_methods.py --table errors.jsonl

Feature error: squared error after the block's second LayerNorm over the variance of the parent's
features, on chips that no method has seen; 1 = predicting the mean. The chips are EuroSAT images
that the parent was pre-trained on and no probe uses. `alone` is the mean over the layers on the
student's own inputs, `path` the error of the tokens after the last layer. Baselines get the same
ridge regression of their second matrix on the same tokens; `raw-` ones do not. The students are
kept as checkpoints under STUDENTS, for `prune_accuracy.py`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_accuracy import eurosat, normaliser, pictures
from torch import Tensor

from model.budget import heaviest, layers, pruned
from model.calibration import Calibration, Moe, banks
from model.checkpoint import disk_tensors, read_config, save_checkpoint
from model.config import ModelConfig
from model.encoder import RingMoE
from model.integrate import FitSettings, Task, Tokens, fit, joined, refitted, ridge
from model.merge import FFN, merge
from model.prune import Plan, plan_pruning, sub_model
from model.rewrite import prune_checkpoint, result_config
from ringmoe_cli.jobs.calibration import routing_mass

BASELINES = ("kc", "ka", "ks", "shared", "random", "linear")
RAW = {"dense": ("raw-kc", "raw-ka"), "one": ("raw-shared",)}
"""Without ridge regression; raw-shared beside kept experts is expert pruning as published."""


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


def keep(source: Path, plan: Plan, ffns: dict[str, FFN], target: Path) -> None:
    """Save the pruned encoder with given dense layers."""
    bare = Plan(plan.source, plan.chosen, plan.result, "ka" if plan.dense else None, 0, 0)
    about = result_config(read_config(source), bare, None)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prune_checkpoint(source, out, bare, about)
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
    about = replace(about, kind="encoder", pretraining=None)
    save_checkpoint(target, about, [(f"encoder.{n}", t) for n, t in disk_tensors(net)])


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


def measured(arguments: argparse.Namespace) -> None:
    """All rows of one parent, as lines of JSON."""
    about, modality = read_config(arguments.model), arguments.modality
    own = pictures(eurosat(arguments.data)[0]["rest"][: arguments.chips])
    chips = {modality: normaliser(about, modality)(own)}
    part = sub_model(about.model, (modality,))
    for stage in arguments.stages.split(","):
        plan = plan_of(stage, about.model, modality, part, arguments.model, chips)
        wanted = arguments.methods or ",".join(("fit", *BASELINES, *RAW[stage]))
        for method in wanted.split(","):
            refit = not method.startswith("raw-")
            imitate = fit if method == "fit" else baseline(method.removeprefix("raw-"), refit)
            ffns, errors = walk(arguments.model, plan, chips, imitate, FitSettings())
            name = f"{arguments.model.name}-{stage}-{method}"
            keep(arguments.model, plan, ffns, arguments.students / name)
            row = {"parent": arguments.model.name, "stage": stage, "method": method, **errors}
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("students", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, help="Summarise rows instead.")
    parser.add_argument("--modality", default="opt")
    parser.add_argument("--chips", type=int, default=512)
    parser.add_argument("--stages", default="dense,one")
    parser.add_argument("--methods", default="")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in arguments.table.read_text().splitlines()]))
    else:
        measured(arguments)


def table(rows: list[dict[str, Any]]) -> str:
    """Errors of all parents, in their order, one line for a method."""
    lines = []
    for stage, method in dict.fromkeys((r["stage"], r["method"]) for r in rows):
        own = [r for r in rows if (r["stage"], r["method"]) == (stage, method)]
        keys = ("alone", "worst", "path", "cpu_s")
        cells = [" ".join(f"{r[key]:.3g}" for r in own) for key in keys]
        lines.append("| " + " | ".join([stage, method, *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
