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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cnn import ResNetPyramid
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tasks_sets import CASES, Case

from model.adapt import freeze as freeze_encoder
from model.batch import Batch
from model.config import TaskConfig
from model.metrics import ConfusionMatrix, RegressionErrors
from model.optim import adamw, learning_rate
from model.tasks.change import ChangeScores
from model.tasks.head import pixel_classes
from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.jobs import objects
from ringmoe_cli.jobs.evaluation import EvaluateRequest, evaluate
from ringmoe_cli.jobs.fewshot import few_shot
from ringmoe_cli.jobs.finetuning import FinetuneRequest, finetune, score, starting_point
from ringmoe_cli.jobs.probe import knn_probe
from ringmoe_cli.jobs.taskdata import TaskData, open_task_data
from ringmoe_cli.machine import use_memory_steadily
from ringmoe_cli.recipe import FinetuneRecipe, load_finetune_recipe

DETECTION_SPLIT = {"spacenet": "held-out"}
SHOTS, EPISODES, SHOT_STEPS = 5, 3, 60


@dataclass(frozen=True)
class Bench:
    """Where everything is, and what is asked."""

    data: Path
    work: Path
    name: str
    pretrained: Path | None

    @property
    def case(self) -> Case:
        """The set's protocol."""
        return CASES[self.name]

    def found(self) -> TaskData:
        """The set, normalised by its own training part."""
        found = open_task_data(self.case.request(self.data, self.work))
        found.training.normalisation = found.held_out.normalisation = found.measure()
        return found

    def recipe(self, *more: str) -> FinetuneRecipe:
        """The task's recipe, with the set's sizes."""
        case = self.case
        said = [f"train.steps={case.updates}", f"train.batch_size={case.batch}",
                "train.save_every=100000", f"task.window={case.window}",
                f"task.modality_dropout={case.dropout}",
                f"task.rotated={str(case.rotated).lower()}"]  # fmt: skip
        return load_finetune_recipe(f"finetune-{case.task}", [*said, *more])

    def run(self, name: str) -> Path:
        """Folder of a training."""
        return self.work / "runs" / f"{self.name}-{name}"


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
    kind = RandomForestRegressor if bench.case.task == "depth" else RandomForestClassifier
    model = kind(100, n_jobs=1, random_state=0, min_samples_leaf=2)
    yield "random forest", classical(bench, model)


def linear(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Logistic or ridge regression on the same features."""
    depth = bench.case.task == "depth"
    model = Ridge() if depth else LogisticRegression(max_iter=300)
    yield "linear", classical(bench, make_pipeline(StandardScaler(), model))


def classical(bench: Bench, model: Any) -> dict[str, Any]:
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


METHODS: Mapping[str, Callable[[Bench], Iterator[tuple[str, dict[str, Any]]]]] = {
    "trivial": trivial, "linear": linear, "forest": forest, "random-full": random_full,
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
