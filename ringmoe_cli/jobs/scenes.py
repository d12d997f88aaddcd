"""All scenes of one `ringmoe predict`: through pipes, here, or by workers; and their mosaic."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ringmoe_cli import console
from ringmoe_cli.jobs import crew, object_maps
from ringmoe_cli.jobs.joining import Mosaic
from ringmoe_cli.jobs.maps import work_through
from ringmoe_cli.scene import pipes


def map_piped(order: crew.Order, scene: str, as_json: bool) -> None:
    """Map one scene from standard input, or to standard output, or both.

    Raises:
        RingmoeError: if the scene cannot be read or the map not be written.
    """
    output = order.wish.output
    with pipes.piped(scene, output) as (path, where):
        done = replace(order, wish=replace(order.wish, output=where)).mapper().map_scene(path)
        if not pipes.is_stdout(output):
            console.result(done if as_json else done["output"])


def map_scenes(
    order: crew.Order,
    scenes: Sequence[str],
    workers: int | None,
    scheduler: str | None,
    mosaic: Path | None,
    as_json: bool,
) -> int:
    """Map scenes and report each.

    Returns:
        How many failed.

    Raises:
        RingmoeError: if the only scene fails.
    """
    joint = Mosaic.of(mosaic, order.model, order.wish) if mosaic else None
    if workers or scheduler:
        tally = crew.work(order, workers, scheduler, scenes, as_json)
    else:
        mapper = order.mapper()
        if mapper.task.name == "tracking":
            done = object_maps.list_clip(mapper, scenes)
            console.result(done if as_json else done["output"])
            return 0
        work = object_maps.work_of(mapper)
        tally = work_through(work, scenes, order.wish.output, as_json)
    if joint:
        joint.join(tally, scenes, as_json)
    return len(tally.failed)
