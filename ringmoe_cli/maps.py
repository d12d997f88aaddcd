"""Maps of many scenes: which files, which model, which outputs, and what to report."""

import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointConfig
from model.config import TaskConfig
from ringmoe_cli import console
from ringmoe_cli.answers import Network, Settings
from ringmoe_cli.errors import OutputExistsError, RingmoeError, SceneError
from ringmoe_cli.machine import chosen_device, use_memory_steadily
from ringmoe_cli.prediction import Report, predict_scene
from ringmoe_cli.scene.part import part_folder
from ringmoe_cli.scene.product import Product, product_of
from ringmoe_cli.scene.reader import SceneReader
from ringmoe_cli.scene.resample import Resampled, model_size
from ringmoe_cli.scene.scene import Scene
from ringmoe_cli.scene.sensors import open_scene
from ringmoe_cli.scene.strips import Normalised
from ringmoe_cli.scene.writer import sidecar
from ringmoe_cli.summary import identity_of, model_identity, summary


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
    no_resample: bool = False
    """Refuse scenes whose ground sampling distance is far from the model's."""
    beside: tuple[str, ...] = ()
    """Co-registered scenes of other modalities, for fused models."""
    before: str | None = None
    """The earlier date, for change models."""


@dataclass(frozen=True)
class Mapper:
    """A model at work on scenes."""

    network: Network
    """In eval mode, on its device."""
    config: CheckpointConfig
    """What its checkpoint says."""
    identity: dict[str, Any]
    """What tells this model from others, for resuming."""
    settings: Settings
    """Window, overlap, batch."""
    wish: Wish
    """What the user said."""

    @property
    def task(self) -> TaskConfig:
        """The model's task."""
        assert self.config.task is not None
        return self.config.task

    def map_scene(self, path: str) -> dict[str, Any]:
        """Write a scene's maps.

        Returns:
            What happened, for `--json`.

        Raises:
            RingmoeError: if the scene cannot be read or the output not be written.
        """
        source = self.open(path)
        product = product_of(self.task, self.wish.probabilities)
        outputs = self.outputs(path, source, product)
        check_free(outputs, self.wish.overwrite)
        fitted = self.at_model_resolution(source, path)
        scenes = [r.scene for date in source.dates for r in date.values()]
        about = {"model": self.identity, "scenes": [identity_of(s) for s in scenes]}
        report = predict_scene(
            self.network, fitted, product, outputs, self.settings,
            original=source, about=about, options=self.wish.options, skip_bad=self.wish.skip_bad,
        )  # fmt: skip
        for date in source.dates:
            for reader in date.values():
                reader.close()  # type: ignore[attr-defined]
        said = summary(path, source, self.task, report)
        warn_about(path, report, said)
        return said

    def open(self, path: str) -> Normalised:
        """The scene, and those beside and before it, ready to be read."""
        now = {s.modality: self.reader(s) for s in map(self.describe, (path, *self.wish.beside))}
        dates = [now]
        if self.wish.before is not None:
            earlier = self.describe(self.wish.before)
            dates.insert(0, {earlier.modality: self.reader(earlier)})
        if self.task.name == "change" and len(dates) != 2:
            raise SceneError(
                f"a change model compares two dates; pass the earlier one: --before FILE {path}"
            )
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

    def describe(self, path: str) -> Scene:
        """A scene with the bands that the model wants, in its order."""
        modalities = self.task.modalities
        said = self.wish.modality or (modalities[0] if len(modalities) == 1 else None)
        scene = open_scene(
            path, modality=said, bands=self.wish.bands, scale=self.wish.scale,
            allow_remote=self.wish.allow_remote, unnamed="number",
        )  # fmt: skip
        if scene.modality not in self.config.normalisation:
            raise SceneError(f"{path} is {scene.modality}; the model reads {', '.join(modalities)}")
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

    def outputs(self, path: str, source: Normalised, product: Product) -> dict[str, Path]:
        """Layer -> file."""
        named = next(iter(source.dates[-1].values())).scene.name
        main = output_path(path, named, self.task.name, self.wish.output)
        first, *others = product.layers
        more = {x.name: main.with_name(f"{main.stem}_{x.name}{main.suffix}") for x in others}
        return {first.name: main, **more}


