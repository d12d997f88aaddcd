"""Maps of many scenes: which files, which model, which outputs, and what to report."""

import glob
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointConfig
from model.config import TaskConfig
from ringmoe_cli import console
from ringmoe_cli.errors import OutputExistsError, RingmoeError, SceneError
from ringmoe_cli.jobs.answers import Network, Settings
from ringmoe_cli.jobs.opening import Opener, Wish, about_scenes
from ringmoe_cli.jobs.prediction import Crew, Job, Report, predict_scene
from ringmoe_cli.jobs.summary import described, model_identity, summary
from ringmoe_cli.jobs.ways import AS_STORED, Ways
from ringmoe_cli.machine import return_unused_memory, use_memory_steadily
from ringmoe_cli.scene.maps.part import part_folder
from ringmoe_cli.scene.maps.product import Product, product_of
from ringmoe_cli.scene.maps.strips import Normalised
from ringmoe_cli.scene.writer import sidecar


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

    def job(self, path: str) -> Job:
        """The work on one scene.

        Raises:
            RingmoeError: if the scene cannot be read or is not what the model wants.
        """
        opener = Opener(self.config, self.task.modalities, self.wish)
        source = opener.open(path)
        if (self.task.name == "change") != (len(source.dates) == 2):
            raise SceneError("a change model, and no other, compares two dates: --before FILE")
        fitted = opener.at_model_resolution(source, path)
        product = product_of(self.task, self.wish.probabilities)
        return Job(self.network, fitted, product, self.settings, source, self.wish.skip_bad)

    def map_scene(self, path: str, crew: Crew | None = None) -> dict[str, Any]:
        """Write a scene's maps, alone or with other processes.

        Returns:
            What happened, for `--json`.

        Raises:
            RingmoeError: if the scene cannot be read or the output not be written.
        """
        job = self.job(path)
        outputs = self.outputs(path, job.own, job.product)
        check_free(outputs, self.wish.overwrite)
        about = {"model": self.identity, "scenes": about_scenes(job.own)}
        report = predict_scene(
            job, outputs, about=about, options=self.wish.options, warp=self.wish.warp, crew=crew
        )
        job.close()
        said = summary(path, job.own, self.task, report)
        if self.task.name == "change":
            said |= changed_regions(outputs["classes"], self.task)
        if self.wish.stac:
            said["stac"] = described(outputs, path, job.own, self.task.name)
        warn_about(path, report, said)
        return said

    def outputs(self, path: str, source: Normalised, product: Product) -> dict[str, Path]:
        """Layer -> file."""
        named = next(iter(source.dates[-1].values())).scene.name
        return layer_files(output_path(path, named, self.task.name, self.wish.output), product)


def layer_files(main: Path, product: Product) -> dict[str, Path]:
    """Layer -> file; the first has the name itself, the others theirs appended."""
    first, *others = product.layers
    more = {x.name: main.with_name(f"{main.stem}_{x.name}{main.suffix}") for x in others}
    return {first.name: main, **more}


def changed_regions(class_map: Path, task: TaskConfig) -> dict[str, Any]:
    """The changed regions of a finished change map, as polygons beside it."""
    from ringmoe_cli.scene.maps.vectors import write_regions

    regions = class_map.with_suffix(".geojson")
    return {"regions": str(regions), "changed": write_regions(regions, class_map, task.classes)}


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
    ways: Ways = AS_STORED,
) -> Mapper:
    """Load a fine-tuned model and make it ready.

    Raises:
        ValueError: if the checkpoint is none, damaged, or has no task head.
        RingmoeError: for an impossible window, device, or way to run it.
    """
    use_memory_steadily()
    from model.packing import pack
    from model.tasks.network import load_task_network

    where = ways.device(device)
    ways.check(where)
    network, config = load_task_network(directory, ways.streamed, ways.int8, ways.bf16)
    assert config.task is not None
    side = window or config.task.window
    settings = Settings.of(side, overlap, batch, where, flips, ways.alone)
    settings = replace(settings, bf16=ways.bf16, int8=ways.int8)
    if not 0 <= settings.overlap < side or side < config.model.patch_size:
        raise RingmoeError(
            f"--window {side} with --overlap {overlap} leaves no step between windows"
        )
    if ways.compiled:
        network.to(where).compile()
    elif not (ways.streamed or ways.int8):
        pack(network.to(where))
    return_unused_memory()
    return Mapper(network, config, model_identity(directory), settings, wish)


def output_path(path: str, name: str, task: str, output: Path | None, suffix: str = ".tif") -> Path:
    """Where a scene's map goes: `<scene>_<task>.tif` beside it, unless said otherwise."""
    file = f"{name}_{task}{suffix}"
    if output is None:
        return Path(path).parent / file if Path(path).exists() else Path(file)
    return output / file if is_folder(output) else output


def is_folder(output: Path | None) -> bool:
    """Whether outputs get names of their own: beside the scenes, or in a folder."""
    if output is None or not output.suffix:
        return True
    return output.is_dir() and output.suffix != ".zarr"


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


@dataclass
class Tally:
    """How the scenes of a run went."""

    made: dict[str, str] = field(default_factory=dict)
    """Scene -> its output; of those that an earlier run had finished too."""
    failed: list[str] = field(default_factory=list)
    """Scenes without an output."""

    def done(self, scene: str, said: dict[str, Any], as_json: bool) -> None:
        """A scene is through: report it."""
        self.made[scene] = said["output"]
        console.result(said if as_json else said["output"])

    def fail(self, scene: str, why: str) -> None:
        """A scene has failed."""
        self.failed.append(scene)
        console.error(f"{scene}: {why}")

    def kept(self, scene: str, output: str) -> None:
        """A scene's output was there before."""
        self.made[scene] = output
        console.say(f"{output} exists and is left as it is; --overwrite replaces it")

    def close(self) -> "Tally":
        """Name those that failed."""
        if self.failed:
            total = len(self.failed) + len(self.made)
            console.error(f"{len(self.failed)} of {total} scenes failed: {', '.join(self.failed)}")
        return self


def work_through(
    work: Callable[[str], dict[str, Any]],
    scenes: Sequence[str],
    output: Path | None,
    as_json: bool,
) -> Tally:
    """Do one scene after the other; a failing one does not stop the others.

    Of several scenes, those with a finished output are passed over: the same command twice goes on.

    Raises:
        RingmoeError: if there is only one scene and it fails, or several and one output.
    """
    if len(scenes) > 1 and not is_folder(output):
        raise RingmoeError(f"-o {output} must be a folder for several scenes")
    tally = Tally()
    for path in scenes:
        try:
            tally.done(path, work(path), as_json)
        except KeyboardInterrupt:
            console.say(f"stopped at {path}; the same command continues where it was")
            raise
        except (RingmoeError, ValueError, OSError) as error:
            if len(scenes) == 1:
                raise
            if isinstance(error, OutputExistsError):
                tally.kept(path, str(error.path))
            else:
                tally.fail(path, " ".join(str(error).split()))
    return tally.close()
