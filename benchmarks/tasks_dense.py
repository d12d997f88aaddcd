"""One labelled set, one method, one line: pre-trained or random, full or frozen, CNN, forest.

    python benchmarks/tasks_dense.py DATA WORK SET METHOD [PRETRAINED]

SET is a name of `tasks_sets.CASES`, METHOD of `METHODS`. Every result is printed as a line of JSON;
`tasks_queue.py` runs them all. Trainings have the recipe's settings and a fixed number of
updates. The CNN (a ResNet-18 pyramid under the same head, as many parameters as nano) gets the CPU
seconds of the longest of our trainings and its share of the pre-training.
Nothing is chosen on a test split.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cnn import ResNetPyramid
from tasks_classical import CLASSICAL
from tasks_sets import CASES, Bench

from model.adapt import freeze as freeze_encoder
from model.batch import Batch
from model.config import TaskConfig
from model.optim import adamw, learning_rate
from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.jobs import objects
from ringmoe_cli.jobs.evaluation import EvaluateRequest, evaluate
from ringmoe_cli.jobs.fewshot import few_shot
from ringmoe_cli.jobs.finetuning import FinetuneRequest, finetune, score, starting_point
from ringmoe_cli.jobs.probe import knn_probe
from ringmoe_cli.jobs.taskdata import TaskData, open_task_data
from ringmoe_cli.machine import use_memory_steadily
from ringmoe_cli.recipe import FinetuneRecipe

DETECTION_SPLIT = {"spacenet": "held-out"}
SHOTS, EPISODES, SHOT_STEPS = 5, 3, 60


def ours(bench: Bench, init: Path | None, *more: str, name: str) -> dict[str, Any]:
    """`ringmoe finetune`, and for boxes `ringmoe evaluate`."""
    run, start = bench.run(name), time.process_time()
    request = bench.case.request(bench.data, bench.work)
    asked = FinetuneRequest(request, run, bench.recipe(*more), init, overwrite=True)
    scores = finetune(asked)
    seconds = time.process_time() - start
    shutil.rmtree(run / "state", ignore_errors=True)
    if bench.case.task == "detection":
        split = DETECTION_SPLIT.get(bench.name, "val")
        scores = evaluate(EvaluateRequest(request, run, run / "evaluation", split, worst=0))
    return {**scores, "cpu": seconds, "steps": bench.case.updates}


def full(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything is trained, from the pre-trained weights."""
    yield "pre-trained, full", ours(bench, bench.pretrained, name="pre-full")


