"""The four commands on a real Sentinel-2 scene: tile, pretrain, finetune, predict.

    RINGMOE_DATA=/path/to/data python benchmarks/real_scene.py [-o FOLDER] [--steps N]

The scene (Aberystwyth, 2021-05-27, 10 bands, 947 x 930 pixels of 10 m) is cut in two: the west is
tiled and learned from, the east is mapped. Between them lies a strip of 64 columns that nobody
uses. The reference is a clump classification by the authors of RSGISLib, not ground truth, so the
score is an agreement. Baselines see the same bands. Results: real_scene.md.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from ringmoe_cli.jobs.demo import score_map
from ringmoe_cli.scene.picture import paint, quicklook, save_triptych
from ringmoe_cli.scene.simulated.baselines import (
    UNLABELLED,
    linear_map,
    majority_map,
    with_neighbourhood,
)

BANDS = "blue,green,red,rededge1,rededge2,rededge3,nir,nir08,swir16,swir22"
SCALE = 0.001
GUARD = 64
EAST = 640
"""First column of the part that is mapped."""
COLOURS = [(0, 120, 0), (150, 190, 90), (190, 60, 60), (60, 110, 190)]


def cut(source: Path, target: Path, columns: slice) -> None:
    """Write some columns of a raster as a file of their own."""
    with rasterio.open(source) as scene:
        window = Window(columns.start, 0, columns.stop - columns.start, scene.height)
        profile = scene.profile | {
            "width": window.width,
            "transform": scene.window_transform(window),
        }
        with rasterio.open(target, "w", **profile) as out:
            out.write(scene.read(window=window))


def run(command: str) -> float:
    """Run a command line; seconds it took."""
    print(f"$ {command}", file=sys.stderr)
    start = time.perf_counter()
    subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def labels_on(scene: Path, reference: Path) -> np.ndarray:
    """Reference classes on a scene's own pixels, by coordinates; 255 where there are none."""
    with rasterio.open(scene) as grid, rasterio.open(reference) as source:
        window = source.window(*grid.bounds).round_offsets().round_lengths()
        values = source.read(1, window=window, boundless=True, fill_value=0)
    return np.where(values == 0, UNLABELLED, values - 1).astype(np.uint8)


def bands_of(path: Path) -> np.ndarray:
    """Reflectance (10, H, W)."""
    with rasterio.open(path) as scene:
        return scene.read().astype(np.float32) * SCALE


def main() -> None:
    """Cut, run the four commands, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("real-scene"))
    parser.add_argument("--pretrain-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(os.environ["RINGMOE_DATA"]) / "02_multispectral" / "s2_aberystwyth_10band"
    source, reference = folder / "mosaic_10band.tif", folder / "sen2_20210527_aber_cls.tif"
    out: Path = given.output
    out.mkdir(parents=True)
    west, east, chart = out / "west.tif", out / "east.tif", out / "east_segmentation.tif"
    cut(source, west, slice(0, EAST - GUARD))
    cut(source, east, slice(EAST, 930))
    said = f"--modality ms --bands {BANDS} --scale {SCALE},0"
    loop = f"--set train.batch_size=32 --set train.seed={given.seed} --set train.save_every=1000"
    seconds = {
        "tile": run(f"ringmoe tile {west} -o {out}/tiles.zarr {said} --labels {reference}"),
        "pretrain": run(
            f"ringmoe pretrain {out}/tiles.zarr -o {out}/pre --steps {given.pretrain_steps} {loop}"
        ),
        "finetune": run(
            f"ringmoe finetune {out}/tiles.zarr --task segmentation --init {out}/pre -o {out}/seg "
            f"--steps {given.steps} {loop} --set train.lr=2e-3 --set task.channels=32"
        ),
        "predict": run(f"ringmoe predict {east} --model {out}/seg {said}"),
    }
    seen, unseen = bands_of(west), bands_of(east)
    learned, truth = labels_on(west, reference), labels_on(east, reference)
    with rasterio.open(chart) as result:
        classes = [result.tags(1)[f"CLASS_{i}"] for i in range(4)]
        guess = result.read(1)
    maps = {
        "ringmoe": guess,
        "majority": majority_map(learned, truth.shape),
        "linear": linear_map(seen, learned, unseen, 4),
        "linear_5x5": linear_map(with_neighbourhood(seen), learned, with_neighbourhood(unseen), 4),
    }
    scores = {name: score_map(each, truth, 4) for name, each in maps.items()}
    pictures = {
        "nir, red, green": quicklook(unseen[[6, 2, 1]]),
        "reference": paint(truth, COLOURS),
        "map": paint(guess, COLOURS),
    }
    save_triptych(out / "picture.png", pictures, classes, COLOURS)
    print(json.dumps({"seconds": seconds, "scores": scores, "classes": classes}, indent=1))


if __name__ == "__main__":
    main()
