"""Labelled images in folders as people keep them: which files belong together, and what they say.

A layout is a set of path templates. `{id}` stands for the part of a name that image and label
share, `{part}` for any folder on the way, `{class}` for the folder that is the label, `{split}`
for the name of a split; suffixes are left out.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ringmoe_cli import console
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.labelled.outlines import Outlines, coco_file, coco_outlines
from ringmoe_cli.text_file import read_rows

SUFFIXES = {
    ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".jp2", ".vrt", ".img", ".gtif", ".npy",
}  # fmt: skip
"""What counts as an image."""

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("Train/Train", "train", "Train", "training"),
    "val": ("Val/Val", "val", "Val", "valid", "validation"),
    "test": ("test", "Test", "testing"),
}
"""Folder names that mean a split; the first that exists."""

ANY = ""
"""Modality of images that say nothing about theirs: the user's `--modality`, or the file's own."""


@dataclass(frozen=True)
class Example:
    """One labelled image: co-registered modalities, one file per date."""

    name: str
    """The part of the path that image and label share."""
    images: Mapping[str, tuple[Path, ...]]
    """modality -> one file per date."""
    label: Path | int | Outlines
    """A raster on the image's grid, a class index, or outlines of objects."""
    split: str = ""
    """train, val, test, or empty where the folder says none."""


