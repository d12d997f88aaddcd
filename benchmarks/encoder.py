"""The encoder on a CPU: against `F.linear`'s own rate, and against Hugging Face's Swin V2.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [blocks] [swin]

`blocks`: one block of width 896 and 1792 on the token grids of 192 px chips, in FLOP/s (matrix
products only, counted in formulas below) over the rate of `F.linear` (D -> 4D) on the same tokens.
`swin`: preset `base` against `Swinv2Model` of the same sizes, in FLOP/s each. Passes take turns;
medians of CPU seconds, which other programs disturb less than the clock. Every pass sees new
images, so that experts see new numbers of tokens, as in a real run. Ours runs as loaded, and with
its experts packed (`model.experts.pack`), which is what `ringmoe predict` does on a CPU.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.encoder import Block, RingMoE
from model.packing import pack
from ringmoe_cli.machine import keep_memory_of_updates


def block_flops(width: int, tokens: int, window: int, ffns: int, top_k: int = 1) -> float:
    """Multiply-adds x 2 of one block: qkv and projection, attention, `ffns` FFNs of ratio 4."""
    linear = 2 * tokens * (4 + 8 * ffns * top_k) * width**2
    return linear + 4 * tokens * window**2 * width


def encoder_flops(config: ModelConfig, size: int, images: int, ffns: int) -> float:
    """FLOPs of a forward pass: blocks, patch embedding and merging."""
    total = 0.0
    for s, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        tokens = images * (size // (4 * 2**s)) ** 2
        total += depth * block_flops(width, tokens, config.stage_window(s), ffns)
        if s + 1 < len(config.depths):
            total += 2 * tokens / 4 * 4 * width * 2 * width
    return total + 2 * images * (size // 4) ** 2 * 48 * config.embed_dim


def seconds(
    passes: list[Callable[[Tensor], object]], draw: Callable[[], Tensor], budget: float
) -> list[float]:
    """Median CPU seconds of each pass; they take turns on images that nobody has seen."""
    times: list[list[float]] = [[] for _ in passes]
    end = time.perf_counter() + budget
    with torch.inference_mode():
        for run in passes:
            run(draw())
        while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 40):
            x = draw()
            for run, spent in zip(passes, times, strict=True):
                start = time.process_time()
                run(x)
                spent.append(time.process_time() - start)
    return [median(spent) for spent in times]


def block_row(preset: str, stage: int, images: int, dtype: torch.dtype, budget: float) -> str:
    """One block over `F.linear`, its experts as loaded and packed."""
    config = ModelConfig.preset(preset, channels={"opt": 3})
    width, side = config.widths[stage], 192 // (4 * 2**stage)
    block = Block(config, stage, 0).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    block = block.to(dtype)
    weight, tokens = torch.randn(4 * width, width, dtype=dtype), images * side**2
    packed = copy.deepcopy(block)
    pack(packed)
    passes = [lambda x, b=b: b(x, {"opt": images}) for b in (block, packed)]
    *ours, linear = seconds(
        [*passes, lambda x: F.linear(x.flatten(0, 2), weight)],
        lambda: torch.randn(images, side, side, width, dtype=dtype),
        budget,
    )
    peak = 8 * tokens * width**2 / linear / 1e9
    rates = [block_flops(width, tokens, config.stage_window(stage), 3) / t / 1e9 for t in ours]
    cells = [f"{width} | {side}² | {images} | {peak:.0f}"]
    cells += [f"{rate:.0f} | {rate / peak:.2f}" for rate in rates]
    return f"| {str(dtype)[6:]} | {' | '.join(cells)} |"


def blocks(budget: float) -> None:
    """Blocks of width 896 and more over `F.linear`."""
    print("| type | width | grid | images | F.linear GFLOP/s | block | ratio | packed | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for dtype in (torch.bfloat16, torch.float32):
        for preset, stage, images in (("14b", 1, 2), ("14b", 1, 8), ("14b", 2, 8), ("base", 3, 32)):
            print(block_row(preset, stage, images, dtype, budget), flush=True)


def swin_row(
    nets: list[RingMoE], theirs: torch.nn.Module, images: int, dtype: torch.dtype, budget: float
) -> str:
    """All networks on the same images."""
    passes = [lambda x, net=net: net({"opt": x}) for net in nets]
    draw = functools.partial(torch.randn, images, 3, 192, 192, dtype=dtype)
    *ours, other = seconds([*passes, theirs], draw, budget)
    rates = [encoder_flops(nets[0].config, 192, images, 3) / t / 1e9 for t in ours]
    rate = encoder_flops(nets[0].config, 192, images, 1) / other / 1e9
    cells = [f"{rate:.0f}", *(f"{r:.0f} | {r / rate:.2f}" for r in rates)]
    times = " | ".join(f"{t:.2f}" for t in (other, *ours))
    return f"| {str(dtype)[6:]} | {images} | {' | '.join(cells)} | {times} |"


def swin(budget: float) -> None:
    """`base` against Hugging Face, per FLOP."""
    from transformers import Swinv2Config, Swinv2Model

    print("| type | images | Swin V2 GFLOP/s | ours | ratio | packed | ratio | Swin V2 s", end="")
    print(" | ours s | packed s |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    config = ModelConfig.preset("base", channels={"opt": 3})
    sizes = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    loaded = RingMoE(config).eval()
    theirs = Swinv2Model(Swinv2Config(image_size=192, window_size=12, **sizes)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        packed = copy.deepcopy(loaded.to(dtype))
        pack(packed)
        for images in (1, 4, 8):
            row = swin_row([loaded, packed], theirs.to(dtype), images, dtype, budget)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["blocks", "swin"])
    parser.add_argument("--seconds", type=float, default=5, help="per row")
    args = parser.parse_args()
    keep_memory_of_updates()  # nobody shall wait for pages of memory
    torch.manual_seed(0)
    for part in args.parts:
        {"blocks": blocks, "swin": swin}[part](args.seconds)
        print()


if __name__ == "__main__":
    main()
