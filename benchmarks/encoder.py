"""The encoder on a CPU: against `F.linear`'s own rate, and against Hugging Face's Swin V2.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py [blocks] [swin]

`blocks`: one block of width 896 and 1792 on the token grids of 192 px chips, in FLOP/s (matrix
products only, counted in formulas below) over the rate of `F.linear` (D -> 4D) on the same tokens.
`swin`: preset `base` against `Swinv2Model` of the same sizes, in FLOP/s each. Passes take turns;
medians of CPU seconds, which other programs disturb less than the clock.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.encoder import Block, RingMoE


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


def seconds(passes: list[Callable[[], object]], budget: float) -> list[float]:
    """Median CPU seconds of each pass; they take turns."""
    times: list[list[float]] = [[] for _ in passes]
    end = time.perf_counter() + budget
    with torch.inference_mode():
        for run in passes:
            run()
        while len(times[0]) < 5 or (time.perf_counter() < end and len(times[0]) < 40):
            for run, spent in zip(passes, times, strict=True):
                start = time.process_time()
                run()
                spent.append(time.process_time() - start)
    return [median(spent) for spent in times]


def block_row(preset: str, stage: int, images: int, dtype: torch.dtype, budget: float) -> str:
    """One block over `F.linear`."""
    config = ModelConfig.preset(preset, channels={"opt": 3})
    width, side = config.widths[stage], 192 // (4 * 2**stage)
    block = Block(config, stage, 0).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    block = block.to(dtype)
    x = torch.randn(images, side, side, width, dtype=dtype)
    flat, weight = x.flatten(0, 2), torch.randn(4 * width, width, dtype=dtype)
    ours, linear = seconds(
        [lambda: block(x, {"opt": images}), lambda: F.linear(flat, weight)], budget
    )
    rate = block_flops(width, len(flat), config.stage_window(stage), 3) / ours / 1e9
    peak = 8 * len(flat) * width**2 / linear / 1e9
    cells = f"{width} | {side}² | {images} | {rate:.0f} | {peak:.0f} | {rate / peak:.2f}"
    return f"| {str(dtype)[6:]} | {cells} |"


def blocks(budget: float) -> None:
    """Blocks of width 896 and more over `F.linear`."""
    print("| type | width | grid | images | block GFLOP/s | F.linear GFLOP/s | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for dtype in (torch.bfloat16, torch.float32):
        for preset, stage, images in (("14b", 1, 2), ("14b", 1, 8), ("14b", 2, 8), ("base", 3, 32)):
            print(block_row(preset, stage, images, dtype, budget), flush=True)


def swin_row(
    ours: RingMoE, theirs: torch.nn.Module, images: int, dtype: torch.dtype, budget: float
) -> str:
    """Both networks on the same images."""
    image = torch.randn(images, 3, 192, 192, dtype=dtype)
    a, b = seconds([lambda: ours({"opt": image}), lambda: theirs(image)], budget)
    rate = encoder_flops(ours.config, 192, images, 3) / a / 1e9
    other = encoder_flops(ours.config, 192, images, 1) / b / 1e9
    cells = f"{rate:.0f} | {other:.0f} | {rate / other:.2f} | {a:.2f} | {b:.2f}"
    return f"| {str(dtype)[6:]} | {images} | {cells} |"


def swin(budget: float) -> None:
    """`base` against Hugging Face, per FLOP."""
    from transformers import Swinv2Config, Swinv2Model

    print("| type | images | ours GFLOP/s | Swin V2 GFLOP/s | ratio | ours s | Swin V2 s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    config = ModelConfig.preset("base", channels={"opt": 3})
    sizes = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    ours = RingMoE(config).eval()
    theirs = Swinv2Model(Swinv2Config(image_size=192, window_size=12, **sizes)).eval()
    for dtype in (torch.float32, torch.bfloat16):
        for images in (1, 4, 16):
            print(swin_row(ours.to(dtype), theirs.to(dtype), images, dtype, budget), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["blocks", "swin"])
    parser.add_argument("--seconds", type=float, default=5, help="per row")
    args = parser.parse_args()
    torch.manual_seed(0)
    for part in args.parts:
        {"blocks": blocks, "swin": swin}[part](args.seconds)
        print()


if __name__ == "__main__":
    main()
