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

import psutil

RINGMOE = [sys.executable, "-m", "ringmoe_cli"]
FREE = 45e9
BLOCK = 16 << 20

LOAD = """
import time, torch
from model import RingMoE
start = time.perf_counter()
net = RingMoE.from_pretrained({model!r}, modality="opt")
seconds = time.perf_counter() - start
size = sum(p.numel() * p.element_size() for p in net.parameters())
print({{"seconds": round(seconds, 2), "bytes": size, "rate": round(size / seconds / 1e9, 3)}})
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


def prune(model: Path, name: str, *arguments: str) -> None:
    """One pruning, its result deleted, between two measurements of the disk."""
    before = read_rate(model)
    out = model.with_name(f"pruned-{name}")
    command = [*RINGMOE, "prune", str(model), "--modality", "opt", "-o", str(out), *arguments]
    facts = measured(name, [*command, "--json"])
    told = json.loads(
        str(subprocess.check_output([*command[:-2], *arguments, "--dry-run", "--json"], text=True))
    )
    rate = told["bytes_read"] / float(str(facts["seconds"])) / 1e9
    print(
        json.dumps(
            {
                "step": name,
                "read_gb": told["bytes_read"] / 1e9,
                "written_gb": told["bytes_written"] / 1e9,
                "rate": round(rate, 3),
                "disk": [round(before, 3), round(read_rate(model), 3)],
            }
        ),
        flush=True,
    )
    shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="14b")
    parser.add_argument("--steps", default="convert,load,run,ep,ka,ks,kc")
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
    steps = arguments.steps.split(",")
    try:
        if "convert" in steps:
            measured(
                "convert",
                [
                    *RINGMOE,
                    "convert",
                    "--random",
                    arguments.preset,
                    "--task",
                    "segmentation",
                    "-o",
                    str(model),
                ],
            )
        for name, program in (("load", LOAD), ("run", RUN)):
            if name in steps:
                rate = read_rate(model)
                measured(name, [sys.executable, "-c", program.format(model=str(model))])
                print(
                    json.dumps(
                        {"step": name, "disk": [round(rate, 3), round(read_rate(model), 3)]}
                    ),
                    flush=True,
                )
        if "ep" in steps:
            prune(model, "ep", "--target", "4.5b")
        for method in ("ka", "ks", "kc"):
            if method in steps:
                prune(model, method, "--target", "1b", "--method", method)
    finally:
        if not arguments.keep:
            shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    main()
