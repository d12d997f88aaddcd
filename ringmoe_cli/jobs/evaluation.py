"""How good is it: scores per class, calibration, areas with intervals, the worst windows."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch, Prediction
from model.checkpoint import CheckpointConfig
from model.metrics import IGNORE, area_estimates
from model.tasks.head import pixel_classes, seen
from model.tasks.network import TaskNetwork, load_task_network
from ringmoe_cli import console
from ringmoe_cli.errors import CheckpointError, LabelError
from ringmoe_cli.jobs.scores import write_evaluation
from ringmoe_cli.jobs.taskdata import BOXES, DataRequest, Windows, find_items, open_windows
from ringmoe_cli.scene.tiles import is_store

SMALLEST = 0.2
"""Share of labelled pixels a window needs to count among the worst."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What the user asks for."""

    data: DataRequest
    """Images and labels; task and size are the model's."""
    model: Path
    """Fine-tuned checkpoint."""
    output: Path
    """Folder for scores and pictures."""
    split: str = "auto"
    """held-out, val, test, all, or auto: test if there is one, held-out for training data."""
    device: str = "cpu"
    """Where to compute."""
    batch: int = 16
    """Windows per batch."""
    worst: int = 6
    """Pictures of so many of the worst windows."""


@dataclass
class Window:
    """A window that went wrong, for a picture."""

    key: str
    """Where it is."""
    error: float
    """Share of wrong pixels, or mean absolute error."""
    image: NDArray[np.float32]
    """(C, H, W), normalised."""
    truth: NDArray[Any]
    """(H, W) classes or values."""
    answer: NDArray[Any]
    """(H, W) likewise."""


@dataclass
class Gathered:
    """What is kept of the batches that went by."""

    metric: Any
    """The task's."""
    classes: int
    """Their number; 0 for values."""
    keep: int
    """How many windows to keep."""
    mapped: NDArray[np.int64] = field(init=False)
    """(K,) valid pixels, or windows, that the model gives to each class."""
    worst: list[tuple[float, int, Window]] = field(default_factory=list)
    """Heap of the windows with the largest errors."""
    count: int = 0
    """Windows so far."""

    def __post_init__(self) -> None:
        self.mapped = np.zeros(self.classes, np.int64)

    def add(self, prediction: Prediction, batch: Batch) -> None:
        """Count one batch."""
        self.metric.update(prediction, batch)
        if prediction.scores is not None:
            self.mapped += self.histogram(prediction.scores.argmax(1))
        if prediction.dense is None:
            return
        if self.classes:
            answer = prediction.dense.argmax(1)
            self.mapped += self.histogram(answer[seen(batch)])
            truth = pixel_classes(batch)
            wrong, known = (answer != truth).float(), truth != IGNORE
        else:
            answer, truth = prediction.dense[:, 0], batch.targets["values"][:, 0]
            known = torch.isfinite(truth) & seen(batch)
            wrong = (answer - truth).abs().nan_to_num()
        errors = (wrong * known).flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)
        shares = known.float().flatten(1).mean(1)
        for row, (error, share) in enumerate(zip(errors.tolist(), shares.tolist(), strict=True)):
            if share >= SMALLEST:
                self.remember(error, batch, row, truth[row], answer[row])

    def histogram(self, classes: torch.Tensor) -> NDArray[np.int64]:
        """How often each class occurs."""
        return np.asarray(torch.bincount(classes.flatten().cpu(), minlength=self.classes).numpy())

    def remember(
        self, error: float, batch: Batch, row: int, truth: torch.Tensor, answer: torch.Tensor
    ) -> None:
        """Keep a window if it is among the worst so far."""
        self.count += 1
        if len(self.worst) == self.keep and (not self.keep or error <= self.worst[0][0]):
            return
        image = next(iter(batch.images.values()))[row, -1].cpu().numpy()
        key = batch.keys[row] if batch.keys else str(self.count)
        window = Window(key, error, image, truth.cpu().numpy(), answer.cpu().numpy())
        push = heapq.heappush if len(self.worst) < self.keep else heapq.heapreplace
        push(self.worst, (error, self.count, window))


