"""What `ringmoe prune` does around `model.prune`: names, the plan in words, the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmoe_cli import console
from ringmoe_cli.errors import OutputExistsError

if TYPE_CHECKING:
    from model.checkpoint import CheckpointConfig
    from model.prune import Plan


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    source: Path
    """The checkpoint."""
    modalities: tuple[str, ...]
    """Those to keep; empty: all of the model's."""
    target: str | None
    """A size, one of the paper's stages, or None for the exact sub-model."""
    method: str | None
    """How layers become dense."""


def wanted_modalities(text: str | None) -> tuple[str, ...]:
    """Names in a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def output_path(request: Request, output: Path | None, overwrite: bool) -> Path:
    """Where the result goes: beside the model, named after what was asked.

    Raises:
        OutputExistsError: if something stands there and may not be replaced.
    """
    words = [*request.modalities, request.method, request.target]
    suffix = "-".join(w.lower().replace("%", "pct") for w in words if w) or "pruned"
    source = request.source.resolve()
    path = output or source.with_name(f"{source.name}-{suffix}")
    if path.exists() and not overwrite:
        raise OutputExistsError(path)
    return path


def planned(request: Request, parent: "CheckpointConfig") -> "Plan":
    """Decide what to keep; routers are read, nothing is written."""
    from model.mass import mass_of_routers
    from model.prune import plan_pruning, sub_model

    modalities = request.modalities or parent.model.modalities
    part = sub_model(parent.model, modalities)
    mass = mass_of_routers(request.source, part) if request.target else {}
    return plan_pruning(parent.model, modalities, request.target, mass, request.method)


def described(plan: "Plan", request: Request, parent: "CheckpointConfig") -> dict[str, Any]:
    """The plan as plain values."""
    from model.rewrite import traffic

    read, written = traffic(request.source, plan)
    before, after = plan.multiply_adds()
    return {
        "model": str(request.source),
        "modalities": list(plan.result.modalities),
        "method": plan.method,
        "parameters_before": plan.before,
        "parameters_after": plan.after,
        "multiply_adds_before": before,
        "multiply_adds_after": after,
        "bytes_read": read,
        "bytes_written": written,
        "head": parent.task.name if parent.task else None,
        "note": plan.note,
    }


def speak(plan: "Plan", facts: dict[str, Any]) -> None:
    """Say what will happen, on stderr."""
    from model.prune import human

    for line in (
        f"{human(plan.before)} -> {human(plan.after)} encoder parameters "
        f"({plan.after / plan.before:.1%}), modalities: {', '.join(plan.result.modalities)}",
        plan.note,
        f"multiply-adds of one chip {facts['multiply_adds_before']:.3g} -> "
        f"{facts['multiply_adds_after']:.3g}; reads {facts['bytes_read'] / 1e9:.3g} GB, "
        f"writes {facts['bytes_written'] / 1e9:.3g} GB",
        f"the {facts['head']} head is kept" if facts["head"] else "",
    ):
        if line:
            console.say(line)


def show(plan: "Plan", facts: dict[str, Any], as_json: bool) -> None:
    """The plan as a result on stdout: experts of each layer, before and after."""
    experts = plan.experts()
    if as_json:
        console.result({**facts, "experts": experts})
        return
    names = list(next(iter(experts.values())))
    rows = [
        [layer, *(f"{before} -> {after}" for after, before in (counts[n] for n in names))]
        for layer, counts in experts.items()
    ]
    console.table("experts per layer", ["layer", *names], rows)


def prune(request: Request, plan: "Plan", parent: "CheckpointConfig", out: Path) -> None:
    """Write the pruned checkpoint, with progress."""
    from model.rewrite import prune_checkpoint, result_config, traffic

    config = result_config(parent, plan, request.target)
    total, _ = traffic(request.source, plan)
    with console.progress(round(total / 1e6), f"pruning to {out.name}", "MB") as advance:
        prune_checkpoint(
            request.source,
            out,
            plan,
            config,
            advance=lambda n: advance(n / 1e6),
            overwrite=True,
        )
