"""Does the accelerator wait for data? A step that takes 50 ms, batches read by workers meanwhile.

    python benchmarks/tiling_loader.py [--workers 2] [--batch 16] [--steps 200]

Four modalities of 4096² pixels, chips of 192 pixels, the paper's mix. The stall is the time
spent waiting for a batch over the whole time, after the first five batches. The same steps without
reading, in the same process, say what the machine itself adds.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import rasterio

from ringmoe_cli.scene.loader import pretraining_batches, store_normalisation
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.tiles import Store
from ringmoe_cli.scene.tiling import Labelled, tile_scenes

SIDE = 4096
STEP = 0.05
WEIGHTS = {"opt": 0.7, "ms": 0.2, "sar-l1": 0.05, "sar-l2": 0.05}
SCENES = {
    "opt": (("red", "green", "blue"), "uint8"),
    "ms": (("blue", "green", "red", "nir"), "uint16"),
    "sar_l1": (("HH", "HV", "VH", "VV"), "complex64"),
    "sar_l2": (("VV", "VH"), "float32"),
}


def make_store(folder: Path) -> Store:
    """A store with one scene per modality, each half smooth and half noise."""
    rng = np.random.default_rng(0)
    scenes = []
    for name, (bands, dtype) in SCENES.items():
        path = folder / f"{name}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=SIDE, height=SIDE, count=len(bands), dtype=dtype,
            crs="EPSG:32630", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 6e6), tiled=True,
        ) as out:  # fmt: skip
            out.descriptions = bands
            for i in out.indexes:
                values = rng.integers(20, 200, (SIDE // 32, SIDE // 32)).repeat(32, 0).repeat(32, 1)
                out.write((values + rng.normal(0, 5, values.shape)).astype(dtype), i)
        scenes.append(Labelled(open_scene(path)))
    return tile_scenes(scenes, folder / "tiles.zarr")


def stall(batches: Iterator[object], steps: int) -> tuple[float, float, float]:
    """Shares of time spent waiting for batches and freeing them; milliseconds per step."""
    for _ in islice(batches, 5):
        time.sleep(STEP)
    waited = freed = 0.0
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(STEP)
        done = time.perf_counter()
        del batch
        freed += time.perf_counter() - done
    whole = time.perf_counter() - start
    return waited / whole, freed / whole, 1000 * whole / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        about = {
            "size": 192, "batch_size": said.batch, "weights": WEIGHTS,
            "normalisation": store_normalisation([store]),
        }  # fmt: skip
        cpu = time.process_time()
        batches = pretraining_batches([store], **about)
        for _ in islice(batches, 20):
            pass
        print(f"one process: {1000 * (time.process_time() - cpu) / 20:.0f} CPU-ms per batch")
        read = pretraining_batches([store], workers=said.workers, **about)
        nothing = iter([None] * (said.steps + 5))
        for name, found in ((f"{said.workers} workers", read), ("no reading", nothing)):
            share, free, step = stall(found, said.steps)
            print(f"{name}: stall {share:.2%}, freeing {free:.2%}, {step:.1f} ms per 50 ms step")


if __name__ == "__main__":
    main()
