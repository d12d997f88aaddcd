"""All rows of the tables of tasks, one after the other; a stopped queue goes on where it was.

Several queues may share WORK: each row is made by the queue that locks it first.

    OMP_NUM_THREADS=1 nohup nice -n 5 python benchmarks/tasks_queue.py DATA WORK [PRETRAINED] &
    python benchmarks/tasks_table.py WORK

PRETRAINED is a checkpoint; rows that need one wait until it is there. `WORK/pretrain.json` says
{"cpu": seconds} of its pre-training. Each row is a line of `WORK/rows.jsonl` as soon as it is
known; rows that failed stand in `WORK/failed.jsonl` and are tried again by the next queue.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks_dense import rows_of
from tasks_sets import CASES, prepare

HERE = Path(__file__).parent
NEEDS = {"full", "frozen", "convpass", "transfer", "shots", "knn", "tracking-pretrained"}
"""Methods that start from the pre-trained checkpoint."""
WAIT = 120
"""Seconds between two looks for it."""
LIMIT = 7200
"""Seconds after which a row is given up."""


def order() -> list[tuple[str, str]]:
    """Set and method of every row, what matters most first."""
    large = ["airsar", "mstar", "eurosat", "dubai"]
    floods = ["floods-both", "floods-ms", "floods-sar"]
    boxes = [n for n, c in CASES.items() if c.task == "detection"]
    maps = [n for n, c in CASES.items() if c.task not in ("detection", "classification")]
    small = [n for n in maps if n not in large + floods]
    rows = [(n, m) for n in [*large, "mstar-clutter"] for m in ("trivial", "linear", "forest")]
    rows += [(n, m) for n in ("mstar", "eurosat") for m in ("pixels", "forest-pixels")]
    rows += [(n, "full") for n in (*large[:3], "floods-both", "levir", "sar-change", "kit")]
    rows += [("wpafb", m) for m in ("still", "difference", "tracking-pretrained")]
    rows += [(n, "full") for n in small] + [("kit", "box-forest"), ("floods-both", "missing")]
    rows += [(n, m) for n in ("airsar", "mstar", "eurosat") for m in ("random-full", "frozen")]
    rows += [(n, m) for n in maps for m in ("trivial", "linear", "forest")]
    rows += [(n, "cnn") for n in ("airsar", "mstar", "eurosat")] + [("mstar-clutter", "full")]
    rows += [("dubai", m) for m in ("full", "random-full", "frozen", "cnn")]
    rows += [("lakes", m) for m in ("box-forest", "full")] + [("eurosat", "knn"), ("mstar", "knn")]
    rows += [("floods-ms", "full"), ("floods-sar", "full"), ("floods-both", "transfer")]
    rows += [(n, "random-full") for n in ("kit", "lakes", *small)]
    rows += [(n, "random-frozen") for n in large]
    rows += [("airsar", "convpass"), ("eurosat", "shots"), ("wpafb", "tracking-random")]
    rows += [(n, "random-full") for n in [*floods, "mstar-clutter"]]
    rows += [(n, m) for n in small for m in ("frozen", "random-frozen")]
    rows += [("neon-trees", "box-forest")]
    rows += [(n, m) for n in ("neon-trees", "spacenet") for m in ("full", "random-full")]
    rows += [(n, "cnn") for n in ("kit", "lakes", "floods-both", *small)]
    rows += [(n, m) for n in [*floods, *boxes] for m in ("frozen", "random-frozen")]
    rows += [(n, "cnn") for n in ("floods-ms", "floods-sar", "neon-trees", "spacenet")]
    rows += [("mstar-clutter", "cnn"), ("eurosat", "convpass")]
    return list(dict.fromkeys(rows))


def command(data: Path, work: Path, name: str, method: str, pretrained: Path | None) -> list[str]:
    """The process that makes a row."""
    start = [str(pretrained)] if method in NEEDS and pretrained else []
    if name == "wpafb" or method == "box-forest":
        row = f"{name}-{method}" if name == "wpafb" else f"{name}-forest"
        return [sys.executable, str(HERE / "tasks_boxes.py"), row, "--work", str(work),
                *(["--init", *start] if start else [])]  # fmt: skip
    script = str(HERE / "tasks_dense.py")
    return [sys.executable, script, str(data), str(work), name, method, *start]


def one(data: Path, work: Path, name: str, method: str, pretrained: Path | None) -> None:
    """Make a row and write it down."""
    words = command(data, work, name, method, pretrained)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RINGMOE_DATA": str(data)}
    start = time.time()
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        done = subprocess.CompletedProcess(words, 124, "", f"not finished after {LIMIT} s")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    key = {"key": f"{name}/{method}"}
    if done.returncode or not lines:
        write(work / "failed.jsonl", {**key, "error": done.stderr.strip()[-600:]})
        return
    for line in lines:
        write(work / "rows.jsonl", {**key, "wall": round(time.time() - start), **line})


def write(path: Path, row: dict[str, object]) -> None:
    """Append a line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def queue(data: Path, work: Path, pretrained: Path | None) -> None:
    """Every row that is not there yet; those that need the checkpoint once it is."""
    work.mkdir(parents=True, exist_ok=True)
    prepare(data, work)
    boxes = [sys.executable, str(HERE / "tasks_boxes.py"), "prepare", "--work", str(work)]
    subprocess.run(boxes, check=True, env={**os.environ, "RINGMOE_DATA": str(data)})
    tried: set[str] = set()
    while True:
        done = {r.get("key") for r in rows_of(work)} | tried
        ready = pretrained is not None and (pretrained / "config.json").is_file()
        left = [(n, m) for n, m in order() if f"{n}/{m}" not in done]
        possible = [(n, m) for n, m in left if ready or m not in NEEDS]
        if possible:
            tried.add("/".join(possible[0]))
            with claimed(work, possible[0]) as mine:
                if mine:
                    one(data, work, *possible[0], pretrained if ready else None)
        elif left and pretrained is not None:
            time.sleep(WAIT)
        else:
            return


@contextmanager
def claimed(work: Path, row: tuple[str, str]) -> Iterator[bool]:
    """Whether no other queue makes this row, nor has just made it; a killed one lets it go."""
    (work / "claims").mkdir(exist_ok=True)
    with (work / "claims" / "-".join(row)).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield "/".join(row) not in {r.get("key") for r in rows_of(work)}


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    queue(given[0], given[1], given[2] if len(given) > 2 else None)
