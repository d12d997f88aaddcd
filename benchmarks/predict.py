"""Whole time of `ringmoe predict` over the pure forward time of the same windows.

    python benchmarks/predict.py [--size 2048] [--preset nano] [--classes 8] [--probabilities]

The command runs in a process of its own (imports, model, reading, blending, COG). Then, in this
processes, a warm model runs forward over as many batches of the same size and nothing else: one
after the other on all cores, as PyTorch does it, and side by side, as the command does it. Printed
are the quotients by either of wall times, which mean something on a quiet machine only, and of
CPU-seconds. So is the command's peak memory beside what importing and loading alone take.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine

from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig, TaskConfig
from model.encoder import RingMoE
from model.normalisation import Normalisation
from model.tasks.network import TaskNetwork
from ringmoe_cli.jobs.compute import LANES, Lanes, computed, in_order
from ringmoe_cli.jobs.maps import load_mapper
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.scene.stitch import Lattice

SAMPLE = 15
"""CPU-seconds of forward passes that are timed."""
BANDS = ("blue", "green", "red", "nir")
IDLE = """
import sys
from pathlib import Path
from ringmoe_cli.jobs import crew, maps, object_maps, scenes
from ringmoe_cli.jobs.opening import Wish
maps.load_mapper(Path(sys.argv[1]), Wish())
print(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
"""
"""Memory with all imports and the model's weights, and nothing else."""
CHILD = """
import atexit, os, sys, time
from pathlib import Path
def say():
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(f"peak {peak}", file=sys.stderr)
atexit.register(say)
from ringmoe_cli.app import main
main()
"""
"""The command, and its own peak memory (that of wait4 would contain this process's)."""


def make_model(folder: Path, preset: str, classes: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset(preset, channels={"ms": 4})
    names = tuple(f"class {i}" for i in range(classes))
    width = 64 if preset == "nano" else 256
    task = TaskConfig("segmentation", names, (), ("ms",), window=config.image_size, channels=width)
    norm = Normalisation(BANDS, (0.1,) * 4, (0.05,) * 4)
    about = CheckpointConfig(config, "task", {"ms": norm}, {"ms": 10.0}, task)
    save_checkpoint(folder, about, disk_tensors(TaskNetwork(RingMoE(config), task)))


def make_scene(path: Path, height: int, width: int) -> None:
    """A Sentinel-2-like GeoTIFF: patches with noise, deflate, 512 px tiles."""
    rng = np.random.default_rng(0)
    patches = rng.integers(300, 3000, (4, height // 16 + 1, width // 16 + 1)).astype(np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=4, dtype="uint16", nodata=0,
        tiled=True, blockxsize=512, blockysize=512, compress="deflate", num_threads="all_cpus",
        crs="EPSG:32630", transform=Affine(10, 0, 500000, 0, -10, 5000000),
    ) as dst:  # fmt: skip
        for top in range(0, height, 512):
            n = min(512, height - top)
            block = patches[:, top // 16 : (top + n - 1) // 16 + 1]
            fine = block.repeat(16, 1).repeat(16, 2)[:, :n, :width]
            noise = rng.integers(0, 64, (4, n, width), dtype=np.uint16)
            dst.write(fine + noise, window=((top, top + n), (0, width)))
        dst.descriptions = BANDS
        dst.scales = (1e-4,) * 4


def command(scene: Path, model: Path, extra: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MB of one run of the command."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "predict", str(scene), "-m", str(model),
         "--overwrite", "-q", *extra], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = status
    assert status == 0, said
    wall = time.perf_counter() - start
    return wall, used.ru_utime + used.ru_stime, int(said.split("peak")[1]) / 1024


def forward(model: Path, height: int, width: int, lanes: int) -> dict[str, float]:
    """Wall and CPU seconds of the forward pass over the scene's windows, and their number.

    Some batches are timed, until `SAMPLE` CPU-seconds have passed; the times are counted for all.
    """
    Lanes.open(lanes)
    mapper = computed(lambda: load_mapper(model, Wish()))
    network, settings = mapper.network, mapper.settings
    lattice = Lattice(height, width, settings.window, settings.overlap)
    windows = lattice.rows * lattice.columns
    shape = (settings.batch, 1, 4, settings.window, settings.window)
    rng = np.random.default_rng(0)
    images = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    batches = [Batch(images={"ms": torch.from_numpy(x)}) for x in images]
    count = windows / settings.batch

    def predict(number: int) -> None:
        with torch.inference_mode():
            network.predict(batches[number % 4])

    numbers = in_order(predict, itertools.count())
    for _ in range(4):
        next(numbers)
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    while done < count and time.process_time() - cpu < SAMPLE:
        next(numbers)
        done += 1
    share = count / done
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall * share, "cpu": cpu * share, "windows": windows}


def forward_elsewhere(model: Path, height: int, width: int, lanes: int) -> dict[str, float]:
    """The same in a process of its own: threads that have computed disturb each other."""
    given = [str(x) for x in (model, height, width, lanes)]
    done = subprocess.run(
        [sys.executable, __file__, "--forward", *given], check=True, capture_output=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--height", type=int)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--probabilities", action="store_true")
    parser.add_argument("--forward", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.forward:
        model, *numbers = given.forward
        print(json.dumps(forward(Path(model), *map(int, numbers))))
        return
    height = given.height or given.size
    extra = ["--probabilities"] if given.probabilities else []
    with tempfile.TemporaryDirectory() as folder:
        model, scene = Path(folder, "model"), Path(folder, "scene.tif")
        make_model(model, given.preset, given.classes)
        make_scene(scene, height, given.size)
        idle = int(
            subprocess.run(
                [sys.executable, "-c", IDLE, str(model)], check=True, capture_output=True
            ).stdout
        ) / 1024  # fmt: skip
        alone = forward_elsewhere(model, height, given.size, 1)
        together = forward_elsewhere(model, height, given.size, LANES)
        wall, cpu, peak = command(scene, model, extra)
    print(
        json.dumps({
            "preset": given.preset, "height": height, "width": given.size,
            "windows": together["windows"],
            "classes": given.classes, "whole_s": round(wall, 2),
            "forward_s": round(alone["wall"], 2), "side_by_side_s": round(together["wall"], 2),
            "ratio": round(wall / alone["wall"], 3),
            "ratio_side_by_side": round(wall / together["wall"], 3),
            "whole_cpu_s": round(cpu, 1), "forward_cpu_s": round(alone["cpu"], 1),
            "side_by_side_cpu_s": round(together["cpu"], 1),
            "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
            "peak_mb": round(peak), "imports_and_model_mb": round(idle),
            "peak_minus_idle_mb": round(peak - idle),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
