"""Objects of whole scenes: windows are predicted one by one, their boxes merged where they overlap.

A window answers for the objects whose centre lies nearer to its own middle than to its
neighbours', so an object up to `overlap` pixels across is told whole. What two windows tell of one
object near that line is settled by suppression.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model.boxes import Boxes, iou_matrix, suppress
from model.detection_metrics import AveragePrecision
from model.normalisation import Normalisation
from model.tasks.detection import SUPPRESS
from model.tasks.head import Metric
from model.tasks.network import TaskNetwork
from model.tasks.tracking import ClipScores
from ringmoe_cli import console
from ringmoe_cli.jobs.answers import Settings, answered, lattice_of
from ringmoe_cli.jobs.opening import SURE
from ringmoe_cli.jobs.taskdata import Windows
from ringmoe_cli.scene.grid import Window
from ringmoe_cli.scene.labelled.box_images import BoxScene
from ringmoe_cli.scene.labelled.examples import LabelledWindows
from ringmoe_cli.scene.maps.strips import Normalised, SkipBad, window_batches
from ringmoe_cli.scene.stitch import Lattice

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
    parts = parts_of_scene(network, source, settings, skip)
    return [merge_detections(found, network.task.rotated) for found in parts]


def parts_of_scene(
    network: TaskNetwork,
    source: Normalised,
    settings: Settings,
    skip: SkipBad | None = None,
    rows: tuple[int, int] | None = None,
) -> list[list[Boxes]]:
    """What every window tells, one list per date; arguments as `boxes_of_scene`.

    Args:
        network: in eval mode.
        source: the scene.
        settings: window, overlap, batch, device.
        skip: what to do about unreadable blocks.
        rows: first and past the last row of windows; None: all.
    """
    lattice, dates = lattice_of(source, settings), len(source.dates)
    found: list[list[Boxes]] = [[] for _ in range(dates)]
    first, stop = rows or (0, lattice.rows)
    windows = window_batches(source, lattice, settings.batch, first, stop, skip or SkipBad())
    for some, answer in answered(network, windows, settings.device):
        boxes = answer.boxes
        assert boxes is not None
        for n, index in enumerate(some.full):
            for t in range(dates):
                found[t].append(own(boxes[n * dates + t].to("cpu"), lattice, *some.places[index]))
    return found


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


@dataclass(frozen=True)
class Judged:
    """What was found in one image or frame."""

    image: BoxScene
    """The image, or the pair that holds the frame."""
    date: int
    """Which of the pair."""
    found: Boxes
    """In its pixels."""

    @property
    def truth(self) -> Boxes:
        """What is labelled there."""
        return self.image.boxes[self.date]

    @property
    def f1(self) -> float:
        """F1 of the confident boxes at an overlap of one half; 1 where nothing is and is found."""
        found = self.found[self.found.scores >= SURE]
        truth = self.truth[~self.truth.ignored]
        same = found.labels[:, None] == truth.labels[None]
        near = (iou_matrix(found, truth) >= 0.5) & same
        hits = min(int(near.any(0).sum()), int(near.any(1).sum()))
        total = len(found) + len(truth)
        return 2 * hits / total if total else 1.0


def score_images(
    network: TaskNetwork,
    images: Sequence[BoxScene],
    normalisation: Mapping[str, Normalisation],
    settings: Settings,
) -> tuple[Metric, list[Judged]]:
    """The task's metric over whole images or clips, found as `ringmoe predict` finds them."""
    metric, judged = network.head.metric(), []
    if isinstance(metric, ClipScores):
        for clip, frames in clips_of(images).items():
            sources = [i.sources(normalisation)[t] for i, t in frames.values()]
            found = boxes_of_clip(network, sources, settings)
            for number, (image, t), boxes in zip(frames, frames.values(), found, strict=True):
                metric.add(clip, number, boxes, image.boxes[t])
                judged.append(Judged(image, t, boxes))
        return metric, judged
    assert isinstance(metric, AveragePrecision)
    with console.progress(len(images), "detect", "images") as advance:
        for image in images:
            (boxes,) = boxes_of_scene(network, image.sources(normalisation)[0], settings)
            metric.add(boxes, image.boxes[0])
            judged.append(Judged(image, 0, boxes))
            advance(1)
    return metric, judged


def draw_worst(judged: Sequence[Judged], count: int, folder: Path) -> None:
    """Pictures of the images with the lowest F1, the worst first."""
    from ringmoe_cli.scene.box_picture import save_boxes

    for rank, one in enumerate(sorted(judged, key=lambda j: j.f1)[:count], 1):
        grid = one.image.grid
        read = one.image.read(Window(0, 0, grid.height, grid.width))
        values, _ = next(iter(read.values()))[one.date]
        found = one.found[one.found.scores >= SURE]
        save_boxes(folder / f"worst_{rank}.png", values, found, one.truth)


def clips_of(images: Sequence[BoxScene]) -> dict[str, dict[int, tuple[BoxScene, int]]]:
    """Clip -> frame number -> a pair that holds the frame, and which of its two it is."""
    clips: dict[str, dict[int, tuple[BoxScene, int]]] = {}
    for image in images:
        _, *numbers = image.name.rsplit(":", 2)
        for t, number in enumerate(map(int, numbers)):
            clips.setdefault(image.clip, {}).setdefault(number, (image, t))
    return {clip: dict(sorted(frames.items())) for clip, frames in clips.items()}
