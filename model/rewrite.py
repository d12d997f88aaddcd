"""A checkpoint rewritten layer by layer: tensors stream in, pruned and merged layers stream out.

The result grows in OUT.part, one finished shard per layer, and gets its name when it is whole; an
interrupted run continues after its last finished layer and gives the same bytes.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.budget import branches, rows_of
from model.calibration import Calibration
from model.checkpoint import (
    CONFIG,
    CheckpointConfig,
    disk_names,
    fingerprint,
    open_tensors,
    shard_metadata,
    weight_map,
    write_index,
    write_text,
)
from model.config import ModelConfig
from model.encoder import RingMoE
from model.merge import FFN, METHODS, Merging
from model.prune import Plan
from model.shards import Entry, Spec, put_shard, settle, stream

BLOCK = re.compile(r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.")
EXPERT = re.compile(
    r"^(encoder\.stages\.(\d+)\.blocks\.(\d+)\.moe\.)"
    r"(collaborative|shared|specialised\.[^.]+)\.(\d+)\.(fc[12])\.(weight|bias)$"
)
ROUTER = re.compile(
    r"^encoder\.stages\.(\d+)\.blocks\.(\d+)\.moe\.router\.(collaborative|specialised\.[^.]+)\."
)
MANIFEST = "pruning.json"
WRITING = ".writing-"
STATE = ".calibration"

Advance = Callable[[float], None]
Fit = Callable[[str], FFN]


@dataclass(frozen=True)
class Output:
    """A tensor of the result and where it comes from."""

    spec: Spec
    """As it will be."""
    sources: Mapping[str, Sequence[Entry]]
    """Tensors of the source to read, by branch; a single one is copied."""
    merging: Merging | None = None
    """How several become one."""
    rows: tuple[int, ...] | None = None
    """Rows of the source to keep (a router that shrinks)."""
    fitted: int | None = None
    """Part of the fitted FFN that replaces it."""

    @property
    def entries(self) -> list[Entry]:
        """What it reads, in order."""
        return [entry for branch in self.sources.values() for entry in branch]


class Taken(Collection[Tensor]):
    """The next tensors of a stream, handed out once, one at a time."""

    def __init__(self, reading: Iterator[Tensor], count: int) -> None:
        self.reading, self.count = reading, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (next(self.reading) for _ in range(self.count))

    def __contains__(self, _: object) -> bool:
        return False


def outputs(source: Path, plan: Plan) -> dict[str, list[Output]]:
    """Every tensor of the result, by shard: one per layer, and one for the rest ("").

    Raises:
        ValueError: if the source lacks a tensor or is damaged.
    """
    entries = open_tensors(source)
    with torch.device("meta"):
        net = RingMoE(plan.result)
    names = [n for p, t in net.named_parameters() for n, _ in disk_names(f"encoder.{p}", t)]
    names += [n for n in entries if not n.startswith("encoder.") and survives(n, plan.result)]
    shards: dict[str, list[Output]] = {}
    for name in names:
        block = BLOCK.match(name)
        layer = f"{block[1]}.{block[2]}" if block else ""
        shards.setdefault(layer, []).append(output(name, plan, entries))
    return shards


def survives(name: str, config: ModelConfig) -> bool:
    """Whether a tensor outside the encoder belongs to a modality that stays, or to none."""
    decoder = re.match(r"^decoders\.([^.]+)\.", name)
    return decoder is None or decoder[1] in config.modalities


def output(name: str, plan: Plan, entries: Mapping[str, Entry]) -> Output:
    """One tensor of the result."""
    expert, router = EXPERT.match(name), ROUTER.match(name)
    if expert and expert[4] == "shared" and plan.method:
        return merged(expert, plan, entries)
    if expert and expert[4] != "shared":
        layer, branch = f"{expert[2]}.{expert[3]}", expert[4]
        row = rows_of(plan.chosen, layer, branch)[int(expert[5])]
        place = rows_of(plan.source, layer, branch).index(row)
        there = f"{expert[1]}{branch}.{place}.{expert[6]}.{expert[7]}"
        return copied(name, entries[there])
    if router and router[3] in shrunk(plan):
        rows = rows_of(plan.chosen, f"{router[1]}.{router[2]}", router[3])
        entry = entries[name]
        spec = Spec(name, entry.spec.dtype, (len(rows), *entry.spec.shape[1:]))
        return Output(spec, {"": [entry]}, rows=rows)
    return copied(name, entries[name])


def shrunk(plan: Plan) -> set[str]:
    """Branches whose routers lose the rows of dropped experts."""
    fewer = {
        "collaborative": plan.result.collaborative < plan.chosen.collaborative,
        "specialised": plan.result.specialised < plan.chosen.specialised,
    }
    return {branch for branch in branches(plan.result) if fewer[branch.partition(".")[0]]}


def copied(name: str, entry: Entry) -> Output:
    """A tensor that stays as it is."""
    return Output(Spec(name, entry.spec.dtype, entry.spec.shape), {"": [entry]})


def merged(expert: re.Match[str], plan: Plan, entries: Mapping[str, Entry]) -> Output:
    """A matrix of the shared expert that stands for experts that go."""
    base, layer, part = expert[1], f"{expert[2]}.{expert[3]}", f"{expert[6]}.{expert[7]}"
    config = replace(plan.source, channels=plan.result.channels)
    present = {b: range(len(rows_of(config, layer, b))) for b in branches(config)}
    present["shared"] = range(config.shared)
    sources = {b: [entries[f"{base}{b}.{e}.{part}"] for e in es] for b, es in present.items()}
    first = next(entry for branch in sources.values() for entry in branch)
    spec = Spec(expert[0], first.spec.dtype, first.spec.shape)
    if plan.method == "fit":
        return Output(spec, {}, fitted=FFN._fields.index(part.replace(".", "_")))
    return Output(spec, sources, merging=plan.method)


def result_config(
    parent: CheckpointConfig, plan: Plan, target: str | None, calibration: str | None = None
) -> CheckpointConfig:
    """config.json of the result.

    Args:
        parent: that of the source.
        plan: what is kept.
        target: as the user said it.
        calibration: checksum of the chips behind the plan and the fit.

    Raises:
        ValueError: if the head was made for modalities that go.
    """
    modalities, task = plan.result.modalities, parent.task
    if task is not None:
        left = tuple(m for m in task.modalities if m in modalities)
        if not left:
            raise ValueError(
                f"the {task.name} head reads {', '.join(task.modalities)}, "
                f"of which {', '.join(modalities)} keeps nothing"
            )
        task = replace(task, modalities=left)
    pruning = {
        "parent": fingerprint(parent.text()),
        "parent_parameters": plan.before,
        "parameters": plan.after,
        "modalities": list(modalities),
        "target": target,
        "method": plan.method,
        "calibration": calibration,
    }
    return replace(
        parent,
        model=plan.result,
        task=task,
        normalisation={m: n for m, n in parent.normalisation.items() if m in modalities},
        gsd={m: g for m, g in parent.gsd.items() if m in modalities},
    ).with_provenance(pruning=pruning)


def prune_checkpoint(
    source: Path,
    target: Path,
    plan: Plan,
    config: CheckpointConfig,
    chips: Mapping[str, Tensor] | None = None,
    advance: Advance = lambda _: None,
    overwrite: bool = False,
) -> None:
    """Write the pruned checkpoint.

    Args:
        source: the checkpoint as it is.
        target: the new folder; its name plus ".part" holds the work in progress.
        plan: what to keep and how.
        config: config.json of the result.
        chips: for method `fit`, modality -> (B, C, H, W) normalised images.
        advance: called with the bytes read (or kept from an earlier run).
        overwrite: replace a checkpoint that stands at `target`, once the new one is whole.

    Raises:
        ValueError: if the source is damaged, `target` is in use, or the disk is too full.
    """
    check_target(source, target, overwrite)
    work = target.with_name(target.name + ".part")
    text = config.text()
    shards = outputs(source, plan)
    begin(work, source, text)
    check_room(work, sum(o.spec.nbytes for o in all_of(shards)))
    names = {
        layer: f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i, layer in enumerate(shards)
    }
    missing = {layer: outs for layer, outs in shards.items() if not (work / names[layer]).exists()}
    advance(cost(shards) - cost(missing))
    fit: Fit | None = None
    if plan.method == "fit":
        fit = Calibration(source, plan, chips or {}, state=work / STATE)
    entries = [entry for out in all_of(missing) for entry in out.entries]
    try:
        with closing(stream(entries)) as reading, Settling() as settling:
            for layer, outs in missing.items():
                ffn = fit(layer) if fit and any(o.fitted is not None for o in outs) else None
                shard = work / names[layer]
                part = shard.with_name(WRITING + shard.name)
                tensors = (made(out, reading, ffn, advance) for out in outs)
                put_shard(part, [o.spec for o in outs], tensors, shard_metadata(text))
                settling.add(part, shard)
    except OSError as failure:
        raise full(work, failure) from None
    where = {o.spec.name: names[layer] for layer, outs in shards.items() for o in outs}
    write_index(work, where, sum(o.spec.nbytes for o in all_of(shards)), text)
    (work / MANIFEST).unlink()
    (work / STATE).unlink(missing_ok=True)
    if target.exists():
        shutil.rmtree(target)
    work.replace(target)


class Settling:
    """Waits for the disk beside the work: a shard gets its name when its bytes are there.

    A context manager; one shard settles while the next one is made.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def __enter__(self) -> "Settling":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown()
        if kind is None:
            self.wait()

    def add(self, part: Path, shard: Path) -> None:
        """Settle a written file under its final name, once the one before has settled."""
        self.wait()
        self.last = self.pool.submit(settled, part, shard)

    def wait(self) -> None:
        """Until the last shard has settled; what went wrong is raised here."""
        if self.last is not None:
            self.last.result()


