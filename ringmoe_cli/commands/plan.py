"""`ringmoe plan`: what a training run needs, before anyone pays for it."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.machine import chosen_device
from ringmoe_cli.options import Device, Json

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.plan import Cluster, Estimate, Layout, Workload

UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def plan(
    gpus: Annotated[int, typer.Option(min=1, help="Ranks.")],
    memory: Annotated[str, typer.Option(help="Memory of one device, e.g. 80GB.")],
    preset: Annotated[str, typer.Option(help="nano, tiny, base, large or 14b.")] = "14b",
    batch: Annotated[int, typer.Option(min=1, help="Images of one update over all ranks.")] = 512,
    peak: Annotated[str, typer.Option(help="FLOP/s one device reaches.")] = "400T",
    bandwidth: Annotated[str, typer.Option(help="Bytes/s one device can receive.")] = "50GB",
    measure: Annotated[
        bool, typer.Option(help="Time a block of every stage on this device instead of --peak.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Memory per rank, traffic, arithmetic and time of pre-training, and a layout that fits.

    The times are what the given peak and bandwidth allow; a real run reaches its own share of them.
    With --measure the parts of the model are timed here, and the bandwidth alone is taken on trust.

    Examples:
        ringmoe plan --preset 14b --gpus 64 --memory 80GB
        ringmoe plan --preset base --gpus 4 --memory 24GB --batch 64 --json
        ringmoe plan --preset tiny --gpus 2 --memory 12GB --batch 8 --measure --bandwidth 1GB
    """
    from model.config import ModelConfig
    from model.plan import Cluster, Link, Workload, smallest
    from model.plan import plan as fitting

    config, link = ModelConfig.preset(preset), Link(quantity(bandwidth))
    work = Workload.of(config)
    cluster = Cluster(gpus, quantity(memory), quantity(peak), link, link)
    if measure:
        work, cluster = measured(config, cluster, device)
    fits = fitting(work, cluster, batch)
    if not fits:
        layout, cost = smallest(work, cluster)
        raise RingmoeError(
            f"{preset} does not fit {gpus} × {memory}: the most frugal layout (ep {layout.ep}, one "
            f"image at a time, checkpointing) needs {cost.memory / 1e9:.1f} GB a rank, of which "
            f"{(cost.weights + cost.gradients + cost.optimiser) / 1e9:.1f} GB shrink with more gpus"
        )
    report = describe(cluster, *fits[0])
    if as_json:
        console.result(report)
    else:
        console.table(f"{preset} on {gpus} × {memory}", ("what", "value"), list(report.items()))


def measured(
    config: "ModelConfig", cluster: "Cluster", device: str
) -> tuple["Workload", "Cluster"]:
    """The same on this kind of device, at the pace at which it computes the parts of the model."""
    from model.plan import Workload
    from model.timing import pace

    where = chosen_device(device)
    on_cpu = where == "cpu"
    console.say(f"timing the parts of the model on {where}")
    found = pace(config, where, "fp32" if on_cpu else "bf16")
    work = Workload.of(config, width=4 if on_cpu else 2, probabilities=on_cpu)
    return work, replace(cluster, pace=found, beside=not on_cpu, whole=on_cpu)


def describe(cluster: "Cluster", layout: "Layout", cost: "Estimate") -> dict[str, object]:
    """The chosen layout and its cost per update and rank, in plain units."""
    gigabytes = {
        f"{name.replace('_', ' ')} (GB)": round(getattr(cost, name) / 1e9, 3)
        for name in (
            "memory", "weights", "gradients", "optimiser", "gathered", "activations",
            "shard_traffic", "token_traffic",
        )
    }  # fmt: skip
    return {
        "layout": f"dp {cluster.gpus // layout.ep} × ep {layout.ep}",
        "images per forward pass": layout.micro_batch,
        "forward passes per update": layout.accumulate,
        "checkpointing": "yes" if layout.checkpointing else "no",
        **gigabytes,
        "arithmetic (TFLOP)": round(cost.flops / 1e12, 3),
        "seconds per update": round(cost.seconds, 4),
    }


def quantity(text: str) -> float:
    """A number with a decimal unit: 80GB, 400T, 1.5e9.

    Raises:
        RingmoeError: if it is none.
    """
    found = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([KMGTP]?)(?:i?B|FLOPS?|B/s)?", text.strip(), re.I)
    if found is None:
        raise RingmoeError(f"{text!r} is not a quantity; write for example 80GB or 400T")
    return float(found[1]) * UNITS[found[2].upper()]
