"""The tables of `tasks.md` from the rows of the queue: every row, won or lost.

    python benchmarks/tasks_table.py WORK

Writes between the marks of `benchmarks/tasks.md`: one line per set, then a table per set.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tasks_sets import CASES, Case

PAGE = Path(__file__).parent / "tasks.md"
BEGIN, END = "<!-- rows begin -->", "<!-- rows end -->"
COLUMNS = {
    "classification": ("accuracy", "kappa", "f1", "ece"),
    "segmentation": ("miou", "accuracy", "kappa", "ece"),
    "change": ("change_f1", "change_iou", "kappa", "ece"),
    "depth": ("rmse", "mae", "r2"),
    "detection": ("map50", "map", "recall"),
    "tracking": ("hota", "mota", "idf1", "precision", "map50", "switches"),
}
TITLES = {
    "miou": "mIoU", "change_f1": "F1 of change", "change_iou": "IoU of change", "f1": "macro F1",
    "rmse": "RMSE, m", "mae": "MAE, m", "r2": "R²", "map50": "AP50", "map": "AP", "ece": "ECE",
    "hota": "HOTA", "mota": "MOTA", "idf1": "IDF1",
}  # fmt: skip
LOWER = ("rmse",)
TRACKING = Case((), "tracking", protocol="WPAFB AOI_02, frames 100-105, 600 label points; trained "
                "and tuned on simulated clips only; a track's centre within 6 pixels of a point "
                "matches it", few=True)  # fmt: skip


def tables(work: Path) -> None:
    """Rewrite the tables of the page."""
    path = work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sets = {**CASES, "wpafb": TRACKING}
    found = {name: [r for r in rows if r["set"] == name] for name in sets}
    parts = [overview(sets, found), *(section(n, case, found[n]) for n, case in sets.items())]
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{chr(10).join(p for p in parts if p)}{END}{after}")


NETWORKS = (
    "ResNet-18", "random start, frozen", "random start, full", "pre-trained, frozen",
    "pre-trained, full",
)  # fmt: skip
"""Columns of the overview, by the beginning of a row's name; the best of each counts."""
TRIVIAL = ("commonest class", "mean of the training", "labels of the first")
CLASSICAL = ("linear", "random forest", "differences")


def overview(sets: dict[str, Case], found: dict[str, list[dict[str, Any]]]) -> str:
    """A line per set: its score by trivial, classical and learned methods."""
    lines = ["| set, score | trivial | classical | " + " | ".join(NETWORKS) + " |",
             "|---|" + "---:|" * (2 + len(NETWORKS))]  # fmt: skip
    for name, case in sets.items():
        key = COLUMNS[case.task][0]
        choose = min if key in LOWER else max
        groups: dict[str, list[float]] = {g: [] for g in ("trivial", "classical", *NETWORKS)}
        for row in (r for r in found[name] if isinstance(r.get(key), float)):
            groups.get(group_of(row["method"]), []).append(row[key])
        scores = {g: choose(values) for g, values in groups.items() if values}
        best = choose(scores.values(), default=None)
        cells = [shown(scores.get(g), best) for g in groups]
        lines.append(f"| {name}, {title(key, case)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


def group_of(method: str) -> str:
    """The overview's column of a row; none for those that answer another question."""
    if method.startswith(TRIVIAL):
        return "trivial"
    if method.startswith(CLASSICAL):
        return "classical"
    if method.startswith("trained on simulated"):
        return "pre-trained, full" if "pre-trained" in method else "random start, full"
    return next((n for n in NETWORKS if method.startswith(n)), "")


def shown(score: float | None, best: float | None) -> str:
    """A score, the best of its set in bold."""
    if score is None:
        return ""
    return f"**{score:.3f}**" if score == best else f"{score:.3f}"


def section(name: str, case: Case, rows: list[dict[str, Any]]) -> str:
    """One set: its protocol and its rows, the best one in bold."""
    if not rows:
        return ""
    keys = COLUMNS[case.task]
    kind = "functional check: under 20 images" if case.few else "benchmark"
    names = [title(k, case) for k in keys]
    main = [r[keys[0]] for r in rows if isinstance(r.get(keys[0]), float)]
    best = (min if keys[0] in LOWER else max)(main, default=None)
    lines = [f"### {name} ({case.task}; {kind})", "", f"{case.protocol}.", "",
             f"| method | {' | '.join(names)} | steps | CPU s |",
             f"|---|{'---:|' * (len(keys) + 2)}"]  # fmt: skip
    for row in rows:
        cells = [cell(row, k) for k in keys]
        if best is not None and row.get(keys[0]) == best:
            cells[0] = f"**{cells[0]}**"
        told = f"{row['cpu']:.0f}" if row.get("cpu") else ""
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {row.get('steps', '')} | {told} |")
    return "\n".join([*lines, "", ""])


def title(key: str, case: Case) -> str:
    """Heading of a column; against another program's map nothing is called accuracy."""
    if case.reference and key == "accuracy":
        return "agreement"
    return TITLES.get(key, key)


def cell(row: dict[str, Any], key: str) -> str:
    """A number, with its margin where there is one."""
    value, margin = row.get(key), row.get(f"{key}_margin95")
    if value is None:
        return ""
    shown = f"{value:d}" if isinstance(value, int) else f"{value:.3f}"
    return shown if margin is None else f"{shown} ± {margin:.3f}"


if __name__ == "__main__":
    tables(Path(sys.argv[1]))
