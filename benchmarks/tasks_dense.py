"""Real labelled sets: pre-trained against random, full against frozen, a CNN, a random forest.

    python benchmarks/tasks_dense.py DATA WORK pretrain
    python benchmarks/tasks_dense.py DATA WORK eurosat forest    # then pre, random, cnn
    python benchmarks/tasks_dense.py DATA WORK table

Every row is appended to WORK/rows.jsonl. The number of updates of our trainings is fixed; the CNN
(a ResNet-18 pyramid under the same head) gets the CPU seconds of pre-training plus fine-tuning.
Nothing is chosen on a test split.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cnn import ResNetPyramid
from sklearn.ensemble import RandomForestClassifier

from model.adapt import freeze as freeze_encoder
from model.batch import Batch
from model.config import TaskConfig
from model.metrics import ConfusionMatrix
from model.optim import adamw, learning_rate
from model.tasks.network import TaskNetwork
from ringmoe_cli import console
from ringmoe_cli.jobs.evaluation import EvaluateRequest, evaluate
from ringmoe_cli.jobs.finetuning import FinetuneRequest, finetune, score, starting_point
from ringmoe_cli.jobs.pretraining import PretrainRequest, pretrain
from ringmoe_cli.jobs.probe import knn_probe
from ringmoe_cli.jobs.taskdata import DataRequest, open_task_data
from ringmoe_cli.recipe import FinetuneRecipe, load_finetune_recipe, load_pretrain_recipe
from ringmoe_cli.scene.labels import Wanted
from ringmoe_cli.scene.sensors import Said
from ringmoe_cli.scene.store.intake import gather
from ringmoe_cli.scene.tiling import Settings, tile_scenes

PRETRAIN_STEPS = 85
MAIN = {
    "classification": "accuracy", "segmentation": "miou", "change": "change_f1", "depth": "rmse"
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One labelled set and its protocol."""

    data: tuple[str, ...]
    task: str
    steps: int
    batch: int = 16
    window: int = 64
    validation: str | None = None
    modalities: tuple[str, ...] = ()
    classes: str | None = None
    dropout: float = 0.0


CASES = {
    "eurosat": Case(("{data}/05_scene_classification/eurosat_rgb",), "classification", 30, 64),
    "mstar": Case(("{work}/mstar/train",), "classification", 60, 32, 64, "{work}/mstar/test",
                  ("sar-l2",)),
    "mstar-clutter": Case(("{work}/mstar-clutter/train",), "classification", 60, 32, 64,
                          "{work}/mstar-clutter/test", ("sar-l2",)),
    "dubai": Case(("{work}/dubai/train",), "segmentation", 40, 16, 64, "{work}/dubai/test",
                  classes="{work}/dubai/classes.csv"),
    "floods-ms": Case(("{work}/floods.zarr",), "segmentation", 40, modalities=("ms",)),
    "floods-sar": Case(("{work}/floods.zarr",), "segmentation", 40, modalities=("sar-l2",)),
    "floods-both": Case(("{work}/floods.zarr",), "segmentation", 40, modalities=("ms", "sar-l2"),
                        dropout=0.5),
    "levir-check": Case(("{data}/07_change_detection/levir_samples",), "change", 40, 8),
    "height-check": Case(("{work}/neon.zarr",), "depth", 40, 8),
    "airsar": Case(("{work}/airsar0.zarr",), "segmentation", 40, validation="{work}/airsar2.zarr"),
}  # fmt: skip


def scenes(paths: list[Path | str], out: Path, label: Path | None = None, **said: Any) -> None:
    classes = said.pop("classes", None)
    if not out.exists():
        labels = [str(label)] if label else []
        wanted = Wanted("segmentation", classes)
        labelled = gather([str(p) for p in paths], Said(**said), labels, wanted)
        tile_scenes(labelled, out, Settings())


