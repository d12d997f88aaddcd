"""`rio ringmoe …`: the `ringmoe` command where rasterio's users look for it."""

import sys

import click


@click.command(
    "ringmoe",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    short_help="Map scenes with RingMoE (rio ringmoe predict scene.tif --model DIR).",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ringmoe(arguments: tuple[str, ...]) -> None:
    """All arguments go to the `ringmoe` command."""
    from ringmoe_cli.app import main

    sys.argv = ["ringmoe", *arguments]
    main()
