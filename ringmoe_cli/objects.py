"""Objects of whole scenes: windows are predicted one by one, their boxes merged where they overlap.

A window answers for the objects whose centre lies nearer to its own middle than to its
neighbours', so an object up to `overlap` pixels across is told whole. What two windows tell of one
object near that line is settled by suppression.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from model.boxes import Boxes, suppress
from model.detection_metrics import AveragePrecision
from model.normalisation import Normalisation
from model.tasks.detection import SUPPRESS
from model.tasks.head import Metric
from model.tasks.network import TaskNetwork
from model.tasks.tracking import ClipScores
from ringmoe_cli import console
from ringmoe_cli.answers import Settings, lattice_of, sent
from ringmoe_cli.scene.box_images import BoxScene
from ringmoe_cli.scene.examples import LabelledWindows
from ringmoe_cli.scene.stitch import Lattice
from ringmoe_cli.scene.strips import Normalised, SkipBad, window_batches
from ringmoe_cli.taskdata import Windows

OVERLAP = 0.5
"""Share of a window that neighbours overlap: objects may be half a window across."""
MARGIN = 8
"""A window also tells of objects up to 1/MARGIN of the overlap beyond its line."""


def settings_of(
    window: int, overlap: float | None = None, batch: int | None = None, device: str = "cpu"
) -> Settings:
    """Settings with the overlap that objects need."""
    return Settings.of(window, OVERLAP if overlap is None else overlap, batch, device)


def boxes_of_scene(
    network: TaskNetwork, source: Normalised, settings: Settings, skip: SkipBad | None = None
) -> list[Boxes]:
    """The objects of a scene, one group per date, in the scene's pixels.

    Args:
        network: of a detection or tracking task, in eval mode.
        source: the scene; two dates for tracking.
        settings: window, overlap, batch, device.
        skip: what to do about unreadable blocks.
    """
    lattice, dates = lattice_of(source, settings), len(source.dates)
    found: list[list[Boxes]] = [[] for _ in range(dates)]
    windows = window_batches(source, lattice, settings.batch, 0, lattice.rows, skip or SkipBad())
    for some in windows:
        if some.batch is None:
            continue
        with torch.inference_mode():
            boxes = network.predict(sent(some.batch, settings.device)).boxes
        assert boxes is not None
        for n, index in enumerate(some.full):
            for t in range(dates):
                found[t].append(own(boxes[n * dates + t].to("cpu"), lattice, *some.places[index]))
    return [merge_detections(parts, network.task.rotated) for parts in found]


def own(boxes: Boxes, lattice: Lattice, row: int, column: int) -> Boxes:
    """The boxes of a window that it answers for, in the scene's pixels."""
    x, y = boxes.geometry[:, 0], boxes.geometry[:, 1]
    near = lattice.overlap / 2 - lattice.overlap / MARGIN
    far = lattice.window - near
    keep = torch.ones(len(boxes), dtype=torch.bool)
    for place, at, last in ((y, row, lattice.rows - 1), (x, column, lattice.columns - 1)):
        keep &= (place >= near) if at else keep
        keep &= (place <= far) if at < last else keep
    moved = boxes[keep].shifted(column * lattice.stride, row * lattice.stride)
    return moved.inside(lattice.height, lattice.width, visible=1e-6)


def merge_detections(parts: Sequence[Boxes], rotated: bool = False) -> Boxes:
    """The boxes of overlapping windows, in scene pixels, each object once; best first."""
    return suppress(Boxes.cat(parts), SUPPRESS[rotated])


def boxes_of_clip(
    network: TaskNetwork, frames: Sequence[Normalised], settings: Settings
) -> list[Boxes]:
    """The objects of every frame of a clip; frames are looked at in pairs."""
    found: dict[int, Boxes] = {}
    with console.progress(len(frames), "detect", "frames") as advance:
        for a, b in pairs(len(frames)):
            both = Normalised([*frames[a].dates, *frames[b].dates], frames[a].normalisation)
            for frame, boxes in zip((a, b), boxes_of_scene(network, both, settings), strict=True):
                found.setdefault(frame, boxes)
            advance(b + 1 - a)
    return [found[n] for n in range(len(frames))]


def pairs(count: int) -> Iterator[tuple[int, int]]:
    """Frames (0, 1), (2, 3) …; the last frame of an odd clip goes with the one before."""
    for first in range(0, count - 1, 2):
        yield first, first + 1
    if count % 2:
        yield max(count - 2, 0), count - 1


def whole_images(windows: Windows) -> list[BoxScene]:
    """The images that some windows tile completely; none if one is seen in part only."""
    assert isinstance(windows, LabelledWindows)
    counts = Counter(p.item for p in windows.places)
    chosen = [windows.items[n] for n in sorted(counts)]
    tiles = [len(list(i.grid.windows(windows.size, windows.size))) for i in chosen]
    if tiles != [counts[n] for n in sorted(counts)]:
        return []
    return [i for i in chosen if isinstance(i, BoxScene)]


def score_images(
    network: TaskNetwork,
    images: Sequence[BoxScene],
    normalisation: Mapping[str, Normalisation],
    settings: Settings,
) -> Metric:
    """The task's metric over whole images or clips, found as `ringmoe predict` finds them."""
    metric = network.head.metric()
    if isinstance(metric, ClipScores):
        for clip, frames in clips_of(images).items():
            sources = [i.sources(normalisation)[t] for i, t in frames.values()]
            found = boxes_of_clip(network, sources, settings)
            for number, (image, t), boxes in zip(frames, frames.values(), found, strict=True):
                metric.add(clip, number, boxes, image.boxes[t])
        return metric
    assert isinstance(metric, AveragePrecision)
    with console.progress(len(images), "detect", "images") as advance:
        for image in images:
            (boxes,) = boxes_of_scene(network, image.sources(normalisation)[0], settings)
            metric.add(boxes, image.boxes[0])
            advance(1)
    return metric


def clips_of(images: Sequence[BoxScene]) -> dict[str, dict[int, tuple[BoxScene, int]]]:
    """Clip -> frame number -> a pair that holds the frame, and which of its two it is."""
    clips: dict[str, dict[int, tuple[BoxScene, int]]] = {}
    for image in images:
        _, *numbers = image.name.rsplit(":", 2)
        for t, number in enumerate(map(int, numbers)):
            clips.setdefault(image.clip, {}).setdefault(number, (image, t))
    return {clip: dict(sorted(frames.items())) for clip, frames in clips.items()}
