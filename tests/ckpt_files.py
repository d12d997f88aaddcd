"""MindSpore checkpoints as MindSpore writes them, encoded by hand from the protobuf rules."""

import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


def number(value: int) -> bytes:
    """A varint; negative ones as 64 bits."""
    value &= (1 << 64) - 1
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([g | 0x80 for g in groups[:-1]] + groups[-1:])


def block(field: int, content: bytes) -> bytes:
    """A field of bytes: string, bytes or message."""
    return number(field << 3 | 2) + number(len(content)) + content


def value(name: str, kind: str, dims: Sequence[int], content: bytes, packed: bool = False) -> bytes:
    """One value of a checkpoint."""
    if packed:
        shape = block(1, b"".join(map(number, dims)))
    else:
        shape = b"".join(number(1 << 3) + number(d) for d in dims)
    return block(
        1, block(1, name.encode()) + block(2, shape + block(2, kind.encode()) + block(3, content))
    )


def parameter(name: str, array: "NDArray | torch.Tensor", pieces: int = 1) -> bytes:
    """A parameter, in several values if it is large."""
    tensor = torch.as_tensor(array).contiguous()
    kind = {torch.bfloat16: "BFloat16"}.get(tensor.dtype) or str(tensor.dtype)[6:].capitalize()
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    cuts = np.linspace(0, len(content), pieces + 1).astype(int)
    dims = list(tensor.shape) or [0]
    return b"".join(value(name, kind, dims, content[a:b]) for a, b in pairwise(cuts))


def checksum(content: bytes) -> bytes:
    """What may stand at the end of a file."""
    return b"crc_num" + binascii.crc32(content).to_bytes(10, "big")


def write_ckpt(path: Path, arrays: Mapping[str, NDArray]) -> None:
    """A whole checkpoint."""
    path.write_bytes(b"".join(parameter(name, array) for name, array in arrays.items()))
