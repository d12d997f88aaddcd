"""What a prediction says about itself: areas per class for people, identities for resuming."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.config import TaskConfig
from ringmoe_cli import console
from ringmoe_cli.jobs.prediction import Report
from ringmoe_cli.scene.areas import Areas, areas_of_map
from ringmoe_cli.scene.maps.product import CELL
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.scene import Scene


def summary(path: str, source: Normalised, task: TaskConfig, report: Report) -> dict[str, Any]:
    """What happened to a scene, as one JSON object."""
    first, *others = report.outputs.values()
    out: dict[str, Any] = {"scene": path, "output": str(first), "task": task.name}
    if others:
        out["more"] = {k: str(v) for k, v in list(report.outputs.items())[1:]}
    if task.classes:
        out.update(class_summary(source, task, report))
    else:
        out.update(value_summary(report))
    if report.skipped:
        out["skipped"] = report.skipped
    return {**out, "seconds": round(report.seconds, 3)}


def class_summary(source: Normalised, task: TaskConfig, report: Report) -> dict[str, Any]:
    """Pixels, share and geodesic area of each class, and the mean confidence."""
    counts = np.array([sums["counts"].sum(0) for _, _, sums in report.sums]).sum(0)
    area = class_areas(source, report, len(task.classes))
    total = int(counts.sum())
    confidence = sum(float(sums["confidence"][0]) for _, _, sums in report.sums)
    classes = {
        name: {"pixels": int(counts[i]), "share": round(float(counts[i] / max(total, 1)), 6)}
        | ({} if area is None else {"area_m2": round(float(area[i]), 1)})
        for i, name in enumerate(task.classes)
    }
    grid = source.grid
    return {
        "classes": classes,
        "mean_confidence": round(confidence / total, 6) if total else None,
        "nodata_share": round(1 - total / (grid.height * grid.width), 6),
    }


def class_areas(source: Normalised, report: Report, classes: int) -> Any:
    """Geodesic area of each class in m²; None where neither scene nor map has a transform."""
    try:
        areas = Areas(source.grid)
    except ValueError:
        return areas_of_map(report.outputs["classes"], classes, CELL)
    return sum(
        areas.of_pixels(row, height, CELL) @ sums["counts"] for row, height, sums in report.sums
    )


def value_summary(report: Report) -> dict[str, Any]:
    """Mean and standard deviation of the values."""
    n, total, squares = np.sum([sums["sums"] for _, _, sums in report.sums], axis=0)
    mean = total / n if n else float("nan")
    deviation = np.sqrt(max(squares / n - mean**2, 0)) if n else float("nan")
    return {"pixels": int(n), "mean": float(mean), "std": float(deviation)}


def described(outputs: Mapping[str, Path], path: str, source: Normalised, task: str) -> str:
    """Write the STAC item of a scene's outputs; returns its path."""
    from ringmoe_cli.scene.maps.stac import write_item

    scene = next(iter(source.dates[-1].values())).scene
    item, dated = write_item(outputs, Path(path), scene.grid, scene.date, task)
    if not dated:
        console.warn(f"{path} does not say when it was taken; {item} says: before its file was")
    return str(item)


def identity_of(scene: Scene) -> dict[str, Any]:
    """What tells a scene from others: its description, and size and time of its files."""
    files = sorted({b.path for b in scene.bands if b.path})
    return {"scene": repr(scene), "files": [stamp(Path(f)) for f in files]}


def stamp(path: Path) -> tuple[str, int, int]:
    """Name, size and time of a file (zeros if it is not a local one)."""
    if not path.exists():
        return str(path), 0, 0
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns


def model_identity(directory: Path) -> dict[str, Any]:
    """What tells a checkpoint from others."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return {"files": [stamp(f) for f in files]}
