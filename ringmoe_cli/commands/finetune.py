"""`ringmoe finetune`: a pre-trained encoder learns a task from labelled data."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Bands, Device, Json, ModalityName, Overwrite, Quiet, Recipe, Set

TASKS = ("segmentation", "classification", "detection", "tracking", "change", "depth")
CONVPASS = 16
"""Width of the bypasses of `--peft convpass`."""


def finetune(
    data: Annotated[list[Path], typer.Argument(help="Tile stores, or one labelled folder or CSV.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")],
    task: Annotated[
        str,
        typer.Option(help="segmentation, classification, detection, tracking, change or depth."),
    ] = "segmentation",
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from; random weights if absent.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label raster or vector, for stores tiled without.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names, e.g. water,land, or a file of them.")
    ] = None,
    val: Annotated[
        Path | None, typer.Option(help="Held-out data; otherwise a part is held out.")
    ] = None,
    modality: ModalityName = None,
    bands: Bands = None,
    recipe: Recipe = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="Train the head only.")] = False,
    peft: Annotated[
        str | None, typer.Option(help="convpass: train narrow bypasses, not the encoder.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Few-shot: so many labelled windows per class.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Draws of the --shots.")] = 5,
    benchmark: Annotated[
        str | None, typer.Option(help="Read a published data set as downloaded, e.g. loveda.")
    ] = None,
    changes: Set = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune for a task and score on what was held out.

    Examples:
        ringmoe finetune tiles.zarr --task segmentation --init runs/pre -o runs/seg
        ringmoe finetune EuroSAT --task classification --init runs/pre -o runs/cls --freeze
    """
    if peft not in (None, "convpass"):
        raise typer.BadParameter(f"--peft {peft}: say convpass")
    if task not in TASKS:
        raise typer.BadParameter(f"--task {task}: say {', '.join(TASKS)}")
    from ringmoe_cli.jobs.fewshot import few_shot
    from ringmoe_cli.jobs.finetuning import FinetuneRequest, finetune
    from ringmoe_cli.jobs.scores import report
    from ringmoe_cli.jobs.taskdata import DataRequest
    from ringmoe_cli.machine import chosen_device
    from ringmoe_cli.recipe import load_finetune_recipe

    console.State.quiet = quiet
    said = [f"task.name={task}"] + ["task.freeze=true"] * freeze
    said += [f"train.steps={steps}"] * (steps is not None)
    said += [f"task.convpass={CONVPASS}"] * (peft == "convpass")
    chosen = load_finetune_recipe(recipe or f"finetune-{task}", [*said, *(changes or ())])
    wanted = DataRequest(
        paths=data,
        task=task,
        size=0,
        seed=chosen.train.seed,
        validation=val,
        modalities=tuple(modality.split(",")) if modality else (),
        bands=tuple(bands.split(",")) if bands else None,
        labels=labels,
        classes=classes,
        benchmark=benchmark,
    )
    request = FinetuneRequest(wanted, output, chosen, init, chosen_device(device), overwrite)
    scores = few_shot(request, shots, episodes) if shots else finetune(request)
    report(scores, output, as_json)
