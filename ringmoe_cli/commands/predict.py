"""`ringmoe predict`: scenes in, georeferenced maps out."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import (  # fmt: skip
    AllowRemote,
    Bands,
    Device,
    Json,
    Metres,
    ModalityName,
    Model,
    Output,
    Overwrite,
    Quiet,
    Scale,
    Scenes,
    SkipBad,
    Stac,
    WindowsPerBatch,
    chosen_model,
)


def predict(
    scenes: Scenes,
    model: Model = None,
    output: Output = None,
    overwrite: Overwrite = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write one band per class, 0-254.")
    ] = False,
    window: Annotated[
        int | None, typer.Option(help="Side of a window in pixels.", show_default="as trained")
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share (or pixels, from 1) that neighbouring windows overlap.")
    ] = 0.25,
    batch: WindowsPerBatch = None,
    tta: Annotated[
        str, typer.Option(help="`flips`: average over the four mirror images.")
    ] = "none",
    modality: ModalityName = None,
    bands: Bands = None,
    scale: Scale = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--with", help="A co-registered scene of another modality (fused models)."),
    ] = None,
    before: Annotated[
        str | None, typer.Option(help="The earlier date of the scene (change models).")
    ] = None,
    gsd: Metres = None,
    no_resample: Annotated[
        bool,
        typer.Option("--no-resample", help="Refuse scenes far from the model's metres per pixel."),
    ] = False,
    mask: Annotated[
        str | None, typer.Option(help="Pixels to leave out: FILE or BAND (not 0), FILE=3,8,9.")
    ] = None,
    warp: Annotated[
        str | None, typer.Option(help="Coordinate system of the maps: EPSG:32630, WKT, PROJ.")
    ] = None,
    dem: Annotated[
        Path | None, typer.Option(help="Heights for --warp of scenes placed by RPCs.")
    ] = None,
    mosaic: Annotated[
        Path | None, typer.Option(help="Also join the maps of all scenes in this file.")
    ] = None,
    stac: Stac = False,
    skip_bad: SkipBad = False,
    co: Annotated[
        list[str] | None, typer.Option("--co", help="Creation option of the COG: NAME=VALUE.")
    ] = None,
    score: Annotated[
        float, typer.Option(min=0, max=1, help="Least confidence of a box (detection models).")
    ] = 0.3,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read a model larger than memory layer by layer.")
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16: quicker where the CPU has it.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Experts in 8-bit integers: less memory (CPU).")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the model: a minute for long runs.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine (Dask).")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")] = None,
    device: Device = "auto",
    allow_remote: AllowRemote = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Map scenes with a fine-tuned model: `<scene>_<task>.tif` beside each scene.

    Detection gives boxes as polygons, classification the class of every tile (.geojson, .parquet or
    .gpkg), change also its regions; tracking takes the frames of a clip in order and gives MOT text
    and lines.

    Examples:
        ringmoe predict scene.tif --model runs/seg
        ls *.tif | ringmoe predict - --model runs/seg --json
        ringmoe predict scene.tif --model runs/det -o boxes.parquet
        cat scene.tif | ringmoe predict /vsistdin/ --model runs/seg -o - > map.tif
        ringmoe predict frames/*.png --model runs/track -o tracks.txt
        ringmoe predict scene.tif --model runs/seg --warp EPSG:32631 --dem heights.tif
        ringmoe predict *.tif --model runs/seg -o maps/ --mosaic all.tif --stac
        ringmoe predict scene.tif --model big --bf16 --int8
        RINGMOE_MODEL=runs/seg ringmoe predict scene.tif -o maps/ --probabilities
    """
    directory = chosen_model(model)
    if tta not in ("none", "flips"):
        raise typer.BadParameter(f"--tta {tta}: say flips or none")
    if dem and not warp:
        raise typer.BadParameter("--dem belongs to --warp")
    console.State.quiet = quiet
    from ringmoe_cli.jobs.crew import Order
    from ringmoe_cli.jobs.maps import scene_list
    from ringmoe_cli.jobs.opening import Wish
    from ringmoe_cli.jobs.scenes import map_piped, map_scenes
    from ringmoe_cli.jobs.ways import Ways
    from ringmoe_cli.scene import pipes
    from ringmoe_cli.scene.maps.warp import Warp
    from ringmoe_cli.scene.writer import parse_options

    wish = Wish(
        output=output, overwrite=overwrite, probabilities=probabilities,
        options=parse_options(co or []), modality=modality,
        bands=tuple(bands.split(",")) if bands else None, scale=scale,
        allow_remote=allow_remote, skip_bad=skip_bad, beside=tuple(beside or ()), before=before,
        gsd=gsd, mask=mask, no_resample=no_resample, sure=score,
        warp=Warp(warp, dem) if warp else None, stac=stac,
    )  # fmt: skip
    ways = Ways(streamed=stream, compiled=compiled, bf16=bf16, int8=int8)
    order = Order(directory, wish, device, window, overlap, batch, tta == "flips", ways)
    paths = list(scene_list(scenes))
    if paths == [pipes.STDIN] or pipes.is_stdout(output):
        if len(paths) != 1 or mosaic or stac:
            raise typer.BadParameter("-o - takes one scene, and neither --mosaic nor --stac")
        map_piped(order, paths[0], as_json)
    elif map_scenes(order, paths, workers, scheduler, mosaic, as_json):
        raise typer.Exit(1)
