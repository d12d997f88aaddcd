"""`ringmoe convert`: weights of other programs, or random ones, as a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Json, Output, Overwrite


def convert(
    weights: Annotated[
        Path | None,
        typer.Argument(
            help=".safetensors, .npz, MindSpore's .ckpt, or a Hugging Face folder.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        str | None, typer.Option(help="No weights but seeded random ones of this preset.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Add a head (with --random).")] = None,
    modality: Annotated[
        str | None,
        typer.Option(help="Modalities of an upcycled model with their channels: opt=3,ms=4."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON with model fields that the file does not tell (window, gate …)."),
    ] = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option(
            help="Tile store of scenes that imported weights are for: how to normalise "
            "them, for `embed`; training knows by itself. Repeatable."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32, with --random.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Import the released RingMoE's weights, upcycle a dense Swin V2, or write random weights.

    A Swin Transformer V2 of timm, Hugging Face or torchvision becomes a mixture whose experts all
    start as its FFN: the features stay the same, and training lets the experts part.

    Examples:
        ringmoe convert released.ckpt -o ringmoe

        ringmoe convert swinv2-tiny/ --modality opt=3,ms=4 -o upcycled

        ringmoe convert swinv2-tiny/ --statistics tiles.zarr -o upcycled

        ringmoe convert --random 14b --task segmentation -o big
    """
    if (weights is None) == (random is None):
        raise typer.BadParameter("name a weight file or folder, or --random and a preset")
    from ringmoe_cli.jobs import conversion

    if statistics and random:
        raise typer.BadParameter("--statistics is for imported weights")
    source = conversion.Source(
        weights, random, task, modality, config, dtype, seed, tuple(statistics or ())
    )
    out = conversion.output_path(source, output, overwrite)
    facts = conversion.convert(source, out)
    console.result({**facts, "output": str(out)} if as_json else out)
