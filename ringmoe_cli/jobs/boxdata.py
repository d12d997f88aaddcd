"""Images and clips with boxes, as the user gives them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.jobs.taskdata import DataRequest, Found
from ringmoe_cli.scene.labelled.box_benchmarks import box_benchmark
from ringmoe_cli.scene.labelled.box_images import (
    BoxScene,
    images_with_boxes,
    pairs_with_boxes,
    stored_boxes,
)
from ringmoe_cli.scene.labelled.boxes_io import find_boxes
from ringmoe_cli.scene.labelled.folder_images import FolderImage, Images, measure
from ringmoe_cli.scene.labelled.labelcode import ClassList
from ringmoe_cli.scene.labelled.store_scenes import StorePlace, statistics
from ringmoe_cli.scene.tiles import is_store, open_store


def in_boxes(request: DataRequest) -> Found:
    """The images, or pairs of frames, of a folder or of stores; `--val` data is split val.

    Raises:
        LabelError: if there are none.
    """
    items, classes = box_scenes(request, request.paths)
    if request.validation:
        others, _ = box_scenes(request, [request.validation], classes)
        items = [replace(i, split="train") for i in items if i.split in ("", "train")]
        items += [replace(i, split="val") for i in others]
    return Found(items, [i.split for i in items], ClassList(classes), measured)


def box_scenes(
    request: DataRequest, paths: Sequence[Path], known: tuple[str, ...] = ()
) -> tuple[list[BoxScene], tuple[str, ...]]:
    """All labelled images under some paths, and the class names.

    Args:
        request: task, modality, bands, classes.
        paths: tile stores, or one folder or label file.
        known: class names already decided; empty: as the request or the data says.
    """
    published = None
    if request.benchmark:
        published = box_benchmark(request.benchmark, request.task, request.rotated)
        known = known or published.classes
    said = ",".join(known) or request.classes
    if is_store(paths[0]):
        return from_stores(request, paths, said)
    if len(paths) > 1:
        raise LabelError("give one folder of images with boxes, or several tile stores")
    one = published is not None and published.one
    found = find_boxes(paths[0], rotated=request.rotated, classes=said, one=one)
    images = Images(request.modalities[0] if request.modalities else None, request.bands)
    make = pairs_with_boxes if request.task == "tracking" else images_with_boxes
    return make(found, images, request.rotated), found.classes


def from_stores(
    request: DataRequest, paths: Sequence[Path], said: str | None
) -> tuple[list[BoxScene], tuple[str, ...]]:
    """Scenes of tile stores under the polygons of `--labels`."""
    if request.task == "tracking":
        raise LabelError("tracking learns from clips in folders, not from stores")
    if request.labels is None:
        raise LabelError(f"{paths[0]} holds no boxes; pass --labels with a vector file of polygons")
    stores = [open_store(p) for p in paths]
    return stored_boxes(stores, request.labels, request.modalities, request.rotated, said)


def measured(items: Sequence[BoxScene]) -> Mapping[str, Normalisation]:
    """Statistics of some images."""
    stored = [i.image for i in items if isinstance(i.image, StorePlace)]
    if stored:
        return statistics(stored)
    return measure([i.image for i in items if isinstance(i.image, FolderImage)])
