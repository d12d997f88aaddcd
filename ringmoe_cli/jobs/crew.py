"""Prediction by several processes: runs of one huge scene, or scenes, over Dask workers.

Workers must see the same files. Each loads the model once. Bands are computed from the same windows
in the same batches as by one process, so the map is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ringmoe_cli import console
from ringmoe_cli.cluster import Engine
from ringmoe_cli.errors import OutputExistsError, RingmoeError
from ringmoe_cli.jobs.answers import Clock
from ringmoe_cli.jobs.maps import Mapper, Tally, is_folder, load_mapper
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.scene.maps.part import save_band
from ringmoe_cli.scene.maps.strips import SkipBad


@dataclass(frozen=True)
class Order:
    """What a worker needs to know to load the model as the main process did."""

    model: Path
    """Checkpoint folder."""
    wish: Wish
    """What the user said about scenes and outputs."""
    device: str = "auto"
    window: int | None = None
    overlap: float = 0.25
    batch: int | None = None
    flips: bool = False
    streamed: bool = False

    def mapper(self) -> Mapper:
        """The model, ready."""
        return load_mapper(
            self.model, self.wish, self.device, self.window, self.overlap, self.batch, self.flips,
            self.streamed,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Some rows of windows of a scene."""

    order: Order
    scene: str
    folder: Path
    """Where finished bands go."""
    first: int
    stop: int


@dataclass(frozen=True)
class Whole:
    """A scene that one worker does alone."""

    order: Order
    scene: str


class Kept:
    """The model a worker has loaded, by the order it was loaded for."""

    @staticmethod
    @lru_cache(maxsize=1)
    def named(_: str) -> dict[str, Mapper]:
        """A place for the model of an order; the one before is forgotten."""
        return {}

    @classmethod
    def mapper(cls, order: Order) -> Mapper:
        """The model of an order, loaded at the first call."""
        place = cls.named(repr(order))
        if "mapper" not in place:
            console.State.quiet = True
            place["mapper"] = order.mapper()
        return place["mapper"]


def work(
    order: Order, workers: int | None, scheduler: str | None, scenes: Sequence[str], as_json: bool
) -> Tally:
    """Map scenes with Dask workers: one scene together, several apart.

    Raises:
        RingmoeError: if the one scene fails, or the task makes no map.
    """
    engine, tally = Engine(workers, scheduler), Tally()
    if len(scenes) == 1:
        tally.done(scenes[0], map_together(order, engine, scenes[0]), as_json)
        return tally
    if not is_folder(order.wish.output):
        raise RingmoeError(f"-o {order.wish.output} must be a folder for several scenes")
    for said in engine.run(map_whole, (Whole(order, scene) for scene in scenes)):
        if "exists" in said:
            tally.kept(said["scene"], said["exists"])
        elif "error" in said:
            tally.fail(said["scene"], said["error"])
        else:
            tally.done(said["scene"], said, as_json)
    return tally.close()


def compute_run(run: Run) -> list[str]:
    """Save the bands of a run; returns the unreadable places left out. May be repeated."""
    job = Kept.mapper(run.order).job(run.scene)
    skip = SkipBad(job.skip_bad)
    for row, band in job.encoded(run.first, run.stop, skip, Clock()):
        save_band(run.folder, row, band)
    job.close()
    return skip.skipped


def map_whole(whole: Whole) -> dict[str, Any]:
    """Map a scene; a failure is an answer too, so that the others go on."""
    try:
        return Kept.mapper(whole.order).map_scene(whole.scene)
    except OutputExistsError as error:
        return {"scene": whole.scene, "exists": str(error.path)}
    except (RingmoeError, ValueError, OSError) as error:
        return {"scene": whole.scene, "error": " ".join(str(error).split())}


def map_together(order: Order, engine: Engine, scene: str) -> dict[str, Any]:
    """Map one scene, its runs spread over workers."""

    def crew(folder: Path, runs: list[tuple[int, int]]) -> Iterator[list[str]]:
        tasks = [Run(order, scene, folder.resolve(), first, stop) for first, stop in runs]
        return engine.run(compute_run, tasks)

    return order.mapper().map_scene(scene, crew)
