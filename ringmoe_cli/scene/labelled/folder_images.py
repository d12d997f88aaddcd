"""Labelled image files behind one face: read, decoded, kept in memory where they are small."""

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
from ringmoe_cli.scene.labelled.folders import ANY, Example
from ringmoe_cli.scene.labelled.labelcode import IGNORE, ClassList
from ringmoe_cli.scene.labelled.outlines import Outlines
from ringmoe_cli.scene.radiometry import to_physical
from ringmoe_cli.scene.raster import open_raster
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.store.statistics import Moments, region_moments

SMALL = 4 << 20
"""Images of up to so many pixels are read once and kept."""
KEPT_BYTES = 1 << 30
"""Memory for images that are kept."""
DISPLAY = {".jpg", ".jpeg", ".png", ".bmp"}
"""Files made to be looked at: their grey levels are taken as they are, never as amplitudes."""


class Images:
    """Reads windows of many files; small ones stay in memory as they were stored."""

    def __init__(self, modality: str | None = None, bands: Sequence[str] | None = None) -> None:
        self.modality, self.bands = modality, bands
        self.kept: dict[Path, tuple[NDArray[Any], NDArray[np.bool_]]] = {}
        self.scenes: dict[Path, Scene] = {}
        self.room = KEPT_BYTES

    def scene(self, path: Path, modality: str) -> Scene:
        """What a file is."""
        if path not in self.scenes:
            said = self.modality if modality == ANY else modality
            scale = "db" if said == "sar-l2" and path.suffix.lower() in DISPLAY else None
            self.scenes[path] = open_scene(
                path, modality=said, bands=self.bands, scale=scale, unnamed="number"
            )
        return self.scenes[path]

    def read(self, path: Path, modality: str, window: Window) -> Sample:
        """Physical channels and validity; outside the image 0 and invalid."""
        scene = self.scene(path, modality)
        height, width = scene.grid.height, scene.grid.width
        if path not in self.kept and height * width <= SMALL and self.room > 0:
            with SceneReader(scene) as reader:
                raw, valid = reader.read(Window(0, 0, height, width))
            self.kept[path] = (raw, valid)
            self.room -= raw.nbytes + valid.nbytes
        if path not in self.kept:
            with SceneReader(scene) as reader:
                return reader.physical(window)
        raw, valid = self.kept[path]
        return to_physical(cut(raw, window), scene), cut(valid, window, False)


@dataclass
class FolderImage:
    """One labelled image of a folder."""

    example: Example
    """Its files."""
    images: Images
    """Reads them."""
    classes: ClassList
    """How label rasters encode classes; no names: labels are values (depth)."""

    @property
    def name(self) -> str:
        """The part of the path that image and label share."""
        return self.example.name

    @property
    def grid(self) -> Grid:
        """Pixels of its first image."""
        return self.scenes[0].grid

    @cached_property
    def scenes(self) -> list[Scene]:
        """One per modality, from the first date."""
        return [self.images.scene(dates[0], m) for m, dates in self.example.images.items()]

    @property
    def channels(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the physical channels per modality."""
        return {s.modality: s.channels for s in self.scenes}

    @property
    def gsd(self) -> Mapping[str, float]:
        """Metres per pixel per modality, where known."""
        return {s.modality: s.gsd for s in self.scenes if s.gsd}

    def read(self, window: Window) -> Mapping[str, Sequence[Sample]]:
        """One sample per date for every modality.

        Raises:
            LabelError: if dates or modalities differ in size.
        """
        found = {}
        for (said, dates), first in zip(self.example.images.items(), self.scenes, strict=True):
            for path in dates:
                other = self.images.scene(path, said).grid
                check_size(path, (other.height, other.width), self.grid)
            found[first.modality] = [self.images.read(path, said, window) for path in dates]
        return found

    def label(self, window: Window) -> Any:
        """Class indices, values, or the class of the whole image."""
        if isinstance(self.example.label, int):
            return self.example.label
        fill = IGNORE if self.classes.names else np.nan
        if self.grid.height * self.grid.width > SMALL:
            inside = self.grid.clip(window)
            around = Window(window.row - inside.row, window.col - inside.col, *window[2:])
            return cut(self.read_label(inside), around, fill)
        return cut(self.whole_label, window, fill)

    @cached_property
    def whole_label(self) -> NDArray[Any]:
        """The label raster of a small image, decoded."""
        return self.read_label(Window(0, 0, self.grid.height, self.grid.width))

    def read_label(self, window: Window) -> NDArray[Any]:
        """A window of the label raster, which must lie on the image's grid."""
        path = self.example.label
        if isinstance(path, Outlines):
            return path.drawn(window)
        assert isinstance(path, Path)
        row, col, height, width = window
        with open_raster(str(path)) as file:
            check_size(path, file.shape, self.grid)
            raw = np.asarray(file.read(window=((row, row + height), (col, col + width))))
            nodata = file.nodata
            palette = file.colormap(1) if file.colorinterp[0].name == "palette" else None
        if palette and self.classes.code.colours:
            table = np.array([palette.get(i, (0, 0, 0, 0))[:3] for i in range(256)], raw.dtype)
            raw = np.moveaxis(table[raw[0]], -1, 0)
        if not self.classes.names:
            values = raw[0].astype(np.float32)
            return values if nodata is None else np.where(raw[0] == nodata, np.nan, values)
        void = None if nodata is None else raw[0] == nodata
        return self.classes.code.decode(raw, len(self.classes.names), path, void)


def check_size(path: Path, shape: tuple[int, int], grid: Grid) -> None:
    """Refuse files of one example that differ in size."""
    if shape != (grid.height, grid.width):
        raise LabelError(
            f"{path} has {shape[0]} x {shape[1]} pixels, but its image has "
            f"{grid.height} x {grid.width}"
        )


def measure(items: Sequence[FolderImage], most: int = 200) -> dict[str, Normalisation]:
    """Normalisation from the pixels of up to `most` images."""
    gathered: dict[str, list[list[Moments]]] = {}
    scenes: dict[str, Scene] = {}
    for item in items[:: max(1, len(items) // most)]:
        for said, dates in item.example.images.items():
            for path in dates:
                scene = item.images.scene(path, said)
                side = Window(0, 0, min(scene.grid.height, 4096), min(scene.grid.width, 4096))
                with SceneReader(scene) as reader:
                    raw, valid = reader.read(side)
                gathered.setdefault(scene.modality, []).append(region_moments(raw, valid, scene))
                scenes[scene.modality] = scene
    return {
        m: normalisation_of(scenes[m], [Moments.merged(c) for c in zip(*parts, strict=True)])
        for m, parts in gathered.items()
    }


def normalisation_of(scene: Scene, moments: Sequence[Moments]) -> Normalisation:
    """Mean and deviation per channel; one scale and no mean for polarimetric channels."""
    channels = scene.channels
    if scene.modality != "sar-l1":
        std = tuple(max(m.std, 1e-6) for m in moments)
        return Normalisation(channels, tuple(m.mean for m in moments), std)
    *parts, power = moments
    scale = max(float(np.sqrt(np.mean([m.rms**2 for m in parts]))), 1e-12)
    return Normalisation(
        channels, (0.0,) * len(parts), (scale,) * len(parts), (power.mean, max(power.std, 1e-6))
    )
