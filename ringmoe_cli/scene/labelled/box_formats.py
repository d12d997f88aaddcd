"""What box files say: COCO, DOTA, YOLO, VOC, CSV, MOTChallenge and vector files, as marks.

Every parser speaks of one file and knows nothing of folders; `boxes_io` finds the files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from model.json_file import read_json
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Grid
from ringmoe_cli.text_file import read_rows, read_text


class Mark(NamedTuple):
    """One labelled object, in pixels of its image."""

    shape: tuple[float, ...]
    """4 numbers: xmin, ymin, xmax, ymax; 5: centre x, y, width, height, angle; 8: four corners."""
    name: str
    """Of the class."""
    ignored: bool = False
    """Crowd or difficult."""
    track: int = -1
    """Identity across frames; -1: none."""


def numbers(path: Path, line: int, words: Sequence[str]) -> list[float]:
    """Words as finite numbers.

    Raises:
        LabelError: with file and line.
    """
    try:
        values = [float(w) for w in words]
    except ValueError:
        values = []
    if not values or not all(math.isfinite(v) for v in values):
        raise LabelError(f"{path}, line {line}: {' '.join(words)!r} is not a box")
    return values


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file that are not empty.

    Raises:
        RingmoeError: if it is not text.
    """
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def is_dota(path: Path) -> bool:
    """Whether a text file holds eight coordinates and a name per line (else it is YOLO's)."""
    for _, line in text_lines(path):
        words = line.split()
        if line.lower().startswith(("imagesource", "gsd")):
            return True
        return len(words) >= 9 and not words[8].replace(".", "", 1).isdigit()
    return False


def parse_dota(path: Path) -> list[Mark]:
    """DOTA: x1 y1 x2 y2 x3 y3 x4 y4 class [difficult] (Xia et al. 2018); header lines skipped."""
    marks = []
    for number, line in text_lines(path):
        if line.lower().startswith(("imagesource", "gsd")):
            continue
        words = line.split()
        if len(words) < 9:
            raise LabelError(
                f"{path}, line {number}: {len(words)} words; DOTA has 8 numbers, class"
            )
        shape = tuple(numbers(path, number, words[:8]))
        marks.append(Mark(shape, words[8], ignored=words[9:10] == ["1"]))
    return marks


def parse_yolo(path: Path, names: Sequence[str], height: int, width: int) -> list[Mark]:
    """YOLO: class, then centre and size, or four corners, as shares of width and height."""
    marks = []
    for number, line in text_lines(path):
        index, *values = numbers(path, number, line.split())
        if len(values) not in (4, 8):
            raise LabelError(
                f"{path}, line {number}: {len(values)} numbers after the class; "
                "YOLO has 4 (centre, size) or 8 (corners)"
            )
        if max(values) > 2 or min(values) < -1:
            raise LabelError(f"{path}, line {number}: {line!r} is not in shares of the image")
        scaled = [v * (width, height)[i % 2] for i, v in enumerate(values)]
        if len(values) == 4:
            x, y, w, h = scaled
            scaled = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        marks.append(Mark(tuple(scaled), name_of(int(index), names, path, number)))
    return marks


def name_of(index: int, names: Sequence[str], path: Path, line: int) -> str:
    """Name of a class number; `class_7` where nothing names it."""
    if not names:
        return f"class_{index}"
    if not 0 <= index < len(names):
        raise LabelError(f"{path}, line {line}: class {index}, but there are {len(names)} names")
    return names[index]


