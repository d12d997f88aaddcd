"""Experts in 8-bit integers on a CPU: speed against bfloat16, and the error of the features.

    OMP_NUM_THREADS=1 python benchmarks/int8.py [--models base large 14b]

Both are packed as `ringmoe predict` does it, and take turns on new images. Errors are relative to
float32, of the last stage, with random weights as training starts from them; `held`: every token
goes to the expert it has in float32. Random routers are near ties, so that in any coarser precision
some tokens go elsewhere. `14b` has one or two blocks of each width, and its error is not measured.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from encoder import seconds
from torch import Tensor

from model.config import ModelConfig
from model.encoder import RingMoE
from model.packing import pack
from model.router import Router
from ringmoe_cli.machine import keep_memory_of_updates

IMAGES = {"base": 8, "large": 4, "14b": 2}
DEPTHS = {"14b": {"depths": (1, 1, 2, 1)}}

Choose = Callable[[Router, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def noted(choices: list[Tensor]) -> Iterator[None]:
    """Write down which experts the routers choose."""
    choose: Choose = Router.choose

    def choosing(router: Router, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
        gate_TK, choice_TK = choose(router, probability_TE)
        choices.append(choice_TK)
        return gate_TK, choice_TK

    with mock.patch.object(Router, "choose", choosing):
        yield


@contextmanager
def held(choices: list[Tensor]) -> Iterator[None]:
    """Choose what was written down."""
    given = iter(choices)

    def choosing(router: Router, probability_TE: Tensor) -> tuple[Tensor, Tensor]:
        choice_TK = next(given)
        return probability_TE.gather(1, choice_TK), choice_TK

    with mock.patch.object(Router, "choose", choosing):
        yield


def errors(exact: RingMoE, nets: list[RingMoE]) -> list[str]:
    """Of each network's last features, with held and with free choices."""
    x, choices, cells = torch.randn(2, 3, 192, 192), [], []
    with torch.inference_mode():
        with noted(choices):
            wanted = exact({"opt": x})["opt"][-1]
        for net in nets:
            with held(choices):
                kept = net({"opt": x.bfloat16()})["opt"][-1]
            free = net({"opt": x.bfloat16()})["opt"][-1]
            cells += [f"{((y.float() - wanted).norm() / wanted.norm()):.4f}" for y in (kept, free)]
    return cells


def row(name: str, budget: float) -> str:
    """One model."""
    config = ModelConfig.preset(name, channels={"opt": 3}, **DEPTHS.get(name, {}))
    exact = RingMoE(config).eval()
    if name == "14b":
        exact = exact.bfloat16()  # both forms of it fit only so
    nets = [copy.deepcopy(exact).bfloat16() for _ in range(2)]
    for net, integers in zip(nets, (False, True), strict=True):
        pack(net, integers)
    cells = ["", "", "", ""] if name == "14b" else errors(exact, nets)
    del exact
    draw = functools.partial(torch.randn, IMAGES[name], 3, 192, 192, dtype=torch.bfloat16)
    passes = [lambda x, net=net: net({"opt": x}) for net in nets]
    rough, whole = seconds(passes, draw, budget)
    times = f"{rough:.2f} | {whole:.2f} | {rough / whole:.2f}"
    return f"| {name} | {IMAGES[name]} | {times} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(IMAGES))
    parser.add_argument("--seconds", type=float, default=15, help="per row")
    args = parser.parse_args()
    keep_memory_of_updates()
    torch.manual_seed(0)
    print(
        "| model | images | bfloat16 s | int8 s | faster | bfloat16 held | free | int8 held", end=""
    )
    print(" | free |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in args.models:
        print(row(name, args.seconds), flush=True)


if __name__ == "__main__":
    main()
