"""Which compressor and chunk size: write speed, random 192-pixel windows, runs of neighbours.

    python benchmarks/tiling_codecs.py [scene.tif]

Reading is compared with a memory-mapped array of the same values in the same process. CPU-seconds
only, one thread.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from numcodecs import Blosc, Zstd, blosc

from ringmoe_cli.scene.store.chunks import ChunkCache, ChunkedArray

SIZE = 192
WINDOWS = 300
RUN = 8
"""Neighbouring windows of a run, along a row."""

CODECS = {
    "zstd3": Zstd(3),
    "blosc-zstd1-shuffle": Blosc("zstd", 1, Blosc.SHUFFLE),
    "blosc-zstd1-bitshuffle": Blosc("zstd", 1, Blosc.BITSHUFFLE),
    "blosc-lz4-shuffle": Blosc("lz4", 5, Blosc.SHUFFLE),
    "blosc-lz4-bitshuffle": Blosc("lz4", 5, Blosc.BITSHUFFLE),
}


def scene_values(path: str | None) -> np.ndarray:
    """A real scene's values, or smooth ones with noise, (4, 4096, 4096) uint16."""
    if path:
        import rasterio

        with rasterio.open(path) as source:
            found = source.read()[:4].astype(np.uint16)
        times = -(-4096 // min(found.shape[1:]))
        return np.tile(found, (1, times, times))[:, :4096, :4096].copy()
    rng = np.random.default_rng(0)
    coarse = rng.integers(300, 3000, (4, 64, 64)).repeat(64, 1).repeat(64, 2)
    return (coarse + rng.normal(0, 25, coarse.shape)).astype(np.uint16)


def cpu(work: Callable[[], object]) -> float:
    """CPU-seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def places(seed: int) -> list[tuple[int, int]]:
    """Corners of random windows."""
    rng = np.random.default_rng(seed)
    return [tuple(v) for v in rng.integers(0, 4096 - SIZE, (WINDOWS, 2)).tolist()]


def runs(seed: int) -> list[tuple[int, int]]:
    """Corners of runs of neighbouring windows."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 4096 - SIZE * RUN, (WINDOWS // RUN, 2)).tolist()
    return [(row, col + i * SIZE) for row, col in starts for i in range(RUN)]


def read_all(array: ChunkedArray, corners: list[tuple[int, int]]) -> None:
    for row, col in corners:
        array.read(row, col, SIZE, SIZE)


def copy_all(array: np.ndarray, corners: list[tuple[int, int]]) -> None:
    for row, col in corners:
        np.array(array[:, row : row + SIZE, col : col + SIZE])


def main() -> None:
    values = scene_values(sys.argv[1] if len(sys.argv) > 1 else None)
    folder = Path(tempfile.mkdtemp())
    np.save(folder / "plain.npy", values)
    mapped = np.load(folder / "plain.npy", mmap_mode="r")
    blosc.use_threads = False
    copy_all(mapped, places(0))
    mapped_random = cpu(lambda: copy_all(mapped, places(1))) / WINDOWS
    mapped_runs = cpu(lambda: copy_all(mapped, runs(1))) / len(runs(1))
    print(
        f"memory-mapped: {1 / mapped_random:.0f} random, {1 / mapped_runs:.0f} in runs, per CPU-s"
    )
    print("codec chunk ratio write_MB/s random/s runs/s random/mapped runs/mapped")
    for (name, coder), chunk in itertools.product(CODECS.items(), (128, 256, 512)):
        group = zarr.create_group(folder / f"{name}-{chunk}", zarr_format=2)
        group.create_array(
            "a", shape=values.shape, dtype="uint16", chunks=(4, chunk, chunk), compressors=[coder]
        )
        array = ChunkedArray.of(folder / f"{name}-{chunk}", "a")
        write = cpu(lambda a=array: a.write(0, 0, values))
        size = sum(p.stat().st_size for p in array.folder.iterdir())
        cold = ChunkedArray(
            array.folder, cache=ChunkCache(1)
        )  # a large store is never in the cache
        random = cpu(lambda a=cold: read_all(a, places(1))) / WINDOWS
        fresh = ChunkedArray.of(folder / f"{name}-{chunk}", "a")
        row = cpu(lambda a=fresh: read_all(a, runs(1))) / len(runs(1))
        print(
            f"{name} {chunk} {values.nbytes / size:.2f} {values.nbytes / 1e6 / write:.0f} "
            f"{1 / random:.0f} {1 / row:.0f} {mapped_random / random:.3f} {mapped_runs / row:.3f}"
        )


if __name__ == "__main__":
    main()
