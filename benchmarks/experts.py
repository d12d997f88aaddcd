"""What routing costs: an RMoE layer against a dense FFN of the same active FLOPs, in one process.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [--one-hot] [--device cuda]

The layer has 4 specialised, 4 collaborative and 1 shared expert, top-1: three FFNs per token. The
baseline is one FFN of three times the hidden width on the same tokens, through `F.linear`. Both
compute in the stated type. Ratios are medians over rounds in which the two take turns. `packed` is
the forward pass with weights laid out once (`model.experts.pack`), as `ringmoe predict` runs it.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import ExpertBank, RMoE
from model.packing import pack
from ringmoe_cli.machine import keep_memory_of_updates

ROUTINGS = {"even": (0.25, 0.25, 0.25, 0.25), "55/25/15/5": (0.55, 0.25, 0.15, 0.05)}


def rmoe_layer(width: int) -> RMoE:
    """A layer whose routers read the wanted expert from the first features of a token."""
    config = ModelConfig(embed_dim=width, depths=(1,), num_heads=(1,), channels={"opt": 3})
    layer = RMoE(config, 0, 0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    routers = (layer.router["collaborative"], layer.router["specialised"]["opt"])
    for i, router in enumerate(routers):
        nn.init.zeros_(router.weight)
        router.weight.data[:, 4 * i : 4 * i + 4] = torch.eye(4)
    return layer


def tokens_for(count: int, width: int, shares: tuple[float, ...]) -> Tensor:
    """(T, D) tokens that go to the experts in the given shares, in random order."""
    x = torch.randn(count, width)
    for first in (0, 4):
        wanted = torch.multinomial(torch.tensor(shares), count, replacement=True)
        x[:, first : first + 4] = 4 * F.one_hot(wanted, 4)
    return x


def dense_ffn(width: int) -> nn.Module:
    """One FFN of the active width."""
    ffn = nn.Sequential(
        nn.Linear(width, 12 * width), nn.GELU(approximate="tanh"), nn.Linear(12 * width, width)
    )
    for parameter in ffn.parameters():
        nn.init.normal_(parameter, std=0.02)
    return ffn


def one_hot_bank(bank: ExpertBank, x: Tensor, chosen: Tensor) -> Tensor:
    """Every expert on every token, masked: the textbook dispatch."""
    mask = F.one_hot(chosen, len(bank)).to(x.dtype)
    inputs = torch.einsum("te,td->etd", mask, x)
    hidden = torch.baddbmm(bank.fc1.bias[:, None], inputs, bank.fc1.weight.transpose(1, 2))
    active = F.gelu(hidden, approximate="tanh")
    outputs = torch.baddbmm(bank.fc2.bias[:, None], active, bank.fc2.weight.transpose(1, 2))
    return torch.einsum("te,etd->td", mask, outputs)


def one_hot_layer(layer: RMoE, x: Tensor) -> Tensor:
    """The same layer with one-hot dispatch."""
    shared = layer.shared
    hidden = F.gelu(F.linear(x, shared.fc1.weight[0], shared.fc1.bias[0]), approximate="tanh")
    y = F.linear(hidden, shared.fc2.weight[0], shared.fc2.bias[0])
    banks = (layer.collaborative, layer.specialised["opt"])
    routers = (layer.router["collaborative"], layer.router["specialised"]["opt"])
    for bank, router in zip(banks, routers, strict=True):
        gate, chosen = F.linear(x.float(), router.weight.float()).softmax(-1).max(-1)
        y = y + one_hot_bank(bank, x, chosen) * gate[:, None].to(x.dtype)
    return y


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds of one call: of CPU on a CPU (other programs disturb less), else of the clock."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def ratio(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    seconds: float,
    device: str,
    rounds: int = 5,
) -> tuple[float, float]:
    """Median ratio of alternating rounds, and the median time of `theirs` in milliseconds."""
    timed(ours, device), timed(theirs, device)
    ours_s, theirs_s = [], []
    end = time.perf_counter() + seconds
    while len(ours_s) < rounds or (time.perf_counter() < end and len(ours_s) < 40):
        theirs_s.append(timed(theirs, device))
        ours_s.append(timed(ours, device))
    return median(ours_s) / median(theirs_s), 1e3 * median(theirs_s)


def passes(
    run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module
) -> tuple[Callable, Callable]:
    """Forward without gradients, and forward with backward."""

    def forward() -> None:
        with torch.inference_mode():
            run(x)

    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def both() -> None:
        run(leaf).backward(grad)
        leaf.grad = None
        module.zero_grad(set_to_none=True)

    return forward, both


def compare(args: argparse.Namespace, width: int, count: int, dtype: torch.dtype) -> None:
    """Print one row per routing."""
    layer, ffn = rmoe_layer(width).to(args.device, dtype), dense_ffn(width).to(args.device, dtype)
    for name in args.routings:
        shares = ROUTINGS[name]
        x = tokens_for(count, width, shares).to(args.device, dtype)
        dense = passes(ffn, x, ffn)
        ours = passes(lambda x: layer(x, {"opt": len(x)})[0], x, layer)
        cells = [
            ratio(a, b, args.seconds, args.device, args.rounds)
            for a, b in zip(ours, dense, strict=True)
        ]
        packed = copy.deepcopy(layer)
        pack(packed)
        quick, _ = passes(lambda x, m=packed: m(x, {"opt": len(x)})[0], x, packed)
        line = f"| {str(dtype)[6:]} | {width} | {count} | {name} |"
        line += f" {ratio(quick, dense[0], args.seconds, args.device, args.rounds)[0]:.2f} |"
        line += "".join(f" {value:.2f} |" for value, _ in cells)
        line += "".join(f" {ms:.1f} |" for _, ms in cells)
        if args.one_hot and name == "even":
            slow = passes(lambda x: one_hot_layer(layer, x), x, layer)
            cells = [ratio(a, b, 0, args.device) for a, b in zip(slow, dense, strict=True)]
            line += "".join(f" {value:.2f} |" for value, _ in cells)
        else:
            line += " | |" if args.one_hot else ""
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per cell")
    parser.add_argument("--widths", type=int, nargs="+", default=[448, 896, 1792])
    parser.add_argument("--tokens", type=int, nargs="+", default=[288, 1152, 2304, 9216, 36864])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS))
    parser.add_argument("--rounds", type=int, default=5, help="at least")
    parser.add_argument("--one-hot", action="store_true")
    parser.add_argument("--flops", type=float, default=1.2e12, help="largest forward per cell")
    args = parser.parse_args()
    keep_memory_of_updates()  # as `ringmoe pretrain` does
    torch.manual_seed(0)
    columns = "type | d | tokens | routing | packed | forward | both | dense forward ms | both ms"
    print(f"| {columns} |{' one-hot forward | both |' if args.one_hot else ''}")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|" + "--:|--:|" * args.one_hot)
    for dtype in args.dtypes:
        for width in args.widths:
            for count in args.tokens:
                if 48 * width**2 * count <= args.flops:
                    compare(args, width, count, getattr(torch, dtype))


if __name__ == "__main__":
    main()
