"""Checkpoints: a directory of safetensors shards, an index and config.json (Hugging Face layout).

Experts are stacked in memory, `…moe.collaborative.fc1.weight` (E, F, D), and one tensor each on
disk, `…moe.collaborative.<e>.fc1.weight` (F, D), so that a modality or an expert can be opened
without reading the rest. Nothing in a checkpoint is code; dtypes are kept.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from model.config import ModelConfig, PretrainConfig, TaskConfig
from model.json_file import read_json
from model.normalisation import Normalisation
from model.shards import Entry, Files, Spec, read_header, write_shard

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
BANK = re.compile(
    r"^(.*\bmoe\.(?:collaborative|shared|specialised\.[^.]+))\.(fc[12]\.(?:weight|bias))$"
)

Sized = TypeVar("Sized", Tensor, Spec)
Kind = Literal["encoder", "pretraining", "task"]


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint says about itself: predict needs no recipe."""

    model: ModelConfig
    """The encoder."""
    kind: Kind = "encoder"
    """Bare encoder, encoder with mask token and decoders, or encoder with a task head."""
    normalisation: Mapping[str, Normalisation] = field(default_factory=dict)
    """modality -> how physical values became input."""
    gsd: Mapping[str, float] = field(default_factory=dict)
    """modality -> ground sampling distance of the training data, metres."""
    task: TaskConfig | None = None
    """Set for kind "task"."""
    pretraining: PretrainConfig | None = None
    """Set for kind "pretraining"."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: command, recipe, step, parent."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return {"format": 1, **asdict(self), "model": self.model.to_dict()}

    def text(self) -> str:
        """The contents of config.json."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        task, pretraining = values.get("task"), values.get("pretraining")
        return cls(
            model=ModelConfig.from_dict(values["model"]),
            kind=values["kind"],
            normalisation={
                m: Normalisation.from_dict(v) for m, v in values["normalisation"].items()
            },
            gsd=dict(values["gsd"]),
            task=TaskConfig.from_dict(task) if task else None,
            pretraining=PretrainConfig(**pretraining) if pretraining else None,
            provenance=dict(values["provenance"]),
        )

    def with_provenance(self, **facts: Any) -> Self:
        """The same with some facts added to its provenance."""
        return replace(self, provenance={**self.provenance, **facts})


