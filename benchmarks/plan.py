"""The plan against real training: memory and time of a rank, on 1, 2 and 4 gloo processes.

    python benchmarks/plan.py [--presets tiny nano base]

The first preset fits the two numbers that `ringmoe plan` is given, FLOP/s of a rank (on one rank)
and bytes/s (on two); the others are predicted with them. One thread a rank, fp32, optical images;
four ranks share two cores, which halves their FLOP/s. Memory is the growth of the peak resident set
over that of a process that has joined the others; time is the median of updates on the clock, so
the machine must be quiet. Then expert parallelism of two one-thread ranks against one process with
two threads, on the same images.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from model.config import ModelConfig
from model.plan import Cluster, Layout, Workload, estimate

IMAGES = {"nano": 128, "tiny": 8, "base": 4}
"""Of one update, over all ranks."""
CASES = ((1, 1), (2, 1), (2, 2), (4, 2))
"""Ranks, and those among which experts are split."""
CORES = 2


@dataclass(frozen=True)
class Measured:
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
    return ModelConfig.preset(preset, channels={"opt": 3})


def worker(preset: str, ep: int, steps: int, out: Path) -> None:
    """One rank: build, train, report."""
    import torch

    from model.batch import Batch
    from model.config import PretrainConfig
    from model.optim import adamw
    from model.parallel import clip_grad_norm, distribute, join, leave, ranks
    from model.pretrain import MaskedImageModel, batch_masks
    from model.start import drawn, fill

    who, config, objective = ranks(), config_of(preset), PretrainConfig()
    join(who, "cpu")
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    empty = resident()
    with torch.device("meta"):
        net = MaskedImageModel(config, objective)
    if who.world > 1:
        distribute(net, "cpu", ep=ep, source=drawn(config, objective, 0))
    else:
        fill(net, drawn(config, objective, 0))
    building = resident(peak=True) - empty
    Path("/proc/self/clear_refs").write_text("5")
    optimiser, images, side = adamw(net, 1e-4, 0.05), IMAGES[preset] // who.world, config.image_size
    clip = clip_grad_norm if who.world > 1 else torch.nn.utils.clip_grad_norm_
    times = []
    for step in range(steps):
        batch = Batch({"opt": torch.randn(images, 1, 3, side, side)})
        batch.targets["masks"] = batch_masks(config, 0.6, batch, 0, step)
        start = time.perf_counter()
        net.loss(batch).loss.backward()
        clip(net.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    if who.rank == 0:
        memory = resident(peak=True) - empty
        out.write_text(json.dumps([memory, building, median(times[1:])]))
    leave()


def measure(preset: str, ranks: int, ep: int, threads: int = 1, steps: int = 4) -> Measured:
    """Run the workers of a case."""
    out = Path(tempfile.mkdtemp()) / "rank0.json"
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = [__file__, "--worker", preset, "--ep", str(ep), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*program, *words, "--out", str(out)], check=True, env=environment)
    return Measured(*json.loads(out.read_text()))


def cluster(ranks: int, peak: float, bandwidth: float) -> Cluster:
    """The machine as the plan sees it."""
    return Cluster(ranks, 1e12, peak * min(1, CORES / ranks), bandwidth)


def fitted(preset: str) -> tuple[float, float]:
    """FLOP/s of a rank, and bytes/s between two."""
    work = Workload.of(config_of(preset), width=4, probabilities=True)
    layout = Layout(1, IMAGES[preset], 1, checkpointing=False)
    one = measure(preset, 1, 1)
    peak = estimate(work, cluster(1, 1.0, 1.0), layout).flops / one.seconds
    halves = replace(layout, ep=2, micro_batch=layout.micro_batch // 2)
    two = measure(preset, 2, 2)
    cost = estimate(work, cluster(2, peak, 1e30), halves)
    print(f"{preset}: {peak / 1e9:.1f} GFLOP/s a rank; two ranks {two.seconds:.3f} s an update")
    tokens = cost.token_traffic / max(two.seconds - cost.seconds, 1e-6)
    print(f"{preset}: {tokens / 1e9:.2f} GB/s", flush=True)
    return peak, tokens


def predictions(presets: list[str], peak: float, bandwidth: float) -> None:
    """The table."""
    print("| preset | ranks | ep | memory GB | planned | error | building GB |", end="")
    print(" seconds | planned | error |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for preset in presets:
        work = Workload.of(config_of(preset), width=4, probabilities=True)
        for ranks, ep in CASES:
            found = measure(preset, ranks, ep)
            layout = Layout(ep, IMAGES[preset] // ranks, 1, checkpointing=False)
            cost = estimate(work, cluster(ranks, peak, bandwidth), layout)
            memory = f"{found.memory / 1e9:.2f} | {cost.memory / 1e9:.2f} |"
            memory += f" {cost.memory / found.memory - 1:+.0%} | {found.building / 1e9:.2f}"
            seconds = f"{found.seconds:.2f} | {cost.seconds:.2f}"
            seconds += f" | {cost.seconds / found.seconds - 1:+.0%}"
            print(f"| {preset} | {ranks} | {ep} | {memory} | {seconds} |", flush=True)


def throughput(preset: str, rounds: int) -> None:
    """Two one-thread ranks with expert parallelism over one two-thread process."""
    ratios = []
    for _ in range(rounds):
        one, two = measure(preset, 1, 1, threads=2), measure(preset, 2, 2)
        ratios.append(one.seconds / two.seconds)
        print(f"{preset}: {one.seconds:.3f} s alone, {two.seconds:.3f} s with ep 2", flush=True)
    print(f"{preset}: throughput {median(ratios):.2f} of one process with two threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["tiny", "nano", "base"])
    parser.add_argument("--fit", nargs=2, type=float, help="FLOP/s and bytes/s, instead of fitting")
    parser.add_argument("--throughput", default="tiny", help="preset, or none")
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("worker", "ep", "steps", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, int(args.ep), int(args.steps), Path(args.out))
        return
    first, *others = args.presets
    peak, bandwidth = args.fit or fitted(first)
    predictions(others, peak, bandwidth)
    if args.throughput != "none":
        throughput(args.throughput, args.rounds)


if __name__ == "__main__":
    main()
