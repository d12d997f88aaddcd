"""Images with boxes as people keep them: COCO, CSV, MOT clips, DOTA, YOLO, VOC, vector files.

Image and label belong together by the stem of their names, wherever under the folder they are;
train, val and test are read from folder or file names, or from lists under ImageSets.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model.boxes import Boxes
from ringmoe_cli import console, text_file
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled import box_formats as formats
from ringmoe_cli.scene.labelled.box_formats import Mark
from ringmoe_cli.scene.labelled.folders import SUFFIXES
from ringmoe_cli.scene.labels import VECTORS

SPLITS = ("train", "val", "test")
ROTATED = re.compile(r"orient|obb|rotat|dota|(?<!rec)labeltxt")
"""What the path of rotated labels says, where a set has both kinds."""


@dataclass(frozen=True)
class BoxImage:
    """One image, or frame of a clip, and its objects."""

    path: Path
    """The image."""
    marks: Sequence[Mark]
    """Its objects."""
    split: str = ""
    """train, val, test, or empty where nothing says it."""
    clip: str = ""
    """Name of the clip it belongs to; empty for single images."""
    frame: int = 0
    """Number in the clip."""


@dataclass(frozen=True)
class BoxSet:
    """Labelled images and what their classes are called."""

    images: tuple[BoxImage, ...]
    """In order of split, clip, frame, name."""
    classes: tuple[str, ...]
    """In index order."""


@dataclass
class Found:
    """What one way of reading a folder has found."""

    images: list[BoxImage] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    """Named by the data; empty: take them from the objects."""


def find_boxes(
    root: Path, *, rotated: bool = False, classes: str | None = None, one: bool = False
) -> BoxSet:
    """The labelled images of a folder or label file.

    Args:
        root: a folder, a COCO JSON or a CSV.
        rotated: prefer rotated labels where a set has both kinds.
        classes: names in index order, separated by commas; objects of others are left out.
        one: every object is of the first of these classes, whatever it is called.

    Raises:
        LabelError: if there are none, or the classes do not fit.
    """
    said = tuple(n.strip() for n in (classes or "").split(",") if n.strip())
    numbered = (names_beside(root) if root.is_dir() else ()) or said
    for reader in READERS:
        found = reader(root, rotated, numbered)
        if one:
            found.images = [renamed(image, said[0]) for image in found.images]
        if any(image.marks for image in found.images):
            names = class_names(found, said)
            order = {s: i for i, s in enumerate((*SPLITS, ""))}
            images = sorted(
                found.images, key=lambda i: (order[i.split], i.clip, i.frame, str(i.path))
            )
            return BoxSet(tuple(images), names)
    raise LabelError(
        f"{root} has no images with boxes; expected COCO JSON, a CSV with image_path,xmin,ymin,"
        "xmax,ymax,label, MOT clips, or DOTA, YOLO, VOC or GeoJSON files named like the images"
    )


def renamed(image: BoxImage, name: str) -> BoxImage:
    """The same image with all objects of one class."""
    return replace(image, marks=[m._replace(name=name) for m in image.marks])


def class_names(found: Found, said: tuple[str, ...]) -> tuple[str, ...]:
    """Class names in index order: as said, as the data lists them, or sorted.

    Raises:
        LabelError: if what is said names none of the objects.
    """
    counts = Counter(m.name for image in found.images for m in image.marks)
    names = said or found.classes or tuple(sorted(counts))
    if not any(counts[n] for n in names):
        raise LabelError(f"--classes {','.join(said)}: the objects are {', '.join(sorted(counts))}")
    empty = [n for n in names if not counts[n]]
    if empty:
        console.warn(f"no object of class {', '.join(empty)}; it cannot be learned")
    others = sum(n for name, n in counts.items() if name not in names)
    if others:
        console.warn(f"{others} object(s) of classes that --classes does not name are left out")
    return names


def read_coco(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """COCO JSON files, beside the images or under annotations/."""
    files = [root] if root.suffix == ".json" else sorted(root.rglob("*.json"))
    files = [f for f in files if f.is_file() and formats.is_coco(f)]
    base = root if root.is_dir() else image_root(root)
    images, found = images_below(base) if files else {}, Found()
    for file in files:
        marks, found.classes = formats.parse_coco(file)
        split = split_in(file.stem) or split_of(file, base)
        for name, objects in marks.items():
            path = locate(name, images, split, file)
            found.images.append(BoxImage(path, objects, split or split_of(path, base)))
    return found


def read_csv(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """CSV files with a box per line."""
    files = [root] if root.suffix == ".csv" else sorted(root.glob("*.csv"))
    found = Found()
    for file in files if all(f.is_file() for f in files) else []:
        header = text_file.read_text(file).split("\n", 1)[0]
        if root.is_dir() and not set(formats.EDGES) <= set(header.strip().split(",")):
            continue
        images, split = images_below(file.parent), split_in(file.stem)
        for name, objects in formats.parse_csv(file).items():
            found.images.append(BoxImage(locate(name, images, split, file), objects, split))
    return found


def read_mot(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """MOTChallenge clips: `<clip>/gt/gt.txt` beside `<clip>/img1` (or what seqinfo.ini says)."""
    found = Found()
    files = sorted(root.rglob("gt/gt.txt")) if root.is_dir() else []
    for file in files:
        folder = file.parent.parent
        marks = formats.parse_mot(file, names)
        found.classes = names
        for frame, path in frames_of(folder):
            clip = folder.relative_to(root).as_posix() if folder != root else folder.name
            found.images.append(
                BoxImage(path, marks.get(frame, []), split_of(file, root), clip, frame)
            )
    return found


def frames_of(folder: Path) -> list[tuple[int, Path]]:
    """Numbered frames of a clip: by their names where those are numbers, else from 1.

    Raises:
        LabelError: if there are none.
    """
    images = folder / text_file.read_setting(folder / "seqinfo.ini", "Sequence", "imDir", "img1")
    images = images if images.is_dir() else folder / "img"
    files = sorted(p for p in images.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise LabelError(f"{images} has no frames")
    if all(p.stem.isdigit() for p in files):
        return [(int(p.stem), p) for p in files]
    return list(enumerate(files, 1))


def read_text(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """DOTA or YOLO text files named like the images."""
    found, lists = Found(), split_lists(root)
    for image, file in paired(root, (".txt",), rotated):
        if formats.is_dota(file):
            objects = formats.parse_dota(file)
        else:
            found.classes = names
            objects = formats.parse_yolo(file, names, *image_size(image))
        split = split_of(file, root) or split_of(image, root) or lists.get(image.stem, "")
        found.images.append(BoxImage(image, objects, split))
    return found


def read_voc(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """VOC XML files named like the images."""
    lists = split_lists(root)
    return Found(
        [
            BoxImage(image, formats.parse_voc(file), lists.get(image.stem) or split_of(image, root))
            for image, file in paired(root, (".xml",), rotated)
        ]
    )


def read_vectors(root: Path, rotated: bool, names: tuple[str, ...]) -> Found:
    """Vector files named like the scenes."""
    from ringmoe_cli.scene.raster import grid_of, open_raster

    found = Found()
    for image, file in paired(root, VECTORS, rotated):
        with open_raster(str(image)) as source:
            grid = grid_of(source)
        marks = formats.parse_vector(file, grid)
        found.images.append(BoxImage(image, marks, split_of(image, root)))
    return found


READERS: Sequence[Callable[[Path, bool, tuple[str, ...]], Found]] = (
    read_coco, read_csv, read_mot, read_text, read_voc, read_vectors,
)  # fmt: skip
"""Ways of reading a folder, the first that finds objects wins."""


def images_below(root: Path) -> dict[str, list[Path]]:
    """Stem -> images of that name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            found.setdefault(path.stem, []).append(path)
    return found


