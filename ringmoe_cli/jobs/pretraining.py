"""Pre-training: tile stores, a recipe and a run folder come together."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.batch import Batch
from model.checkpoint import CheckpointConfig, disk_names, disk_tensors, save_checkpoint
from model.config import ModelConfig
from model.inherit import Heritage, inherited
from model.normalisation import Normalisation
from model.parallel import (
    Ranks,
    clip_grad_norm,
    distribute,
    join,
    leave,
    ranks,
    total,
    whole_tensors,
)
from model.physics import local_looks, log_floor, span
from model.pretrain import MaskedImageModel, with_masks
from model.start import Source, drawn, fill
from model.state import TrainingState
from model.train import ALONE, Crew, StepReport, compile_blocks, recompute_blocks, train
from model.utilisation import Utilisation
from ringmoe_cli import console
from ringmoe_cli.errors import RecipeError, RingmoeError, StoreError
from ringmoe_cli.jobs.inheriting import check_init, inherited_input
from ringmoe_cli.jobs.runs import claim_run, stop_requests
from ringmoe_cli.jobs.watching import RoutingLog, Watch
from ringmoe_cli.machine import keep_memory_of_updates
from ringmoe_cli.ranks import launched, meet_on_slurm
from ringmoe_cli.recipe import PretrainRecipe, settings
from ringmoe_cli.scene.loader import pretraining_batches, store_gsd, store_normalisation
from ringmoe_cli.scene.tiles import Store, open_store

SIMULATED = "simulated"
"""Folder in the run folder for the scene that stands in for missing stores."""
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
    init: Path | None = None
    """Checkpoint to go on from, with its model; None: random weights of the recipe's model."""
    device: str = "cpu"
    """Where to compute."""
    overwrite: bool = False
    """Replace a finished run."""
    workers: int = 0
    """Reading processes; 0 reads in a thread."""
    as_json: bool = False
    """Log steps go to stdout."""
    tensorboard: bool = False
    """Also write TensorBoard's files."""


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
    """Train, or go on training, and save; on all processes if there are several.

    Returns:
        Run folder, step, losses and SAR-L1 floor.

    Raises:
        KeyboardInterrupt: after saving, if a signal asked to stop.
        StoreError: if the stores have nothing to train on.
        OutputExistsError: if a finished run is in the way.
        RingmoeError: if another process ended.
    """
    meet_on_slurm()
    who = ranks() if launched() else Ranks()
    keep_memory_of_updates(gathered=request.recipe.train.ep < who.world)
    if request.recipe.train.batch_size // request.recipe.train.accumulate < who.world:
        raise RecipeError(f"train.batch_size is too small for {who.world} processes")
    if request.device == "cuda" and who.world > 1:
        request = replace(request, device=f"cuda:{who.local}")
    join(who, request.device)
    try:
        return pretrain_together(request, who)
    except RuntimeError as failure:
        if who.world == 1:
            raise
        text = str(failure).splitlines()[0]
        raise RingmoeError(f"process {who.rank} lost the others: {text}") from failure
    finally:
        leave()


def pretrain_together(request: PretrainRequest, who: Ranks) -> dict[str, Any]:
    """What every process does."""
    recipe, output = request.recipe, request.output
    config, steps = recipe.train, recipe.train.steps
    facts = provenance(request)
    done = claimed(request, facts, who)
    data = open_data(request.stores or simulated_stores(output / SIMULATED), recipe)
    torch.manual_seed(config.seed)
    model, weights, data = first_weights(request, data, who)
    with torch.device("meta"):
        network = MaskedImageModel(model, recipe.objective, data.normalisation)
    if who.world == 1:
        fill(network, weights)
    routing = RoutingLog(network.encoder, config, output, done, total)
    if config.recompute:
        recompute_blocks(network)
    if config.compile:
        compile_blocks(network)
    about = CheckpointConfig(
        model=model,
        kind="pretraining",
        normalisation=data.normalisation,
        gsd=data.gsd,
        pretraining=recipe.objective,
        provenance=facts,
    )
    crew = ALONE
    if who.world > 1:
        distribute(network, request.device, config.ep, config.precision, weights)
        crew = Crew(who.rank == 0, total, clip_grad_norm, (*model.modalities, "balance"))
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    utilisation = Utilisation.of(model, request.device, dtype, who.world)
    board = output / "tensorboard" if request.tensorboard else None
    watch = Watch(config, done, as_json=request.as_json, tensorboard=board)

    def on_step(report: StepReport) -> None:
        watch.on_step(report)
        routing.on_step(report)

    with stop_requests() as stop, watch:
        step = train(
            network,
            lambda start: masked_batches(data, model, request, start, who),
            config,
            output,
            publish=lambda step: publish(output, about.with_provenance(step=step), network, who),
            on_step=on_step,
            stop=stop,
            device=request.device,
            crew=crew,
            utilisation=utilisation,
        )
    if step < steps:
        console.say(f"saved after step {step} of {steps}; the same command goes on")
        raise KeyboardInterrupt
    return {"run": str(output), "step": step, **watch.last, **speckle_floor(data, request)}