def frozen(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """The head is trained on the pre-trained encoder."""
    scores = ours(bench, bench.pretrained, "task.freeze=true", name="pre-frozen")
    yield "pre-trained, frozen", scores


def convpass(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Head and narrow bypasses are trained."""
    scores = ours(bench, bench.pretrained, "task.convpass=16", name="pre-convpass")
    yield "pre-trained, Convpass", scores


def random_full(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything is trained, from random weights."""
    yield "random start, full", ours(bench, None, name="random-full")


def random_frozen(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """The head is trained on an encoder of random weights."""
    yield "random start, frozen", ours(bench, None, "task.freeze=true", name="random-frozen")


def shots(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """A few labelled windows per class, several draws, random against pre-trained."""
    for name, init in (("random start", None), ("pre-trained", bench.pretrained)):
        recipe = bench.recipe(f"train.steps={SHOT_STEPS}")
        request = bench.case.request(bench.data, bench.work)
        run, start = bench.run(f"shots-{name.split()[0]}"), time.process_time()
        found = few_shot(FinetuneRequest(request, run, recipe, init), SHOTS, EPISODES)
        found["cpu"] = time.process_time() - start
        yield f"{SHOTS} windows per class, {name}, mean of {EPISODES} draws", found


def neighbours(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Nearest training windows by the pre-trained features."""
    assert bench.pretrained
    start = time.process_time()
    found = knn_probe(bench.case.request(bench.data, bench.work), bench.pretrained, 20)
    yield "20-NN of pre-trained features", {**found, "cpu": time.process_time() - start}


def missing(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fused model without one of its sensors."""
    run = bench.run("pre-full" if bench.run("pre-full").exists() else "random-full")
    for alone in bench.case.modalities:
        asked = replace(bench.case.request(bench.data, bench.work), modalities=(alone,))
        out = bench.run(f"only-{alone}")
        found = evaluate(EvaluateRequest(asked, run, out, "held-out", worst=0))
        yield f"fused model ({run.name.split('-', 2)[-1]}), only {alone}", found


def transfer(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """A head taught by one modality of a frozen encoder, asked about each; and neighbours."""
    assert bench.pretrained
    for taught in bench.case.modalities:
        network, found, seconds = taught_by(bench, taught)
        for m in bench.case.modalities:
            batches = (only(b, m) for b in found.held_out.once(bench.case.batch))
            scores = {**score(network, batches), "cpu": seconds}
            yield f"frozen head taught {taught}, asked {m}", scores
            request = bench.case.request(bench.data, bench.work)
            near = knn_probe(request, bench.pretrained, 5, across=(taught, m))
            yield f"5-NN of windows, remembers {taught}, asked {m}", {**near, "cpu": 0.0}


def taught_by(bench: Bench, taught: str) -> tuple[TaskNetwork, TaskData, float]:
    """A head for a frozen encoder that sees one modality only."""
    torch.manual_seed(0)
    request = bench.case.request(bench.data, bench.work)
    found = open_task_data(request)
    asked = FinetuneRequest(request, bench.work, FinetuneRecipe(), bench.pretrained)
    encoder, normalisation = starting_point(asked, found)
    found.training.normalisation = found.held_out.normalisation = normalisation
    freeze_encoder(encoder)
    task = TaskConfig(bench.case.task, found.classes, modalities=bench.case.modalities, channels=32)
    network = TaskNetwork(encoder, task)
    batches = (only(b, taught) for b in found.training.training(bench.case.batch, 0))
    seconds = learn(network, batches, bench.case.updates)
    return network.eval(), found, seconds


def only(batch: Batch, modality: str) -> Batch:
    """A batch with one of its modalities."""
    valid = {m: v for m, v in batch.valid.items() if m == modality}
    return replace(batch, images={modality: batch.images[modality]}, valid=valid)


def learn(network: TaskNetwork, batches: Iterable[Batch], steps: int, peak: float = 3e-3) -> float:
    """So many updates; returns CPU seconds."""
    optimiser, start = adamw(network.train(), peak, 0.05), time.process_time()
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak, 5e-7, 20)
        optimiser.zero_grad()
        network.loss(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
    return time.process_time() - start


def cnn(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same head on a ResNet-18, for the CPU seconds of our longest row."""
    torch.manual_seed(0)
    case, found = bench.case, bench.found()
    channels = {m: len(b) for m, b in found.training.channels.items()}
    task = TaskConfig(
        case.task, found.classes, modalities=tuple(channels), channels=32, window=case.window,
        rotated=case.rotated, value_range=found.value_range, unit=found.unit,
    )  # fmt: skip
    network = TaskNetwork(ResNetPyramid(channels), task, modality_dropout=case.dropout)
    each = learn(network, found.training.training(case.batch, 1), 8, 1e-5) / 8
    seconds = longest(bench) + pretraining_share(bench)
    torch.manual_seed(0)
    network = TaskNetwork(ResNetPyramid(channels), task, modality_dropout=case.dropout)
    steps = max(20, round(seconds / each))
    spent = learn(network, found.training.training(case.batch, 0), steps, 1e-3)
    if case.task == "detection":
        images = objects.whole_images(found.held_out)
        settings = objects.settings_of(case.window)
        if images:
            metric, _ = objects.score_images(
                network.eval(), images, found.held_out.normalisation, settings
            )
            scores = metric.compute()
        else:
            scores = score(network.eval(), found.held_out.once(case.batch))
    else:
        scores = score(network.eval(), found.held_out.once(case.batch))
    yield "ResNet-18, same CPU seconds", {**scores, "cpu": spent, "steps": steps}


def rows_of(work: Path) -> list[dict[str, Any]]:
    """Results so far."""
    path = work / "rows.jsonl"
    return [json.loads(r) for r in path.read_text().splitlines()] if path.exists() else []


def longest(bench: Bench) -> float:
    """CPU seconds of our longest training on this set."""
    mine = [r["cpu"] for r in rows_of(bench.work)
            if r.get("set") == bench.name and ", full" in r.get("method", "")]  # fmt: skip
    return max(mine, default=60.0)


def pretraining_share(bench: Bench) -> float:
    """CPU seconds of pre-training, divided by the sets that start from it."""
    path = bench.work / "pretrain.json"
    return float(json.loads(path.read_text())["cpu"]) / len(CASES) if path.exists() else 0.0


METHODS: Mapping[str, Callable[[Bench], Iterator[tuple[str, dict[str, Any]]]]] = {
    **CLASSICAL, "random-full": random_full,
    "random-frozen": random_frozen, "full": full, "frozen": frozen, "convpass": convpass,
    "cnn": cnn, "missing": missing, "transfer": transfer, "shots": shots, "knn": neighbours,
}  # fmt: skip
KEPT = ("accuracy", "miou", "f1", "kappa", "balanced_accuracy", "change_f1", "change_iou", "ece",
        "cpu", "steps", "rmse", "mae", "r2", "map", "map50", "recall", "ap50_per_class",
        "accuracy_margin95", "miou_margin95", "iou_per_class")  # fmt: skip


def main() -> None:
    """One method on one set."""
    data, work, name, method = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    pretrained = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    console.State.quiet = True
    use_memory_steadily()
    for title, scores in METHODS[method](Bench(data, work, name, pretrained)):
        row = {"set": name, "method": title, **{k: scores[k] for k in KEPT if k in scores}}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