def image_root(file: Path) -> Path:
    """The folder of the images a label file outside any folder speaks of."""
    return file.parent.parent if file.parent.name.lower() == "annotations" else file.parent


def locate(name: str, images: dict[str, list[Path]], split: str, file: Path) -> Path:
    """The image of this name; where several share it, the one in the folder of the split.

    Raises:
        LabelError: if there is none.
    """
    given = Path(name.replace("\\", "/"))
    matching = images.get(given.stem, [])
    same = [p for p in matching if p.as_posix().endswith(given.as_posix())] or matching
    best = [p for p in same if split and split_in(*p.parts[-2:-5:-1]) == split] or same
    if not best:
        raise LabelError(f"{file} speaks of {name}, which is not among the images beside it")
    return best[0]


def paired(root: Path, suffixes: Sequence[str], rotated: bool) -> Iterable[tuple[Path, Path]]:
    """Images and the label files named like them.

    Raises:
        LabelError: if an image has several label files and nothing says which.
    """
    if not root.is_dir():
        return
    images = images_below(root)
    labels: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes):
        if file.stem in images:
            labels.setdefault((split_of(file, root), file.stem), []).append(file)
    for (split, stem), files in labels.items():
        kind = [f for f in files if is_rotated(f, root) == rotated] or files
        if len(kind) > 1:
            raise LabelError(f"{kind[0]} and {kind[1]} label one image; keep one of them")
        places = images[stem]
        image = next((p for p in places if split_of(p, root) == split), places[0])
        yield image, kind[0]


