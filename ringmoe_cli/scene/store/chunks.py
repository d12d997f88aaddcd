"""Chunks of a Zarr array, read and written one file at a time.

The array is described by zarr; only the chunk files pass through here, because a window needs a
few of them and zarr's machinery costs several times their decoding. The tests compare with zarr.
"""

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ringmoe_cli.scene.store.shards import RUN, pack, unpack

CACHE_BYTES = 128 * 2**20
"""Decoded chunks kept per process, whatever the number of arrays: enough for runs of neighbours."""


class ChunkCache:
    """Decoded chunks used lately, up to some bytes; safe from any thread."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self.bytes = 0
        self.lock = threading.Lock()

    def get(self, key: Hashable) -> NDArray[Any] | None:
        """The chunk, if it is kept."""
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
            return self.kept.get(key)

    def put(self, key: Hashable, values: NDArray[Any]) -> None:
        """Keep a chunk, and forget those not used for longest."""
        with self.lock:
            if key not in self.kept:
                self.kept[key] = values
                self.bytes += values.nbytes
            while self.bytes > self.limit and len(self.kept) > 1:
                self.bytes -= self.kept.popitem(last=False)[1].nbytes


CACHE = ChunkCache(CACHE_BYTES)
"""Shared by all arrays of this process."""


class ChunkedArray:
    """A Zarr array (…, y, x) in a local folder, chunked along y and x only.

    Version 2 has a file per chunk, version 3 one per `shards.RUN` chunks in a row. Reading is safe
    from any thread; writing is safe for windows that share no file.
    """

    def __init__(self, folder: Path, *, cache: ChunkCache = CACHE) -> None:
        import zarr

        described = zarr.open_array(store=folder, mode="r")
        self.folder = folder
        self.shape: tuple[int, ...] = described.shape
        self.dtype: np.dtype[Any] = described.dtype
        self.chunks: tuple[int, ...] = described.chunks
        self.fill = described.fill_value if described.fill_value is not None else 0
        self.attrs: dict[str, Any] = dict(described.attrs)
        self.sharded = described.shards is not None
        self.codec: Any = codec() if self.sharded else described.compressors[0]
        self._lead = ("c",) * self.sharded + ("0",) * len(self.shape[:-2])
        self.cache = cache
        self.written = file_time(folder / ("zarr.json" if self.sharded else ".zarray"))

    def read(self, row: int, col: int, height: int, width: int) -> NDArray[Any]:
        """Values (…, height, width) of a window inside the array."""
        tall, wide = self.chunks[-2:]
        out = np.empty((*self.shape[:-2], height, width), self.dtype)
        for i in range(row // tall, -(-(row + height) // tall)):
            for j in range(col // wide, -(-(col + width) // wide)):
                top, left = max(row, i * tall), max(col, j * wide)
                bottom, right = min(row + height, (i + 1) * tall), min(col + width, (j + 1) * wide)
                out[..., top - row : bottom - row, left - col : right - col] = self.chunk(i, j)[
                    ..., top - i * tall : bottom - i * tall, left - j * wide : right - j * wide
                ]
        return out

    def chunk(self, i: int, j: int) -> NDArray[Any]:
        """A whole decoded chunk, from the cache if it was used lately."""
        key = (self.folder, self.written, i, j)
        values = self.cache.get(key)
        if values is None:
            values = self._decode(i, j)
            self.cache.put(key, values)
        return values

    def write(self, row: int, col: int, values: NDArray[Any]) -> int:
        """Write a window that begins at a file's corner and ends at one or at the array's edge.

        Returns:
            Checksum of the bytes that are now in its files, see `checksum`.
        """
        check = 0
        tall, wide = self.chunks[-2:]
        for path, top, left, right in self._files(row, col, *values.shape[-2:]):
            rows = values[..., top : top + tall, left:right]
            found = [self._encode(rows[..., x : x + wide]) for x in range(0, right - left, wide)]
            data = pack(found) if self.sharded else found[0]
            overwrite(path, data)
            check = zlib.crc32(data, check)
        return check

    def checksum(self, row: int, col: int, height: int, width: int) -> int:
        """CRC-32 of the files of a window, one after the other, as they are on disk."""
        check = 0
        for path, *_ in self._files(row, col, height, width):
            with suppress(FileNotFoundError):
                check = zlib.crc32(path.read_bytes(), check)
        return check

    def _files(
        self, row: int, col: int, height: int, width: int
    ) -> Iterator[tuple[Path, int, int, int]]:
        """A window's files, and where in the window each begins, and ends to the right."""
        tall, wide = self.chunks[-2], self.chunks[-1] * (RUN if self.sharded else 1)
        assert row % tall == 0, "windows begin at a file"
        assert col % wide == 0, "windows begin at a file"
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                path = self._path((row + top) // tall, (col + left) // wide)
                yield path, top, left, min(left + wide, width)

    def _path(self, i: int, j: int) -> Path:
        """The file of this number downwards and to the right."""
        return self.folder / ".".join((*self._lead, str(i), str(j)))

    def _decode(self, i: int, j: int) -> NDArray[Any]:
        try:
            if self.sharded:
                data = unpack(self._path(i, j // RUN), j % RUN)
            else:
                data = self._path(i, j).read_bytes()
        except FileNotFoundError:
            return np.full(self.chunks, self.fill, self.dtype)
        return np.frombuffer(self.codec.decode(data), self.dtype).reshape(self.chunks)

    def _encode(self, block: NDArray[Any]) -> bytes:
        """Whole chunks on disk: the part beyond the array's edge holds the fill value."""
        if block.shape != self.chunks:
            whole = np.full(self.chunks, self.fill, self.dtype)
            whole[..., : block.shape[-2], : block.shape[-1]] = block
        else:
            whole = np.ascontiguousarray(block, self.dtype)
        return bytes(self.codec.encode(whole))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, cache=CACHE)

    @classmethod
    def of(cls, folder: str | os.PathLike[str], name: str) -> Self:
        """The array of this name in a group's folder."""
        return cls(Path(folder) / name)


def codec() -> Any:
    """How chunks are compressed: see benchmarks/tiling_codecs.md for the choice."""
    from numcodecs import Blosc, blosc

    blosc.use_threads = False  # chunks are the unit of parallel work; and bytes stay the same
    return Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)


def overwrite(path: Path, data: bytes) -> None:
    """Make a file hold these bytes without emptying it first.

    Two workers may write the same chunk, one of them given up for lost: their bytes are equal, so
    the file is whole as soon as one of them is done, whenever the other is killed.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        written = os.write(file, data)
        while written < len(data):
            written += os.write(file, data[written:])
        if os.fstat(file).st_size > written:
            os.ftruncate(file, written)
    finally:
        os.close(file)


def file_time(path: Path) -> int:
    """When a file was written: an overwritten store must not be served from the cache."""
    return path.stat().st_mtime_ns
