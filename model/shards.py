"""Safetensors files as streams: tensors read by offset, written one after another.

A safetensors file is 8 bytes of header length, a JSON header, and the bytes of the tensors. Reading
with pread, two at a time, with the kernel told what is done with, is several times faster than page
faults of a memory map, and leaves neither memory nor page cache behind.
"""

import json
import os
import queue
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 4 << 20
"""Bytes per pread, cut where the file's own blocks of this size end. Cut elsewhere, two preads meet
in pages that the kernel keeps together, none of which it forgets: reading takes a third longer."""
READERS = 2
"""Preads at once."""
BUFFERS = 3
"""Of a stream: one in use, two read ahead."""
HEADER_LIMIT = 100 << 20
"""A longer header is damage (the format's own limit)."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """A tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: what it is and where its bytes are."""

    spec: Spec
    """Name, dtype, shape."""
    path: Path
    """The shard."""
    start: int
    """First byte, from the beginning of the file."""


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; reads the header only.

    Raises:
        ValueError: if the file is missing, truncated or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_LIMIT):
                raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {n: entry_of(path, n, fields, 8 + length) for n, fields in header.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} has a damaged header: {e!r}") from e
    end = max((e.start + e.spec.nbytes for e in entries.values()), default=8 + length)
    if size < end:
        raise ValueError(f"{path} is truncated: it has {size} of {end} bytes; copy it again")
    return entries, metadata


def entry_of(path: Path, name: str, fields: Mapping[str, Any], base: int) -> Entry:
    """One entry of a header, checked: size fits shape, no negative offsets."""
    spec = Spec(name, DTYPES[fields["dtype"]], tuple(fields["shape"]))
    start, stop = fields["data_offsets"]
    if start < 0 or stop - start != spec.nbytes:
        raise ValueError(f"{path} has a damaged header: {name} does not fit its bytes")
    return Entry(spec, path, base + start)


def read_part(file: int, entry: Entry, view: memoryview, block: int) -> None:
    """Fill an entry's memory with what it has in one block of `CHUNK` bytes of an open file.

    Raises:
        ValueError: if the file ends early.
    """
    place = max(block, entry.start)
    stop = min(block + CHUNK, entry.start + len(view))
    while place < stop:
        got = os.preadv(file, [view[place - entry.start : stop - entry.start]], place)
        if got == 0:
            raise ValueError(f"{entry.path} is truncated inside {entry.spec.name}; copy it again")
        place += got
    if place == block + CHUNK:
        forget(file, block, CHUNK)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def forget(file: int, start: int, length: int) -> None:
    """Tell the kernel that these bytes will not be read again (where it listens)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


class Files:
    """Shards opened for streaming, one descriptor each; a context manager.

    Parts of a tensor are read side by side: while one waits for the disk, another is copied to
    memory that the system has to find first.
    """

    def __init__(self) -> None:
        self.open: dict[Path, int] = {}
        self.readers = ThreadPoolExecutor(READERS, "reader")

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.readers.shutdown()
        for descriptor in self.open.values():
            forget(descriptor, 0, 0)
            os.close(descriptor)

    def read(self, entry: Entry, target: Tensor) -> None:
        """Fill a contiguous tensor of the entry's dtype and shape from its shard.

        Raises:
            ValueError: if the shard ends early.
        """
        if entry.path not in self.open:
            descriptor = os.open(entry.path, os.O_RDONLY)
            self.open[entry.path] = descriptor
        part = partial(read_part, self.open[entry.path], entry, bytes_of(target))
        first, stop = entry.start - entry.start % CHUNK, entry.start + entry.spec.nbytes
        for _ in self.readers.map(part, range(first, stop, CHUNK)):
            pass


def stream(entries: Sequence[Entry]) -> Generator[Tensor, None, None]:
    """Read tensors in the order given, ahead of their use, into a few reused buffers.

    Yields:
        Each tensor; it is overwritten once the next one is asked for.
    """
    largest = max((entry.spec.nbytes for entry in entries), default=0)
    free: queue.Queue[Tensor] = queue.Queue()
    full: queue.Queue[Tensor | BaseException] = queue.Queue()
    stop = threading.Event()
    for _ in range(BUFFERS):
        free.put(torch.empty(largest, dtype=torch.uint8))
    reader = threading.Thread(target=read_ahead, args=(entries, free, full, stop), daemon=True)
    reader.start()
    try:
        for entry in entries:
            item = full.get()
            if isinstance(item, BaseException):
                raise item
            yield shaped(item, entry.spec)
            free.put(item)
    finally:
        stop.set()
        free.put(torch.empty(0, dtype=torch.uint8))
        reader.join()


def read_ahead(
    entries: Sequence[Entry],
    free: "queue.Queue[Tensor]",
    full: "queue.Queue[Tensor | BaseException]",
    stop: threading.Event,
) -> None:
    """The reading thread of `stream`; what goes wrong is handed to the consumer."""
    try:
        with Files() as files:
            for entry in entries:
                buffer = free.get()
                if stop.is_set():
                    return
                files.read(entry, shaped(buffer, entry.spec))
                full.put(buffer)
    except (OSError, ValueError) as failure:
        full.put(failure)


def shaped(buffer: Tensor, spec: Spec) -> Tensor:
    """The front of a byte buffer as a tensor."""
    return buffer[: spec.nbytes].view(spec.dtype).view(spec.shape)


def write_shard(
    path: Path, specs: Sequence[Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, one tensor in memory at a time, and sync it to disk.

    Args:
        path: overwritten if it exists.
        specs: what the tensors will be, in order.
        tensors: exactly those tensors.
        metadata: strings for the header.
    """
    put_shard(path, specs, tensors, metadata)
    settle(path)


def put_shard(
    path: Path, specs: Sequence[Spec], tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """`write_shard` without waiting for the disk: only `settle` makes the file last."""
    with path.open("wb", buffering=0) as file:
        file.write(header_bytes(specs, metadata))
        for spec, tensor in zip(specs, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, spec.shape):
                raise ValueError(f"{spec} was promised, {tensor.dtype} {tuple(tensor.shape)} came")
            view = bytes_of(tensor.contiguous())
            while view:
                view = view[file.write(view) :]


def settle(path: Path) -> None:
    """Wait until a file is on disk, and free its page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        forget(descriptor, 0, 0)
    finally:
        os.close(descriptor)


def header_bytes(specs: Sequence[Spec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with spaces to 8 bytes as the format recommends."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        span = [offset, offset + spec.nbytes]
        fields[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
