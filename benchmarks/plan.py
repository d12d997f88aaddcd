"""The plan against real training: memory and time of a rank, on 1, 2 and 4 gloo processes.

    python benchmarks/plan.py [--presets nano tiny]

Each case is several launches of as many processes. The first measures what the plan adds up: one
block of every stage as the ranks run it together, everything outside the blocks, AdamW
(`model.timing`), messages, and what the libraries take of a process (a model of no size). The next
ones do so for another model and train it, with few and with many images, for what the parts leave
out: what the allocator wastes, copies around messages, time between the parts. The last trains;
nothing of it goes into the plan. With `--alone` every rank times blocks for itself, and their
messages are counted. One thread a rank, fp32, optical images; four ranks share two cores. Memory is
the growth of the peak resident set over that of a process that has joined the others; time is the
median of updates on the clock, so the machine must be quiet.
"""

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from model.config import ModelConfig
from model.plan import Cluster, Estimate, Layout, Link, Workload, estimate
from model.timing import Line, Pace
from ringmoe_cli.machine import keep_memory_of_updates

if TYPE_CHECKING:
    from torch import nn

    from model.parallel import Ranks
    from model.pretrain import MaskedImageModel

IMAGES = {"nano": 128, "tiny": 8, "base": 4, "other": 64, "others": 256, "wide": 16}
"""Of one update, over all ranks."""
ALONE = "RINGMOE_BENCHMARK_ALONE"
"""Set in the environment of ranks that time blocks for themselves."""
STEPS = 6
"""Updates, of which the first two do not count."""
SMALL = {"image_size": 64, "window": 8, "mask_cell": 16, "num_heads": (2, 4, 8, 16)}
MODELS: dict[str, dict[str, Any]] = {
    "smallest": {
        "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "image_size": 32, "window": 4,
        "mask_cell": 8,
    },
    "other": {"embed_dim": 64, "depths": (1, 1, 2, 1), **SMALL},
    "wide": {"embed_dim": 112, "depths": (1, 1, 1, 2), **SMALL},
}  # fmt: skip
"""Without memory to speak of; unlike the presets, to see what parts leave out; and with large
blocks, to see what gathering them takes."""
MODELS["others"] = MODELS["other"]


