"""Pre-training: tile stores, a recipe and a run folder come together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.normalisation import Normalisation
from model.physics import local_looks, log_floor, span
from model.pretrain import MaskedImageModel, with_masks
from model.train import StepReport, train
from ringmoe_cli import console
from ringmoe_cli.errors import StoreError
from ringmoe_cli.recipe import PretrainRecipe, settings
from ringmoe_cli.runs import claim_run, stop_requests
from ringmoe_cli.scene.loader import pretraining_batches, store_normalisation
from ringmoe_cli.scene.tiles import Store, open_store

SIMULATED_SIZE = 768
"""Side in pixels of the simulated scene that stands in for missing stores."""
SIMULATED_SEED = 1
"""Not the demo's, so that its scene stays unseen."""
LOOKS_CHIPS = 16
"""SAR-L1 chips from which the number of looks is estimated."""


@dataclass(frozen=True)
class PretrainRequest:
    """What the user asks for."""

    stores: tuple[Path, ...]
    """Tile stores; none: a simulated scene is made in the run folder."""
    output: Path
    """Run folder."""
    recipe: PretrainRecipe
    """Model, objective, loop and mix."""
    device: str = "cpu"
    """Where to compute."""
    overwrite: bool = False
    """Replace a finished run."""
    workers: int = 0
    """Reading processes; 0 reads in a thread."""
    as_json: bool = False
    """Log steps go to stdout."""


