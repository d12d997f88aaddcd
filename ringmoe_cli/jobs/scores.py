"""Scores as tables, JSON and CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.metrics import ConfusionMatrix
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


def report(scores: Mapping[str, Any], output: Path, as_json: bool) -> None:
    """Scores and the folder they belong to, on stdout."""
    if as_json:
        console.result({"output": str(output), "scores": plain(scores)})
        return
    classes = scores.get("class_names", ())
    if classes and per_class(scores):
        class_table(scores, classes)
    if areas := scores.get("areas"):
        area_table(areas)
    console.table("", ("score", "value"), [(k, shown(v)) for k, v in totals(scores).items()])
    console.result(output)


def as_text(value: Any) -> str:
    """JSON for a file."""
    return json.dumps(value, indent=1) + "\n"


def area_table(areas: Mapping[str, Any]) -> None:
    """Mapped and error-adjusted area of every class."""
    unit = areas["unit"]
    rows = [
        (name, f"{a['mapped']:.1f}", f"{a['estimated']:.1f}", f"± {a['margin']:.1f}")
        for name, a in areas["classes"].items()
    ]
    console.table("", ("class", f"mapped ({unit})", "estimated", "95 %"), rows)


def write_evaluation(
    output: Path,
    scores: Mapping[str, Any],
    classes: Sequence[str],
    confusion: ConfusionMatrix | None,
) -> None:
    """`evaluation.json`, `evaluation.csv` and, where classes are counted, `confusion.png`."""
    from model.checkpoint import write_text

    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "evaluation.json", as_text(plain(scores)))
    write_csv(output / "evaluation.csv", scores, classes)
    if confusion is not None:
        from ringmoe_cli.scene.picture import save_confusion

        save_confusion(output / "confusion.png", confusion.counts.numpy(), classes)


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