def prepare(data: Path, work: Path) -> None:
    """Stores of the scenes, and copies of the folders with the splits as folders."""
    t3 = data / "04_sar_complex/airsar_sf_T3"
    for strip in (0, 2):
        labels = data / f"06_segmentation/airsar_polsf_labels/labels_strip{strip}.png"
        names = "1=bare soil,2=mountain,3=water,4=urban,5=vegetation"
        scenes([t3 / f"strip{strip}"], work / f"airsar{strip}.zarr", labels, classes=names)
    naip = sorted((data / "01_optical_scenes/naip").glob("*.tif"))
    oam = next((data / "01_optical_scenes/oam_2048").glob("*.tif"))
    scenes(naip, work / "naip.zarr", bands=("red", "green", "blue", "-"), modality="opt")
    scenes([oam], work / "oam.zarr", bands=("red", "green", "blue"), modality="opt")
    ten = ("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16",
           "swir22")  # fmt: skip
    aber = data / "02_multispectral/s2_aberystwyth_10band/mosaic_10band.tif"
    scenes([aber], work / "aber.zarr", bands=ten, scale="0.0001")
    umbra = data / "03_sar_amplitude/umbra_mount_yasur.tiff"
    scenes([umbra], work / "umbra.zarr", modality="sar-l2", bands=("amplitude",))
    flood = data / "06_segmentation/sen1floods11_spain"
    water = flood / "Spain_7370579_LabelHand.tif"
    floods = work / "floods.zarr"
    if not floods.exists():
        wanted = Wanted("segmentation", "0=land,1=water")
        s2 = gather([str(flood / "Spain_7370579_S2Hand.tif")], Said(scale="0.0001"), [str(water)],
                    wanted)  # fmt: skip
        s1 = gather([str(flood / "Spain_7370579_S1Hand.tif")], Said(scale="db"), [], wanted)
        tile_scenes([*s2, *s1], floods, Settings())
    neon = data / "09_height/neon_OSBS_029"
    if not (work / "neon.zarr").exists():
        said, heights = Said("opt", ("red", "green", "blue")), Wanted("depth")
        chm = f"depth={neon / 'OSBS_029_chm_0p5m_derived.tif'}"
        tile_scenes(gather([str(neon / "OSBS_029.tif")], said, [chm], heights),
                    work / "neon.zarr", Settings())  # fmt: skip
    copy_dubai(data / "06_segmentation/dubai", work / "dubai")
    if not (work / "mstar").exists():
        shutil.copytree(data / "05_scene_classification/mstar_soc", work / "mstar")
        clutter_only(work / "mstar", work / "mstar-clutter")


def copy_dubai(source: Path, out: Path) -> None:
    """Parts 7 to 9 of every tile are the test split."""
    if out.exists():
        return
    for kind in ("images", "masks"):
        for path in sorted((source / "train" / kind).iterdir()):
            split = "test" if int(path.stem[-1]) >= 7 else "train"
            (out / split / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / split / kind / path.name)
    (out / "classes.csv").write_text(
        "building,60,16,152\nland,132,41,246\nroad,110,193,228\nvegetation,254,221,58\n"
        "water,226,169,41\nunlabelled,155,155,155\n"
    )


