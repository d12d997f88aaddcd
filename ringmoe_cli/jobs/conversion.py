"""What `ringmoe convert` does around `model`: which kind of file, names, the run."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.json_file import read_json
from ringmoe_cli import console
from ringmoe_cli.errors import CheckpointError, OutputExistsError

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.weights import Weights

CONFIG = "config.json"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Source:
    """What the user wants converted."""

    weights: Path | None
    """A weight file or folder."""
    random: str | None
    """Or the preset of a random model."""
    task: str | None
    """Head of a random model."""
    modality: str | None
    """Modalities and channels of an upcycled or random model."""
    config: Path | None
    """JSON of model fields."""
    dtype: str
    """Of a random model."""
    seed: int
    """Of a random model."""
    statistics: tuple[Path, ...] = ()
    """Tile stores that say how the input is normalised."""


def output_path(source: Source, output: Path | None, overwrite: bool) -> Path:
    """Where the checkpoint goes.

    Raises:
        OutputExistsError: if something stands there and may not be replaced.
    """
    name = source.weights.stem if source.weights else f"random-{source.random}"
    path = output or Path(f"{name}-ringmoe")
    if path.exists() and not (overwrite and (path / CONFIG).is_file()):
        raise OutputExistsError(path)
    return path


def convert(source: Source, out: Path) -> dict[str, Any]:
    """Write the checkpoint under a temporary name, then rename it; facts about it."""
    work = out.with_name(out.name + ".part")
    if work.exists():
        shutil.rmtree(work)
    facts = write_random(source, work) if source.random else write_imported(source, work)
    if out.exists():
        shutil.rmtree(out)
    work.replace(out)
    return facts


def write_random(source: Source, work: Path) -> dict[str, Any]:
    """A checkpoint of random weights."""
    import torch

    from model.config import ModelConfig
    from model.random_weights import example_task, random_checkpoint, random_specs

    if source.dtype not in DTYPES:
        raise CheckpointError(f"--dtype {source.dtype} is none of {', '.join(DTYPES)}")
    assert source.random is not None
    config = ModelConfig.preset(source.random, **changes(source))
    if source.modality:
        config = config.with_modalities(tuple(channels(source, dict(config.channels))))
    modalities = config.modalities[:1]
    task = example_task(source.task, config, modalities) if source.task else None
    dtype = getattr(torch, source.dtype)
    total = sum(spec.nbytes for spec in random_specs(config, task, dtype))
    room(work, total)
    with console.progress(round(total / 1e6), f"writing {work.stem}", "MB") as advance:
        random_checkpoint(
            work, config, task, dtype, source.seed, advance=lambda n: advance(n / 1e6)
        )
    return {"kind": "random", "bytes": total, "modalities": list(config.modalities)}


def write_imported(source: Source, work: Path) -> dict[str, Any]:
    """A checkpoint of somebody's weights."""
    from model.released import is_released
    from model.upcycle import find_swin
    from model.weights import open_weights

    assert source.weights is not None
    weights = open_weights(source.weights)
    if is_released(weights):
        return write_released(source, weights, work)
    if find_swin(weights):
        return write_upcycled(source, weights, work)
    raise CheckpointError(
        f"{source.weights} speaks neither the released RingMoE's names nor those of a Swin V2 of "
        f"timm, Hugging Face or torchvision; its first name is {next(iter(weights.specs), 'none')}"
    )


def write_released(source: Source, weights: "Weights", work: Path) -> dict[str, Any]:
    """The released network under our names."""
    from model.checkpoint import CheckpointConfig, write_checkpoint
    from model.config import PretrainConfig
    from model.released import released_config, released_tensors

    config = released_config(weights, **changes(source))
    specs, tensors, unused = released_tensors(weights, config)
    if unused:
        console.warn(f"{len(unused)} parameters are not used, among them {unused[0]}")
    needed = {"mask_token", *(f"decoders.{m}.weight" for m in config.modalities)}
    whole = needed <= {spec.name for spec in specs}
    room(work, sum(spec.nbytes for spec in specs))
    about = CheckpointConfig(
        config,
        kind="pretraining" if whole else "encoder",
        pretraining=PretrainConfig(sar_l1_target="pixels") if whole else None,
        provenance={"imported": "released RingMoE"},
        **input_of(source, config),
    )
    write_checkpoint(work, about, specs, tensors)
    return {"kind": "released", "modalities": list(config.modalities), "unused": unused}


