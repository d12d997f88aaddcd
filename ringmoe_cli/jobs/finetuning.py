"""Fine-tuning: labelled data, starting weights and a head come together in a run folder."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.adapt import depth_scale, encoder_for, freeze, insert_convpass, parameters
from model.batch import Batch
from model.checkpoint import (
    CheckpointConfig,
    disk_tensors,
    read_config,
    save_checkpoint,
    write_text,
)
from model.config import TaskConfig
from model.encoder import RingMoE
from model.metrics import IGNORE
from model.normalisation import Normalisation
from model.tasks.classification import Classification
from model.tasks.network import TaskNetwork
from model.train import train
from ringmoe_cli import console
from ringmoe_cli.errors import CheckpointError, RingmoeError
from ringmoe_cli.jobs.inheriting import check_init, inherited_input
from ringmoe_cli.jobs.runs import claim_run, stop_requests
from ringmoe_cli.jobs.scores import as_text, plain
from ringmoe_cli.jobs.taskdata import DataRequest, TaskData, open_task_data
from ringmoe_cli.machine import keep_memory_of_updates
from ringmoe_cli.recipe import FinetuneRecipe, model_config, settings

SCORES = "scores.json"
PROBED = 20_000
"""Windows that a classifier's first weights are fitted to, at most."""


@dataclass(frozen=True)
class FinetuneRequest:
    """What the user asks for."""

    data: DataRequest
    """Where images and labels are; its size is set from recipe and checkpoint."""
    output: Path
    """Run folder."""
    recipe: FinetuneRecipe
    """Head and loop."""
    init: Path | None = None
    """Checkpoint whose encoder to start from; None: random weights."""
    device: str = "cpu"
    """Where to compute."""
    overwrite: bool = False
    """Replace a finished run."""