def clutter_only(source: Path, out: Path) -> None:
    """The same chips with the 64 × 64 pixels in their middle, the vehicle, filled with clutter."""
    from PIL import Image

    for path in source.rglob("*.jpeg"):
        pixels = np.asarray(Image.open(path).convert("L")).copy()
        middle = tuple(slice(n // 2 - 32, n // 2 + 32) for n in pixels.shape)
        pixels[middle] = np.median(pixels)
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target, quality=95)


def pretrained(work: Path) -> float:
    """Pre-train on unlabelled scenes of all four modalities, once; returns CPU seconds."""
    done = work / "pretrain.json"
    if not done.exists():
        recipe = load_pretrain_recipe(
            "pretrain-nano",
            [f"train.steps={PRETRAIN_STEPS}", "train.batch_size=32", "train.save_every=80"],
        )
        stores = tuple(work / f"{n}.zarr" for n in ("naip", "oam", "aber", "umbra", "airsar0"))
        start = time.process_time()
        pretrain(PretrainRequest(stores, work / "pre", recipe))
        done.write_text(json.dumps({"cpu": time.process_time() - start}))
    return float(json.loads(done.read_text())["cpu"])


def request_of(case: Case, data: Path, work: Path) -> DataRequest:
    def at(text: str) -> Path:
        return Path(text.format(data=data, work=work))

    return DataRequest(
        paths=[at(p) for p in case.data],
        task=case.task,
        size=case.window,
        validation=at(case.validation) if case.validation else None,
        modalities=case.modalities,
        classes=str(at(case.classes)) if case.classes else None,
    )


def ours(name: str, case: Case, data: Path, work: Path, init: bool, freeze: bool) -> dict[str, Any]:
    recipe = load_finetune_recipe(
        f"finetune-{case.task}",
        [f"train.steps={case.steps}", f"train.batch_size={case.batch}", "train.save_every=1000",
         f"task.window={case.window}", f"task.freeze={str(freeze).lower()}",
         "task.channels=32", f"task.modality_dropout={case.dropout}"],
    )  # fmt: skip
    run = work / "runs" / f"{name}-{'pre' if init else 'rand'}-{'frozen' if freeze else 'full'}"
    start = time.process_time()
    scores = finetune(
        FinetuneRequest(request_of(case, data, work), run, recipe,
                        work / "pre" if init else None, overwrite=True)
    )  # fmt: skip
    shutil.rmtree(run / "state", ignore_errors=True)
    return {**scores, "cpu": time.process_time() - start}


def cnn(case: Case, data: Path, work: Path, seconds: float) -> dict[str, Any]:
    """The same head on a ResNet-18, trained for so many CPU seconds."""
    torch.manual_seed(0)
    found = open_task_data(request_of(case, data, work))
    found.training.normalisation = found.held_out.normalisation = found.measure()
    channels = {m: len(b) for m, b in found.training.channels.items()}
    task = TaskConfig(case.task, found.classes, modalities=tuple(channels), channels=32)
    network = TaskNetwork(ResNetPyramid(channels), task, modality_dropout=case.dropout)
    optimiser = adamw(network.train(), 1e-3, 0.05)
    stream, start, step, steps = found.training.training(case.batch, 0), time.process_time(), 0, 20
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, max(steps, 60), 1e-3, 5e-7, 20)
        optimiser.zero_grad()
        network.loss(next(stream)).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        step += 1
        spent = time.process_time() - start
        if step == 20:
            steps = max(60, int(seconds / spent * 20))
        if spent > 1.1 * seconds and step >= 60:
            break
    scores = score(network.eval(), found.held_out.once(case.batch))
    return {**scores, "cpu": time.process_time() - start, "steps": step}


def forest(case: Case, data: Path, work: Path) -> dict[str, Any]:
    """A random forest: band statistics and histograms of chips, 5 × 5 statistics of pixels."""
    found = open_task_data(request_of(case, data, work))
    found.training.normalisation = found.held_out.normalisation = found.measure()
    start = time.process_time()
    x, y = features(found.training.once(16), case, 20_000)
    model = RandomForestClassifier(100, n_jobs=1, random_state=0, min_samples_leaf=2).fit(x, y)
    x, y = features(found.held_out.once(16), case, 400_000)
    confusion = ConfusionMatrix(len(found.classes))
    confusion.update(torch.from_numpy(model.predict(x)), torch.from_numpy(y))
    majority = np.bincount(y).max() / len(y)
    return {**confusion.compute(), "majority": majority, "cpu": time.process_time() - start}


def transferred(case: Case, taught: str, data: Path, work: Path) -> dict[str, dict[str, Any]]:
    """A head trained on one modality of a frozen encoder, asked about each; and neighbours."""
    torch.manual_seed(0)
    found = open_task_data(request_of(case, data, work))
    asked = FinetuneRequest(request_of(case, data, work), work, FinetuneRecipe(), work / "pre")
    encoder, normalisation = starting_point(asked, found)
    found.training.normalisation = found.held_out.normalisation = normalisation
    freeze_encoder(encoder)
    task = TaskConfig(case.task, found.classes, modalities=case.modalities, channels=32)
    network = TaskNetwork(encoder, task)
    optimiser = adamw(network.train(), 1e-3, 0.05)
    stream, start = found.training.training(case.batch, 0), time.process_time()
    for step in range(case.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, case.steps, 1e-3, 5e-7, 20)
        optimiser.zero_grad()
        network.loss(only(next(stream), taught)).loss.backward()
        optimiser.step()
    network.eval()
    spent = {"cpu": time.process_time() - start}
    rows = {}
    for m in case.modalities:
        batches = (only(b, m) for b in found.held_out.once(case.batch))
        rows[f"frozen head taught {taught}, asked {m}"] = {**score(network, batches), **spent}
        near = knn_probe(request_of(case, data, work), work / "pre", 5, across=(taught, m))
        rows[f"5-NN of windows, remembers {taught}, asked {m}"] = {**near, "cpu": 0.0}
    return rows