def is_rotated(file: Path, root: Path) -> bool:
    """Whether the path of a label file says that its boxes are rotated."""
    text = file.relative_to(root).parent.as_posix().lower()
    return ROTATED.search(text) is not None


def split_of(path: Path, root: Path) -> str:
    """The split that a folder between root and file speaks of, the innermost first."""
    folders = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return split_in(*reversed(folders))


SPELLINGS = {
    "train": "train", "training": "train", "train2017": "train",
    "val": "val", "valid": "val", "validation": "val", "val2017": "val",
    "test": "test", "testing": "test", "test2017": "test",
}  # fmt: skip


def split_in(*names: str) -> str:
    """The split that the first name to do so speaks of; empty if none does."""
    for name in names:
        for word in re.split(r"[^a-z0-9]+", name.lower()):
            if word in SPELLINGS:
                return SPELLINGS[word]
    return ""


def split_lists(root: Path) -> dict[str, str]:
    """Image stem -> split, from lists under ImageSets (VOC, DIOR, HRSC2016)."""
    return {
        stem: split
        for split in SPLITS
        for file in sorted(root.rglob(f"ImageSets/**/{split}.txt"))
        for _, stem in formats.text_lines(file)
    }


def names_beside(root: Path) -> tuple[str, ...]:
    """Class names of a YOLO or MOT folder: *.names, classes.txt, or data.yaml."""
    for file in (*sorted(root.glob("*.names")), root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            return tuple(line for _, line in formats.text_lines(file))
    for file in (root / "data.yaml", root / "dataset.yaml"):
        if file.is_file():
            content = text_file.read_yaml(file)
            names = content.get("names", ()) if isinstance(content, dict) else ()
            return tuple(str(n) for n in (names.values() if isinstance(names, dict) else names))
    return ()


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file.

    Raises:
        LabelError: if it is none.
    """
    from PIL import Image, UnidentifiedImageError

    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp"):
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except (UnidentifiedImageError, OSError) as error:
            raise LabelError(f"{path} is not an image: {error}") from error
    from ringmoe_cli.scene.raster import open_raster

    with open_raster(str(path)) as source:
        return source.height, source.width


def boxes_of(
    marks: Sequence[Mark], classes: Sequence[str], rotated: bool, size: tuple[int, int]
) -> tuple[Boxes, Counter[str]]:
    """Marks as boxes on an image, and how many were left out for which reason.

    Args:
        marks: objects of one image.
        classes: names in index order; other objects are left out without a word.
        rotated: keep angles; otherwise boxes become their horizontal envelope.
        size: (height, width) of the image.
    """
    index = {name: i for i, name in enumerate(classes)}
    marks = [m for m in marks if m.name in index]
    if not marks:
        return Boxes.empty(), Counter()
    boxes = Boxes(
        torch.stack([geometry_of(m.shape, rotated) for m in marks]),
        labels=torch.tensor([index[m.name] for m in marks]),
        tracks=torch.tensor([m.track for m in marks]),
        ignored=torch.tensor([m.ignored for m in marks]),
    )
    boxes = boxes if rotated else boxes.horizontal()
    solid = (boxes.geometry[:, 2:4] > 1e-3).all(1)
    shown = boxes[solid].inside(*size, visible=1e-6)
    lost = Counter({"zero area": int((~solid).sum()), "outside": int(solid.sum()) - len(shown)})
    return shown, +lost


def geometry_of(shape: tuple[float, ...], rotated: bool) -> torch.Tensor:
    """(5,) centre, size, angle of a mark's shape."""
    if len(shape) == 4:
        return Boxes.from_corners([shape]).geometry[0]
    if len(shape) == 5:
        *flat, angle = shape
        return torch.tensor([*flat, math.remainder(angle, math.pi)])
    if rotated:
        return Boxes.from_polygons(torch.tensor(shape).view(1, 4, 2)).geometry[0]
    x, y = shape[::2], shape[1::2]
    return Boxes.from_corners([[min(x), min(y), max(x), max(y)]]).geometry[0]
