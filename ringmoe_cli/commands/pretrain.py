"""`ringmoe pretrain`: the encoder learns from unlabelled scenes of all modalities."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Device, Json, Overwrite, Quiet, Recipe, Set


def pretrain(
    stores: Annotated[
        list[Path] | None,
        typer.Argument(help="Tile stores of any modalities; none: a simulated scene."),
    ] = None,
    recipe: Recipe = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("runs/pre"),
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint to go on from, with its model; random weights if absent."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    changes: Set = None,
    skip_nan: Annotated[
        bool, typer.Option("--skip-nan", help="Leave out updates whose loss is not finite.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Reading processes; 0: a thread.")] = 0,
    processes: Annotated[
        int, typer.Option("--nproc", min=1, help="Processes on this machine, one per device.")
    ] = 1,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log to TensorBoard, in the run folder.")
    ] = False,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pre-train by masked image modelling.

    A run that was stopped in any way goes on with the same command.

    Examples:
        ringmoe pretrain tiles.zarr --recipe pretrain-nano -o runs/pre
        ringmoe pretrain s2.zarr s1.zarr -o runs/pre --set modalities.ms.weight=0.5
        ringmoe pretrain tiles.zarr --init upcycled -o runs/pre
        ringmoe pretrain tiles.zarr --nproc 4
        ringmoe pretrain
    """
    from ringmoe_cli.ranks import launch, launched

    if processes > 1 and not launched():
        raise typer.Exit(launch(processes, sys.argv[1:]))
    from ringmoe_cli.jobs.pretraining import PretrainRequest, pretrain
    from ringmoe_cli.machine import chosen_device
    from ringmoe_cli.recipe import load_pretrain_recipe

    console.State.quiet = quiet
    said = [f"train.steps={steps}"] * (steps is not None) + ["train.skip_nan=true"] * skip_nan
    request = PretrainRequest(
        stores=tuple(stores or ()),
        output=output,
        recipe=load_pretrain_recipe(recipe or "pretrain-nano", [*said, *(changes or ())]),
        init=init,
        device=chosen_device(device),
        overwrite=overwrite,
        workers=workers,
        as_json=as_json,
        tensorboard=tensorboard,
    )
    found = pretrain(request)
    if "sar_l1_floor" in found:
        console.say(
            f"sar-l1 {found['sar-l1']:.3f}; speckle alone leaves {found['sar_l1_floor']:.3f} "
            f"({found['sar_l1_looks']:.1f} looks)"
        )
    console.result(found if as_json else output)