def only(batch: Batch, modality: str) -> Batch:
    """A batch with one of its modalities."""
    valid = {m: v for m, v in batch.valid.items() if m == modality}
    return replace(batch, images={modality: batch.images[modality]}, valid=valid)


def features(batches: Any, case: Case, most: int) -> tuple[Any, Any]:
    xs, ys = [], []
    pool = torch.nn.AvgPool2d(5, 1, 2, count_include_pad=False)
    for batch in batches:
        x = torch.cat([v[:, 0] for v in batch.images.values()], 1)
        y = batch.targets["classes"]
        if case.task == "classification":
            counts = [torch.stack([torch.histc(c, 16, -2, 3) for c in image]).flatten()
                      for image in x]  # fmt: skip
            xs.append(torch.cat([x.mean((2, 3)), x.std((2, 3)), torch.stack(counts)], 1))
            ys.append(y)
            continue
        mean = pool(x)
        spread = (pool(x * x) - mean**2).clamp(min=0).sqrt()
        every = torch.cat([x, mean, spread], 1).movedim(1, -1)
        xs.append(every[y != 255])
        ys.append(y[y != 255])
    x, y = torch.cat(xs).numpy(), torch.cat(ys).numpy()
    if len(y) > most:
        chosen = np.random.default_rng(0).choice(len(y), most, replace=False)
        x, y = x[chosen], y[chosen]
    return x, y


def measure(name: str, part: str, data: Path, work: Path) -> None:
    """One part of a set's rows: forest, pre, random, cnn."""
    case = CASES[name]

    def note(method: str, scores: dict[str, Any]) -> None:
        kept = ("accuracy", "miou", "f1", "kappa", "balanced_accuracy", "change_f1", "ece",
                "majority", "cpu", "steps", "pixels", "rmse", "mae", "r2")  # fmt: skip
        row = {"set": name, "method": method, **{k: scores[k] for k in kept if k in scores}}
        with (work / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if part == "forest":
        note("random forest", forest(case, data, work))
    elif part == "missing":
        run = work / "runs" / f"{name}-pre-full"
        for alone in case.modalities:
            asked = replace(request_of(case, data, work), modalities=(alone,), task="", size=0)
            note(
                f"fused model, only {alone}",
                evaluate(EvaluateRequest(asked, run, work / "runs" / f"{name}-{alone}", worst=0)),
            )
    elif part == "transfer":
        for taught in case.modalities:
            for method, found in transferred(case, taught, data, work).items():
                note(method, found)
    elif part == "cnn":
        rows = [json.loads(r) for r in (work / "rows.jsonl").read_text().splitlines()]
        longest = max(r["cpu"] for r in rows if r["set"] == name and "full" in r["method"])
        before = json.loads((work / "pretrain.json").read_text())["cpu"]
        note("ResNet-18, same CPU seconds", cnn(case, data, work, before + longest))
    else:
        for freeze in (False, True):
            found = ours(name, case, data, work, part == "pre", freeze)
            note(f"{'pre-trained' if part == 'pre' else part}, {'frozen' if freeze else 'full'}",
                 found)  # fmt: skip


def table(work: Path) -> None:
    for line in (work / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        main = MAIN[CASES[row["set"]].task]
        shown = [f"{row[k]:.3f}" if k in row else "" for k in (main, "accuracy", "kappa", "ece")]
        print(f"| {row['set']} | {row['method']} | {' | '.join(shown)} | {row.get('cpu', 0):.0f} |")


if __name__ == "__main__":
    data, work, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    work.mkdir(parents=True, exist_ok=True)
    console.State.quiet = True
    if what == "pretrain":
        prepare(data, work)
        print(pretrained(work))
    elif what == "table":
        table(work)
    else:
        measure(what, sys.argv[4], data, work)