def write_upcycled(source: Source, weights: "Weights", work: Path) -> dict[str, Any]:
    """A dense Swin V2 as a mixture."""
    from model.checkpoint import CheckpointConfig, write_checkpoint
    from model.upcycle import find_swin, swin_config, upcycled

    swin = find_swin(weights)
    assert swin is not None
    config = swin_config(
        swin, channels(source, {"opt": 3}), **their_config(source), **changes(source)
    )
    specs, tensors = upcycled(swin, config, source.seed)
    room(work, sum(spec.nbytes for spec in specs))
    imported = {"imported": f"Swin V2 ({swin.layout})"}
    about = CheckpointConfig(config, provenance=imported, **input_of(source, config))
    write_checkpoint(work, about, specs, tensors)
    return {"kind": "upcycled", "layout": swin.layout, "modalities": list(config.modalities)}


def input_of(source: Source, config: "ModelConfig") -> dict[str, Any]:
    """What `--statistics` says about the input: normalisation and metres per pixel.

    Raises:
        CheckpointError: if the stores hold other modalities or numbers of bands than the model.
    """
    if not source.statistics:
        return {}
    from ringmoe_cli.scene.loader import store_gsd, store_normalisation
    from ringmoe_cli.scene.tiles import open_store

    stores = [open_store(path) for path in source.statistics]
    named = ", ".join(map(str, source.statistics))
    found = store_normalisation(stores)
    for name, channels in config.channels.items():
        if name not in found:
            raise CheckpointError(f"{named} holds {', '.join(found)}, but the model reads {name}")
        if len(found[name].bands) != channels:
            raise CheckpointError(
                f"{name} has {len(found[name].bands)} bands in {named} and {channels} in the model;"
                f" name a store with those bands, or --modality {name}={len(found[name].bands)}"
            )
    used = {name: found[name] for name in config.channels}
    return {"normalisation": used, "gsd": store_gsd(stores, used)}


def changes(source: Source) -> dict[str, Any]:
    """Model fields of `--config`.

    Raises:
        CheckpointError: if the file is no JSON object.
    """
    if source.config is None:
        return {}
    try:
        fields = read_json(source.config)
    except (OSError, ValueError) as damage:
        raise CheckpointError(f"{damage}; --config wants an object of model fields") from damage
    from model.config import ModelConfig

    unknown = set(fields) - set(ModelConfig.__dataclass_fields__)
    if unknown:
        raise CheckpointError(f"{source.config} has unknown model fields: {sorted(unknown)}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def their_config(source: Source) -> dict[str, Any]:
    """Window and image size from the config.json of a Hugging Face folder, if there is one."""
    path = source.weights / CONFIG if source.weights else Path(CONFIG)
    if source.weights is None or not path.is_file():
        return {}
    theirs = read_json(path)
    names = {"window_size": "window", "image_size": "image_size"}
    known = {
        ours: theirs[name] for name, ours in names.items() if isinstance(theirs.get(name), int)
    }
    return {k: v for k, v in known.items() if k not in changes(source)}


def channels(source: Source, default: dict[str, int]) -> dict[str, int]:
    """Modalities and channels: "opt=3,ms=4", or names whose channels are known.

    Raises:
        CheckpointError: for a modality without a number.
    """
    from model.config import default_channels

    if not source.modality:
        return default
    found: dict[str, int] = {}
    for part in source.modality.split(","):
        name, _, count = part.strip().partition("=")
        number = int(count) if count.isdigit() else {**default_channels(), **default}.get(name)
        if not number:
            raise CheckpointError(f"--modality {part.strip()}: write name=channels, e.g. ms=4")
        found[name] = number
    return found


def room(work: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(work.absolute().parent).free
    if needed > free:
        raise CheckpointError(
            f"the checkpoint needs {needed / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free"
        )
