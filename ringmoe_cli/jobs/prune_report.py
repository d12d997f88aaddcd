"""What a pruning did, on one page: sizes, kept experts, feature errors, speed."""

import base64
import html
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmoe_cli.errors import RingmoeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from model.encoder import RingMoE
    from ringmoe_cli.jobs.pruning import Work

KINDS = (".json", ".html", ".png")
REPEATS = 3
MEASURED = 500_000_000
"""Parameters of the largest model whose speed is measured."""


def check_path(path: Path) -> None:
    """Refuse a report of a kind that is not written, or in a folder that is not there.

    Raises:
        RingmoeError: naming the kinds or the folder.
    """
    if not path.parent.is_dir():
        raise RingmoeError(f"--report {path}: {path.parent} is no folder; make it first")
    if path.suffix not in KINDS:
        raise RingmoeError(f"--report {path}: choose a name that ends in {', '.join(KINDS)}")


def report_of(work: "Work", facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """Everything the report says, as plain values."""
    from model.budget import branches, rows_of
    from model.calibration import layer_errors

    chosen, rows = work.plan.chosen, []
    found = layer_errors(work.request.source, out, work.plan, work.chips) if work.chips else []
    errors = {e.layer: {"error": e.error, "path_error": e.path} for e in found}
    for layer in work.plan.experts():
        kept = {}
        for branch in branches(chosen):
            mass = work.mass.get(layer, {}).get(branch, ())
            own = rows_of(chosen, layer, branch)
            kept[branch] = {
                "kept": list(own),
                "mass": [round(float(m), 4) for m in mass],
                "mass_kept": round(float(sum(mass[row] for row in own)), 4) if mass else None,
            }
        rows.append({"layer": layer, "branches": kept, **errors.get(layer, {})})
    return {**facts, "output": str(out), "layers": rows, "speed": speeds(work, out)}


def speeds(work: "Work", out: Path) -> dict[str, float] | None:
    """Chips per second before and after, in turn; None for models too large to try."""
    import torch

    from model.checkpoint import load_module
    from model.encoder import RingMoE
    from model.prune import size_of, sub_model

    config = sub_model(work.plan.source, work.plan.result.modalities)
    if size_of(config) > MEASURED:
        return None
    with torch.device("meta"):
        before = RingMoE(config)
    load_module(work.request.source, before, "encoder.")
    after = RingMoE.from_pretrained(out)
    nets = {"before": before.eval(), "after": after}
    best = dict.fromkeys(nets, float("inf"))
    for _ in range(REPEATS):
        for name, net in nets.items():
            best[name] = min(best[name], seconds(net))
    return {name: round(1 / value, 3) for name, value in best.items()}


def seconds(net: "RingMoE") -> float:
    """Seconds of one training chip of the first modality, in a batch of four."""
    import torch

    name, channels = next(iter(net.config.channels.items()))
    images = torch.zeros(4, channels, net.config.image_size, net.config.image_size)
    with torch.no_grad():
        start = time.perf_counter()
        net({name: images})
    return (time.perf_counter() - start) / 4


def write_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, as a picture, or as a page with the picture in it."""
    part = path.with_name(path.name + ".part")
    if path.suffix == ".json":
        part.write_text(json.dumps(report, indent=1) + "\n")
    else:
        picture = io.BytesIO()
        drawn(report).savefig(picture, format="png", dpi=110, metadata={"Software": None})
        if path.suffix == ".png":
            part.write_bytes(picture.getvalue())
        else:
            part.write_text(page(report, picture.getvalue()))
    part.replace(path)


def summary(report: dict[str, Any]) -> list[str]:
    """Size, arithmetic and speed before and after, in words."""
    from model.prune import human

    before, after = report["parameters_before"], report["parameters_after"]
    speed = report["speed"]
    return [
        f"{human(before)} → {human(after)} encoder parameters ({after / before:.1%})",
        f"multiply-adds of one chip {report['multiply_adds_before']:.3g} → "
        f"{report['multiply_adds_after']:.3g}",
        f"chips per second {speed['before']:.3g} → {speed['after']:.3g}"
        if speed
        else f"speed not measured: more than {human(MEASURED)} parameters",
    ]


def drawn(report: dict[str, Any]) -> "Figure":
    """Kept experts with their routing mass, and the errors of the layers."""
    from matplotlib.figure import Figure

    layers = report["layers"]
    figure = Figure(figsize=(8, 2.2 + 0.32 * len(layers)), layout="constrained")
    figure.suptitle("\n".join(summary(report)), fontsize=9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    for y, row in enumerate(layers):
        x = 0.0
        for branch in row["branches"].values():
            for expert, mass in enumerate(branch["mass"]):
                colour = "tab:blue" if expert in branch["kept"] else "lightgrey"
                left.barh(y, max(mass, 0.01), left=x, color=colour, edgecolor="white")
                x += mass
            x = round(x + 0.05, 2)
        right.barh(y - 0.2, row.get("error", 0.0), height=0.4, color="tab:orange")
        right.barh(y + 0.2, row.get("path_error", 0.0), height=0.4, color="tab:red")
    left.set_yticks(range(len(layers)), [row["layer"] for row in layers])
    left.invert_yaxis()
    left.set_title("routing mass by branch (blue: kept)", fontsize=9)
    right.set_title("feature error: layer, path (red)", fontsize=9)
    return figure


def page(report: dict[str, Any], picture: bytes) -> str:
    """A page that needs no other file."""
    plain = {k: v for k, v in report.items() if k not in ("layers", "speed")}
    lines = "".join(
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>"
        for k, v in plain.items()
        if v not in (None, "")
    )
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary(report))
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return (
        "<!doctype html><meta charset=utf-8><title>ringmoe prune</title>"
        "<style>body{font:14px sans-serif;margin:2em}th,td{text-align:left;padding-right:1em}"
        f"img{{max-width:100%}}</style><h1>Pruning</h1>{said}"
        f"<table>{lines}</table><img alt='experts and errors' src='{source}'>"
        f"{layer_table(report['layers'])}\n"
    )


def layer_table(layers: list[dict[str, Any]]) -> str:
    """Kept experts of every layer with their routing mass, and its errors, as HTML."""
    names = list(layers[0]["branches"])
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("layer", *names, "error", "path error"))
    rows = []
    for row in layers:
        cells = [row["layer"], *(kept_words(row["branches"][name]) for name in names)]
        cells += [f"{row[key]:.4f}" if key in row else "" for key in ("error", "path_error")]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def kept_words(branch: dict[str, Any]) -> str:
    """Experts of a branch that stay, by router row, each with its share of the tokens."""
    mass = branch["mass"]
    return ", ".join(f"{k} ({mass[k]:.0%})" if mass else str(k) for k in branch["kept"]) or "none"
