"""Options that several commands share, declared once."""

from pathlib import Path
from typing import Annotated

import typer

Scenes = Annotated[
    list[str], typer.Argument(help="Rasters or product folders; - reads a list from stdin.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object per line on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors on stderr.")]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", envvar="RINGMOE_MODEL", help="Checkpoint directory.", show_default=False
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, or auto.")]
ModalityName = Annotated[
    str | None,
    typer.Option("--modality", help="opt, ms, sar-l1 or sar-l2; guessed from the bands if absent."),
]
Bands = Annotated[
    str | None,
    typer.Option("--bands", help="Names of the file's bands in order, e.g. blue,green,red,nir."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a recipe value: --set train.steps=500 (repeatable)."),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe name (ringmoe inspect --recipes) or YAML file."),
]
AllowRemote = Annotated[
    bool, typer.Option("--allow-remote", help="Let GDAL read URLs and files outside the folder.")
]
Scale = Annotated[
    str | None,
    typer.Option("--scale", help="factor[,offset], or dn, reflectance, amplitude, sigma0, db."),
]
Metres = Annotated[
    float | None, typer.Option("--gsd", help="Metres per pixel, for scenes that do not say.")
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Unreadable blocks become nodata, with a warning.")
]
WindowsPerBatch = Annotated[
    int | None, typer.Option("--batch", help="Windows per batch.", show_default="by size")
]
Stac = Annotated[
    bool, typer.Option("--stac", help="Write a STAC item beside each scene's outputs.")
]


def chosen_model(model: Path | None) -> Path:
    """The checkpoint that the user named.

    Raises:
        BadParameter: if none was.
    """
    if model is None:
        raise typer.BadParameter(
            "run `ringmoe demo` to get a model, or pass --model DIR or set RINGMOE_MODEL"
        )
    return model
