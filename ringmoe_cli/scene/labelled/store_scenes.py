"""Labelled scenes of tile stores: co-registered ones together, labels from the store or a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.normalisation import Normalisation
from ringmoe_cli.errors import LabelError
from ringmoe_cli.scene.grid import Grid, Window
from ringmoe_cli.scene.labelled.examples import Sample, cut
from ringmoe_cli.scene.labelled.folder_images import normalisation_of
from ringmoe_cli.scene.labels import LabelSource, Wanted, open_labels
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.store.statistics import Moments, channel_keys
from ringmoe_cli.scene.tiles import LabelLayer, Store, StoredScene

KEPT_BYTES = 512 << 20
"""A scene of up to so many bytes is kept in memory."""


@dataclass
class StorePlace:
    """Scenes of one place on one grid, and its labels."""

    scenes: Mapping[str, tuple[StoredScene, ...]]
    """modality -> one scene per date."""
    layer: LabelLayer
    """What the labels mean."""
    labels: LabelSource | StoredScene
    """Where they are read from."""

    @property
    def first(self) -> StoredScene:
        """The first date of the first modality."""
        return next(iter(self.scenes.values()))[0]

    @property
    def name(self) -> str:
        """Names of its scenes."""
        return "+".join(s.name for dates in self.scenes.values() for s in dates)

    @property
    def grid(self) -> Grid:
        """Pixels common to all its scenes."""
        return self.first.grid

    @property
    def channels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the physical channels per modality."""
        return {m: dates[0].scene.channels for m, dates in self.scenes.items()}

    @property
    def gsd(self) -> Mapping[str, float]:
        """Metres per pixel per modality, where known."""
        return {m: d[0].scene.gsd for m, d in self.scenes.items() if d[0].scene.gsd}

    def read(self, window: Window) -> Mapping[str, Sequence[Sample]]:
        """One sample per date for every modality."""
        return {m: [self.sample(s, window) for s in dates] for m, dates in self.scenes.items()}

    def sample(self, scene: StoredScene, window: Window) -> Sample:
        """Physical channels and validity of a window, from memory where the scene is small."""
        if scene.name not in self.kept:
            return scene.physical(window)
        raw, valid = self.kept[scene.name]
        return to_physical(cut(raw, window), scene.scene), cut(valid, window, False)

    @cached_property
    def kept(self) -> dict[str, tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Raw values and validity of the scenes that fit in memory."""
        whole = Window(0, 0, self.grid.height, self.grid.width)
        scenes = [s for dates in self.scenes.values() for s in dates]
        size = sum(int(np.prod(s.image.shape)) * np.dtype(s.scene.dtype).itemsize for s in scenes)
        return {s.name: s.read(whole) for s in scenes} if size <= KEPT_BYTES else {}

    def label(self, window: Window) -> Any:
        """Class indices (h, w) with 255, or values with nan."""
        return cut(self.whole_label, window, self.layer.ignore)

    @cached_property
    def whole_label(self) -> NDArray[Any]:
        """All labels of the place."""
        whole = Window(0, 0, self.grid.height, self.grid.width)
        if isinstance(self.labels, StoredScene):
            return self.labels.read_label(self.layer.task, whole)
        return self.labels.read(whole)


def labelled_places(
    stores: Sequence[Store],
    task: str,
    modalities: Sequence[str] = (),
    labels: Path | None = None,
    classes: str | None = None,
) -> list[StorePlace]:
    """The places of stores that have labels for a task.

    Scenes with the same pixels on the ground belong together: other modalities of a place are
    fused, two scenes of one modality are the two dates of a change.

    Args:
        stores: where the scenes are.
        task: segmentation, change or depth.
        modalities: which to use; empty: all.
        labels: a raster or vector file for scenes whose store has none.
        classes: names, as `ringmoe tile --classes`.

    Raises:
        LabelError: if no scene has labels for the task.
    """
    scenes = [s for store in stores for s in store.scenes]
    chosen = [s for s in scenes if not modalities or s.modality in modalities]
    if not chosen:
        there = ", ".join(sorted({s.modality for s in scenes}))
        raise LabelError(f"{stores[0].path} is {there}; {', '.join(modalities)} is wanted")
    found = []
    for members in by_place(chosen):
        first = members[0].grid
        everyone = [*members, *(s for s in scenes if same_place(s.grid, first))]
        source = label_source(everyone, task, labels, classes)
        if source is not None:
            found += [StorePlace(dates, *source) for dates in with_dates(members, task)]
    if not found:
        held = sorted({t for s in scenes for t in s.labels})
        raise LabelError(
            f"{', '.join(str(s.path) for s in stores)} has no labels for {task}"
            f"{' (only ' + ', '.join(held) + ')' if held else ''}; pass --labels FILE here, "
            "or to `ringmoe tile`"
        )
    return found


def by_place(scenes: Sequence[StoredScene]) -> list[list[StoredScene]]:
    """Group scenes that share their pixels on the ground."""
    groups: list[list[StoredScene]] = []
    for scene in scenes:
        home = next((g for g in groups if same_place(g[0].grid, scene.grid)), None)
        if home is None:
            groups.append([scene])
        else:
            home.append(scene)
    return groups


def same_place(first: Grid, second: Grid) -> bool:
    """Whether two grids have the same pixels; scenes that nothing places never share them."""
    return first.has_transform and first == second


def with_dates(
    members: Sequence[StoredScene], task: str
) -> list[dict[str, tuple[StoredScene, ...]]]:
    """The scenes of one place per modality: two dates for change, else each date by itself.

    Raises:
        LabelError: if change has not two dates.
    """
    found: dict[str, list[StoredScene]] = {}
    for scene in members:
        found.setdefault(scene.modality, []).append(scene)
    dated = {m: sorted(s, key=lambda x: x.scene.date) for m, s in found.items()}
    if task == "change":
        for dates in dated.values():
            if len(dates) != 2:
                raise LabelError(
                    f"change needs two scenes of one place; {dates[0].name} has {len(dates) - 1} "
                    "other date(s) on the same grid"
                )
        return [{m: tuple(s) for m, s in dated.items()}]
    count = max(len(s) for s in dated.values())
    return [{m: (s[min(i, len(s) - 1)],) for m, s in dated.items()} for i in range(count)]


def label_source(
    scenes: Sequence[StoredScene], task: str, labels: Path | None, classes: str | None
) -> tuple[LabelLayer, LabelSource | StoredScene] | None:
    """Labels of one place: from the file if given, else from whichever scene carries them."""
    if labels is not None:
        source = open_labels(labels, scenes[0].grid, Wanted(task, classes))
        return source.layer, source
    carrier = next((s for s in scenes if task in s.labels), None)
    return None if carrier is None else (carrier.labels[task], carrier)


def statistics(places: Sequence[StorePlace]) -> dict[str, Normalisation]:
    """Normalisation from the stores' statistics over all scenes of these places."""
    found: dict[str, list[StoredScene]] = {}
    for place in places:
        for modality, dates in place.scenes.items():
            found.setdefault(modality, []).extend(dates)
    return {
        m: normalisation_of(scenes[0].scene, merged_moments(scenes)) for m, scenes in found.items()
    }


def merged_moments(scenes: Sequence[StoredScene]) -> list[Moments]:
    """The stored statistics of several scenes together, one entry per channel."""
    keys = channel_keys(scenes[0].scene)
    parts = [[moments(s.statistics[k]) for s in scenes] for k in keys]
    return [Moments.merged(p) for p in parts]


def moments(about: Mapping[str, float]) -> Moments:
    """Moments from what a store says about a channel."""
    count = about["count"]
    return Moments(
        int(count), about["mean"] * count, about["rms"] ** 2 * count, about["min"], about["max"]
    )