def disk_names(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor as it stands on disk: expert banks one entry per expert, the rest unchanged."""
    bank = BANK.match(name)
    if bank is None:
        return [(name, tensor)]
    return [(f"{bank[1]}.{e}.{bank[2]}", expert) for e, expert in enumerate(tensor.unbind(0))]


def disk_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, named and split as on disk."""
    for name, tensor in module.state_dict().items():
        yield from disk_names(name, tensor)


def save_checkpoint(
    directory: Path | str,
    config: CheckpointConfig,
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint, holding one shard in memory at a time.

    Shards appear under temporary names and are renamed when all are written; each carries the
    fingerprint of config.json, so that a mixture of two saves is noticed and refused.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = config.text()
    metadata = shard_metadata(text)
    parts: list[tuple[Path, list[str]]] = []
    total = 0
    for shard in shards(tensors, shard_bytes):
        part = directory / f".shard-{len(parts)}.part"
        specs = [Spec(name, t.dtype, tuple(t.shape)) for name, t in shard.items()]
        write_shard(part, specs, (t.detach().cpu() for t in shard.values()), metadata)
        parts.append((part, list(shard)))
        total += sum(t.nbytes for t in shard.values())
    publish(directory, parts, total, text)


def shards(tensors: Iterable[tuple[str, Sized]], limit: int) -> Iterator[dict[str, Sized]]:
    """Group tensors in order into shards of at most `limit` bytes (or one larger tensor)."""
    shard: dict[str, Sized] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def write_checkpoint(
    directory: Path | str,
    config: CheckpointConfig,
    specs: Sequence[Spec],
    tensors: Iterable[Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint whose tensors are known before they are there, one in memory at a time.

    Args:
        directory: the new checkpoint.
        config: its config.json.
        specs: names on disk, dtypes and shapes.
        tensors: exactly those, in order.
        shard_bytes: as in `save_checkpoint`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = config.text()
    stream = iter(tensors)
    parts: list[tuple[Path, list[str]]] = []
    for shard in shards(((spec.name, spec) for spec in specs), shard_bytes):
        part = directory / f".shard-{len(parts)}.part"
        few = list(shard.values())
        write_shard(part, few, islice(stream, len(few)), shard_metadata(text))
        parts.append((part, list(shard)))
    publish(directory, parts, sum(spec.nbytes for spec in specs), text)


def shard_metadata(config: str) -> dict[str, str]:
    """What every shard says in its header: the format, and the config.json it belongs to."""
    return {"format": "pt", "ringmoe": fingerprint(config)}


def publish(directory: Path, parts: list[tuple[Path, list[str]]], total: int, config: str) -> None:
    """Give written shards their names, then write the index and config.json."""
    weight_map: dict[str, str] = {}
    for i, (part, names) in enumerate(parts):
        shard = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        part.replace(directory / shard)
        weight_map.update(dict.fromkeys(names, shard))
    write_index(directory, weight_map, total, config)
    current = set(weight_map.values())
    for stale in directory.glob("model-*-of-*.safetensors"):
        if stale.name not in current:
            stale.unlink()


def write_index(directory: Path, weight_map: Mapping[str, str], total: int, config: str) -> None:
    """Write the index (tensor name -> shard) and config.json."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(directory / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
    write_text(directory / CONFIG, config)


def write_text(path: Path, text: str) -> None:
    """Write a small file under a temporary name, sync it, rename it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    synced(part)
    part.replace(path)


def synced(path: Path) -> None:
    """Force a file to disk before it gets its final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(text: str) -> str:
    """Short hash that ties shards to their config.json."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_config(directory: Path | str) -> CheckpointConfig:
    """Read config.json.

    Raises:
        ValueError: if the directory is no checkpoint, or its config is damaged.
    """
    path = Path(directory) / CONFIG
    if not Path(directory).exists():
        raise ValueError(f"{directory} does not exist; name the folder of a checkpoint")
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no {CONFIG}")
    try:
        return CheckpointConfig.from_dict(read_json(path))
    except (KeyError, TypeError, AttributeError) as damage:
        raise ValueError(f"{path} is damaged or from another program: {damage!r}") from damage


def weight_map(directory: Path | str) -> dict[str, str]:
    """Tensor name -> shard file name, from the index.

    Raises:
        ValueError: if there is no index, it is damaged, or it points out of the directory.
    """
    path = Path(directory) / INDEX
    try:
        names = dict(read_json(path)["weight_map"])
        outside = [file for file in set(names.values()) if Path(file).name != file]
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {INDEX}: the checkpoint is incomplete") from None
    except (KeyError, TypeError) as damage:
        raise ValueError(f"{path} is damaged: {damage!r}") from damage
    if outside:
        raise ValueError(f"{path} points outside its folder: {outside[0]}")
    return names


def open_tensors(directory: Path | str, names: Iterable[str] | None = None) -> dict[str, Entry]:
    """Where tensors are, in the order of their bytes; reads the headers of their shards only.

    Args:
        directory: the checkpoint.
        names: names on disk; None means every tensor.

    Raises:
        ValueError: naming the tensor or shard that is missing, truncated, or from another save.
    """
    directory = Path(directory)
    where = weight_map(directory)
    wanted = list(where if names is None else names)
    absent = next((name for name in wanted if name not in where), None)
    if absent is not None:
        raise ValueError(f"{directory} has no tensor {absent}")
    expected = fingerprint((directory / CONFIG).read_text())
    known: dict[str, Entry] = {}
    for shard in dict.fromkeys(where[name] for name in wanted):
        entries, metadata = read_header(directory / shard)
        check_shard(directory / shard, metadata, expected)
        known.update(entries)
    lost = next((name for name in wanted if name not in known), None)
    if lost is not None:
        raise ValueError(f"{directory / where[lost]} lacks {lost}, which {INDEX} puts there")
    found = {name: known[name] for name in wanted}
    return dict(sorted(found.items(), key=lambda item: (item[1].path, item[1].start)))


def read_tensors(directory: Path | str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors by their names on disk, in the order of their bytes.

    Raises:
        ValueError: as `open_tensors`.
    """
    with Files() as files:
        for name, entry in open_tensors(directory, names).items():
            tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
            files.read(entry, tensor)
            yield name, tensor


def check_shard(shard: Path, metadata: Mapping[str, str], expected: str) -> None:
    """Refuse a shard that belongs to another save of the same folder."""
    if metadata.get("ringmoe", expected) != expected:
        raise ValueError(f"{shard} belongs to another save than {CONFIG}; resume or save again")


def load_module(directory: Path | str, module: nn.Module, prefix: str = "") -> None:
    """Fill a module's parameters and buffers in place from a checkpoint.

    Args:
        directory: the checkpoint.
        module: may hold a part of the checkpoint (one modality, the encoder without its head);
            built on the meta device it gets memory in the checkpoint's dtypes, without a copy.
        prefix: put before the module's own names, e.g. "encoder.".

    Raises:
        ValueError: if a tensor is missing or has another shape.
    """
    slots: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(prefix=prefix).items():
        slots.update(disk_names(name, tensor))
    entries = open_tensors(directory, slots)
    if any(tensor.is_meta for tensor in slots.values()):
        slots = allocate(module, entries, prefix)
    with torch.no_grad(), Files() as files:
        for name, entry in entries.items():
            fill(files, entry, slots[name])


def allocate(module: nn.Module, entries: Mapping[str, Entry], prefix: str) -> dict[str, Tensor]:
    """Give a module built on the meta device memory in the checkpoint's dtypes; its slots."""
    slots: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        memory = tensor
        if tensor.is_meta:
            first = disk_names(prefix + name, tensor)[0][0]
            memory = torch.empty(tensor.shape, dtype=entries[first].spec.dtype)
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], nn.Parameter(memory))
        slots.update(disk_names(prefix + name, memory))
    return slots


def fill(files: Files, entry: Entry, slot: Tensor) -> None:
    """Read a tensor straight into its place, or through a copy where dtype or device differ."""
    if entry.spec.shape != tuple(slot.shape):
        raise ValueError(
            f"{entry.path.parent}: {entry.spec.name} is {entry.spec.shape}, "
            f"but the model has {tuple(slot.shape)}"
        )
    if entry.spec.dtype == slot.dtype and slot.is_cpu and slot.is_contiguous():
        files.read(entry, slot)
        torch.autograd.graph.increment_version(slot)  # the bytes came past torch
        return
    tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
    files.read(entry, tensor)
    slot.copy_(tensor)
