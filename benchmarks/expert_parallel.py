"""Two ranks of one thread, which split the experts, against one process of two threads.

    python benchmarks/expert_parallel.py [--preset tiny] [--images 8] [--balanced] [--rounds 3]

Both train on the same number of images (fp32, optical, gloo), in turns; medians of updates on the
clock, so the machine must be quiet. Routers that have learnt nothing send some experts far more
tokens than others, and a rank waits for the one with more; with `--balanced` every expert gets a
quarter, as in a run whose routers are balanced.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median

import torch
from plan import STEPS, empty_process, prepared, run_ranks, updates
from torch import Tensor

from model.parallel import leave
from model.router import Router


def evenly(router: Router, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `Router.choose`: scattered over tokens, but equal shares."""
    tokens, experts = probability_TE.shape
    scattered = (torch.arange(tokens) * 2654435761 % 2**32) >> 16
    choice_TK = (scattered % experts)[:, None]
    return probability_TE.gather(1, choice_TK), choice_TK


def rank(args: argparse.Namespace) -> None:
    """Train; the first rank reports the time of an update."""
    ep = int(os.environ.get("WORLD_SIZE", "1"))
    empty_process(ep)
    if args.balanced:
        Router.choose = evenly
    net, who = prepared(args.preset, ep)
    times = updates(net, who, args.images // who.world, STEPS)
    if who.rank == 0:
        args.out.write_text(json.dumps(median(times[2:])))
    leave()


def seconds(args: argparse.Namespace, ranks: int) -> float:
    """Of an update on so many ranks, which share two threads."""
    words = [__file__, "--preset", args.preset, "--images", str(args.images)]
    return float(run_ranks([*words, *["--balanced"] * args.balanced], ranks, threads=2 // ranks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        rank(args)
        return
    pairs = [(seconds(args, 1), seconds(args, 2)) for _ in range(args.rounds)]
    for one, two in pairs:
        print(f"{one:.3f} s alone, {two:.3f} s on two ranks")
    print(f"throughput {median(one / two for one, two in pairs):.2f} of one process")


if __name__ == "__main__":
    main()
