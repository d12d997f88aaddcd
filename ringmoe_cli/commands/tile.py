"""`ringmoe tile`: scenes and their labels into one store."""

from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import AllowRemote, Bands, Json, ModalityName, Output, Overwrite, Scenes


def tile(
    scenes: Scenes,
    output: Output = None,
    modality: ModalityName = None,
    bands: Bands = None,
    scale: Annotated[
        str | None,
        typer.Option(help="Factor[,offset], or reflectance, dn, amplitude, sigma0, db."),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Label raster or polygons: FILE, or TASK=FILE (repeatable)."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="What --labels hold: segmentation, depth or change.")
    ] = "segmentation",
    classes: Annotated[
        str | None, typer.Option(help="Class names in order, or value=name pairs.")
    ] = None,
    attribute: Annotated[
        str | None, typer.Option(help="Field of a vector file that holds the class.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Class of pixels outside all polygons (default: ignored).")
    ] = None,
    tile_size: Annotated[int, typer.Option(min=16, help="Side of a chunk in pixels.")] = 256,
    shards: Annotated[
        bool,
        typer.Option("--shards", help="Zarr v3, 16 chunks a file, for parallel file systems."),
    ] = False,
    min_valid: Annotated[
        float, typer.Option(min=0, max=1, help="Training leaves out windows with less valid area.")
    ] = 0.5,
    scl: Annotated[
        str | None,
        typer.Option(help="Scene classes of Sentinel-2 L2A to mark invalid, e.g. 3,8,9,10."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Mark undecodable blocks invalid and go on.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine (default: threads).")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")] = None,
    slurm: Annotated[
        str | None, typer.Option(help="Run as SLURM jobs: queue=short,memory=8GB …")
    ] = None,
    allow_remote: AllowRemote = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Put scenes and labels into one store that training, GDAL, QGIS and xarray read.

    An interrupted run is continued by the same command.

    Examples:
        ringmoe tile scene.tif -o tiles.zarr
        ringmoe tile S2A_MSIL2A.SAFE -o tiles.zarr --labels landcover.gpkg --attribute class
        ringmoe tile aerial.tif -o tiles.zarr --bands red,green,blue,nir --labels depth=dsm.tif
        ls *.tif | ringmoe tile - -o tiles.zarr --workers 8
    """
    from ringmoe_cli.cluster import Engine, parse_slurm
    from ringmoe_cli.scene import tiling
    from ringmoe_cli.scene.labels import Wanted
    from ringmoe_cli.scene.products.plain import Said
    from ringmoe_cli.scene.store import intake

    names = tuple(n.strip() for n in bands.split(",")) if bands else None
    said = Said(modality, names, scale, scl=intake.class_numbers(scl))
    wanted = Wanted(task, classes, attribute, background)
    paths = intake.listed(scenes)
    labelled = intake.gather(paths, said, labels or [], wanted, allow_remote)
    store = tiling.tile_scenes(
        labelled,
        output or intake.default_output(paths[0]),
        tiling.Settings(
            tile=tile_size,
            min_valid=min_valid,
            skip_bad=skip_bad,
            allow_remote=allow_remote,
            shards=shards,
            overwrite=overwrite,
            engine=Engine(workers, scheduler, parse_slurm(slurm)),
        ),
        progress=lambda total: console.progress(total, "tiling", "Mpx"),
    )
    console.result(intake.report(store) if as_json else store.path)