@dataclass(frozen=True)
class PretrainData:
    """The stores as training sees them."""

    stores: Sequence[Store]
    """Opened."""
    normalisation: Mapping[str, Normalisation]
    """Of the modalities that take part, in order."""
    gsd: Mapping[str, float]
    """Median metres per pixel of each, where known."""

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each modality."""
        return {m: len(n.bands) for m, n in self.normalisation.items()}


def pretrain(request: PretrainRequest) -> dict[str, Any]:
    """Train, or go on training, and save.

    Returns:
        Run folder, step, loss and SAR-L1 floor.

    Raises:
        KeyboardInterrupt: after saving, if a signal asked to stop.
        StoreError: if the stores have nothing to train on.
        OutputExistsError: if a finished run is in the way.
    """
    recipe, output = request.recipe, request.output
    facts = provenance(request)
    done = claim_run(output, facts, recipe.train.steps, request.overwrite)
    data = open_data(request.stores or simulated_stores(output / "simulated"), recipe)
    config = recipe.model_config(data.channels)
    torch.manual_seed(recipe.train.seed)
    network = MaskedImageModel(config, recipe.objective, data.normalisation)
    about = CheckpointConfig(
        model=config,
        kind="pretraining",
        normalisation=data.normalisation,
        gsd=data.gsd,
        pretraining=recipe.objective,
        provenance=facts,
    )

    def publish(step: int) -> None:
        save_checkpoint(output, about.with_provenance(step=step), disk_tensors(network))

    steps = recipe.train.steps
    with stop_requests() as stop, Watch(request, done) as watch:
        step = train(
            network,
            lambda start: masked_batches(data, config, request, start),
            recipe.train,
            output,
            publish=publish,
            on_step=watch.on_step,
            stop=stop,
            device=request.device,
        )
    if step < steps:
        console.say(f"saved after step {step} of {steps}; the same command goes on")
        raise KeyboardInterrupt
    return {"run": str(output), "step": step, **watch.last, **speckle_floor(data, request)}


def provenance(request: PretrainRequest) -> dict[str, Any]:
    """What decides the run: the same facts mean that it may be resumed."""
    plain = json.loads(json.dumps(settings(request.recipe)))
    stores = [str(s) for s in request.stores] or ["simulated"]
    return {"command": "pretrain", "stores": stores, "recipe": plain}


def open_data(paths: Sequence[Path], recipe: PretrainRecipe) -> PretrainData:
    """Open stores and decide the normalisation of the modalities that take part.

    Raises:
        StoreError: if the stores hold none of the recipe's modalities.
    """
    stores = [open_store(path) for path in paths]
    wanted = {m: mix for m, mix in recipe.modalities.items() if mix.weight > 0}
    bands = {m: mix.bands for m, mix in wanted.items() if mix.bands}
    found = store_normalisation(stores, bands)
    used = {m: n for m, n in found.items() if m in wanted}
    if not used:
        named = ", ".join(str(p) for p in paths)
        raise StoreError(f"{named} holds {', '.join(found)}; the recipe uses {', '.join(wanted)}")
    for name in found.keys() - used.keys():
        console.warn(f"{name} scenes are left out: the recipe gives them no weight")
    gsd: dict[str, float] = {}
    for name in used:
        scenes = [s.scene for store in stores for s in store.scenes_of(name)]
        metres = [s.gsd for s in scenes if s.gsd]
        gsd |= {name: float(median(metres))} if metres else {}
    return PretrainData(stores, used, gsd)


def masked_batches(
    data: PretrainData, config: ModelConfig, request: PretrainRequest, start: int
) -> Iterator[Batch]:
    """Batches with their masks, from batch `start` on."""
    training, objective = request.recipe.train, request.recipe.objective
    batches = pretraining_batches(
        data.stores,
        data.normalisation,
        size=config.image_size,
        batch_size=training.batch_size // training.accumulate,
        weights={m: request.recipe.modalities[m].weight for m in data.normalisation},
        seed=training.seed,
        start_step=start,
        workers=request.workers,
    )
    return with_masks(batches, config, objective.mask_ratio, training.seed, start)


def simulated_stores(folder: Path) -> list[Path]:
    """A simulated scene in all four modalities, tiled; made once per run folder."""
    from ringmoe_cli.scene.intake import gather
    from ringmoe_cli.scene.labels import Wanted
    from ringmoe_cli.scene.sensors import Said
    from ringmoe_cli.scene.simulate import simulate_scene, write_scene
    from ringmoe_cli.scene.tiling import tile_scenes

    store = folder / "tiles.zarr"
    if not store.exists():
        console.say(f"no stores given: simulating a scene in {folder}")
        files = write_scene(simulate_scene(SIMULATED_SEED, SIMULATED_SIZE), folder)
        scenes = [str(files[m]) for m in ("opt", "ms", "sar-l1", "sar-l2")]
        tile_scenes(gather(scenes, Said(), [], Wanted("segmentation")), store)
    return [store]


def speckle_floor(data: PretrainData, request: PretrainRequest) -> dict[str, float]:
    """Least loss that speckle leaves of the SAR-L1 power target, and the looks it rests on."""
    norm = data.normalisation.get("sar-l1")
    if norm is None or norm.power_db is None or request.recipe.objective.sar_l1_target != "power":
        return {}
    config = request.recipe.model_config({"sar-l1": len(norm.bands)})
    batches = pretraining_batches(
        data.stores,
        {"sar-l1": norm},
        size=config.image_size,
        batch_size=LOOKS_CHIPS,
        weights={"sar-l1": 1.0},
    )
    images = next(batches).images["sar-l1"][:, 0]
    looks = local_looks(span(images, norm))
    return {"sar_l1_floor": log_floor(looks) / norm.power_db[1], "sar_l1_looks": looks}


class Watch:
    """Tells the user how a run goes: live on a terminal, one JSON line per log step elsewhere."""

    def __init__(self, request: PretrainRequest, done: int) -> None:
        self.request, self.done = request, done
        self.last: dict[str, float] = {}
        self.bar: Any = None

    def __enter__(self) -> "Watch":
        if console.on_terminal():
            left = self.request.recipe.train.steps - self.done
            self.bar = console.progress(left, "pretrain", "step")
            self.advance = self.bar.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*failure)

    def on_step(self, report: StepReport) -> None:
        """Show one update."""
        self.last = {"loss": report.loss, **report.parts}
        if self.bar is not None:
            self.advance(1, described(report))
        config = self.request.recipe.train
        if report.step % config.log_every and report.step != config.steps:
            return
        if self.request.as_json:
            console.result(report.row())
        elif self.bar is None:
            console.say(json.dumps(report.row()))


def described(report: StepReport) -> str:
    """One update in a few words: losses, learning rate, speed, waiting."""
    parts = "  ".join(f"{name} {value:.3f}" for name, value in report.parts.items())
    speed = f"{report.images / report.seconds:.0f} img/s"
    return f"{parts}  lr {report.lr:.1e}  {speed}  wait {report.wait / report.seconds:.0%}"
