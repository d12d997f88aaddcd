"""Rank-K approximation of an expert's matrix: the Gram matrix's eigh against `linalg.svd`.

    python benchmarks/prune_svd.py --width 1792

CPU seconds of this process (the better of three alternating runs), errors relative to the SVD's
own (which is the smallest possible).
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor

from model.lowrank import truncated

ROUNDS = 3


def by_svd(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def timed(
    method: Callable[[Tensor, int], Tensor], matrix: Tensor, rank: int
) -> tuple[float, float]:
    start = time.process_time()
    found = method(matrix, rank)
    return time.process_time() - start, float((matrix - found).norm() / matrix.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1792)
    width = parser.parse_args().width
    matrix = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0)) * 0.02
    rank = width // 4
    runs = [(timed(truncated, matrix, rank), timed(by_svd, matrix, rank)) for _ in range(ROUNDS)]
    ours, our_error = min(own for own, _ in runs)
    theirs, their_error = min(other for _, other in runs)
    print(
        json.dumps(
            {
                "width": width,
                "gram_cpu_s": round(ours, 2),
                "svd_cpu_s": round(theirs, 2),
                "faster": round(theirs / ours, 2),
                "error_above_svd": our_error / their_error - 1,
            }
        )
    )


if __name__ == "__main__":
    main()