@dataclass(frozen=True)
class Layout:
    """Where the files of a labelled folder are."""

    images: Mapping[str, tuple[str, ...]]
    """modality -> path template of each date."""
    label: str = ""
    """Path template of the label raster; empty: the `{class}` folder is the label."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)
    """Split -> what `{split}` may stand for."""


def pair(images: str, labels: str) -> Layout:
    """Images in one folder, labels of the same name in another."""
    return Layout({ANY: (f"{images}/{{id}}",)}, f"{labels}/{{id}}")


IMAGE_FOLDERS = ("images", "image", "img", "imgs", "rgb", "optical")
MASK_FOLDERS = ("masks", "mask", "labels", "label", "annotations", "gt", "lbl")
HEIGHT_FOLDERS = ("dsm", "ndsm", "height", "heights", "depth", "agl")

LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "classification": (Layout({ANY: ("{class}/{id}",)}),),
    "segmentation": tuple(pair(i, m) for i in IMAGE_FOLDERS for m in MASK_FOLDERS),
    "depth": tuple(pair(i, h) for i in IMAGE_FOLDERS for h in HEIGHT_FOLDERS),
    "change": tuple(
        Layout({ANY: (f"{a}/{{id}}", f"{b}/{{id}}")}, f"{m}/{{id}}")
        for a, b in (("A", "B"), ("T1", "T2"), ("im1", "im2"))
        for m in ("label", "labels", "OUT", "gt", "mask")
    ),
}
"""Task -> layouts that are recognised without being told, first match wins."""


def find_examples(root: Path, task: str) -> tuple[list[Example], tuple[str, ...]]:
    """The labelled images of a folder, and the class names that folder names give.

    Raises:
        LabelError: if no layout of the task fits, or an image has no label.
    """
    for layout in LAYOUTS.get(task, ()):
        examples, classes = examples_of(root, layout)
        if examples:
            return examples, classes
    raise LabelError(
        f"{root} has no labelled images for {task}; expected {expected(task)}, "
        "each also under train/, val/ or test/"
    )


def expected(task: str) -> str:
    """The first layout of a task, for a message."""
    layout = LAYOUTS[task][0]
    templates = [t for dates in layout.images.values() for t in dates] + [layout.label]
    return ", ".join(t.replace("{", "<").replace("}", ">") for t in templates if t)


def examples_of(root: Path, layout: Layout) -> tuple[list[Example], tuple[str, ...]]:
    """The labelled images that a layout finds under a folder, in order of their names."""
    splits = {
        split: folder for split in layout.splits if (folder := split_folder(root, split, layout))
    }
    splits = splits or {"": root}
    classes = sorted({c for folder in splits.values() for c in class_names(folder, layout)})
    examples = [e for s, folder in splits.items() for e in joined(folder, layout, classes, s)]
    return examples, tuple(classes)


def outlined(root: Path, layout: Layout, labels: str) -> list[Example]:
    """Images of a layout under the outlines of a COCO file per split, named `labels`_<split>."""
    found = []
    for split in layout.splits:
        folder, file = split_folder(root, split, layout), coco_file(root, f"{labels}_{split}")
        if folder is None or file is None:
            continue
        outlines = coco_outlines(file)
        for example in joined(folder, layout, [], split):
            stem = next(iter(example.images.values()))[0].stem
            found += [replace(example, label=outlines[stem])] if stem in outlines else []
    return found


def split_folder(root: Path, split: str, layout: Layout) -> Path | None:
    """The folder of a split, whatever its spelling, or None."""
    return next((root / n for n in layout.splits[split] if (root / n).is_dir()), None)


def class_names(folder: Path, layout: Layout) -> set[str]:
    """Names of the folders that are labels; none where labels are files."""
    if layout.label:
        return set()
    if not folder.is_dir():
        return set()
    folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    full = {p.name for p in folders if has_images(p)}
    empty = [p.name for p in folders if p.name not in full]
    if full and empty:
        console.warn(f"{folder}: no images in {', '.join(empty)}; not a class here")
    return full


def has_images(folder: Path) -> bool:
    """Whether a folder holds at least one image."""
    return any(p.suffix.lower() in SUFFIXES for p in folder.iterdir())


def joined(folder: Path, layout: Layout, classes: list[str], split: str) -> Iterable[Example]:
    """Match the files of every modality, date and label by the shared part of their names."""
    files = {
        (m, t): matches(folder, template)
        for m, dates in layout.images.items()
        for t, template in enumerate(dates)
    }
    labels = matches(folder, layout.label) if layout.label else {}
    first = next(iter(files.values()))
    if layout.label and not labels:
        return
    for key in sorted(first):
        lacking = [f for f, found in files.items() if key not in found]
        if lacking or (layout.label and key not in labels):
            what = f"image of {lacking[0][0]} date {lacking[0][1] + 1}" if lacking else "label"
            raise LabelError(f"{first[key]} has no {what} of the same name; add or remove it")
        images = {
            m: tuple(files[m, t][key] for t in range(len(layout.images[m]))) for m in layout.images
        }
        label = labels[key] if layout.label else classes.index(key[0]) if classes else 0
        yield Example("/".join(key), images, label, split)


def matches(folder: Path, template: str) -> dict[tuple[str, ...], Path]:
    """Files that fit a template, by what its placeholders stand for.

    Leading zeros do not count, so that `02_10` finds `2_10`.
    """
    pattern = re.escape(template)
    for name in ("class", "part", "id"):
        pattern = pattern.replace(re.escape(f"{{{name}}}"), f"(?P<{name}>[^/]+)")
    wanted = re.compile(pattern)
    found: dict[tuple[str, ...], Path] = {}
    for path in sorted(folder.glob(re.sub(r"\{\w+\}", "*", template) + ".*")):
        place = wanted.fullmatch(path.relative_to(folder).with_suffix("").as_posix())
        if place is None or path.suffix.lower() not in SUFFIXES:
            continue
        key = tuple(re.sub(r"(?<!\d)0+(?=\d)", "", v) for v in place.groups())
        if key in found:
            raise LabelError(f"{found[key]} and {path} have the same name; keep one of them")
        found[key] = path
    return found


def there(path: Path) -> bool:
    """Whether it is a file, however odd its name: a damaged list names anything."""
    try:
        return path.is_file()
    except OSError:
        return False


def from_csv(path: Path) -> tuple[list[Example], tuple[str, ...]]:
    """Examples from lines `image,class[,split]`; paths are relative to the list.

    Raises:
        LabelError: for a line without a class, or a file that is not there.
    """
    rows = read_rows(path)
    if rows and not there(path.parent / rows[0][0]):
        rows = rows[1:]  # a header
    classes = sorted({row[1] for row in rows if len(row) > 1})
    examples = []
    for number, row in enumerate(rows, 1):
        image = path.parent / row[0]
        if len(row) < 2 or not there(image):
            problem = "has no class" if len(row) < 2 else "is not a file"
            raise LabelError(f"{path}, entry {number}: {row[0]} {problem}; write image,class")
        split = row[2] if len(row) > 2 else ""
        examples.append(Example(row[0], {ANY: (image,)}, classes.index(row[1]), split))
    return examples, tuple(classes)
