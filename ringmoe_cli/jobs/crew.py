"""Prediction by several processes: runs of one huge scene, or scenes, over Dask workers.

Workers must see the same files. Each loads the model once. Bands are computed from the same windows
in the same batches as by one process, so the map is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from model.boxes import Boxes
from model.checkpoint import read_config
from ringmoe_cli import console
from ringmoe_cli.cluster import Engine
from ringmoe_cli.errors import OutputExistsError, RingmoeError
from ringmoe_cli.jobs import object_maps
from ringmoe_cli.jobs.compute import loaded
from ringmoe_cli.jobs.maps import Mapper, Tally, is_folder, load_mapper
from ringmoe_cli.jobs.objects import pairs
from ringmoe_cli.jobs.opening import Wish
from ringmoe_cli.jobs.ways import AS_STORED, Ways
from ringmoe_cli.scene.maps.part import save_band
from ringmoe_cli.scene.maps.strips import SkipBad

MOST_ROWS = 16
"""Rows of windows that one worker searches at a time."""


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
    ways: Ways = AS_STORED

    def mapper(self) -> Mapper:
        """The model, ready."""
        load = partial(
            load_mapper, self.model, self.wish, self.device, self.window, self.overlap, self.batch,
            self.flips, self.ways,
        )  # fmt: skip
        return loaded(load, self.ways.device(self.device), alone=self.ways.alone)


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
class Rows:
    """Some rows of windows of a scene in which objects are sought."""

    order: Order
    scene: str
    first: int
    stop: int


@dataclass(frozen=True)
class Pair:
    """Two neighbouring frames of a clip."""

    order: Order
    first: int
    """Number of the first frame."""
    scenes: tuple[str, ...]


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
        RingmoeError: if the one scene, or the clip, fails.
    """
    engine, tally = Engine(workers, scheduler), Tally()
    task = read_config(order.model).task
    name = task.name if task else ""
    if name == "tracking":
        tally.done(scenes[0], track_together(order, engine, scenes), as_json)
        return tally
    if len(scenes) == 1 and name != "classification":
        together = search_together if name == "detection" else map_together
        tally.done(scenes[0], together(order, engine, scenes[0]), as_json)
        return tally
    if len(scenes) > 1 and not is_folder(order.wish.output):
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
    for row, band in job.encoded(run.first, run.stop, skip):
        save_band(run.folder, row, band)
    job.close()
    return skip.skipped


def search_run(rows: Rows) -> tuple[int, list[Boxes], list[str]]:
    """Objects of some rows of windows, unmerged. May be repeated."""
    mapper = Kept.mapper(rows.order)
    return (rows.first, *object_maps.search_rows(mapper, rows.scene, (rows.first, rows.stop)))


def search_frames(pair: Pair) -> tuple[int, list[Boxes]]:
    """Objects of two frames. May be repeated."""
    return pair.first, object_maps.search_pair(Kept.mapper(pair.order), pair.scenes)


def search_together(order: Order, engine: Engine, scene: str) -> dict[str, Any]:
    """Find the objects of one scene, its rows of windows spread over workers."""

    def search(rows: int) -> tuple[list[Boxes], list[str]]:
        step = max(1, min(MOST_ROWS, rows // (2 * (engine.workers or 4))))
        tasks = (Rows(order, scene, r, min(r + step, rows)) for r in range(0, rows, step))
        found = sorted(engine.run(search_run, tasks), key=lambda answer: answer[0])
        parts = [boxes for _, several, _ in found for boxes in several]
        return parts, sorted({place for *_, skipped in found for place in skipped})

    return object_maps.list_scene(order.mapper(), scene, search)


def track_together(order: Order, engine: Engine, scenes: Sequence[str]) -> dict[str, Any]:
    """Track through a clip, its pairs of frames spread over workers."""
    tasks = (Pair(order, a, (scenes[a], scenes[b])) for a, b in pairs(len(scenes)))
    found: dict[int, Boxes] = {}
    for first, boxes in sorted(engine.run(search_frames, tasks), key=lambda answer: answer[0]):
        for frame, some in enumerate(boxes, first):
            found.setdefault(frame, some)
    ordered = [found[n] for n in range(len(scenes))]
    return object_maps.list_clip(order.mapper(), scenes, ordered)


def map_whole(whole: Whole) -> dict[str, Any]:
    """Map a scene; a failure is an answer too, so that the others go on."""
    try:
        return object_maps.work_of(Kept.mapper(whole.order))(whole.scene)
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
