"""Labelled data as the user gives it, as training and held-out windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from model.batch import Batch
from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled.benchmarks import benchmark
from ringmoe_cli.scene.labelled.examples import Labelled, LabelledWindows
from ringmoe_cli.scene.labelled.folders import Example, find_examples, from_csv
from ringmoe_cli.scene.labelled.labelcode import ClassList, LabelCode, class_list
from ringmoe_cli.scene.labelled.splits import (
    ENOUGH_IMAGES,
    Split,
    few,
    split_by_block,
    split_by_image,
    windows_of,
)
from ringmoe_cli.scene.tiles import is_store, open_store
from ringmoe_cli.text_file import read_text

BOXES = ("detection", "tracking")
"""Tasks whose labels are boxes."""
CHANGE = ClassList(("unchanged", "changed"), ((0, 0, 0), (255, 255, 255)), LabelCode(threshold=128))
"""What 0/255 masks of change pairs mean."""


class Windows(Protocol):
    """One side of a split."""

    normalisation: Mapping[str, Normalisation]
    """Set before the first batch is drawn."""

    @property
    def channels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the channels per modality."""

    @property
    def gsd(self) -> Mapping[str, float]:
        """Metres per pixel per modality, where known."""

    def training(
        self, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Endless augmented batches from batch `start` on."""

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every window once."""


@dataclass(frozen=True)
class TaskData:
    """What a task trains on and is scored on."""

    training: Windows
    """Training windows."""
    held_out: Windows
    """Windows that no training window touches."""
    measure: Callable[[], Mapping[str, Normalisation]]
    """Statistics of the training images."""
    classes: tuple[str, ...] = ()
    """Names in index order; empty for depth."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """RGB per class, where the labels say it."""
    unit: str = ""
    """Unit of values."""
    value_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest value of the training labels (depth)."""


@dataclass(frozen=True)
class DataRequest:
    """What the user says about labelled data."""

    paths: Sequence[Path]
    """Tile stores, or one labelled folder or list."""
    task: str
    """Name of the task."""
    size: int
    """Side of a sample in pixels."""
    seed: int = 0
    """Of the split."""
    share: float = 0.2
    """Held out, where the data itself has no validation split."""
    validation: Path | None = None
    """Held-out data of its own, or a .txt list of the held-out images' names."""
    modalities: tuple[str, ...] = ()
    """Which to use; one name also says what the images of a folder are."""
    bands: tuple[str, ...] | None = None
    """Names of a folder's bands, in order."""
    labels: Path | None = None
    """Label file for stores without labels."""
    classes: str | None = None
    """Class names, or a file that lists them."""
    rotated: bool = False
    """Boxes keep their angle."""
    shots: int = 0
    """Training windows per class; 0: all."""
    draw: int = 0
    """Which draw of the shots."""
    benchmark: str | None = None
    """Name of a published data set whose folders are read as downloaded."""


@dataclass(frozen=True)
class Found:
    """Labelled images before they are divided."""

    items: Sequence[Labelled]
    """The images."""
    splits: Sequence[str]
    """What the data itself says of each: train, val, test or empty."""
    classes: ClassList
    """Names, colours; no names: values."""
    measure: Callable[[Sequence[Any]], Mapping[str, Normalisation]]
    """Statistics of some of the items."""
    unit: str = ""
    """Unit of values."""

    def numbers(self, *splits: str) -> list[int]:
        """Items of some splits."""
        return [i for i, s in enumerate(self.splits) if s in splits]


def open_task_data(request: DataRequest) -> TaskData:
    """Find images and labels, and divide them.

    Raises:
        LabelError: if there are none for the task, or they cannot be divided.
    """
    found = find_items(request)
    split = divide(found, request)
    training = [found.items[i] for i in found.numbers("", "train")]
    chosen = split.training
    if request.shots:
        chosen = few(chosen, request.shots, request.draw)
    return TaskData(
        training=chosen,
        held_out=split.held_out,
        measure=lambda: found.measure(training),
        classes=found.classes.names,
        colours=found.classes.colours,
        unit=found.unit,
        value_range=value_range(chosen) if request.task == "depth" else (0.0, 1.0),
    )


def open_windows(request: DataRequest, split: str) -> tuple[LabelledWindows, ClassList]:
    """All labelled windows of one split, for scoring; `all` takes every image.

    Raises:
        LabelError: if the data has no such split.
    """
    found = find_items(request)
    whole = request.task == "classification"
    if split == "held-out":
        return divide(found, request).held_out, found.classes
    chosen = found.numbers(split) if split != "all" else range(len(found.items))
    if not chosen:
        held = sorted({s for s in found.splits if s}) or ["none"]
        raise LabelError(f"{request.paths[0]} has no split {split!r}; it has {', '.join(held)}")
    if request.task in BOXES:
        from ringmoe_cli.scene.labelled.box_images import all_windows

        return all_windows(found.items, chosen, request.size), found.classes
    return windows_of(found.items, chosen, request.size, whole), found.classes


def find_items(request: DataRequest) -> Found:
    """The labelled images of stores or of a folder; `--val` data comes as split val.

    Raises:
        LabelError: if there are none for the task.
    """
    check_exists(request.paths)
    if request.task in BOXES:
        from ringmoe_cli.jobs.boxdata import in_boxes

        return in_boxes(request)
    if is_store(request.paths[0]):
        return in_stores(request)
    if len(request.paths) > 1:
        raise LabelError("give one labelled folder, or several tile stores")
    return in_folder(request)


def check_exists(paths: Sequence[Path]) -> None:
    """Refuse paths that are not there."""
    for path in paths:
        if not path.exists():
            raise LabelError(f"{path} does not exist")


def in_stores(request: DataRequest) -> Found:
    """Labelled scenes of tile stores."""
    from ringmoe_cli.scene.labelled.store_scenes import StorePlace, labelled_places, statistics

    if request.task == "classification":
        raise LabelError("classification learns from class folders or a CSV list, not from stores")

    def places(paths: Sequence[Path]) -> list[StorePlace]:
        stores = [open_store(p) for p in paths]
        return labelled_places(
            stores, request.task, request.modalities, request.labels, request.classes
        )

    items = places(request.paths)
    others = places([request.validation]) if request.validation else []
    layer = items[0].layer
    odd = next((i for i in [*items, *others] if i.layer.classes != layer.classes), None)
    if odd:
        raise LabelError(f"{odd.name} has other classes than {items[0].name}; say --classes")
    splits = [""] * len(items) + ["val"] * len(others)
    classes = ClassList(layer.classes, layer.colours)
    return Found([*items, *others], splits, classes, statistics, layer.unit)


def in_folder(request: DataRequest) -> Found:
    """Labelled images of a folder or list."""
    from ringmoe_cli.scene.labelled.folder_images import FolderImage, Images, measure

    examples, names = found_examples(request, request.paths[0])
    if request.validation and request.validation.suffix == ".txt":
        examples = listed(examples, request.validation)
    elif request.validation:
        others, others_names = found_examples(request, request.validation)
        examples = [replace(e, split="train") for e in examples if e.split in ("", "train")]
        examples += [replace(e, split="val") for e in renumbered(others, others_names, names)]
    classes = folder_classes(request, names)
    images = Images(request.modalities[0] if request.modalities else None, request.bands)
    items = [FolderImage(e, images, classes) for e in examples]
    unit = "m" if request.task == "depth" else ""
    return Found(items, [e.split for e in examples], classes, measure, unit)


def listed(examples: Sequence[Example], path: Path) -> list[Example]:
    """Examples whose names a list gives are held out, the others are for training.

    Raises:
        LabelError: for a name in the list that is no example.
    """
    wanted = {Path(line.strip()).stem for line in read_text(path).splitlines() if line.strip()}
    stems = {image_of(e).stem for e in examples}
    if unknown := sorted(wanted - stems):
        raise LabelError(f"{path} names {unknown[0]}, which is not among the images")
    return [replace(e, split="val" if image_of(e).stem in wanted else "train") for e in examples]


def image_of(example: Example) -> Path:
    """The first file of an example."""
    return next(iter(example.images.values()))[0]


def found_examples(request: DataRequest, root: Path) -> tuple[list[Example], tuple[str, ...]]:
    """The examples of a folder, a list, or a benchmark as downloaded."""
    if request.benchmark:
        return benchmark(request.benchmark).find(root)
    return from_csv(root) if root.is_file() else find_examples(root, request.task)


def renumbered(
    examples: Sequence[Example], names: Sequence[str], known: Sequence[str]
) -> list[Example]:
    """Examples of class folders under another class list.

    Raises:
        LabelError: for a class that is not in it.
    """
    unknown = [n for n in names if n not in known]
    if unknown:
        raise LabelError(f"class {unknown[0]!r} is not among {', '.join(known)}")
    return [
        replace(e, label=known.index(names[e.label])) if isinstance(e.label, int) else e
        for e in examples
    ]


def divide(found: Found, request: DataRequest) -> Split:
    """The split the data says, or one by image, or by block where the images are few."""
    if request.task in BOXES:
        from ringmoe_cli.scene.labelled.box_images import divide_boxes

        return divide_boxes(found.items, request.size, request.share, request.seed)
    whole = request.task == "classification"
    training, said = found.numbers("", "train"), found.numbers("val")
    if said:
        return Split(
            windows_of(found.items, training, request.size, whole),
            windows_of(found.items, said, request.size, whole),
        )
    items = [found.items[i] for i in training]
    if whole or len(items) >= ENOUGH_IMAGES:
        return split_by_image(items, request.size, request.share, request.seed, whole)
    return split_by_block(items, request.size, request.share, request.seed)


def folder_classes(request: DataRequest, found: tuple[str, ...]) -> ClassList:
    """Classes by folder name, by benchmark, by `--classes`, or by a list beside the images.

    Raises:
        LabelError: if nothing says them.
    """
    if request.task == "classification":
        return ClassList(found)
    if request.task == "depth":
        return ClassList(())
    if request.benchmark:
        return benchmark(request.benchmark).classes
    beside = next((request.paths[0] / n for n in ("classes.csv", "classes.txt")
                   if (request.paths[0] / n).is_file()), None)  # fmt: skip
    if request.classes or beside:
        return class_list(request.classes or str(beside))
    if request.task == "change":
        return CHANGE
    raise LabelError(
        f"{request.paths[0]} does not say its classes; pass --classes water,land,… or put a "
        "classes.csv with lines name, name,value or name,red,green,blue into it"
    )


def value_range(windows: LabelledWindows) -> tuple[float, float]:
    """Lowest and highest value of some windows' labels."""
    import numpy as np

    labels = (windows.items[p.item].label(p.window) for p in windows.places)
    ends = [(float(np.nanmin(v)), float(np.nanmax(v))) for v in labels]
    return min(low for low, _ in ends), max(high for _, high in ends)
