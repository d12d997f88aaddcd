"""Images and clips with boxes, as the user gives them, as training and held-out windows."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.box_images import (
    BoxScene,
    divide,
    images_with_boxes,
    pairs_with_boxes,
    stored_boxes,
)
from ringmoe_cli.scene.boxes_io import find_boxes
from ringmoe_cli.scene.folder_images import FolderImage, Images, measure
from ringmoe_cli.scene.store_scenes import StorePlace, statistics
from ringmoe_cli.taskdata import DataRequest, TaskData


def open_box_data(request: DataRequest) -> TaskData:
    """Find images and boxes, and divide them.

    Raises:
        LabelError: if there are none, or they cannot be divided.
    """
    items, classes = box_scenes(request, request.paths)
    others = box_scenes(request, [request.validation], classes)[0] if request.validation else []
    split = divide(items, request.size, request.share, request.seed, others)
    seen = {p.item for p in split.training.places}
    training = [i for n, i in enumerate(split.training.items) if n in seen]
    return TaskData(
        split.training,
        split.held_out,
        measured([i for i in training if isinstance(i, BoxScene)]),
        classes,
    )


def box_scenes(
    request: DataRequest, paths: Sequence[Path], known: tuple[str, ...] = ()
) -> tuple[list[BoxScene], tuple[str, ...]]:
    """All labelled images under some paths, and the class names.

    Args:
        request: task, modality, bands, classes.
        paths: tile stores, or one folder or label file.
        known: class names already decided; empty: as the request or the data says.
    """
    said = ",".join(known) or request.classes
    if (paths[0] / ".zgroup").is_file():
        return from_stores(request, paths, said)
    if len(paths) > 1:
        raise LabelError("give one folder of images with boxes, or several tile stores")
    found = find_boxes(paths[0], rotated=request.rotated, classes=said)
    images = Images(request.modalities[0] if request.modalities else None, request.bands)
    make = pairs_with_boxes if request.task == "tracking" else images_with_boxes
    return make(found, images, request.rotated), found.classes


def from_stores(
    request: DataRequest, paths: Sequence[Path], said: str | None
) -> tuple[list[BoxScene], tuple[str, ...]]:
    """Scenes of tile stores under the polygons of `--labels`."""
    from ringmoe_cli.scene.tiles import open_store

    if request.task == "tracking":
        raise LabelError("tracking learns from clips in folders, not from stores")
    if request.labels is None:
        raise LabelError(f"{paths[0]} holds no boxes; pass --labels with a vector file of polygons")
    stores = [open_store(p) for p in paths]
    return stored_boxes(stores, request.labels, request.modalities, request.rotated, said)


def measured(items: Sequence[BoxScene]) -> Callable[[], Mapping[str, Normalisation]]:
    """How to measure the training images."""
    stored = [i.image for i in items if isinstance(i.image, StorePlace)]
    if stored:
        return lambda: statistics(stored)
    return lambda: measure([i.image for i in items if isinstance(i.image, FolderImage)])
