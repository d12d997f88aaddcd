"""All rows of the tables of tasks, one after the other; a stopped queue goes on where it was.

    OMP_NUM_THREADS=1 nohup nice -n 5 python benchmarks/tasks_queue.py DATA WORK [PRETRAINED] &
    python benchmarks/tasks_table.py WORK

PRETRAINED is a checkpoint; rows that need one wait until it is there. `WORK/pretrain.json` says
{"cpu": seconds} of its pre-training. Each row is a line of `WORK/rows.jsonl` as soon as it is
known; rows that failed stand in `WORK/failed.jsonl` and are tried again by the next queue.
"""

import json
import os
import subprocess
import sys
import time
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
    dense = [n for n, c in CASES.items() if c.task != "detection"]
    boxes = [n for n, c in CASES.items() if c.task == "detection"]
    large = ["airsar", "mstar", "eurosat", "dubai"]
    plain = ("trivial", "linear", "forest")
    rows = [(n, m) for n in large for m in (*plain, "full", "random-full")]
    rows += [("floods-both", "full"), ("floods-both", "missing"), ("floods-ms", "full"),
             ("floods-sar", "full"), ("eurosat", "knn"), ("mstar", "knn")]  # fmt: skip
    rows += [(n, m) for n in dense for m in plain]
    rows += [(n, "frozen") for n in large]
    rows += [("mstar-clutter", "full"), ("floods-both", "transfer")]
    rows += [(n, m) for n in ("kit", "lakes") for m in ("box-forest", "full", "random-full")]
    rows += [("wpafb", m) for m in ("still", "difference", "tracking-pretrained")]
    rows += [(n, "cnn") for n in large]
    small = [n for n in dense if n not in large and n != "mstar-clutter"]
    rows += [(n, m) for n in small for m in ("full", "random-full")]
    rows += [(n, "random-frozen") for n in large]
    rows += [("eurosat", "shots"), ("airsar", "convpass"), ("mstar-clutter", "random-full"),
             ("wpafb", "tracking-random")]  # fmt: skip
    rows += [(n, m) for n in small for m in ("frozen", "random-frozen", "cnn")]
    rows += [(n, "cnn") for n in ("mstar-clutter", "lakes", "kit")]
    rows += [("eurosat", "convpass"), ("neon-trees", "box-forest")]
    rows += [(n, m) for n in ("neon-trees", "spacenet") for m in ("full", "random-full", "cnn")]
    rows += [(n, m) for n in boxes for m in ("frozen", "random-frozen")]
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
            one(data, work, *possible[0], pretrained if ready else None)
        elif left and pretrained is not None:
            time.sleep(WAIT)
        else:
            return


if __name__ == "__main__":
    given = [Path(word) for word in sys.argv[1:]]
    queue(given[0], given[1], given[2] if len(given) > 2 else None)
