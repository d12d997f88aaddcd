"""Detection and tracking on the real labelled sets, against trivial and classical baselines.

    RINGMOE_DATA=… python benchmarks/tasks_boxes.py ROW --work /tmp/boxes [--init PRETRAINED]

ROW is prepare, lakes-forest, kit-forest, neon-trees-forest, wpafb-still, wpafb-difference or
wpafb-tracking-random; it prints one JSON line. The networks of detection are rows of
`tasks_dense.py`; `tasks_queue.py` runs them all.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import label, uniform_filter
from vehicles import clip

from model.association import track
from model.boxes import Boxes
from model.detection_metrics import AveragePrecision
from model.tracking_metrics import TrackingScores
from ringmoe_cli.scene.labelled.boxes_io import BoxSet, boxes_of, find_boxes, image_size

DATA = Path(os.environ.get("RINGMOE_DATA", "/nowhere"))
REACH = 6.0
"""Pixels between a label point and a track's centre that count as a match (WPAFB)."""


def ringmoe(*words: object) -> dict[str, Any]:
    """Run the command line; its last line of JSON."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ringmoe", *map(str, words), "--json", "--quiet"],
        check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def trained(data: Path, run: Path, task: str, *more: object) -> float:
    """Fine-tune; CPU seconds on one thread, which other work on the machine does not change."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ringmoe("finetune", data, "--task", task, "-o", run, "--overwrite", "--modality", "opt", *more)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start


def show(name: str, scores: dict[str, Any], seconds: float) -> None:
    """One line of results."""
    keys = ("map", "map50", "recall", "ap50_per_class", "hota", "mota", "idf1", "precision",
            "switches")  # fmt: skip
    kept = {k: scores[k] for k in keys if k in scores}
    label = METHODS.get(name, "random forest on pixels, regions as boxes")
    row = {"set": name.rsplit("-forest", 1)[0] if name not in METHODS else "wpafb"}
    print(json.dumps({**row, "method": label, **kept, "cpu": round(seconds, 1)}), flush=True)


def kit(work: Path) -> Path:
    """KIT AIS Munich street: the first 14 frames train, two are left out, the last 4 are held out.

    Neighbouring frames share their background, so this says how well known vehicles are found
    again later, not how well others are.
    """
    root = work / "kit"
    frames = sorted((DATA / "10_tracking/kit_ais_munichstreet02").glob("*.png"))
    for part, chosen in (("train", frames[:14]), ("val", frames[16:])):
        for frame in chosen:
            for suffix in (".png", ".txt"):
                target = root / part / frame.with_suffix(suffix).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(frame.with_suffix(suffix), target)
    (root / "classes.txt").write_text("car\ntruck\nbus\nminibus\ncyclist\n")
    return root


def neon(work: Path) -> Path:
    """NEON crowns: OSBS trains, SJER is held out; two images, a functional check."""
    root, source = work / "neon", DATA / "08_detection/neon_trees"
    for part, stem in (("train", "OSBS_029"), ("val", "2018_SJER_3_252000_4107000_image_477")):
        folder = root / part
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{stem}.tif", folder)
        file = source / (f"{stem}.csv" if part == "train" else f"{stem}_truth.csv")
        with file.open() as rows, (folder / f"{stem}.txt").open("w") as out:
            for row in csv.DictReader(rows):
                x0, x1, y0, y1 = (float(row[k]) / 400 for k in ("xmin", "xmax", "ymin", "ymax"))
                out.write(f"0 {(x0 + x1) / 2} {(y0 + y1) / 2} {x1 - x0} {y1 - y0}\n")
    (root / "classes.txt").write_text("tree\n")
    return root


def spacenet(work: Path) -> Path:
    """SpaceNet-4 roofs in one pan image of 900 × 450; blocks of it are held out."""
    root, source = work / "spacenet", DATA / "08_detection/spacenet4_atlanta_buildings"
    root.mkdir(parents=True, exist_ok=True)
    for name in ("atlanta_left.tif", "atlanta_left.geojson"):
        shutil.copy(source / name, root)
    return root


