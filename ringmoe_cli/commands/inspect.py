"""`ringmoe inspect`: what is this?"""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import AllowRemote, Json


def inspect(
    target: Annotated[
        str | None,
        typer.Argument(help="A scene, a tile store or a checkpoint.", show_default=False),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A model size: nano, tiny, base, large or 14b.")
    ] = None,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes.")] = False,
    quicklook: Annotated[
        Path | None, typer.Option(help="Draw the scene or store into this PNG.")
    ] = None,
    routing: Annotated[
        Path | None, typer.Option(help="Draw which experts each modality uses into this PNG.")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(help="Draw the losses of a run into this PNG.")
    ] = None,
    allow_remote: AllowRemote = False,
    as_json: Json = False,
) -> None:
    """Say in one screen what a scene, a tile store or a checkpoint is.

    Examples:
        ringmoe inspect scene.tif
        ringmoe inspect tiles.zarr --quicklook tiles.png
        ringmoe inspect runs/pre --curves loss.png --routing experts.png
        ringmoe inspect --preset 14b --json
    """
    from ringmoe_cli.jobs import inspection

    if recipes:
        report = inspection.of_recipes()
    elif preset:
        report = inspection.of_preset(preset)
    elif target:
        report = inspection.of_path(target, allow_remote)
    else:
        raise typer.BadParameter("name a scene, a tile store or a checkpoint, or pass --preset")
    if as_json:
        console.result(report)
    else:
        inspection.show(report)
    if target:
        for picture in inspection.draw(target, quicklook, routing, curves):
            console.say(f"wrote {picture}")
