"""`ringmoe evaluate`: how good a fine-tuned model, or a map, is on labelled data."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Bands, Device, Json, ModalityName, Model, Output, Quiet


def evaluate(
    data: Annotated[
        list[Path] | None, typer.Argument(help="Tile stores, a labelled folder or CSV; or a map.")
    ] = None,
    model: Model = None,
    output: Output = None,
    split: Annotated[
        str, typer.Option(help="auto, held-out, val, test or all of the data.")
    ] = "auto",
    labels: Annotated[
        Path | None, typer.Option(help="Label raster or vector: for a map, or bare stores.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Class names, e.g. water,land, or a file of them.")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Read a published data set as downloaded, e.g. loveda.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--data", help="The same as DATA, for one folder.")
    ] = None,
    modality: ModalityName = None,
    bands: Bands = None,
    knn: Annotated[
        int | None,
        typer.Option(min=1, help="No head: let so many nearest training windows vote."),
    ] = None,
    task: Annotated[str, typer.Option(help="Of --knn: classification or segmentation.")] = (
        "classification"
    ),
    across: Annotated[
        str | None, typer.Option(help="Of --knn: remember one modality, ask another: ms,sar-l2.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows per batch.")] = 16,
    worst: Annotated[int, typer.Option(min=0, help="Pictures of the worst windows.")] = 6,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Scores per class as table, JSON and CSV, calibration, areas, and the worst windows.

    Examples:
        ringmoe evaluate tiles.zarr --model runs/seg
        ringmoe evaluate --benchmark loveda --data LoveDA --split val --model runs/seg --json
        ringmoe evaluate scene_segmentation.tif --labels reference.gpkg
        ringmoe evaluate EuroSAT --model runs/pre --knn 20
    """
    from ringmoe_cli.jobs.evaluation import EvaluateRequest
    from ringmoe_cli.jobs.evaluation import evaluate as run
    from ringmoe_cli.jobs.mapscore import score_map
    from ringmoe_cli.jobs.probe import knn_probe
    from ringmoe_cli.jobs.scores import report
    from ringmoe_cli.jobs.taskdata import DataRequest
    from ringmoe_cli.machine import chosen_device

    console.State.quiet = quiet
    paths = [*(data or []), *([folder] if folder else [])]
    if not paths:
        raise typer.BadParameter("no data: name a store, a labelled folder or a map")
    if paths[0].is_file() and paths[0].suffix.lower() in (".tif", ".tiff", ".vrt"):
        if labels is None:
            raise typer.BadParameter(f"{paths[0]} is a map: pass its --labels")
        out = output or paths[0].with_suffix(".evaluation")
        report(score_map(paths[0], labels, classes, out), out, as_json)
        return
    if model is None:
        raise typer.BadParameter(
            "no model: pass --model DIR or set RINGMOE_MODEL (ringmoe demo makes one)"
        )
    wanted = DataRequest(
        paths=paths, task=task, size=0, labels=labels, classes=classes, benchmark=benchmark,
        modalities=tuple(modality.split(",")) if modality else (),
        bands=tuple(bands.split(",")) if bands else None,
    )  # fmt: skip
    where = chosen_device(device)
    if knn:
        report(knn_probe(wanted, model, knn, where, pair_of(across)), model, as_json)
        return
    out = output or model / "evaluation"
    report(run(EvaluateRequest(wanted, model, out, split, where, batch, worst)), out, as_json)


def pair_of(text: str | None) -> tuple[str, str] | None:
    """Two names of modalities, or nothing."""
    if text is None:
        return None
    first, comma, second = text.partition(",")
    if not comma or "," in second:
        raise typer.BadParameter(f"--across {text}: say two modalities, ms,sar-l2")
    return first, second