def settled(part: Path, shard: Path) -> None:
    """Sync a file, then rename it."""
    settle(part)
    part.replace(shard)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a checkpoint, or the source itself."""
    if not target.exists():
        return
    if target.resolve() == source.resolve():
        raise ValueError(f"{target} is the model to prune; choose another output")
    if not overwrite:
        raise ValueError(f"{target} exists")
    if not (target / CONFIG).is_file():
        raise ValueError(f"{target} is no checkpoint, so it is not replaced")


def check_room(work: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold; finished shards count as room."""
    left = needed - sum(path.stat().st_size for path in work.glob("model-*"))
    free = shutil.disk_usage(work).free
    if left > free:
        raise ValueError(
            f"{work} needs {left / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free"
        )


def full(work: Path, failure: OSError) -> Exception:
    """What a full disk means for the work in progress; other failures as they are."""
    if failure.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return failure
    return ValueError(
        f"{work}: {failure.strerror}; make room and run the same command again, "
        "it continues after the last finished layer"
    )


def traffic(source: Path, plan: Plan) -> tuple[int, int]:
    """Bytes that a pruning reads and writes."""
    shards = outputs(source, plan)
    return cost(shards), sum(out.spec.nbytes for out in all_of(shards))


def all_of(shards: Mapping[str, list[Output]]) -> list[Output]:
    """The outputs of all shards, in order."""
    return [out for outs in shards.values() for out in outs]