def evaluate(request: EvaluateRequest) -> dict[str, Any]:
    """Score a fine-tuned model on labelled data and write everything down.

    Returns:
        The scores; `evaluation.json`, `.csv` and pictures are in the output folder.

    Raises:
        CheckpointError: if the model is no task model or reads other bands.
        LabelError: if the data has no labels, or other classes.
    """
    network, config = load_task_network(request.model)
    assert config.task is not None
    task = config.task
    data = replace(
        request.data, task=task.name, size=task.window, rotated=task.rotated,
        modalities=request.data.modalities or task.modalities,
    )  # fmt: skip
    windows, names, split = chosen_windows(replace(request, data=data), config)
    table = translation(names, config.task.classes)
    windows.normalisation = fitting(config, windows)
    gathered = Gathered(
        network.to(request.device).head.metric(), len(config.task.classes), request.worst
    )
    if not in_whole_images(network, windows, gathered, request):
        run(network, windows, table, gathered, request)
    scores: dict[str, Any] = gathered.metric.compute()
    scores |= {"task": config.task.name, "split": split, "model": str(request.model)}
    if hasattr(gathered.metric, "confusion"):
        scores["areas"] = areas(gathered, config, windows.gsd)
    scores["class_names"] = config.task.classes
    write_down(request.output, scores, gathered, config)
    return scores


def chosen_windows(
    request: EvaluateRequest, config: CheckpointConfig
) -> tuple[Windows, tuple[str, ...], str]:
    """The windows to score, the data's class names, and the split they are of.

    Data that the model was trained on is scored on its held-out part, never on what it has seen.
    """
    same = [str(p) for p in request.data.paths] == config.provenance.get("data", [])
    data = as_trained(request.data, config.provenance) if same else request.data
    if data.task in BOXES and config.task and not data.classes:
        data = replace(data, classes=",".join(config.task.classes))
    if data.task == "segmentation" and not data.classes and not data.benchmark:
        data = replace(data, classes=names_for(data, config))
    split = request.split
    if split == "auto":
        held = set(find_items(data).splits)
        split = "test" if "test" in held else "held-out" if same or "val" in held else "all"
    if same and split == "all":
        console.warn("the model was trained on part of this data: --split all flatters it")
    windows, classes = open_windows(data, split)
    return windows, classes.names, split


def as_trained(data: DataRequest, provenance: Mapping[str, Any]) -> DataRequest:
    """The request with what decided the split in training: seed, labels, held-out data."""
    seed = provenance.get("recipe", {}).get("train", {}).get("seed", data.seed)
    validation, labels = provenance.get("validation"), provenance.get("labels")
    return replace(
        data,
        seed=seed,
        validation=Path(validation) if validation else None,
        labels=data.labels or (Path(labels) if labels else None),
    )


def names_for(data: DataRequest, config: CheckpointConfig) -> str | None:
    """The model's own class names, for folders that do not list theirs."""
    root = data.paths[0]
    listed = any((root / n).is_file() for n in ("classes.csv", "classes.txt"))
    return (
        None if listed or is_store(root) or config.task is None else ",".join(config.task.classes)
    )


def translation(names: Sequence[str], known: Sequence[str]) -> torch.Tensor | None:
    """Table from the data's class indices to the model's; None if they are the same.

    Raises:
        LabelError: for a class the model does not know.
    """
    if tuple(names) == tuple(known):
        return None
    unknown = [n for n in names if n not in known]
    if unknown:
        raise LabelError(f"the model does not know class {unknown[0]!r}; it has {', '.join(known)}")
    table = torch.full((IGNORE + 1,), IGNORE)
    table[: len(names)] = torch.tensor([known.index(n) for n in names])
    return table


def fitting(config: CheckpointConfig, windows: Windows) -> Mapping[str, Any]:
    """The checkpoint's normalisation, if the data has its bands.

    Raises:
        CheckpointError: naming the bands on both sides.
    """
    assert config.task is not None
    channels = windows.channels
    common = [m for m in config.task.modalities if m in channels]
    if not common:
        raise CheckpointError(
            f"the model reads {', '.join(config.task.modalities)}, "
            f"the data is {', '.join(channels)}"
        )
    for m in common:
        wanted = config.normalisation[m].bands
        if wanted != tuple(channels[m]):
            raise CheckpointError(
                f"the model reads {m} bands {', '.join(wanted)}; the data has "
                f"{', '.join(channels[m])}; say --bands or tile with the model's"
            )
    return config.normalisation


