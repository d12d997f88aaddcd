"""Opening scenes for a model: the bands it wants, at the ground sampling distance it knows."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointConfig
from ringmoe_cli import console
from ringmoe_cli.errors import SceneError
from ringmoe_cli.jobs.summary import identity_of
from ringmoe_cli.scene.maps.strips import Normalised, Readable
from ringmoe_cli.scene.maps.warp import Warp
from ringmoe_cli.scene.masks import masked
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.resample import Resampled, model_size
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.sensors import open_scene

SURE = 0.3
"""Confidence from which a box is written, unless the user says another."""


@dataclass(frozen=True)
class Wish:
    """What the user said about scenes and outputs."""

    output: Path | None = None
    """A file, a folder, or None: beside the scene."""
    overwrite: bool = False
    """Replace finished outputs."""
    probabilities: bool = False
    """Also write the probability of every class."""
    options: dict[str, str] = field(default_factory=dict)
    """Creation options of the COG driver."""
    modality: str | None = None
    """Modality of the scenes."""
    bands: tuple[str, ...] | None = None
    """Names of the files' bands, in order."""
    scale: str | None = None
    """Factor and offset, or quantity."""
    allow_remote: bool = False
    """Let GDAL use the network."""
    skip_bad: bool = False
    """Leave unreadable blocks out."""
    gsd: float | None = None
    """Ground sampling distance in metres, for scenes that do not say."""
    mask: str | None = None
    """Pixels to leave out: a file or band, and after `=` the values that mean so."""
    no_resample: bool = False
    """Refuse scenes whose ground sampling distance is far from the model's."""
    beside: tuple[str, ...] = ()
    """Co-registered scenes of other modalities, for fused models."""
    before: str | None = None
    """The earlier date, for change models."""
    sure: float = SURE
    """Least confidence of a box that is written."""
    warp: Warp | None = None
    """Where maps shall lie, if not on their scenes' grids."""
    stac: bool = False
    """Write a STAC item beside the outputs."""


@dataclass(frozen=True)
class Opener:
    """What a model wants of scenes, and what the user says about them."""

    config: CheckpointConfig
    """Normalisation and ground sampling distance, by modality."""
    modalities: tuple[str, ...]
    """What the model reads."""
    wish: Wish
    """What the user said."""

    def open(self, path: str) -> Normalised:
        """The scene, and those beside and before it, ready to be read."""
        scenes = map(self.describe, (path, *self.wish.beside))
        now: dict[str, Readable] = {s.modality: self.reader(s) for s in scenes}
        if self.wish.mask:
            everything, remote = self.look(path), self.wish.allow_remote
            now = {m: masked(r, everything, self.wish.mask, remote) for m, r in now.items()}
        dates = [now]
        if self.wish.before is not None:
            earlier = self.describe(self.wish.before)
            dates.insert(0, {earlier.modality: self.reader(earlier)})
        return Normalised(dates, self.config.normalisation)

    def at_model_resolution(self, source: Normalised, path: str) -> Normalised:
        """The scene resampled to the model's ground sampling distance, if they differ much.

        Raises:
            SceneError: if they do, and the user wants no resampling.
        """
        modality, reader = next(iter(source.dates[-1].items()))
        wanted, has = self.config.gsd.get(modality), reader.scene.gsd
        size = model_size(reader.scene, wanted)
        if size is None:
            return source
        if self.wish.no_resample:
            raise SceneError(
                f"{path} has pixels of {has:g} m, the model was trained on {wanted:g} m; "
                "drop --no-resample"
            )
        console.say(f"{path}: {has:g} m pixels are read at the model's {wanted:g} m")
        dates = [{m: Resampled(r, *size) for m, r in date.items()} for date in source.dates]
        return Normalised(dates, source.normalisation)

    def reader(self, scene: Scene) -> SceneReader:
        """Reads windows of a scene."""
        return SceneReader(scene, allow_remote=self.wish.allow_remote)

    def look(self, path: str) -> Scene:
        """A scene with all its bands."""
        said = self.wish.modality or (self.modalities[0] if len(self.modalities) == 1 else None)
        return open_scene(
            path, modality=said, bands=self.wish.bands, scale=self.wish.scale,
            allow_remote=self.wish.allow_remote, unnamed="number",
        )  # fmt: skip

    def describe(self, path: str) -> Scene:
        """A scene with the bands that the model wants, in its order."""
        scene = self.look(path)
        if scene.modality not in self.config.normalisation:
            reads = ", ".join(self.modalities)
            raise SceneError(f"{path} is {scene.modality}; the model reads {reads}")
        wanted = self.config.normalisation[scene.modality].bands
        fitting = scene.for_channels(wanted)
        fitting = replace(fitting, gsd=self.wish.gsd or fitting.gsd)
        if not scene.named:
            console.warn(f"{path} does not name its bands; taken in order as {', '.join(wanted)}")
        for note in scene.notes:
            console.warn(f"{path}: {note}")
        if not scene.grid.is_placed and not scene.grid.rpcs:
            console.warn(f"{path} has no coordinate system; neither will its map")
        return fitting


def about_scenes(source: Normalised) -> list[dict[str, Any]]:
    """What identifies the scenes of a source."""
    return [identity_of(r.scene) for date in source.dates for r in date.values()]
