"""14.7 billion parameters on this machine: what converting, loading, pruning and running cost.

    python benchmarks/stream.py /big/disk            # writes a 29.5 GB checkpoint there, deletes it

Every step runs in a process of its own, whose anonymous memory is sampled; page cache is dropped
before every read. The machine's own sequential read rate is measured between the steps.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import psutil

RINGMOE = [sys.executable, "-m", "ringmoe_cli"]
FREE = 45e9
BLOCK = 16 << 20
REST = 20
"""Seconds before a rate is taken: by then a virtual machine has handed free memory to its host."""

LOAD = """
import json, time, torch
from model import RingMoE
time.sleep({rest})
start = time.perf_counter()
net = RingMoE.from_pretrained({model!r}, modality="opt")
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in net.parameters())
print(json.dumps({{"bytes": size, "rate": size / seconds / 1e9}}))
"""
RUN = """
import time, torch
from model.stream import streamed_encoder
net = streamed_encoder({model!r}, ("opt",))
x = torch.randn(1, 3, 192, 192)
start = time.perf_counter()
with torch.no_grad():
    features = net({{"opt": x}})["opt"]
finite = all(bool(f.isfinite().all()) for f in features)
print({{"seconds": round(time.perf_counter() - start, 2), "finite": finite}})
"""

FIT = """
import json, time, torch
from pathlib import Path
from model.budget import layers
from model.calibration import Calibration
from model.checkpoint import read_config
from model.integrate import FitSettings
from model.prune import plan_pruning, sub_model
from ringmoe_cli.jobs.calibration import chips_within_memory
from ringmoe_cli.machine import return_unused_memory
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6
model = Path({model!r})
config = read_config(model).model
count = chips_within_memory(sub_model(config, ("opt",)), 512)
torch.manual_seed(0)
chips = {{"opt": torch.randn(count, 3, config.image_size, config.image_size)}}
plan = plan_pruning(config, ("opt",), "1b", {{}}, "fit")
walk = Calibration(model, plan, chips, FitSettings(steps=2))
seconds, peaks = [], []
for stage, width in enumerate(config.widths):
    if stage:
        side = walk.parent["opt"].shape[1] // 2
        walk.parent = walk.student = {{"opt": torch.randn(count, side, side, width)}}
    start = time.perf_counter()
    walk(str(stage) + ".0")
    seconds.append(round(time.perf_counter() - start, 1))
    peaks.append(round(peak() * 1.024, 2))
    return_unused_memory()
    Path("/proc/self/clear_refs").write_text("5")
print(json.dumps({{"chips": count, "seconds": seconds, "peak_gb": peaks}}))
"""
"""One layer of every stage, its tokens random, two steps of the descent: memory is that of any."""
PROGRAMS = {"run": RUN, "fit": FIT}
PREDICTIONS: dict[str, list[str]] = {"predict": [], "predict8": ["--int8"]}
COMPRESS = """
import json, time
from pathlib import Path
from model import merge, rewrite
from model.checkpoint import read_config
from model.prune import plan_pruning
model, svds, done, honest = Path({model!r}), [], [], merge.truncated
def timed(matrix, rank):
    start = time.perf_counter()
    found = honest(matrix, rank)
    svds.append(time.perf_counter() - start)
    return found
merge.truncated = timed
about, start = read_config(model), time.perf_counter()
plan = plan_pruning(about.model, ("opt",), "1b", {{}}, "kc")
class Enough(Exception): pass
def advance(count):
    done.append(count)
    if time.perf_counter() - start > {limit}:
        raise Enough
try:
    out = model.with_name("pruned-kc")
    config = rewrite.result_config(about, plan, "1b")
    rewrite.prune_checkpoint(model, out, plan, config, advance=advance)
except Enough:
    pass
print(json.dumps({{"seconds": time.perf_counter() - start, "svds": sum(svds), "count": len(svds),
                  "bytes": sum(done)}}))