def parse_voc(path: Path) -> list[Mark]:
    """Pascal VOC XML and its relatives: DIOR-R's corners, HRSC2016's and ROLabelImg's angles."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise LabelError(f"{path} is not XML: {error}") from error
    found = [*root.iter("object"), *root.iter("HRSC_Object")]
    return [voc_mark(item, path) for item in found]


CORNERS = ("x_left_top", "y_left_top", "x_right_top", "y_right_top",
           "x_right_bottom", "y_right_bottom", "x_left_bottom", "y_left_bottom")  # fmt: skip
VOC_SHAPES = (
    CORNERS,
    ("cx", "cy", "w", "h", "angle"), ("mbox_cx", "mbox_cy", "mbox_w", "mbox_h", "mbox_ang"),
    ("xmin", "ymin", "xmax", "ymax"), ("box_xmin", "box_ymin", "box_xmax", "box_ymax"),
)  # fmt: skip
"""Tags that hold a box, the most precise first."""


def voc_mark(item: ElementTree.Element, path: Path) -> Mark:
    """One object of an XML file."""
    texts = {e.tag: (e.text or "").strip() for e in item.iter()}
    name = texts.get("name") or texts.get("Class_ID") or ""
    for tags in VOC_SHAPES:
        if all(t in texts for t in tags):
            shape = tuple(numbers(path, 0, [texts[t] for t in tags]))
            return Mark(shape, name, ignored=texts.get("difficult") == "1")
    raise LabelError(f"{path}: object {name!r} has no box (bndbox, robndbox or corners)")


def parse_coco(path: Path) -> tuple[dict[str, list[Mark]], tuple[str, ...]]:
    """COCO JSON: file name -> marks, and class names in order of their ids.

    A segmentation of four corners is taken as the (rotated) box; crowds are ignored objects.

    Raises:
        LabelError: if it is not COCO.
    """
    try:
        content = read_json(path)
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        files = {i["id"]: str(i["file_name"]) for i in content["images"]}
        marks: dict[str, list[Mark]] = {f: [] for f in files.values()}
        for row in content["annotations"]:
            marks[files[row["image_id"]]].append(coco_mark(row, categories))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabelError(f"{path} is not COCO: {error!r}") from error
    return marks, tuple(categories[k] for k in sorted(categories))


def coco_mark(row: Mapping[str, Any], categories: Mapping[Any, str]) -> Mark:
    """One annotation."""
    outline = row.get("segmentation")
    four = isinstance(outline, list) and len(outline) == 1 and len(outline[0]) == 8
    x, y, w, h = (float(v) for v in row["bbox"])
    shape = tuple(map(float, outline[0])) if outline and four else (x, y, x + w, y + h)
    track = row.get("track_id", -1)
    return Mark(shape, categories[row["category_id"]], bool(row.get("iscrowd")), int(track))


def is_coco(path: Path) -> bool:
    """Whether a JSON file has images, annotations and categories."""
    try:
        return {"images", "annotations", "categories"} <= set(read_json(path))
    except (ValueError, OSError):
        return False


IMAGE_FIELDS = ("image_path", "image", "filename", "file_name", "file")
EDGES = ("xmin", "ymin", "xmax", "ymax")


def parse_csv(path: Path) -> dict[str, list[Mark]]:
    """A CSV with fields image_path, xmin, ymin, xmax, ymax and label: image -> marks.

    Raises:
        LabelError: for missing fields or values that are no numbers.
    """
    fields, *rows = read_rows(path) or [[]]
    image = next((f for f in IMAGE_FIELDS if f in fields), None)
    if image is None or not set(EDGES) <= set(fields):
        raise LabelError(f"{path} needs fields image_path, {', '.join(EDGES)} and label")
    marks: dict[str, list[Mark]] = {}
    for line, cells in enumerate(rows, 2):
        row = dict(zip(fields, cells, strict=False))
        shape = tuple(numbers(path, line, [row.get(e, "") for e in EDGES]))
        name = row.get("label") or row.get("class") or "object"
        marks.setdefault(row.get(image, ""), []).append(Mark(shape, name))
    return marks


def parse_mot(path: Path, names: Sequence[str] = ()) -> dict[int, list[Mark]]:
    """MOTChallenge: frame, id, left, top, width, height[, counts, class, visibility].

    Returns frame -> marks. Rows that do not count (7th column 0) are ignored objects; classes are
    numbered from 1.
    """
    marks: dict[int, list[Mark]] = {}
    for line, text in text_lines(path):
        values = numbers(path, line, text.split(","))
        if len(values) < 6:
            raise LabelError(f"{path}, line {line}: {len(values)} numbers; MOT has at least 6")
        frame, track, x, y, w, h = values[:6]
        index = int(values[7]) if len(values) > 7 else 1
        name = name_of(index - 1, names, path, line) if names else f"class_{index}"
        counts = len(values) < 7 or values[6] != 0
        mark = Mark((x, y, x + w, y + h), name, not counts, int(track))
        marks.setdefault(int(frame), []).append(mark)
    return marks


def parse_vector(path: Path, grid: Grid) -> list[Mark]:
    """Polygons of a GeoJSON, GeoPackage, GeoParquet or shapefile as rotated boxes on a scene.

    Raises:
        LabelError: if it holds no polygons, or all of them miss the scene.
    """
    import shapely

    from ringmoe_cli.scene.labelled.polygons import check_cover, class_field, on_grid, read_table
    from ringmoe_cli.scene.labels import Wanted

    table = read_table(path)
    field = class_field(table, Wanted("detection"), path)
    table = on_grid(table, grid)
    table = table[table.geom_type.isin(["Polygon", "MultiPolygon"])].explode(index_parts=False)
    check_cover(table, grid, path)
    names = table[field].astype(str) if field else ["object"] * len(table)
    marks = []
    for geometry, name in zip(table.geometry.values, names, strict=True):
        pixels = shapely.transform(geometry, lambda xy: to_pixels(xy, grid))
        around = shapely.minimum_rotated_rectangle(pixels)
        if around.geom_type == "Polygon":
            corners = shapely.get_coordinates(around)[:4]
            marks.append(Mark(tuple(corners.ravel().tolist()), name))
    return marks


def to_pixels(xy: Any, grid: Grid) -> Any:
    """(N, 2) ground coordinates -> (N, 2) x, y in pixels."""
    import numpy as np

    row, col = grid.rowcol(xy[:, 0], xy[:, 1])
    return np.stack([col, row], 1)