def cost(shards: Mapping[str, list[Output]]) -> int:
    """Bytes to read for some shards."""
    return sum(entry.spec.nbytes for out in all_of(shards) for entry in out.entries)


def made(out: Output, reading: Iterator[Tensor], ffn: FFN | None, advance: Advance) -> Tensor:
    """One tensor of the result, from the next tensors of the stream."""
    if out.fitted is not None and ffn is not None:
        return ffn[out.fitted].to(out.spec.dtype)
    if out.merging is not None:
        parts = {b: Taken(reading, len(es)) for b, es in out.sources.items() if es}
        tensor = METHODS[out.merging](parts)
    else:
        tensor = next(reading)
    advance(sum(entry.spec.nbytes for entry in out.entries))
    return tensor if out.rows is None else tensor[list(out.rows)]


def begin(work: Path, source: Path, config: str) -> None:
    """Make the folder of the work in progress; start afresh if it is that of other work."""
    files = sorted(set(weight_map(source).values()))
    facts = [(f, (source / f).stat().st_size, (source / f).stat().st_mtime_ns) for f in files]
    manifest = json.dumps({"source": facts, "config": fingerprint(config)}) + "\n"
    path = work / MANIFEST
    if path.is_file() and path.read_text() == manifest:
        return
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_text(path, manifest)
