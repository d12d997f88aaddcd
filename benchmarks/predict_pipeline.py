"""The pipeline of `ringmoe predict` alone: COG to COG with a model that computes nothing.

    python benchmarks/predict_pipeline.py [--size 8192] [--bands 3] [--window 192] [--batch 2]

The model answers with its input bands, so that there are as many classes as bands. The floor is
what no program of this kind can leave out, measured in the same process: reading the scene in
windows, writing the class map to a temporary GeoTIFF, and copying that to a COG.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil

from model.batch import Batch, Prediction
from model.config import TaskConfig
from model.normalisation import Normalisation
from ringmoe_cli.jobs.answers import Settings
from ringmoe_cli.jobs.prediction import Job, predict_scene
from ringmoe_cli.machine import use_memory_steadily
from ringmoe_cli.scene.maps.product import ClassMap
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.raster import SAFE_OPTIONS
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.writer import class_layer, copy_to_cog, open_rows

NAMES = ("red", "green", "blue", "nir", "rededge1", "rededge2", "swir16", "swir22")
STRIP = 512


class Nothing:
    """Answers with its input."""

    def predict(self, batch: Batch) -> Prediction:
        """Its input as probabilities."""
        return Prediction(dense=batch.images["ms"][:, 0])


def make_cog(path: Path, size: int, bands: int) -> None:
    """A scene like a real one: smooth patches with noise, 512 px blocks, deflate."""
    rng = np.random.default_rng(0)
    patches = rng.integers(300, 3000, (bands, size // 16 + 1, size // 16 + 1)).astype(np.uint16)
    plain = path.with_suffix(".plain.tif")
    with rasterio.open(
        plain, "w", driver="GTiff", height=size, width=size, count=bands, dtype="uint16", nodata=0,
        tiled=True, blockxsize=512, blockysize=512, crs="EPSG:32630",
        transform=rasterio.Affine(10, 0, 500000, 0, -10, 5000000),
    ) as dst:  # fmt: skip
        dst.descriptions, dst.scales = NAMES[:bands], (1e-4,) * bands
        for top in range(0, size, STRIP):
            n = min(STRIP, size - top)
            block = patches[:, top // 16 : (top + n - 1) // 16 + 1]
            fine = block.repeat(16, 1).repeat(16, 2)[:, :n, :size]
            noise = rng.integers(0, 64, fine.shape, dtype=np.uint16)
            dst.write(fine + noise, window=((top, top + n), (0, size)))
    rasterio.shutil.copy(plain, path, driver="COG", COMPRESS="DEFLATE", NUM_THREADS="ALL_CPUS")
    plain.unlink()


def floor(scene: Path, folder: Path) -> dict[str, float]:
    """Seconds of reading, of the temporary GeoTIFF, and of the COG copy."""
    layer = class_layer(tuple("abc"), ())
    with rasterio.Env(**SAFE_OPTIONS), rasterio.open(scene) as src:
        grid = SceneReader(open_scene(str(scene))).scene.grid
        classes = []
        for top in range(0, src.height, STRIP):
            window = ((top, min(top + STRIP, src.height)), (0, src.width))
            classes.append(src.read(window=window).argmax(0).astype(np.uint8)[None])
    read = time_of_reading(scene)
    start = time.perf_counter()
    with open_rows(folder / "rows.tif", layer, grid) as rows:
        for n, block in enumerate(classes):
            top = n * STRIP
            rows.write(block, window=((top, top + block.shape[1]), (0, grid.width)))
    written = time.perf_counter()
    copy_to_cog(folder / "rows.tif", folder / "floor.tif", layer, {})
    return {"read": read, "write": written - start, "cog": time.perf_counter() - written}


def time_of_reading(scene: Path) -> float:
    """Seconds to read all pixels, strip by strip."""
    start = time.perf_counter()
    with rasterio.Env(**SAFE_OPTIONS), rasterio.open(scene) as src:
        for top in range(0, src.height, STRIP):
            src.read(window=((top, min(top + STRIP, src.height)), (0, src.width)))
    return time.perf_counter() - start


def ours(scene: Path, output: Path, settings: Settings, bands: int) -> float:
    """Seconds of the pipeline."""
    start = time.perf_counter()
    task = TaskConfig("segmentation", NAMES[:bands], (), ("ms",), window=settings.window)
    norm = Normalisation(NAMES[:bands], (0.1,) * bands, (0.05,) * bands)
    source = Normalised([{"ms": SceneReader(open_scene(str(scene)))}], {"ms": norm})
    predict_scene(Job(Nothing(), source, ClassMap(task), settings), {"classes": output})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--window", type=int, default=192)
    parser.add_argument("--batch", type=int, help="Windows per batch, as in `ringmoe predict`.")
    parser.add_argument("--repeat", type=int, default=2)
    given = parser.parse_args()
    use_memory_steadily()
    settings = Settings.of(given.window, batch=given.batch)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_cog(folder / "scene.tif", given.size, given.bands)
        for _ in range(given.repeat):
            least = floor(folder / "scene.tif", folder)
            output = folder / "map.tif"
            output.unlink(missing_ok=True)
            cpu = time.process_time()
            seconds = ours(folder / "scene.tif", output, settings, given.bands)
            total = sum(least.values())
            print(
                json.dumps({
                    "size": given.size, "bands": given.bands, "window": given.window,
                    "batch": settings.batch,
                    "floor_s": {k: round(v, 2) for k, v in least.items()},
                    "floor": round(total, 2), "ours": round(seconds, 2),
                    "ours_cpu": round(time.process_time() - cpu, 2),
                    "ratio": round(seconds / total, 3), "load": round(os.getloadavg()[0], 1),
                }),
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