"""


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files' pages."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_rate(folder: Path, limit: float = 4e9) -> float:
    """GB/s of a plain sequential read of the first bytes of a checkpoint."""
    drop_cache(folder)
    buffer, done = bytearray(BLOCK), 0
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while done < limit and (got := file.readinto(buffer)):
                done += got
    seconds = time.perf_counter() - start
    drop_cache(folder)
    return done / seconds / 1e9


def copy_rate(folder: Path, limit: float = 2e9) -> float:
    """GB/s, read and written, of a plain copy on the same disk until it is all there."""
    drop_cache(folder)
    buffer, done, target = bytearray(BLOCK), 0, folder.with_name("plain-copy")
    start = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while done < limit and (got := file.readinto(buffer)):
                    done += out.write(memoryview(buffer)[:got])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    drop_cache(folder)
    return 2 * done / seconds / 1e9


def measured(name: str, command: list[str]) -> dict[str, object]:
    """Run a command; its seconds, and the peaks of its memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            memory = psutil.Process(process.pid).memory_info()
            anonymous = max(anonymous, memory.rss - memory.shared)
            resident = max(resident, memory.rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    answer = process.communicate()[0].strip()
    facts = {
        "step": name,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_anonymous_gb": round(anonymous / 1e9, 2),
        "peak_rss_gb": round(resident / 1e9, 2),
        "exit": process.returncode,
        "said": answer[-300:],
    }
    print(json.dumps(facts), flush=True)
    return facts


def load(model: Path, turns: int = 4) -> None:
    """Loading and a plain read of the same number of bytes, in turns, after the same rest."""
    command = [sys.executable, "-c", LOAD.format(model=str(model), rest=REST)]
    loads, plain, size = [], [], 0.0
    for turn in range(turns):
        for plainly in (turn % 2 == 1, turn % 2 == 0):
            drop_cache(model)
            if plainly:
                time.sleep(REST)
                plain.append(read_rate(model, size))
            else:
                told = json.loads(str(measured("load", command)["said"]))
                size = told["bytes"]
                loads.append(told["rate"])
    share = mean(loads) / mean(plain)
    print(json.dumps({"step": "load", "rate": loads, "disk": plain, "share": round(share, 3)}))


def predict(model: Path, name: str, *arguments: str) -> None:
    """`ringmoe predict` on a scene of one window of 192 pixels."""
    import numpy as np
    import rasterio

    scene, out = model.with_name("window.tif"), model.with_name("window_map.tif")
    pixels = np.random.default_rng(0).integers(1, 255, (3, 192, 192), dtype=np.uint8)
    shape = {"count": 3, "height": 192, "width": 192, "dtype": "uint8", "crs": "EPSG:32631"}
    grid = rasterio.Affine(1, 0, 5e5, 0, -1, 5e6)
    with rasterio.open(scene, "w", driver="GTiff", transform=grid, **shape) as file:
        file.write(pixels)
    drop_cache(model)
    command = [*RINGMOE, "predict", str(scene), "--model", str(model), "-o", str(out)]
    measured(name, [*command, "--bands", "red,green,blue", *arguments])
    for left in (scene, out, Path(f"{out}.aux.xml")):
        left.unlink(missing_ok=True)


def prune(model: Path, name: str, *arguments: str) -> None:
    """One pruning, its result deleted, between two measurements of the disk.

    Where as much is written as is read, it is held against a plain copy, too.
    """
    out = model.with_name(f"pruned-{name}")
    command = [*RINGMOE, "prune", str(model), "--modality", "opt", *arguments]
    told = json.loads(subprocess.check_output([*command, "--dry-run", "--json"], text=True))
    read, written = told["bytes_read"] / 1e9, told["bytes_written"] / 1e9
    plain = {"read": read_rate} | ({"copy": copy_rate} if written > read / 2 else {})
    before = {kind: rate(model) for kind, rate in plain.items()}
    seconds = float(str(measured(name, [*command, "-o", str(out)])["seconds"]))
    shutil.rmtree(out, ignore_errors=True)
    facts: dict[str, object] = {"step": name, "read_gb": read, "written_gb": written}
    for kind, rate in plain.items():
        own = (read + written if kind == "copy" else read) / seconds
        disk = [before[kind], rate(model)]
        share = round(own / (sum(disk) / 2), 3)
        facts[kind] = {"rate": round(own, 3), "disk": disk, "share": share}
    print(json.dumps(facts), flush=True)


def compress(model: Path, seconds: float) -> None:
    """The first layers by KC: the whole against the reading alone and the SVDs alone."""
    facts = measured("kc", [sys.executable, "-c", COMPRESS.format(model=str(model), limit=seconds)])
    drop_cache(model)
    told = json.loads(str(facts["said"]))
    start = time.perf_counter()
    done, buffer = 0, bytearray(BLOCK)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while done < told["bytes"] and (got := file.readinto(buffer)):
                done += got
    reading = time.perf_counter() - start
    ratio = told["seconds"] / max(reading, told["svds"])
    print(json.dumps({"step": "kc", "reading_alone": reading, "ratio": round(ratio, 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="14b")
    parser.add_argument("--steps", default="convert,load,run,predict,predict8,ep,ka,ks,kc,fit")
    parser.add_argument("--seconds", type=float, default=1e9, help="After which KC may stop.")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    model = arguments.folder / "random-14b"
    if (
        arguments.preset == "14b"
        and not model.exists()
        and shutil.disk_usage(arguments.folder).free < FREE
    ):
        print("skipped: less than 45 GB free")
        return
    try:
        walk_through(model, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(model, ignore_errors=True)


def run(model: Path, name: str) -> None:
    """A program between two measurements of the disk."""
    rate = read_rate(model)
    measured(name, [sys.executable, "-c", PROGRAMS[name].format(model=str(model))])
    print(json.dumps({"step": name, "disk": [rate, read_rate(model)]}), flush=True)


def walk_through(model: Path, arguments: argparse.Namespace) -> None:
    """The steps that were asked for, one after another."""
    steps = arguments.steps.split(",")
    if "convert" in steps:
        words = ["convert", "--random", arguments.preset, "--task", "segmentation", "-o"]
        measured("convert", [*RINGMOE, *words, str(model)])
    if "load" in steps:
        load(model)
    for name in (n for n in steps if n in PROGRAMS):
        run(model, name)
    for name in (n for n in steps if n in PREDICTIONS):
        predict(model, name, *PREDICTIONS[name])
    if "ep" in steps:
        prune(model, "ep", "--target", "4.5b")
    for method in (m for m in steps if m in ("ka", "ks")):
        prune(model, method, "--target", "1b", "--method", method)
    if "kc" in steps:
        compress(model, arguments.seconds)
        for left in (model.with_name("pruned-kc"), model.with_name("pruned-kc.part")):
            shutil.rmtree(left, ignore_errors=True)


if __name__ == "__main__":
    main()
