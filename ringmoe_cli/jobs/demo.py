"""The whole line on a simulated scene: tile, pre-train, fine-tune, map, and an honest score.

The simulated world is cut in two by a guard strip. The model sees one part; the map, the
baselines and the best possible per-pixel classifier are scored on the other.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.json_file import read_json
from model.state import TrainingState
from ringmoe_cli import console
from ringmoe_cli.errors import OutputExistsError, RingmoeError
from ringmoe_cli.scene.simulate import SimulatedScene, simulate_scene

Classes = NDArray[np.uint8]

FACTS, REPORT, PICTURE = "demo.json", "report.json", "picture.png"


@dataclass(frozen=True)
class DemoRequest:
    """What the user asks for; the sizes are for tests."""

    folder: Path
    """Where everything is written."""
    seed: int = 0
    """Of the world and of training."""
    overwrite: bool = False
    """Start over in a folder that holds a demo."""
    width: int = 1024
    """Of the world in pixels."""
    training_height: int = 896
    """Rows that the model may see."""
    guard: int = 64
    """Rows between, as many as a window has, that nobody uses."""
    held_out_height: int = 256
    """Rows that are mapped and scored."""
    pretraining: tuple[str, ...] = (
        "train.steps=60", "train.batch_size=32", "train.save_every=30", "train.lr=1e-3",
        "train.warmup_steps=20", "model.mask_cell=16",
        "modalities.opt.weight=0.7", "modalities.ms.weight=0.2",
        "modalities.sar-l1.weight=0.05", "modalities.sar-l2.weight=0.05",
    )  # fmt: skip
    """What differs from the recipe pretrain-nano."""
    finetuning: tuple[str, ...] = (
        "train.steps=300", "train.batch_size=16", "train.lr=2e-3", "task.channels=32"
    )  # fmt: skip
    """What differs from the recipe finetune-segmentation."""


@dataclass
class Clock:
    """Says what begins, and remembers how long it took."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Stage -> duration in this run."""

    @contextmanager
    def stage(self, name: str, about: str) -> Iterator[None]:
        """Time one stage of the demo."""
        console.say(f"{name}: {about}")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def demo(request: DemoRequest) -> dict[str, Any]:
    """Run the demo, or what an interrupted one has left to do.

    Returns:
        The report: scores by method, and the paths of map and picture.

    Raises:
        OutputExistsError: if the folder holds a finished demo, or something else.
        RingmoeError: if it holds an unfinished demo of another seed.
    """
    folder, clock = claim_folder(request), Clock()
    with clock.stage("simulate", f"a landscape seen by four sensors, seed {request.seed}"):
        world = simulate_scene(request.seed, (height_of(request), request.width))
        training, held_out = divide(world, request)
    with clock.stage("tile", "the training part in four modalities, with labels"):
        store = tile(training, folder)
    with clock.stage("pretrain", "the encoder, by filling in what was masked"):
        pretrain(request, store)
    with clock.stage("finetune", "land cover from the multi-spectral bands"):
        finetune(request, store)
    with clock.stage("predict", "a map of the part that was held out"):
        path = predict(held_out, folder)
    with clock.stage("score", "the map and its rivals against the truth"):
        report = judge(training, held_out, path, folder, request.seed)
    return {**report, "seconds": clock.seconds}


def height_of(request: DemoRequest) -> int:
    """Rows of the world."""
    return request.training_height + request.guard + request.held_out_height


def divide(world: SimulatedScene, request: DemoRequest) -> tuple[SimulatedScene, SimulatedScene]:
    """The part to learn from and the part to be judged on, with the guard strip between."""
    start = request.training_height + request.guard
    return (
        world.crop(0, 0, request.training_height, request.width),
        world.crop(start, 0, request.held_out_height, request.width),
    )


def claim_folder(request: DemoRequest) -> Path:
    """Make the folder, or recognise the unfinished demo in it.

    Raises:
        OutputExistsError: if it holds a finished demo, or something else.
        RingmoeError: if its unfinished demo has another seed.
    """
    folder, facts = request.folder, {"command": "demo", "seed": request.seed}
    marker = folder / FACTS
    if folder.exists() and not marker.is_file() and any(folder.iterdir()):
        raise OutputExistsError(folder)
    if marker.is_file() and request.overwrite:
        shutil.rmtree(folder)
    if (folder / REPORT).is_file():
        raise OutputExistsError(folder)
    if marker.is_file():
        if read_json(marker) != facts:
            raise RingmoeError(
                f"{folder} holds an unfinished demo of another seed; "
                "choose another -o, or pass --overwrite"
            )
        console.say(f"{folder}: going on with an unfinished demo")
    write_json(marker, facts)
    return folder


def tile(training: SimulatedScene, folder: Path) -> Path:
    """Write the training part as GeoTIFFs and put them into a store."""
    from ringmoe_cli.scene.labels import Wanted
    from ringmoe_cli.scene.sensors import Said
    from ringmoe_cli.scene.simulate import write_scene
    from ringmoe_cli.scene.store.intake import gather
    from ringmoe_cli.scene.tiling import tile_scenes

    store, scenes = folder / "tiles.zarr", folder / "training"
    if not store.exists():
        if not scenes.exists():
            write_whole(lambda part: write_scene(training, part), scenes)
        files = [str(scenes / f"{m}.tif") for m in ("opt", "ms", "sar_l1", "sar_l2")]
        labels = [str(scenes / "landcover.tif")]
        tile_scenes(gather(files, Said(), labels, Wanted("segmentation")), store)
    return store


