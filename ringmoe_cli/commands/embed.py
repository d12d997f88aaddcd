"""`ringmoe embed`: features of scenes, without any head or labels."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import (
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


def embed(
    scenes: Scenes,
    model: Model = None,
    output: Output = None,
    overwrite: Overwrite = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="A feature map (COG) instead of a vector per tile.")
    ] = False,
    stage: Annotated[int, typer.Option(help="1 to 4, at 4, 8, 16 or 32 pixels per feature.")] = 4,
    pca: Annotated[
        int | None, typer.Option(min=1, help="Keep this many principal components (dense).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or int8 (dense).")] = "float16",
    zarr: Annotated[
        bool, typer.Option("--zarr", help="A Zarr group instead of a COG, as by -o NAME.zarr.")
    ] = False,
    quicklook: Annotated[
        Path | None, typer.Option(help="Draw the first three bands as PNG (dense).")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Side of a tile in pixels.", show_default="as trained")
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share (or pixels, from 1) that windows overlap (dense).")
    ] = 0.25,
    batch: WindowsPerBatch = None,
    modality: ModalityName = None,
    bands: Bands = None,
    scale: Scale = None,
    gsd: Metres = None,
    stac: Stac = False,
    skip_bad: SkipBad = False,
    device: Device = "auto",
    allow_remote: AllowRemote = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Features of scenes: `<scene>_embedding.parquet`, a polygon and a vector per tile.

    Examples:
        ringmoe embed scene.tif --model runs/pre
        ringmoe embed scene.tif --model runs/pre --dense --stage 2 --pca 16 --quicklook look.png
        ringmoe embed scene.tif --model runs/pre --dense --dtype int8 -o features.zarr
    """
    directory = chosen_model(model)
    if dtype not in ("float16", "int8"):
        raise typer.BadParameter(f"--dtype {dtype}: say float16 or int8")
    if (pca or quicklook or zarr) and not dense:
        raise typer.BadParameter("--pca, --quicklook and --zarr belong to --dense")
    console.State.quiet = quiet
    from ringmoe_cli.jobs.compute import loaded
    from ringmoe_cli.jobs.embedding import load_embedder
    from ringmoe_cli.jobs.maps import scene_list, work_through
    from ringmoe_cli.jobs.opening import Wish
    from ringmoe_cli.scene.quickrgb import draw_bands

    wish = Wish(
        output=output, overwrite=overwrite, modality=modality, scale=scale, gsd=gsd,
        bands=tuple(bands.split(",")) if bands else None,
        allow_remote=allow_remote, skip_bad=skip_bad, stac=stac,
    )  # fmt: skip
    load = partial(
        load_embedder, directory, wish,
        stage=stage, device=device, window=window, overlap=overlap, batch=batch,
    )  # fmt: skip
    embedder = loaded(load, device)

    def work(path: str) -> dict[str, object]:
        if not dense:
            return embedder.vectors(path)
        said = embedder.dense(path, pca, dtype, ".zarr" if zarr else ".tif")
        if quicklook:
            draw_bands(Path(said["output"]), quicklook)
        return said

    if work_through(work, list(scene_list(scenes)), output, as_json).failed:
        raise typer.Exit(1)