class Measured(NamedTuple):
    """What a rank did."""

    memory: float
    """Bytes above those of an empty process."""
    building: float
    """The same while the network was built and sharded."""
    seconds: float
    """Of an update."""


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most."""
    wanted = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))


def config_of(preset: str) -> ModelConfig:
    """One modality, so that it fits."""
    if preset in MODELS:
        return ModelConfig(**MODELS[preset], channels={"opt": 3})
    return ModelConfig.preset(preset, channels={"opt": 3})


def prepared(preset: str, ep: int) -> tuple["MaskedImageModel", "Ranks"]:
    """The network of a rank."""
    import torch

    from model.config import PretrainConfig
    from model.parallel import distribute, ranks
    from model.pretrain import MaskedImageModel
    from model.start import drawn, fill

    who, config, objective = ranks(), config_of(preset), PretrainConfig()
    with torch.device("meta"):
        net = MaskedImageModel(config, objective)
    if who.world > 1:
        distribute(net, "cpu", ep=ep, source=drawn(config, objective, 0))
    else:
        fill(net, drawn(config, objective, 0))
    return net, who


def updates(net: "MaskedImageModel", who: "Ranks", images: int, steps: int) -> list[float]:
    """Seconds of each update."""
    import torch

    from model.batch import Batch
    from model.optim import adamw
    from model.parallel import clip_grad_norm
    from model.pretrain import batch_masks

    optimiser, side, times = adamw(net, 1e-4, 0.05), net.config.image_size, []
    clip = clip_grad_norm if who.world > 1 else torch.nn.utils.clip_grad_norm_
    for step in range(steps):
        batch = Batch({"opt": torch.randn(images, 1, 3, side, side)})
        batch.targets["masks"] = batch_masks(net.config, 0.6, batch, 0, step)
        start = time.perf_counter()
        net.loss(batch).loss.backward()
        clip(net.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    return times


def empty_process(ep: int) -> int:
    """Bytes of a process that has joined the others and multiplied once."""
    import torch

    from model.parallel import join, ranks

    keep_memory_of_updates(gathered=ep < ranks().world)
    join(ranks(), "cpu")
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    return resident()


def train_rank(preset: str, ep: int, steps: int, out: Path) -> None:
    """One rank: build, train, report."""
    from model.parallel import leave

    empty = empty_process(ep)
    net, who = prepared(preset, ep)
    building = resident(peak=True) - empty
    Path("/proc/self/clear_refs").write_text("5")
    times = updates(net, who, IMAGES[preset] // who.world, steps)
    if who.rank == 0:
        memory = resident(peak=True) - empty
        out.write_text(json.dumps([memory, building, median(times[2:])]))
    leave()


def probe_rank(preset: str, ep: int, out: Path) -> None:
    """One rank: measure the parts, all ranks at the same time."""
    from model.parallel import leave
    from model.timing import pace

    empty = empty_process(ep)
    net, who = prepared("smallest", ep)
    updates(net, who, 1, 2)
    overhead = resident(peak=True) - empty
    images = IMAGES[preset] // who.world
    few, many = max(images // 2, 1), max(images, 2)
    spread = None if who.world == 1 or os.environ.get(ALONE) else functools.partial(spread_all, ep)
    speed = pace(config_of(preset), images=(few, many), spread=spread)
    found = {"overhead": overhead, "pace": asdict(speed), "links": []}
    if who.world > 1:
        found["links"] = [asdict(tokens_link(ep)), asdict(shards_link(ep))]
    if who.rank == 0:
        out.write_text(json.dumps(found))
    leave()


def spread_all(ep: int, module: "nn.Module") -> None:
    """Lay blocks and the module around them out as `distribute` does."""
    from model.parallel import Spread
    from model.start import blocks_of

    spread = Spread.over("cpu", ep)
    for _, block in list(blocks_of(module)):
        spread.block(block)
    spread.rest(module)


class LeftOut(NamedTuple):
    """What measured parts leave out, learnt on the other model."""

    fixed: float = 0.0
    """Bytes that the allocator takes in any case."""
    share: float = 0.0
    """Bytes that it takes, as a share of those in its heap."""
    copies: float = 0.0
    """Copies that messages make of gathered blocks, as a multiple of those that are counted."""
    waiting: float = 0.0
    """Time between the parts, as a share of theirs."""


@functools.cache
def left_out(ranks: int, ep: int) -> LeftOut:
    """By training the other model in a layout with few and with many images.

    Where blocks are gathered, the allocator's part is that of a process alone, and copies are
    learnt on a model of large blocks.
    """
    many = beyond("others", ranks, ep)
    if many.gathered:
        alone, wide = left_out(1, 1), beyond("wide", ranks, ep)
        rest = wide.memory - alone.fixed - alone.share * wide.heap
        return LeftOut(alone.fixed, alone.share, max(rest / wide.gathered, 0.0), many.seconds)
    few = beyond("other", ranks, ep)
    share = max((many.memory - few.memory) / (many.heap - few.heap), 0.0)
    return LeftOut(few.memory - share * few.heap, share, 0.0, many.seconds)


class Beyond(NamedTuple):
    """A training against the plain sum of its parts."""

    heap: float
    """Bytes among which the allocator leaves gaps (`Estimate.heap`)."""
    gathered: float
    """Bytes of gathered blocks alone."""
    memory: float
    """Bytes more than planned."""
    seconds: float
    """Time more than planned, as a share."""


@functools.cache
def beyond(preset: str, ranks: int, ep: int) -> Beyond:
    """Plan and train a case."""
    cost = planned(preset, ranks, ep, launch("--probe-rank", preset, ranks, ep), LeftOut())
    found = measure(preset, ranks, ep)
    seconds = found.seconds / cost.seconds - 1
    return Beyond(cost.heap, cost.gathered, found.memory - cost.memory, seconds)


def planned(preset: str, ranks: int, ep: int, parts: dict[str, Any], more: LeftOut) -> Estimate:
    """The plan for a case, from measured parts and what they leave out."""
    work = Workload.of(config_of(preset), width=4, probabilities=True)
    layout = Layout(ep, IMAGES[preset] // ranks, 1, checkpointing=False)
    there = cluster(ranks, parts, more)
    copies = more.copies * estimate(work, there, layout).gathered
    return estimate(work, replace(there, overhead=there.overhead + copies), layout)


def link(few: tuple[float, float], many: tuple[float, float], messages: int) -> Link:
    """The way on which two (bytes received, seconds) were measured."""
    bandwidth = (many[0] - few[0]) / max(many[1] - few[1], 1e-9)
    return Link(bandwidth, max(few[1] - few[0] / bandwidth, 0.0) / messages)


def clocked(run: Callable[[], object], rounds: int = 7) -> float:
    """Median seconds of something that all ranks do together."""
    import torch.distributed as dist

    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times[2:])


def tokens_link(ep: int) -> Link:
    """All-to-all inside a group of expert ranks (of all ranks, if experts are not split)."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    size = ep if ep > 1 else world
    mesh = init_device_mesh("cpu", (world // size, size), mesh_dim_names=("dp", "ep"))
    group = mesh["ep"].get_group()
    points = []
    for rows in (64, 16384):
        sent, got = torch.ones(rows * size, 96), torch.empty(rows * size, 96)
        once = clocked(lambda a=got, b=sent: dist.all_to_all_single(a, b, group=group))
        points.append((rows * (size - 1) * 96 * 4, once))
    return link(*points, messages=1)


def shards_link(ep: int) -> Link:
    """Gathering weights and reducing gradients, as FSDP or `Replicas` does it."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from model.replicas import Replicas

    world, points = dist.get_world_size(), []
    whole = ep == world
    for width in (64, 1536):
        if whole:
            replicas = Replicas([nn.Parameter(torch.ones(width, width)) for _ in range(4)])
            for parameter in replicas.parameters:
                parameter.grad = torch.ones_like(parameter)

            def run(replicas: Replicas = replicas) -> None:
                replicas.send()
                replicas.finish()
        else:
            layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(4)))
            alone = copy.deepcopy(layers)
            fully_shard(layers)
            layers.set_force_sum_reduction_for_comms(True)
            layers.set_gradient_divide_factor(1.0)
            x = torch.ones(1, width)

            def run(layers: nn.Module = layers, x: torch.Tensor = x) -> None:
                layers(x).sum().backward()
                layers.zero_grad(set_to_none=True)

        seconds = clocked(run)
        if not whole:
            seconds -= clocked(lambda net=alone, x=x: net(x).sum().backward())
        received = 4 * width * width * (1 - 1 / world) * (8 if whole else 12)
        points.append((received, seconds))
    return link(*points, messages=1 if whole else 3)


def launch(mode: str, preset: str, ranks: int, ep: int) -> Any:
    """Run the ranks of a case; what the first one reports."""
    return run_ranks([__file__, mode, "--presets", preset, "--ep", str(ep)], ranks)


def run_ranks(words: list[str], ranks: int, threads: int = 1) -> Any:
    """Run a script on some ranks; what the first one writes to its `--out`."""
    out = Path(tempfile.mkdtemp()) / "rank0.json"
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*program, *words, "--out", str(out)], check=True, env=environment)
    return json.loads(out.read_text())


def measure(preset: str, ranks: int, ep: int) -> Measured:
    """Train."""
    return Measured(*launch("--train-rank", preset, ranks, ep))


def cluster(ranks: int, found: dict[str, Any], more: LeftOut) -> Cluster:
    """The machine as the plan sees it."""
    speed = found["pace"]
    lines = tuple(Line(**line) for line in speed["stages"])
    pace = Pace(lines, Line(**speed["rest"]), speed["update"], speed["together"])
    tokens, shards = (Link(**link) for link in found["links"] or ({}, {}))
    return Cluster(
        ranks, 1e12, tokens=tokens, shards=shards, overhead=found["overhead"] + more.fixed,
        slack=more.share, waiting=more.waiting, beside=False, pace=pace, whole=True,
    )  # fmt: skip


def predictions(presets: list[str], cases: list[tuple[int, int]]) -> None:
    """The table."""
    print("| preset | ranks | ep | memory GB | planned | error | building GB |", end="")
    print(" seconds | planned | error |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for preset in presets:
        for ranks, ep in cases:
            parts, more = launch("--probe-rank", preset, ranks, ep), left_out(ranks, ep)
            found, cost = measure(preset, ranks, ep), planned(preset, ranks, ep, parts, more)
            memory = f"{found.memory / 1e9:.2f} | {cost.memory / 1e9:.2f} |"
            memory += f" {cost.memory / found.memory - 1:+.0%} | {found.building / 1e9:.2f}"
            seconds = f"{found.seconds:.2f} | {cost.seconds:.2f}"
            seconds += f" | {cost.seconds / found.seconds - 1:+.0%}"
            print(f"| {preset} | {ranks} | {ep} | {memory} | {seconds} |", flush=True)
            print(f"{cost}\n{parts}\n{more}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="*", default=["nano", "tiny"])
    parser.add_argument("--cases", nargs="+", help="ranks:ep", default=["1:1", "2:1", "2:2", "4:2"])
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--train-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--probe-rank", action="store_true", help=argparse.SUPPRESS)
    for name in ("ep", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_rank:
        train_rank(args.presets[0], int(args.ep), STEPS, Path(args.out))
    elif args.probe_rank:
        probe_rank(args.presets[0], int(args.ep), Path(args.out))
    else:
        os.environ |= {ALONE: "1"} if args.alone else {}
        pairs = [tuple(map(int, case.split(":"))) for case in args.cases]
        predictions(args.presets, pairs)


if __name__ == "__main__":
    main()
