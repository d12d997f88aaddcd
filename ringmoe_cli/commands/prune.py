"""`ringmoe prune`: a smaller model from a larger one."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Json, Output, Overwrite


def prune(
    model: Annotated[
        Path | None,
        typer.Argument(envvar="RINGMOE_MODEL", help="Checkpoint folder.", show_default=False),
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Modalities to keep, e.g. opt or opt,ms; all if absent.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Size: 300m, 25%, or the paper's stages 6.5b, 4.5b, 1b (dense)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How layers become dense: kc, ks, ka, or fit (learns from --tiles)."),
    ] = None,
    tiles: Annotated[
        list[Path] | None,
        typer.Option(help="Tile store to measure routing and fit layers on (repeatable)."),
    ] = None,
    chips: Annotated[int, typer.Option(min=8, help="Calibration chips of each modality.")] = 512,
    distill: Annotated[int, typer.Option(min=0, help="Steps of distillation afterwards.")] = 0,
    report: Annotated[
        Path | None, typer.Option(help="Write what was done into this .html, .png or .json.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune a model: to some modalities (exact), to fewer experts, or to one FFN per layer.

    Examples:
        ringmoe prune runs/pre --modality opt

        ringmoe prune runs/pre --modality opt --target 1b --method kc -o opt1b

        ringmoe prune runs/pre --modality opt --target 1b --tiles cal.zarr --distill 200

        ringmoe prune runs/pre --target 25% --modality opt,ms --dry-run
    """
    if model is None:
        raise typer.BadParameter(
            "name a checkpoint or set RINGMOE_MODEL; `ringmoe demo` makes one to try"
        )
    from ringmoe_cli.jobs import prune_report, pruning

    if report:
        prune_report.check_path(report)
    names = pruning.wanted_modalities(modality)
    stores = tuple(tiles or ())
    work = pruning.planned(pruning.Request(model, names, target, method, stores, chips, distill))
    facts = pruning.described(work)
    pruning.speak(work.plan, facts)
    if dry_run:
        pruning.show(work.plan, facts, as_json)
        return
    out = pruning.output_path(work.request, output, overwrite)
    pruning.prune(work, out)
    if report:
        prune_report.write_report(prune_report.report_of(work, facts, out), report)
        console.say(f"wrote {report}")
    console.result({**facts, "output": str(out)} if as_json else out)