def first_weights(
    request: PretrainRequest, data: PretrainData, who: Ranks
) -> tuple[ModelConfig, Source, PretrainData]:
    """The model, where its weights come from, and the data as they know it."""
    recipe, seed = request.recipe, request.recipe.train.seed
    if request.init is None:
        model = recipe.model_config(data.channels)
        return model, drawn(model, recipe.objective, seed), data
    bands, normalisation = inherited_input(request.init, data.normalisation)
    ep = recipe.train.ep if who.world > 1 else 1
    heritage = Heritage(request.init, bands, (who.rank % ep, ep))
    model = heritage.model(data.channels)
    for name in sorted(set(model.modalities) - bands.keys()):
        console.say(f"{name} is new to {request.init}: its own weights start at random")
    for name in sorted(heritage.about.model.channels.keys() - bands.keys()):
        console.warn(f"{name} of {request.init} is left out: no scenes of it")
    source = inherited(heritage, model, recipe.objective, seed)
    return model, source, replace(data, normalisation=normalisation)


def claimed(request: PretrainRequest, facts: Mapping[str, Any], who: Ranks) -> int:
    """Let the first process claim the run folder and simulate missing data; updates done.

    The others wait, and leave without a word if it fails.
    """
    steps, failure = request.recipe.train.steps, None
    if who.rank == 0:
        try:
            check_init(request.init, request.output)
            claim_run(request.output, facts, steps, request.overwrite)
            if not request.stores:
                simulated_stores(request.output / SIMULATED)
        except Exception as refusal:
            failure = refusal
    failed = total(torch.tensor(float(failure is not None), device=request.device)).item()
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(1)
    return TrainingState(request.output / "state").latest()


def publish(output: Path, about: CheckpointConfig, network: MaskedImageModel, who: Ranks) -> None:
    """Write the checkpoint: the first process writes, all give their parts."""
    if who.world == 1:
        save_checkpoint(output, about, disk_tensors(network))
        return
    tensors = whole_tensors(network)
    if who.rank == 0:
        save_checkpoint(output, about, (d for name, t in tensors for d in disk_names(name, t)))
    for _ in tensors:
        pass


def provenance(request: PretrainRequest) -> dict[str, Any]:
    """What decides the run: the same facts mean that it may be resumed."""
    plain = json.loads(json.dumps(settings(request.recipe)))
    stores = [str(s) for s in request.stores] or ["simulated"]
    init = str(request.init) if request.init else None
    return {"command": "pretrain", "stores": stores, "init": init, "recipe": plain}


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
    return PretrainData(stores, used, store_gsd(stores, used))


def masked_batches(
    data: PretrainData, config: ModelConfig, request: PretrainRequest, start: int, who: Ranks
) -> Iterator[Batch]:
    """This process's part of the batches, with their masks, from batch `start` on."""
    training, objective = request.recipe.train, request.recipe.objective
    batches = pretraining_batches(
        data.stores,
        data.normalisation,
        size=config.image_size,
        batch_size=training.batch_size // training.accumulate,
        weights={m: request.recipe.modalities[m].weight for m in data.normalisation},
        seed=training.seed,
        start_step=start,
        rank=who.rank,
        world=who.world,
        workers=request.workers,
    )
    return with_masks(
        batches, config, objective.mask_ratio, training.seed, start, who.rank, who.world
    )


def simulated_stores(folder: Path) -> list[Path]:
    """A simulated scene in all four modalities, tiled; made once per run folder."""
    from ringmoe_cli.scene.labels import Wanted
    from ringmoe_cli.scene.sensors import Said
    from ringmoe_cli.scene.simulate import simulate_scene, write_scene
    from ringmoe_cli.scene.store.intake import gather
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
