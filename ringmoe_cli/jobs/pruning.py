"""What `ringmoe prune` does around `model.prune`: names, the plan in words, the run."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmoe_cli import console
from ringmoe_cli.errors import OutputExistsError, RingmoeError
from ringmoe_cli.machine import return_unused_memory

if TYPE_CHECKING:
    from torch import Tensor

    from model.budget import Mass
    from model.checkpoint import CheckpointConfig
    from model.prune import Method, Plan

DISTILL_BATCH = 16
"""Chips of each modality in a step of distillation."""


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
    tiles: tuple[Path, ...] = ()
    """Stores to calibrate on."""
    chips: int = 512
    """Calibration chips of each modality."""
    distill: int = 0
    """Steps of distillation afterwards."""


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


@dataclass(frozen=True)
class Work:
    """What was decided, and what it was decided on."""

    request: Request
    """As asked."""
    parent: "CheckpointConfig"
    """config.json of the source."""
    plan: "Plan"
    """What is kept."""
    mass: "Mass"
    """Routing mass of every expert; empty where no size is asked for."""
    chips: "Mapping[str, Tensor]"
    """Calibration chips; empty without tiles."""


def planned(request: Request) -> Work:
    """Decide what to keep; routers and tiles are read, nothing is written.

    Raises:
        RingmoeError: if `fit` or distillation is asked for without tiles.
    """
    from model.checkpoint import read_config
    from model.mass import mass_of_routers
    from model.prune import plan_pruning, sub_model
    from ringmoe_cli.jobs.calibration import (
        calibration_chips,
        chips_within_memory,
        routing_mass,
    )

    if not request.tiles and (request.method == "fit" or request.distill):
        raise RingmoeError("--method fit and --distill learn from tiles; name a store with --tiles")
    parent = read_config(request.source)
    modalities = request.modalities or parent.model.modalities
    part = sub_model(parent.model, modalities)
    chips: Mapping[str, Tensor] = {}
    mass: Mass = {}
    if request.tiles:
        count = chips_within_memory(part, request.chips)
        if count < request.chips:
            console.say(f"{count} of {request.chips} chips: more would need too much memory")
        chips = calibration_chips(request.tiles, parent, part.modalities, count)
        mass = routing_mass(request.source, part, chips)
    elif request.target:
        mass = mass_of_routers(request.source, part)
    default: Method = "fit" if request.tiles else "kc"
    plan = plan_pruning(parent.model, modalities, request.target, mass, request.method, default)
    return Work(request, parent, plan, mass, chips)


def described(work: Work) -> dict[str, Any]:
    """The plan as plain values."""
    from model.rewrite import traffic

    plan, parent = work.plan, work.parent
    read, written = traffic(work.request.source, plan)
    before, after = plan.multiply_adds()
    return {
        "model": str(work.request.source),
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


def prune(work: Work, out: Path) -> None:
    """Write the pruned checkpoint, with progress; distil it if asked."""
    from model.rewrite import prune_checkpoint, result_config, traffic

    request, plan = work.request, work.plan
    config = result_config(work.parent, plan, request.target, fingerprint_of(work))
    total, _ = traffic(request.source, plan)
    with console.progress(round(total / 1e6), f"pruning to {out.name}", "MB") as advance:
        prune_checkpoint(
            request.source,
            out,
            plan,
            config,
            chips=work.chips,
            advance=lambda n: passed(n, advance),
            overwrite=True,
        )
    if request.distill:
        distil(work, out)


def passed(size: float, advance: Callable[..., None]) -> None:
    """Some bytes are done; what working on them left behind goes back to the system."""
    return_unused_memory()
    advance(size / 1e6)


def fingerprint_of(work: Work) -> str | None:
    """What the calibration chips were, as a checksum; None without any."""
    if not work.chips:
        return None
    crc = 0
    for images in work.chips.values():
        crc = zlib.crc32(images.numpy().tobytes(), crc)
    return f"{crc:08x}"


def distil(work: Work, out: Path) -> None:
    """Train a pruned checkpoint on its parent's features; it is replaced when that is done."""
    import torch

    from model.checkpoint import (
        disk_tensors,
        load_module,
        read_config,
        read_tensors,
        save_checkpoint,
        weight_map,
    )
    from model.distill import distill
    from model.encoder import RingMoE
    from model.prune import sub_model

    student = RingMoE.from_pretrained(out).float()
    with torch.device("meta"):
        parent = RingMoE(sub_model(work.plan.source, work.plan.result.modalities))
    load_module(work.request.source, parent, "encoder.")
    steps = work.request.distill
    with console.progress(steps, "distilling", "step") as advance:
        distill(
            student,
            parent.float().eval(),
            drawn(work.chips, steps),
            steps,
            on_step=lambda loss: advance(1, f"loss {loss:.4f}"),
        )
    others = [name for name in weight_map(out) if not name.startswith("encoder.")]
    tensors = [(f"encoder.{name}", t) for name, t in disk_tensors(student)]
    config = read_config(out).with_provenance(distilled=steps)
    save_checkpoint(out, config, [*tensors, *read_tensors(out, others)])


def drawn(chips: "Mapping[str, Tensor]", steps: int) -> "Iterator[dict[str, Tensor]]":
    """Random batches of the calibration chips, flipped at random."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = {}
        for name, images in chips.items():
            rows = torch.randint(len(images), (DISTILL_BATCH,), generator=generator)
            flip = torch.rand(1, generator=generator) < 0.5
            batch[name] = images[rows].flip(-1) if flip else images[rows]
        yield batch