def finetune(request: FinetuneRequest) -> dict[str, Any]:
    """Train, or go on training; save; score on the held-out windows.

    Returns:
        The scores (see the task's metric), and what was trained on what.

    Raises:
        LabelError: if labels are missing or do not fit.
        CheckpointError: if the starting checkpoint is for something else.
        OutputExistsError: if the run is finished, or was made with other settings.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RingmoeError("finetune trains on one process; start it without torchrun")
    check_init(request.init, request.output)
    keep_memory_of_updates()
    size, rotated = window_size(request), request.recipe.task.rotated
    request = replace(request, data=replace(request.data, size=size, rotated=rotated))
    torch.manual_seed(request.recipe.train.seed)
    data = open_task_data(request.data)
    encoder, normalisation = starting_point(request, data)
    network = with_head(encoder, request, data)
    data.training.normalisation = data.held_out.normalisation = normalisation
    facts = provenance(request)
    learned, total = parameters(network)
    console.say(f"training {learned / 1e6:.2f} of {total / 1e6:.2f} M parameters")
    done = claim_run(request.output, facts, request.recipe.train.steps, request.overwrite)
    checkpoint = CheckpointConfig(
        model=encoder.config,
        kind="task",
        normalisation=normalisation,
        gsd=data.training.gsd,
        task=network.task,
        provenance=facts,
    )
    if not done:
        start_head(network, data, request)
    fit(network, data, request, checkpoint, done)
    scores = score(network.eval(), data.held_out.once(batch_size(request)), request.device)
    warn_unseen(scores, network.task.classes)
    scores |= {"task": network.task.name, "class_names": network.task.classes}
    write_text(request.output / SCORES, as_text(plain(scores)))
    return scores


def window_size(request: FinetuneRequest) -> int:
    """Side of the training windows: the recipe's, else the encoder's image size."""
    if request.recipe.task.window:
        return request.recipe.task.window
    if request.init:
        return read_config(request.init).model.image_size
    return model_config(request.recipe.model, {"opt": 3}).image_size


def starting_point(
    request: FinetuneRequest, data: TaskData
) -> tuple[RingMoE, dict[str, Normalisation]]:
    """The encoder for the data's bands, and what normalises them.

    Raises:
        CheckpointError: if the checkpoint lacks a modality of the data.
    """
    channels = data.training.channels
    measured = dict(data.measure())
    if request.init is None:
        sizes = {m: len(names) for m, names in channels.items()}
        return RingMoE(model_config(request.recipe.model, sizes)), measured
    known = read_config(request.init).model.channels
    missing = [m for m in channels if m not in known]
    if missing:
        raise CheckpointError(
            f"{request.init} was trained on {', '.join(known)}, but the data is {missing[0]}; "
            "choose scenes with --modality, or another --init"
        )
    sources, chosen = inherited_input(request.init, measured)
    return encoder_for(request.init, sources), chosen


def with_head(encoder: RingMoE, request: FinetuneRequest, data: TaskData) -> TaskNetwork:
    """The encoder with a fresh head, frozen or with bypasses as the recipe says."""
    wanted = request.recipe.task
    task = TaskConfig(
        name=wanted.name,
        classes=data.classes,
        colours=data.colours,
        modalities=tuple(data.training.channels),
        window=request.data.size,
        rotated=wanted.rotated,
        value_range=data.value_range,
        unit=data.unit,
        channels=wanted.channels,
        adapter=wanted.convpass,
        detail=wanted.detail,
    )
    insert_convpass(encoder, wanted.convpass)
    if wanted.freeze or wanted.convpass:
        freeze(encoder)
    return TaskNetwork(
        encoder,
        task,
        balance_weight=wanted.balance_weight,
        modality_dropout=wanted.modality_dropout,
    )


def provenance(request: FinetuneRequest) -> dict[str, Any]:
    """What decides the run: the same facts mean that it may be resumed."""
    data = request.data
    return {
        "command": "finetune",
        "data": [str(p) for p in data.paths],
        "labels": str(data.labels) if data.labels else None,
        "validation": str(data.validation) if data.validation else None,
        "modalities": list(data.modalities),
        "shots": [data.shots, data.draw],
        "init": str(request.init) if request.init else None,
        "recipe": plain(settings(request.recipe)),
    }


def start_head(network: TaskNetwork, data: TaskData, request: FinetuneRequest) -> None:
    """Let a classifier begin as a linear probe of its encoder; other heads stay random."""
    if not isinstance(network.head, Classification):
        return
    network.to(request.device).eval()
    embeddings: list[torch.Tensor] = []
    classes: list[torch.Tensor] = []
    for batch in data.training.once(batch_size(request)):
        sent = batch.to(request.device)
        embeddings.append(network.embed(sent))
        classes.append(sent.targets["classes"])
        if len(embeddings) * len(classes[0]) >= PROBED:
            break
    known = torch.cat(classes) != IGNORE
    network.head.start_from(torch.cat(embeddings)[known], torch.cat(classes)[known])


def fit(
    network: TaskNetwork,
    data: TaskData,
    request: FinetuneRequest,
    checkpoint: CheckpointConfig,
    done: int,
) -> None:
    """Run the training loop, with progress; a signal saves and stops.

    Raises:
        KeyboardInterrupt: after saving, if a signal asked to stop.
    """
    config, output = request.recipe.train, request.output
    decay = request.recipe.task.layer_decay if request.init else 1.0  # random layers learn alike
    each = config.batch_size // config.accumulate

    def publish(step: int) -> None:
        save_checkpoint(output, checkpoint.with_provenance(step=step), disk_tensors(network))

    title = f"finetune {network.task.name}"
    with (
        stop_requests() as stop,
        console.progress(config.steps - done, title, "step") as advance,
    ):
        step = train(
            network,
            lambda start: data.training.training(each, config.seed, start),
            config,
            output,
            publish=publish,
            on_step=lambda report: advance(1, f"loss {report.loss:.4f}"),
            stop=stop,
            device=request.device,
            rate=lambda name: depth_scale(name, network.config.depths, decay),
        )
    if step < config.steps:
        console.say(f"saved after step {step} of {config.steps}; the same command goes on")
        raise KeyboardInterrupt


def warn_unseen(scores: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Say which classes nothing can be said about."""
    support = scores.get("support_per_class", ())
    unseen = [c for c, n in zip(classes, support, strict=False) if not n]
    if unseen:
        console.warn(f"no held-out label of {', '.join(unseen)}: nothing is known about them")


def batch_size(request: FinetuneRequest) -> int:
    """Windows per batch when scoring."""
    return max(1, request.recipe.train.batch_size // request.recipe.train.accumulate)


def score(network: TaskNetwork, batches: Iterable[Batch], device: str = "cpu") -> dict[str, Any]:
    """The task's metric over batches; the network must be in eval mode."""
    network.to(device)
    metric = network.head.metric()
    for batch in batches:
        on_device = batch.to(device)
        metric.update(network.predict(on_device), on_device)
    return metric.compute()
