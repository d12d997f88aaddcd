"""Images, pairs of frames and stored scenes with boxes, behind the face of a labelled image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.boxes import Boxes
from model.normalisation import Normalisation
from ringmoe_cli import console
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labelled.box_formats import parse_vector
from ringmoe_cli.scene.labelled.boxes_io import BoxImage, BoxSet, boxes_of, image_size
from ringmoe_cli.scene.labelled.examples import Labelled, LabelledWindows, Place, Sample
from ringmoe_cli.scene.labelled.folder_images import FolderImage, Images
from ringmoe_cli.scene.labelled.folders import ANY, Example
from ringmoe_cli.scene.labelled.labelcode import ClassList
from ringmoe_cli.scene.labelled.splits import Split, split_by_block
from ringmoe_cli.scene.labelled.store_scenes import StorePlace
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.tiles import LabelLayer, Store

VISIBLE = 0.5
"""Share of a box that a window must show to learn from it; what shows less is ignored."""
SHARE_OF_CLIP = 5
"""One frame in so many is held out where there is one clip only: its last ones."""


@dataclass(frozen=True)
class BoxScene:
    """An image, or the frames of a pair, with boxes."""

    image: Labelled
    """Reads the pixels; its own label is not used."""
    boxes: tuple[Boxes, ...]
    """Per date, in the image's pixels."""
    split: str = ""
    """train, val, test, or empty."""
    clip: str = ""
    """Clip a pair belongs to."""

    @property
    def name(self) -> str:
        """Of the image; of a pair, "clip:frame:frame"."""
        return self.image.name

    @property
    def grid(self) -> Grid:
        """Its pixels."""
        return self.image.grid

    @property
    def channels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the physical channels per modality."""
        return self.image.channels

    @property
    def gsd(self) -> Mapping[str, float]:
        """Metres per pixel per modality, where known."""
        return self.image.gsd

    def read(self, window: Window) -> Mapping[str, Sequence[Sample]]:
        """One sample per date for every modality."""
        return self.image.read(window)

    def label(self, window: Window) -> list[Boxes]:
        """The boxes of each date that a window shows, in its pixels."""
        return [boxes_in(boxes, window) for boxes in self.boxes]

    def sources(self, normalisation: Mapping[str, Normalisation]) -> list[Normalised]:
        """Each date on its own, normalised, to be predicted whole."""
        scenes = scenes_of(self.image)
        return [
            Normalised([{m: Date(s, self.image, t) for m, s in scenes.items()}], normalisation)
            for t in range(len(self.boxes))
        ]


@dataclass(frozen=True)
class Date:
    """One date of one modality of an image, read as `ringmoe predict` reads scenes."""

    scene: Scene
    """What is known about it."""
    image: Labelled
    """Reads it."""
    number: int
    """Which date."""

    def physical(self, window: Window) -> Sample:
        """Physical channels and validity of a window that may overhang."""
        return self.image.read(window)[self.scene.modality][self.number]


def scenes_of(image: Labelled) -> dict[str, Scene]:
    """What is known about each modality of an image."""
    if isinstance(image, FolderImage):
        return {s.modality: s for s in image.scenes}
    assert isinstance(image, StorePlace)
    return {m: dates[0].scene for m, dates in image.scenes.items()}


def boxes_in(boxes: Boxes, window: Window) -> Boxes:
    """Boxes cut to a window; those of which it shows too little to learn from are ignored."""
    here = boxes.shifted(-window.col, -window.row)
    share = here.visible(window.height, window.width)
    marked = replace(here, ignored=here.ignored | (share < VISIBLE))
    return marked[share > 0].cut(window.height, window.width)


def images_with_boxes(found: BoxSet, images: Images, rotated: bool) -> list[BoxScene]:
    """Every image of a set on its own, for detection."""
    lost: Counter[str] = Counter()
    scenes = []
    for item in found.images:
        boxes = fitted(item, found.classes, rotated, lost)
        scenes.append(BoxScene(reader(item.path.stem, (item.path,), images), (boxes,), item.split))
    tell(lost)
    return scenes


def pairs_with_boxes(found: BoxSet, images: Images, rotated: bool) -> list[BoxScene]:
    """Neighbouring frames of every clip, for tracking.

    Raises:
        LabelError: if no clip has two frames, or objects have no identity.
    """
    lost: Counter[str] = Counter()
    clips: dict[str, list[tuple[BoxImage, Boxes]]] = {}
    for item in found.images:
        if item.clip:
            boxes = fitted(item, found.classes, rotated, lost)
            clips.setdefault(item.clip, []).append((item, boxes))
    tell(lost)
    pairs = []
    for clip, frames in clips.items():
        for (a, first), (b, second) in pairwise(frames):
            name = f"{clip}:{a.frame}:{b.frame}"
            image = reader(name, (a.path, b.path), images)
            pairs.append(BoxScene(image, (first, second), a.split, clip))
    if not pairs:
        raise LabelError(
            "tracking needs clips of at least two frames: <clip>/img1, <clip>/gt/gt.txt"
        )
    return pairs


def fitted(item: BoxImage, classes: Sequence[str], rotated: bool, lost: Counter[str]) -> Boxes:
    """The boxes of one image; counts those that do not lie on it."""
    boxes, missing = boxes_of(item.marks, classes, rotated, image_size(item.path))
    lost.update(missing)
    return boxes


def tell(lost: Counter[str]) -> None:
    """Warn once about boxes that were left out."""
    if lost:
        what = ", ".join(f"{n} with {k}" if k == "zero area" else f"{n} {k} the image"
                         for k, n in sorted(lost.items()))  # fmt: skip
        console.warn(f"boxes left out: {what}")


def reader(name: str, paths: tuple[Path, ...], images: Images) -> FolderImage:
    """What reads some image files as the dates of one place."""
    return FolderImage(Example(name, {ANY: paths}, 0), images, ClassList(()))


def stored_boxes(
    stores: Sequence[Store],
    labels: Path,
    modalities: Sequence[str],
    rotated: bool,
    said: str | None,
) -> tuple[list[BoxScene], tuple[str, ...]]:
    """The scenes of tile stores with the polygons of a vector file, and the class names.

    Raises:
        LabelError: if the polygons miss every scene.
    """
    scenes = [s for store in stores for s in store.scenes]
    scenes = [s for s in scenes if not modalities or s.modality in modalities]
    marks = [parse_vector(labels, s.grid) for s in scenes]
    names = tuple(n.strip() for n in said.split(",")) if said else ()
    classes = names or tuple(sorted({m.name for on in marks for m in on}))
    lost: Counter[str] = Counter()
    found = []
    for scene, on in zip(scenes, marks, strict=True):
        grid = scene.grid
        boxes, missing = boxes_of(on, classes, rotated, (grid.height, grid.width))
        place = StorePlace({scene.modality: (scene,)}, LabelLayer("detection", classes), scene)
        found.append(BoxScene(place, (boxes,)))
        lost.update(missing)
    tell(lost)
    return found, classes


def divide_boxes(items: Sequence[Labelled], size: int, share: float, seed: int) -> Split:
    """Training and held-out windows: as the data says, by clip, by image, or by block.

    Args:
        items: labelled images; those of split "test" take no part.
        size: side of a window.
        share: held out where the data has no validation split.
        seed: of the draw.
    """
    used = [i for i in items if isinstance(i, BoxScene) and i.split != "test"]
    held = [n for n, i in enumerate(used) if i.split == "val"] or drawn(used, share, seed)
    if not held:
        return by_block(used, size, share, seed)
    apart = set(held)
    training = [n for n in range(len(used)) if n not in apart and not next_is_held(used, n, apart)]
    return Split(
        LabelledWindows(used, thinned(used, places(used, training, size), seed), size),
        LabelledWindows(used, places(used, held, size), size),
    )


def all_windows(items: Sequence[Labelled], chosen: Sequence[int], size: int) -> LabelledWindows:
    """All windows of some images, for scoring."""
    return LabelledWindows(items, places(items, chosen, size), size)


def next_is_held(items: Sequence[BoxScene], n: int, held: set[int]) -> bool:
    """Whether a pair shares a frame with a held-out pair of its clip."""
    return bool(items[n].clip) and n + 1 in held and items[n + 1].clip == items[n].clip


def drawn(items: Sequence[BoxScene], share: float, seed: int) -> list[int]:
    """Which images to hold out: some clips, the end of a single clip, some images, or none."""
    clips = sorted({i.clip for i in items if i.clip})
    if len(clips) == 1:
        return list(range(len(items) - max(1, len(items) // SHARE_OF_CLIP), len(items)))
    groups = clips or ([i.name for i in items] if len(items) >= 5 else [])
    order = np.random.default_rng((seed, len(groups))).permutation(len(groups))
    chosen = {groups[g] for g in order[: max(1, round(share * len(groups)))]} if groups else set()
    return [n for n, i in enumerate(items) if (i.clip or i.name) in chosen]


def places(items: Sequence[Labelled], chosen: Sequence[int], size: int) -> list[Place]:
    """Windows that tile images."""
    return [Place(n, w) for n in chosen for w in items[n].grid.windows(size, size)]


def thinned(items: Sequence[BoxScene], found: Sequence[Place], seed: int) -> list[Place]:
    """All windows with objects, and at most as many without."""
    busy = [p for p in found if any(map(len, items[p.item].label(p.window)))]
    empty = [p for p in found if not any(map(len, items[p.item].label(p.window)))]
    order = np.random.default_rng((seed, len(empty))).permutation(len(empty))
    return busy + [empty[i] for i in sorted(order[: len(busy)].tolist())]


def by_block(items: Sequence[BoxScene], size: int, share: float, seed: int) -> Split:
    """As `split_by_block`, with the windows that hold no object."""
    split = split_by_block(items, size, share, seed)
    masks = split.training.kept_out

    def chosen(wanted: str) -> list[Place]:
        every = places(items, range(len(items)), size)
        return [p for p in every if side_of(masks[p.item], p.window) == wanted]

    return Split(
        LabelledWindows(items, thinned(items, chosen("training"), seed), size, kept_out=masks),
        LabelledWindows(items, chosen("held out"), size),
    )


def side_of(mask: NDArray[np.bool_], window: Window) -> str:
    """On which side of a split a window lies; neither, where it touches both."""
    row, col, height, width = window
    part = mask[row : row + height, col : col + width]
    return "held out" if part.all() else "between" if part.any() else "training"
