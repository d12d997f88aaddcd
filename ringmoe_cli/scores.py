"""Scores as tables, JSON and CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ringmoe_cli import console

PER_CLASS = "_per_class"


def plain(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, null for what is not a finite number."""
    text = json.dumps(value, default=console.plain)
    return json.loads(text, parse_constant=lambda _: None)


def totals(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores that are one number."""
    return {k: v for k, v in scores.items() if isinstance(v, int | float)}


def per_class(scores: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Name -> one number per class."""
    return {k.removesuffix(PER_CLASS): v for k, v in scores.items() if k.endswith(PER_CLASS)}


def shown(value: float | None) -> str:
    """A number for people: four digits, a dash where it is undefined."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def report(
    task: str, scores: Mapping[str, Any], output: Path, as_json: bool, classes: Sequence[str] = ()
) -> None:
    """Scores and the folder they belong to, on stdout."""
    if as_json:
        console.result({"output": str(output), "task": task, "scores": plain(scores)})
        return
    if classes:
        class_table(scores, classes)
    console.table("", ("score", "value"), [(k, shown(v)) for k, v in totals(scores).items()])
    console.result(output)


def class_table(scores: Mapping[str, Any], classes: Sequence[str]) -> None:
    """One row per class."""
    columns = per_class(scores)
    rows = [
        (name, *(shown(values[i]) for values in columns.values())) for i, name in enumerate(classes)
    ]
    console.table("", ("class", *columns), rows)


def write_csv(path: Path, scores: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Rows `score,class,value`; totals have an empty class."""
    rows: list[tuple[str, str, Any]] = [(k, "", v) for k, v in totals(scores).items()]
    for name, values in per_class(scores).items():
        rows += [(name, c, v) for c, v in zip(classes, values, strict=True)]
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("score", "class", "value"))
        writer.writerows((score, c, plain(value)) for score, c, value in rows)
    part.replace(path)