def run(
    network: TaskNetwork,
    windows: Windows,
    table: torch.Tensor | None,
    gathered: Gathered,
    request: EvaluateRequest,
) -> None:
    """Predict every window once."""
    total = getattr(windows, "places", ())
    with console.progress(len(total), "evaluate", "windows") as advance:
        for batch in windows.once(request.batch):
            if table is not None and "classes" in batch.targets:
                batch.targets["classes"] = table[batch.targets["classes"]]
            on_device = batch.to(request.device)
            gathered.add(network.predict(on_device), on_device)
            advance(len(batch.keys))


def in_whole_images(
    network: TaskNetwork, windows: Windows, gathered: Gathered, request: EvaluateRequest
) -> bool:
    """Score boxes as `ringmoe predict` finds them, where whole images are held out."""
    if network.task.name not in BOXES:
        return False
    from ringmoe_cli.jobs import objects

    gathered.keep = 0
    images = objects.whole_images(windows)
    if images:
        settings = objects.settings_of(network.task.window, device=request.device)
        gathered.metric, judged = objects.score_images(
            network, images, windows.normalisation, settings
        )
        request.output.mkdir(parents=True, exist_ok=True)
        objects.draw_worst(judged, request.worst, request.output)
    return bool(images)


def areas(gathered: Gathered, config: CheckpointConfig, gsd: Mapping[str, float]) -> dict[str, Any]:
    """Mapped and error-adjusted areas per class, in hectares where the pixel size is known.

    Olofsson et al. 2014. The interval takes the labelled pixels as an independent sample of the
    mapped ones; neighbouring pixels are not, which makes it too narrow.
    """
    assert config.task is not None
    metres = next(iter(gsd.values()), None)
    whole_windows = config.task.name == "classification"
    per = 1.0 if metres is None or whole_windows else metres**2 / 1e4
    unit = "windows" if whole_windows else "pixels" if metres is None else "ha"
    found = area_estimates(
        gathered.metric.confusion.counts.numpy(), gathered.mapped.astype(np.float64) * per
    )
    rows = {n: asdict(a) for n, a in zip(config.task.classes, found, strict=True)}
    return {"unit": unit, "classes": rows}


def write_down(
    output: Path, scores: Mapping[str, Any], gathered: Gathered, config: CheckpointConfig
) -> None:
    """JSON, CSV and pictures."""
    assert config.task is not None
    confusion = getattr(gathered.metric, "confusion", None)
    write_evaluation(output, scores, config.task.classes, confusion)
    for rank, (_, _, window) in enumerate(sorted(gathered.worst, reverse=True), 1):
        draw(output / f"worst_{rank}.png", window, config)


def draw(path: Path, window: Window, config: CheckpointConfig) -> None:
    """Input, truth and prediction of one window."""
    from ringmoe_cli.scene.picture import paint, palette_of, quicklook, save_panels, save_triptych

    task = config.task
    assert task is not None
    bands = config.normalisation[task.modalities[0]].bands
    rgb = [bands.index(b) for b in ("red", "green", "blue") if b in bands]
    image = quicklook(window.image[rgb] if len(rgb) == 3 else window.image)
    if not task.classes:
        pictures = {
            "truth": quicklook(window.truth[None]),
            "answer": quicklook(window.answer[None]),
        }
        save_panels(path, {f"{window.key}, error {window.error:.2f}": image, **pictures})
        return
    colours = task.colours or palette_of(len(task.classes))
    pictures = {
        "input": image,
        "truth": paint(window.truth, colours),
        "prediction": paint(window.answer, colours),
    }
    footer = f"{window.key}: {window.error:.0%} of the labelled pixels are wrong"
    save_triptych(path, pictures, task.classes, colours, footer)
