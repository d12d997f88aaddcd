"""Published data sets with boxes: their class lists. `boxes_io` finds their files as downloaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from ringmoe_cli.errors import LabelError

DIOR = (
    "airplane", "airport", "baseballfield", "basketballcourt", "bridge", "chimney", "dam",
    "Expressway-Service-area", "Expressway-toll-station", "golffield", "groundtrackfield", "harbor",
    "overpass", "ship", "stadium", "storagetank", "tenniscourt", "trainstation", "vehicle",
    "windmill",
)  # fmt: skip
DOTA = (
    "plane", "ship", "storage-tank", "baseball-diamond", "tennis-court", "basketball-court",
    "ground-track-field", "harbor", "bridge", "large-vehicle", "small-vehicle", "helicopter",
    "roundabout", "soccer-ball-field", "swimming-pool",
)  # fmt: skip


@dataclass(frozen=True)
class BoxBenchmark:
    """One data set with boxes."""

    task: str
    """detection or tracking."""
    classes: tuple[str, ...]
    """In the order of its own description."""
    rotated: bool = False
    """Scored by rotated boxes."""
    one: bool = False
    """All objects are of its one class, whatever the files call them."""


BOX_BENCHMARKS: Mapping[str, BoxBenchmark] = {
    "dior": BoxBenchmark("detection", DIOR),
    "dior-r": BoxBenchmark("detection", DIOR, rotated=True),
    "dota": BoxBenchmark("detection", DOTA, rotated=True),
    "dota-1.5": BoxBenchmark("detection", (*DOTA, "container-crane"), rotated=True),
    "hrsc2016": BoxBenchmark("detection", ("ship",), rotated=True, one=True),
    "hrsid": BoxBenchmark("detection", ("ship",)),
    "sar-aircraft": BoxBenchmark(
        "detection", ("A330", "A320/321", "A220", "ARJ21", "Boeing737", "Boeing787", "other")
    ),
    "air-mot": BoxBenchmark("tracking", ("airplane", "ship")),
}
"""Name -> data set."""


def box_benchmark(name: str, task: str, rotated: bool) -> BoxBenchmark:
    """A data set by name, for a model of this kind.

    Raises:
        LabelError: for an unknown one, or one for another task or kind of boxes.
    """
    if name not in BOX_BENCHMARKS:
        raise LabelError(f"unknown benchmark {name!r}; choose from {', '.join(BOX_BENCHMARKS)}")
    found = BOX_BENCHMARKS[name]
    if found.task != task:
        raise LabelError(f"{name} is for {found.task}, not {task}")
    if found.rotated != rotated:
        kind = "rotated" if found.rotated else "horizontal"
        raise LabelError(f"{name} has {kind} boxes; say --set task.rotated={found.rotated}".lower())
    return found