def warn_about(path: str, report: Report, said: dict[str, Any]) -> None:
    """Say what may surprise in a finished map."""
    for place in report.skipped:
        console.warn(f"left out: {place}")
    if said.get("nodata_share") == 1 or said.get("pixels") == 0:
        console.warn(f"{path} has no valid pixel; neither has its map")


def load_mapper(
    directory: Path,
    wish: Wish,
    device: str = "auto",
    window: int | None = None,
    overlap: float = 0.25,
    batch: int | None = None,
    flips: bool = False,
) -> Mapper:
    """Load a fine-tuned model and make it ready.

    Raises:
        ValueError: if the checkpoint is none, damaged, or has no task head.
        RingmoeError: for an impossible window or device.
    """
    use_memory_steadily()
    from model.tasks.network import load_task_network

    network, config = load_task_network(directory)
    assert config.task is not None
    where = chosen_device(device)
    side = window or config.task.window
    settings = Settings.of(side, overlap, batch, where, flips)
    if not 0 <= settings.overlap < side or side < config.model.patch_size:
        raise RingmoeError(
            f"--window {side} with --overlap {overlap} leaves no step between windows"
        )
    return Mapper(network.to(where), config, model_identity(directory), settings, wish)


def output_path(path: str, name: str, task: str, output: Path | None) -> Path:
    """Where a scene's map goes: `<scene>_<task>.tif` beside it, unless said otherwise."""
    file = f"{name}_{task}.tif"
    if output is None:
        return Path(path).parent / file if Path(path).exists() else Path(file)
    return output / file if is_folder(output) else output


def is_folder(output: Path | None) -> bool:
    """Whether outputs get names of their own: beside the scenes, or in a folder."""
    return output is None or output.is_dir() or not output.suffix


def check_free(outputs: dict[str, Path], overwrite: bool) -> None:
    """Refuse to replace finished outputs unasked; a run in progress may go on.

    Raises:
        OutputExistsError: naming the file in the way.
    """
    for path in outputs.values():
        if path.exists() and not overwrite:
            raise OutputExistsError(path)
    main = next(iter(outputs.values()))
    if part_folder(main).exists():
        console.say(f"found {part_folder(main)}: continuing if scene, model and settings agree")
    main.parent.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for path in outputs.values():
            sidecar(path).unlink(missing_ok=True)


def scene_list(given: Sequence[str]) -> Iterator[str]:
    """The scenes meant by the arguments: `-` is a list on stdin, patterns are expanded."""
    for text in given:
        if text == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        elif not Path(text).exists() and glob.has_magic(text) and "://" not in text:
            found = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - absolute patterns too
            if not found:
                raise SceneError(f"no file matches {text}")
            yield from found
        else:
            yield text


def map_all(mapper: Mapper, scenes: Sequence[str], as_json: bool) -> int:
    """Map one scene after the other; a failing one does not stop the others.

    Returns:
        How many failed.

    Raises:
        RingmoeError: if there is only one scene, and it fails.
    """
    if len(scenes) > 1 and not is_folder(mapper.wish.output):
        raise RingmoeError(f"-o {mapper.wish.output} must be a folder for several scenes")
    failed = []
    for path in scenes:
        try:
            done = mapper.map_scene(path)
        except (RingmoeError, ValueError, OSError) as error:
            if len(scenes) == 1:
                raise
            failed.append(path)
            console.error(f"{path}: {' '.join(str(error).split())}")
            continue
        console.result(done if as_json else done["output"])
    if failed:
        console.error(f"{len(failed)} of {len(scenes)} scenes failed: {', '.join(failed)}")
    return len(failed)