def write_whole(write: Any, folder: Path) -> None:
    """Let `write` fill a folder that gets its name when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    part.rename(folder)


def pretrain(request: DemoRequest, store: Path) -> None:
    """Pre-train on all four modalities."""
    from ringmoe_cli.jobs.pretraining import PretrainRequest
    from ringmoe_cli.jobs.pretraining import pretrain as run
    from ringmoe_cli.recipe import load_pretrain_recipe

    seed = f"train.seed={request.seed}"
    recipe = load_pretrain_recipe("pretrain-nano", [*request.pretraining, seed])
    output = request.folder / "runs" / "pre"
    if not finished(output, recipe.train.steps):
        run(PretrainRequest((store,), output, recipe))


def finetune(request: DemoRequest, store: Path) -> None:
    """Fine-tune for land cover on the multi-spectral scene."""
    from ringmoe_cli.jobs.finetuning import FinetuneRequest
    from ringmoe_cli.jobs.finetuning import finetune as run
    from ringmoe_cli.jobs.taskdata import DataRequest
    from ringmoe_cli.recipe import load_finetune_recipe

    seed = f"train.seed={request.seed}"
    recipe = load_finetune_recipe("finetune-segmentation", [*request.finetuning, seed])
    runs = request.folder / "runs"
    data = DataRequest((store,), "segmentation", 0, request.seed, share=0.05, modalities=("ms",))
    if not finished(runs / "seg", recipe.train.steps):
        run(FinetuneRequest(data, runs / "seg", recipe, runs / "pre"))


def finished(run: Path, steps: int) -> bool:
    """Whether a run has done all its steps."""
    return TrainingState(run / "state").latest() >= steps


def predict(held_out: SimulatedScene, folder: Path) -> Path:
    """Map the held-out multi-spectral scene."""
    from ringmoe_cli.jobs.maps import load_mapper
    from ringmoe_cli.jobs.opening import Wish
    from ringmoe_cli.scene.simulate import write_scene

    scenes = folder / "held_out"
    if not scenes.exists():
        write_whole(lambda part: write_scene(held_out, part), scenes)
    path = folder / "map.tif"
    if not path.exists():
        load_mapper(folder / "runs" / "seg", Wish(path)).map_scene(str(scenes / "ms.tif"))
    return path


def judge(
    training: SimulatedScene, held_out: SimulatedScene, path: Path, folder: Path, seed: int
) -> dict[str, Any]:
    """Score the map beside its rivals; save report and picture."""
    from ringmoe_cli.scene.simulate import read_raster
    from ringmoe_cli.scene.simulated.spectra import COVERS

    maps = {"ringmoe": read_raster(path)[0], **rivals(training, held_out)}
    scores = {name: score_map(guess, held_out.labels, len(COVERS)) for name, guess in maps.items()}
    write_picture(folder / PICTURE, held_out, maps["ringmoe"], scores)
    report = {
        "seed": seed,
        "classes": [c.name for c in COVERS],
        "scores": scores,
        "share_of_bayes": scores["ringmoe"]["miou"] / scores["bayes"]["miou"],
        "map": str(path),
        "picture": str(folder / PICTURE),
    }
    write_json(folder / REPORT, report)
    return report


def rivals(training: SimulatedScene, held_out: SimulatedScene) -> dict[str, Classes]:
    """Maps by baselines on the same bands, and by the best possible classifier of single pixels."""
    from ringmoe_cli.scene.simulate import MS_SCALE, bayes_posterior, shares_of
    from ringmoe_cli.scene.simulated.baselines import linear_map, majority_map, with_neighbourhood
    from ringmoe_cli.scene.simulated.spectra import COVERS

    seen, unseen = (s.ms * np.float32(MS_SCALE) for s in (training, held_out))
    labels, count = training.labels, len(COVERS)
    wide, wide_unseen = with_neighbourhood(seen), with_neighbourhood(unseen)
    posterior = bayes_posterior(unseen, shares_of(held_out.surfaces))
    return {
        "majority": majority_map(labels, held_out.labels.shape),
        "linear": linear_map(seen, labels, unseen, count),
        "linear_5x5": linear_map(wide, labels, wide_unseen, count),
        "bayes": posterior.argmax(axis=0).astype(np.uint8),
    }


def score_map(guess: Classes, truth: Classes, classes: int) -> dict[str, Any]:
    """MIoU, accuracy and IoU per class over the labelled pixels."""
    import torch

    from model.metrics import ConfusionMatrix

    confusion = ConfusionMatrix(classes)
    confusion.update(torch.from_numpy(guess.astype(np.int64)), torch.from_numpy(truth))
    found = confusion.compute()
    return {key: found[key] for key in ("miou", "accuracy", "iou_per_class")}


def write_picture(
    path: Path, held_out: SimulatedScene, guess: Classes, scores: dict[str, Any]
) -> None:
    """Input, truth and map of the held-out part, with the scores."""
    from ringmoe_cli.scene.picture import paint, quicklook, save_triptych
    from ringmoe_cli.scene.simulated.spectra import COVERS

    colours = [c.colour for c in COVERS]
    images = {
        "near infrared, red, green": quicklook(held_out.ms[[3, 2, 1]]),
        "truth": paint(held_out.labels, colours),
        "map": paint(guess, colours),
    }
    parts = [f"{TITLES[name]} {found['miou']:.2f}" for name, found in scores.items()]
    save_triptych(path, images, [c.name for c in COVERS], colours, "mIoU: " + ", ".join(parts))


TITLES = {
    "ringmoe": "RingMoE nano",
    "majority": "majority class",
    "linear": "linear",
    "linear_5x5": "linear with 5×5 means and deviations",
    "bayes": "best possible on single pixels",
}
"""Names of the methods for people."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=1, default=console.plain) + "\n", "utf-8")
    part.replace(path)
