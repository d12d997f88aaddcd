"""`ringmoe demo`: everything once, on a simulated scene, with nothing to download."""

from pathlib import Path
from typing import Annotated

import typer

from ringmoe_cli import console
from ringmoe_cli.options import Json, Overwrite, Quiet


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything.")] = Path(
        "ringmoe-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another world.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate, tile, pre-train, fine-tune, map and score, in a few minutes.

    A demo that was interrupted goes on with the same command.

    Examples:
        ringmoe demo
        ringmoe demo -o elsewhere --seed 7 --json
    """
    from ringmoe_cli.jobs.demo import TITLES, DemoRequest
    from ringmoe_cli.jobs.demo import demo as run

    console.State.quiet = quiet
    report = run(DemoRequest(output, seed, overwrite))
    if as_json:
        console.result(report)
        return
    rows = [
        (TITLES[name], f"{found['miou']:.3f}", f"{found['accuracy']:.3f}")
        for name, found in report["scores"].items()
    ]
    console.table("held-out part", ("method", "mIoU", "accuracy"), rows)
    console.result(report["map"])
    console.result(report["picture"])