def wpafb(work: Path) -> Path:
    """WPAFB frames 100-105 as a MOT clip; label points become boxes of 9 × 9 pixels."""
    root, source = work / "wpafb" / "val" / "aoi02", DATA / "10_tracking/wpafb_aoi02"
    for folder in ("img1", "gt"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for frame in range(100, 106):
        shutil.copy(source / f"frames/frame_{frame:06d}.png", root / f"img1/{frame:06d}.png")
    with (source / "gt_frames_000_255.csv").open() as rows, (root / "gt/gt.txt").open("w") as out:
        for row in csv.DictReader(rows):
            if int(row["frame"]) <= 105:
                x, y = float(row["col"]) + 0.5 - 4.5, float(row["row"]) + 0.5 - 4.5
                out.write(f"{row['frame']},{row['id']},{x},{y},9,9,1,1,1\n")
    return root.parent.parent


def simulated(work: Path, clips: int = 24) -> Path:
    """Simulated clips to learn from."""
    root = work / "vehicles"
    for seed in range(clips):
        clip(root / ("val" if seed >= clips - 3 else "train") / f"clip{seed:02d}", seed)
    return root


def pixel_features(path: Path) -> NDArray[np.float32]:
    """(H, W, F): colours, and their means and deviations over 5 × 5 and 15 × 15 pixels."""
    import rasterio

    with rasterio.open(path) as source:
        bands = source.read().astype(np.float32)
    bands /= max(float(np.percentile(bands, 99)), 1.0)
    layers = [bands]
    for side in (5, 15):
        mean = np.stack([uniform_filter(b, side) for b in bands])
        square = np.stack([uniform_filter(b * b, side) for b in bands])
        layers += [mean, np.sqrt(np.maximum(square - mean**2, 0))]
    return np.moveaxis(np.concatenate(layers), 0, -1)


def forest_row(name: str, data: Path, classes: str | None = None, rotated: bool = False) -> None:
    """Classical baseline: a random forest on pixels, connected regions of a class as boxes."""
    from sklearn.ensemble import RandomForestClassifier

    start, rng = time.process_time(), np.random.default_rng(0)
    found = find_boxes(data, rotated=rotated, classes=classes)
    samples, targets = [], []
    for image in (i for i in found.images if i.split == "train"):
        features, truth = pixel_features(image.path), painted(image.path, image.marks, found)
        at = rng.choice(truth.size, min(3000, truth.size), replace=False)
        samples.append(features.reshape(truth.size, -1)[at])
        targets.append(truth.ravel()[at])
    forest = RandomForestClassifier(60, min_samples_leaf=5, n_jobs=2, random_state=0)
    forest.fit(np.concatenate(samples), np.concatenate(targets))
    seconds, metric = time.process_time() - start, AveragePrecision(len(found.classes))
    for image in (i for i in found.images if i.split == "val"):
        features = pixel_features(image.path)
        flat = features.reshape(-1, features.shape[-1])
        chance = forest.predict_proba(flat).reshape(*features.shape[:2], -1)
        columns = {int(c): chance[..., n] for n, c in enumerate(forest.classes_)}
        size = image_size(image.path)
        truth = boxes_of(image.marks, found.classes, False, size)[0]
        metric.add(regions(columns, len(found.classes)), truth)
    show(name, metric.compute(), seconds)


def painted(path: Path, marks: Any, found: BoxSet) -> NDArray[np.int64]:
    """(H, W) class + 1 inside boxes, 0 outside; the smaller box on top."""
    height, width = image_size(path)
    boxes = boxes_of(marks, found.classes, False, (height, width))[0]
    out = np.zeros((height, width), np.int64)
    for n in boxes.area.argsort(descending=True).tolist():
        x0, y0, x1, y1 = (round(v) for v in boxes.corners()[n].tolist())
        out[y0:y1, x0:x1] = int(boxes.labels[n]) + 1
    return out


def regions(chance: dict[int, NDArray[np.float64]], classes: int) -> Boxes:
    """Envelopes of connected regions where a class is likelier than all others."""
    best = np.stack([chance.get(k, np.zeros_like(chance[0])) for k in range(classes + 1)])
    winner, rows, names, scores = best.argmax(0), [], [], []
    for k in range(1, classes + 1):
        numbers, count = label(winner == k)
        for n in range(1, count + 1):
            y, x = np.nonzero(numbers == n)
            if y.size >= 20:
                rows.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
                names.append(k - 1)
                scores.append(float(best[k, y, x].mean()))
    if not rows:
        return Boxes.empty()
    return Boxes.from_corners(rows, labels=torch.tensor(names), scores=torch.tensor(scores))


def tracking_scores(
    name: str, found: list[Boxes], truth: list[Boxes], seconds: float, **settings: float
) -> None:
    """Associate and score by centre distance."""
    scores, precision = TrackingScores(reach=REACH), AveragePrecision(1)
    scores.add(track(found, **settings), truth)
    for f, t in zip(found, truth, strict=True):
        precision.add(f, t)
    show(name, {**precision.compute(), **scores.compute()}, seconds)


def wpafb_frames(work: Path) -> tuple[list[Path], list[Boxes]]:
    """Frames and labels of the real clip."""
    found = find_boxes(wpafb(work), classes="vehicle")
    truth = [boxes_of(i.marks, found.classes, False, image_size(i.path))[0] for i in found.images]
    return [i.path for i in found.images], truth


def difference_row(work: Path) -> None:
    """Baseline: regions that differ from the median of the frames, same association."""
    paths, truth = wpafb_frames(work)
    start = time.process_time()
    frames = np.stack([np.asarray(Image.open(p), np.float32) for p in paths])
    frames = (frames - frames.mean((1, 2), keepdims=True)) / frames.std((1, 2), keepdims=True)
    away = np.abs(frames - np.median(frames, 0))
    found = []
    for image in away:
        smooth = uniform_filter(image, 3)
        numbers, count = label(smooth > 0.6)
        centres = [np.argwhere(numbers == n).mean(0) + 0.5 for n in range(1, count + 1)]
        peaks = [float(smooth[numbers == n].max()) for n in range(1, count + 1)]
        sizes = [int((numbers == n).sum()) for n in range(1, count + 1)]
        good = [n for n, s in enumerate(sizes) if 4 <= s <= 150]
        rows = [[centres[n][1], centres[n][0], 9, 9, 0] for n in good]
        scores = torch.tensor([min(peaks[n] / 3, 1.0) for n in good])
        found.append(Boxes(torch.tensor(rows, dtype=torch.float32).view(-1, 5), scores=scores))
    tracking_scores("wpafb-difference", found, truth, time.process_time() - start)


def still_row(work: Path) -> None:
    """Trivial baseline: the labels of the first frame, kept for ever."""
    _, truth = wpafb_frames(work)
    tracking_scores("wpafb-still", [truth[0]] * len(truth), truth, 0.0)


def wpafb_row(work: Path, init: Path | None) -> None:
    """Train on simulated clips, track the real one."""
    run = work / "runs" / f"wpafb-{'pre' if init else 'random'}"
    METHODS["wpafb-tracking"] += ", pre-trained start" if init else ", random start"
    more = ["--init", init] if init else []
    words = ["--set", "task.window=96", "--set", "train.batch_size=4", "--steps", 350]
    seconds = trained(simulated(work), run, "tracking", "--bands", "band_1", *words, *more)
    score_wpafb(work, run, seconds)


def score_wpafb(work: Path, run: Path, seconds: float) -> None:
    """Scores on the simulated clips held out, and on the real one.

    The tracker's threshold is chosen on the simulated clips; the real one is looked at once.
    """
    clips: dict[str, tuple[list[Path], list[Boxes]]] = {}
    found = find_boxes(work / "vehicles", classes="vehicle")
    for image in (i for i in found.images if i.split == "val"):
        truth = boxes_of(image.marks, found.classes, False, image_size(image.path))[0]
        paths, truths = clips.setdefault(image.clip, ([], []))
        paths.append(image.path)
        truths.append(truth)
    simulated_boxes = {name: detected(run, paths) for name, (paths, _) in clips.items()}
    best, chosen = -1.0, 0.4
    for high in (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5):
        scores = TrackingScores(reach=REACH)
        for name, (_, truths) in clips.items():
            scores.add(track(simulated_boxes[name], high=high, low=high / 2), truths)
        hota = scores.compute()["hota"]
        if hota > best:
            best, chosen = hota, high
    paths, truth = wpafb_frames(work)
    real = detected(run, paths)
    tracking_scores("wpafb-tracking", real, truth, seconds, high=chosen, low=chosen / 2)


def detected(run: Path, paths: list[Path]) -> list[Boxes]:
    """The boxes of every frame of a clip, as `ringmoe predict` finds them."""
    from model.tasks.network import load_task_network
    from ringmoe_cli.jobs.objects import boxes_of_clip, settings_of
    from ringmoe_cli.scene.maps.strips import Normalised
    from ringmoe_cli.scene.reader import SceneReader
    from ringmoe_cli.scene.sensors import open_scene

    network, config = load_task_network(run)
    frames = [
        Normalised(
            [{"opt": SceneReader(open_scene(p, modality="opt", unnamed="number"))}],
            config.normalisation,
        )
        for p in paths
    ]
    return boxes_of_clip(network, frames, settings_of(192))


METHODS = {
    "wpafb-still": "labels of the first frame, kept (uses labels)",
    "wpafb-difference": "differences to the median frame, same association",
    "wpafb-tracking": "trained on simulated clips",
}
LAKES = DATA / "08_detection/bhuvan_lake_river"


def forest_of(name: str, work: Path) -> None:
    """The classical row of a set."""
    rows: dict[str, Callable[[], None]] = {
        "lakes": lambda: forest_row("lakes-forest", LAKES, "lake,river"),
        "kit": lambda: forest_row("kit-forest", kit(work), "car,minibus"),
        "neon-trees": lambda: forest_row("neon-trees-forest", neon(work), "tree"),
    }
    rows[name]()


def main() -> None:
    """Run the row named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("--work", type=Path, default=Path("/tmp/boxes"))
    parser.add_argument("--init", type=Path)
    said = parser.parse_args()
    if said.row == "prepare":
        for make in (kit, neon, spacenet):
            make(said.work)
    elif said.row.endswith("-forest"):
        forest_of(said.row.removesuffix("-forest"), said.work)
    elif said.row == "wpafb-still":
        still_row(said.work)
    elif said.row == "wpafb-difference":
        difference_row(said.work)
    else:
        wpafb_row(said.work, said.init)


if __name__ == "__main__":
    main()
