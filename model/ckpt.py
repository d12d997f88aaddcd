"""MindSpore's `.ckpt` files without MindSpore: a protobuf message, read field by field.

    Checkpoint   1: Value, repeated
    Value        1: name, 2: Tensor
    Tensor       1: dimension, repeated, 2: name of its type, 3: bytes

Parameters above 512 MB stand in several values of the same tag, one after another, each with the
whole shape. A file may end with "crc_num" and the CRC-32 of what comes before. (mindspore:
ccsrc/utils/checkpoint.proto, python/mindspore/train/serialization.py.) Only the small fields are
read at first, every length is checked against its message, and nothing in the file is executed.
"""

import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from model.shards import CHUNK, Entry, Files, Spec

DTYPES = {
    "Float64": torch.float64, "Float32": torch.float32, "Float16": torch.float16,
    "BFloat16": torch.bfloat16, "Int64": torch.int64, "Int32": torch.int32, "Int16": torch.int16,
    "Int8": torch.int8, "UInt8": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
TALK = ("str", "random_op")
"""Types of values that are no tensors."""
CRC, CRC_BYTES = b"crc_num", 10
"""What stands before the checksum, and its length."""
NAME_LIMIT, RANK_LIMIT = 4096, 16
"""Longer names and shapes are damage."""
VARINT, WIDE, LENGTH, NARROW = 0, 1, 2, 5
"""Protobuf's wire types: a number, 8 bytes, a length and so many bytes, 4 bytes."""


class Field(NamedTuple):
    """One field of a message."""

    number: int
    """Which field."""
    wire: int
    """Its wire type."""
    value: int
    """Of a number; where the bytes begin of everything else."""
    end: int
    """First byte after the field."""


@dataclass
class Part:
    """One value of the file: a parameter or a piece of one."""

    name: str = ""
    kind: str = ""
    shape: list[int] = field(default_factory=list)
    start: int = 0
    """First byte of its content."""
    length: int = 0
    """Bytes of its content."""


class CkptWeights:
    """Parameters of a MindSpore checkpoint; its bytes are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces: dict[str, list[Entry]] = {}
        specs: dict[str, Spec] = {}
        before = ""
        with path.open("rb") as file:
            for part in parts(file, content_end(file)):
                if part.name in specs and part.name != before:
                    raise ValueError(f"{path} is damaged: it has {part.name} twice")
                before = part.name
                if part.kind not in TALK:
                    specs[part.name] = spec_of(path, part)
                    spec = Spec(part.name, torch.uint8, (part.length,))
                    self.pieces.setdefault(part.name, []).append(Entry(spec, path, part.start))
        self.specs: Mapping[str, Spec] = specs
        for name, spec in specs.items():
            there = sum(piece.spec.nbytes for piece in self.pieces[name])
            if there != spec.nbytes:
                raise ValueError(
                    f"{path} is damaged: {name} of {spec.shape} has {there} of {spec.nbytes} bytes"
                )

    def read(self, name: str) -> Tensor:
        """One parameter."""
        spec, done = self.specs[name], 0
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        whole = tensor.view(-1).view(torch.uint8)
        with Files() as files:
            for piece in self.pieces[name]:
                files.read(piece, whole[done : done + piece.spec.nbytes])
                done += piece.spec.nbytes
        return tensor


def content_end(file: BinaryIO) -> int:
    """Where the message ends; the checksum after it, if there is one, is verified.

    Raises:
        ValueError: if the checksum is another.
    """
    size = file.seek(0, 2)
    end = size - len(CRC) - CRC_BYTES
    file.seek(max(end, 0))
    if end < 0 or file.read(len(CRC)) != CRC:
        return size
    expected, found = int.from_bytes(file.read(CRC_BYTES), "big"), 0
    file.seek(0)
    for start in range(0, end, CHUNK):
        found = binascii.crc32(file.read(min(CHUNK, end - start)), found)
    if found != expected:
        raise ValueError(f"{file.name} is damaged: its checksum is another; copy it again")
    return end


def parts(file: BinaryIO, end: int) -> Iterator[Part]:
    """The values of a checkpoint, in order.

    Raises:
        ValueError: if the file is truncated or something else.
    """
    try:
        for outer in fields(file, 0, end):
            if (outer.number, outer.wire) != (1, LENGTH):
                raise ValueError("it holds something else than parameters")
            part = Part()
            for inner in fields(file, outer.value, outer.end):
                if (inner.number, inner.wire) == (1, LENGTH):
                    part.name = text(file, inner)
                elif (inner.number, inner.wire) == (2, LENGTH):
                    read_tensor(file, inner, part)
                elif inner.number == 3:
                    raise ValueError(f"{part.name} is a table, not a tensor")
            if not (part.name and part.kind):
                raise ValueError("a parameter has no name or no type")
            yield part
    except ValueError as damage:
        raise ValueError(
            f"{file.name} is truncated, encrypted or no MindSpore checkpoint: {damage}"
        ) from None


def read_tensor(file: BinaryIO, message: Field, part: Part) -> None:
    """Shape, type and place of a tensor."""
    for item in fields(file, message.value, message.end):
        if item.number == 1 and item.wire == VARINT:
            part.shape.append(item.value)
        elif item.number == 1 and item.wire == LENGTH:  # packed, as other writers may do
            file.seek(item.value)
            while file.tell() < item.end and len(part.shape) <= RANK_LIMIT:
                part.shape.append(varint(file, item.end))
        elif (item.number, item.wire) == (2, LENGTH):
            part.kind = text(file, item)
        elif (item.number, item.wire) == (3, LENGTH):
            part.start, part.length = item.value, item.end - item.value
        if len(part.shape) > RANK_LIMIT:
            raise ValueError(f"{part.name} has more than {RANK_LIMIT} dimensions")


def spec_of(path: Path, part: Part) -> Spec:
    """What the whole parameter is.

    Raises:
        ValueError: for a type that is no weight, or a shape larger than the file.
    """
    if part.kind not in DTYPES:
        raise ValueError(f"{path}: {part.name} has the type {part.kind!r}, which is not read")
    shape = () if part.shape == [0] else tuple(part.shape)  # MindSpore's way to write a number
    spec = Spec(part.name, DTYPES[part.kind], shape)
    if max(prod(shape), *shape, 0) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: {part.name} of {shape} is larger than the file")
    return spec


def fields(file: BinaryIO, start: int, end: int) -> Iterator[Field]:
    """The fields of a message between two places of a file.

    Raises:
        ValueError: if a field reaches beyond the message.
    """
    while start < end:
        file.seek(start)
        key = varint(file, end)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value = varint(file, end)
            start = file.tell()
        elif wire in (WIDE, LENGTH, NARROW):
            length = varint(file, end) if wire == LENGTH else {WIDE: 8, NARROW: 4}[wire]
            value = file.tell()
            start = value + length
        else:
            raise ValueError(f"there is no field at byte {start}")
        if start > end:
            raise ValueError(f"the field at byte {value} ends {start - end} bytes too late")
        yield Field(number, wire, value, start)


def varint(file: BinaryIO, end: int) -> int:
    """A number of 7 bits a byte, the last one below 128, that ends in time."""
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte or file.tell() > end:
            break
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError(f"no number ends at byte {file.tell()}")


def text(file: BinaryIO, item: Field) -> str:
    """A short string."""
    if item.end - item.value > NAME_LIMIT:
        raise ValueError(f"a name has {item.end - item.value} bytes")
    file.seek(item.value)
    try:
        return file.read(item.end - item.value).decode()
    except UnicodeDecodeError:
        raise ValueError("a name is no text") from None
