"""Files that hold several chunks: Zarr v3's `sharding_indexed` codec, chunks in a row.

A shard is its chunks one after the other, then their places (offset and length, little-endian
uint64; all ones where there is none) and the CRC-32C of those.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

RUN = 16
"""Chunks in a row that share a file."""

ABSENT = 2**64 - 1
"""Place of a chunk beyond the array's edge."""

INDEX_BYTES = 16 * RUN + 4
"""Bytes at the end of a shard."""


def pack(chunks: Sequence[bytes]) -> bytes:
    """A shard of up to `RUN` encoded chunks, the first ones of its row."""
    places = np.full((RUN, 2), ABSENT, "<u8")
    ends = np.cumsum([0, *map(len, chunks)])
    places[: len(chunks), 0] = ends[:-1]
    places[: len(chunks), 1] = np.diff(ends)
    index = places.tobytes()
    return b"".join((*chunks, index, google_crc32c.value(index).to_bytes(4, "little")))


def unpack(path: Path, number: int) -> bytes:
    """One encoded chunk of a shard, read without the others.

    Raises:
        FileNotFoundError: if there is no such file, or the chunk is not in it.
        ValueError: if the index is torn.
    """
    with path.open("rb") as file:
        file.seek(-min(INDEX_BYTES, path.stat().st_size), os.SEEK_END)
        index = file.read()
        if google_crc32c.value(index[:-4]) != int.from_bytes(index[-4:], "little"):
            raise ValueError(f"{path}: the shard's index is damaged; tile the scene again")
        start, length = np.frombuffer(index, "<u8", 2, 16 * number).tolist()
        if start == ABSENT:
            raise FileNotFoundError(path)
        file.seek(start)
        return file.read(length)
