"""Names and colours of the values of a class raster, where GDAL keeps them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Category:
    """One value of a class raster."""

    value: int
    """Raw value."""
    name: str
    """Class name."""
    colour: Colour | None = None
    """RGB, if the file says."""


def read_categories(path: Path, source: Any) -> dict[int, Category]:
    """Named values of a raster's first band: from its side file, or from its own metadata.

    Understood are GDAL's raster attribute table and category names in `<file>.aux.xml`, and a
    `CLASS_NAMES` tag (a JSON list, or separated by commas); colours come from the colour table.
    """
    side = path.with_name(f"{path.name}.aux.xml")
    names: dict[int, Category] = {}
    if side.is_file():
        names = from_side_file(side)
    written = source.tags(1).get("CLASS_NAMES") or source.tags().get("CLASS_NAMES")
    if not names and written:
        names = {i: Category(i, n) for i, n in enumerate(name_list(written))}
    try:
        table: Mapping[int, Any] = source.colormap(1)
    except ValueError:
        return names
    return {
        v: c if c.colour else Category(v, c.name, table_colour(table, v)) for v, c in names.items()
    }


def table_colour(table: Mapping[int, Any], value: int) -> Colour | None:
    """A value's colour in a GDAL colour table."""
    if value not in table:
        return None
    red, green, blue, _ = table[value]
    return (red, green, blue)


def name_list(text: str) -> list[str]:
    """Names in a tag: a JSON list, or separated by commas."""
    try:
        found = json.loads(text)
    except ValueError:
        found = text.split(",")
    return [str(n).strip() for n in found] if isinstance(found, list) else []


def from_side_file(path: Path) -> dict[int, Category]:
    """Category names or an attribute table of the first band in a PAM file."""
    try:
        text = path.read_text("utf-8")
        root = ElementTree.fromstring(text) if "<!" not in text else None
    except (ElementTree.ParseError, UnicodeDecodeError):
        return {}
    band = root.find("PAMRasterBand") if root is not None else None
    if band is None:
        return {}
    table = band.find("GDALRasterAttributeTable")
    if table is not None:
        return from_table(table)
    names = [e.text or "" for e in band.findall("CategoryNames/Category")]
    return {i: Category(i, n) for i, n in enumerate(names) if n}


def from_table(table: ElementTree.Element) -> dict[int, Category]:
    """Rows of a raster attribute table that have a name (GDAL usages: 2 name, 5 value, 6-8 RGB)."""
    fields = table.findall("FieldDefn")
    heads = [(f.findtext("Name", "").lower(), f.findtext("Usage", "0")) for f in fields]
    name = column(heads, "2", ("class_name", "class_names", "classname", "class", "name", "label"))
    value = column(heads, "5", ("value",))
    colours = [column(heads, usage, (label,)) for usage, label in COLOURS]
    found: dict[int, Category] = {}
    for number, row in enumerate(table.findall("Row")):
        cells = [f.text or "" for f in row.findall("F")]
        if name is None or not cells[name].strip():
            continue
        at = int(float(cells[value])) if value is not None else number
        found[at] = Category(at, cells[name].strip(), rgb(cells, colours))
    return found


COLOURS = (("6", "red"), ("7", "green"), ("8", "blue"))


def column(heads: list[tuple[str, str]], usage: str, labels: tuple[str, ...]) -> int | None:
    """The column of this usage, else of one of these names."""
    for number, (_, use) in enumerate(heads):
        if use == usage:
            return number
    for label in labels:
        for number, (head, _) in enumerate(heads):
            if head == label:
                return number
    return None


def rgb(cells: list[str], columns: list[int | None]) -> Colour | None:
    """A row's colour; fractions of one are scaled to 255."""
    if any(c is None for c in columns):
        return None
    parts = [float(cells[c]) for c in columns if c is not None]
    if all(p <= 1 for p in parts) and any(p % 1 for p in parts):
        parts = [p * 255 for p in parts]
    return (round(parts[0]), round(parts[1]), round(parts[2]))
