"""Labelled data as the user gives it, as training and held-out windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from model.batch import Batch
from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.examples import Labelled
from ringmoe_cli.scene.folders import Example, find_examples, from_csv
from ringmoe_cli.scene.labelcode import ClassList, LabelCode, class_list
from ringmoe_cli.scene.splits import (
    ENOUGH_IMAGES,
    Split,
    split_by_block,
    split_by_image,
    windows_of,
)

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
    """Held-out data of its own."""
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


def open_task_data(request: DataRequest) -> TaskData:
    """Find images and labels, and divide them.

    Raises:
        LabelError: if there are none for the task, or they cannot be divided.
    """
    missing = [p for p in request.paths if not p.exists()]
    if missing:
        raise LabelError(f"{missing[0]} does not exist")
    if request.task in ("detection", "tracking"):
        from ringmoe_cli.boxdata import open_box_data

        return open_box_data(request)
    if (request.paths[0] / ".zgroup").is_file():
        return from_stores(request)
    if len(request.paths) > 1:
        raise LabelError("give one labelled folder, or several tile stores")
    return from_folder(request)


def from_stores(request: DataRequest) -> TaskData:
    """Labelled scenes of tile stores, held out by block or by `--val`."""
    from ringmoe_cli.scene.store_scenes import StorePlace, labelled_places, statistics
    from ringmoe_cli.scene.tiles import open_store

    if request.task == "classification":
        raise LabelError("classification learns from class folders or a CSV list, not from stores")

    def places(paths: Sequence[Path]) -> list[StorePlace]:
        stores = [open_store(p) for p in paths]
        return labelled_places(
            stores, request.task, request.modalities, request.labels, request.classes
        )

    items = places(request.paths)
    layer = items[0].layer
    if request.validation:
        others = places([request.validation])
        split = Split(windows_of(items, range(len(items)), request.size),
                      windows_of(others, range(len(others)), request.size))  # fmt: skip
        items = items + others
    else:
        split = split_by_block(items, request.size, request.share, request.seed)
    odd = next((i for i in items if i.layer.classes != layer.classes), None)
    if odd:
        raise LabelError(f"{odd.name} has other classes than {items[0].name}; say --classes")
    span = value_range(split) if request.task == "depth" else (0.0, 1.0)
    return TaskData(
        split.training, split.held_out, lambda: statistics(items), layer.classes, layer.colours,
        layer.unit, span,
    )  # fmt: skip


def from_folder(request: DataRequest) -> TaskData:
    """Labelled images of a folder or list, held out as it says, or by image, or by block."""
    from ringmoe_cli.scene.folder_images import FolderImage, Images, measure

    root = request.paths[0]
    examples, found = from_csv(root) if root.is_file() else find_examples(root, request.task)
    classes = folder_classes(request, examples, found)
    images = Images(request.modalities[0] if request.modalities else None, request.bands)
    items = [FolderImage(e, images, classes) for e in examples if e.split != "test"]
    whole = request.task == "classification"
    said = [i for i, item in enumerate(items) if item.example.split == "val"]
    if request.validation:
        others, _ = find_examples(request.validation, request.task)
        first = len(items)
        items += [FolderImage(e, images, classes) for e in others]
        said = list(range(first, len(items)))
    split = divide(items, said, request, whole)
    span = value_range(split) if request.task == "depth" else (0.0, 1.0)
    training = [i for i in items if i.example.split != "val"]
    return TaskData(
        split.training, split.held_out, lambda: measure(training), classes.names, classes.colours,
        "m" if request.task == "depth" else "", span,
    )  # fmt: skip


def divide(
    items: Sequence[Labelled], said: Sequence[int], request: DataRequest, whole: bool
) -> Split:
    """The split the data says, or one by image, or by block where the images are few."""
    if said:
        training = [i for i in range(len(items)) if i not in set(said)]
        return Split(
            windows_of(items, training, request.size, whole),
            windows_of(items, said, request.size, whole),
        )
    if whole or len(items) >= ENOUGH_IMAGES:
        return split_by_image(items, request.size, request.share, request.seed, whole)
    return split_by_block(items, request.size, request.share, request.seed)


def folder_classes(
    request: DataRequest, examples: Sequence[Example], found: tuple[str, ...]
) -> ClassList:
    """Classes by folder name, by `--classes`, by a list beside the images, or by counting values.

    Raises:
        LabelError: if nothing says them.
    """
    if request.task == "classification":
        return ClassList(found)
    if request.task == "depth":
        return ClassList(())
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


def value_range(split: Split) -> tuple[float, float]:
    """Lowest and highest value of the training labels."""
    import numpy as np

    windows = split.training
    ends = [(float(np.nanmin(v)), float(np.nanmax(v))) for v in
            (windows.items[p.item].label(p.window) for p in windows.places)]  # fmt: skip
    return min(low for low, _ in ends), max(high for _, high in ends)
