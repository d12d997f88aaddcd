"""Chunks of a Zarr v2 array, read and written one file at a time.

The array is described by zarr; only the chunk files pass through here, because a window needs a
few of them and zarr's machinery costs several times their decoding. The tests compare with zarr.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

CACHE_BYTES = 128 * 2**20
"""Decoded chunks kept per process, whatever the number of arrays: enough for runs of neighbours."""


UNFINISHED = ".part"
"""Ending of files that a killed writer may leave behind."""


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
    """A Zarr v2 array (…, y, x) in a local folder, chunked along y and x only.

    Reading is safe from any thread; writing is safe for windows that share no chunk.
    """

    def __init__(self, folder: Path, *, cache: ChunkCache = CACHE) -> None:
        import zarr

        described = zarr.open_array(store=folder, mode="r", zarr_format=2)
        self.folder = folder
        self.shape: tuple[int, ...] = described.shape
        self.dtype: np.dtype[Any] = described.dtype
        self.chunks: tuple[int, ...] = described.chunks
        self.fill = described.fill_value if described.fill_value is not None else 0
        self.attrs: dict[str, Any] = dict(described.attrs)
        self.codec: Any = described.compressors[0]
        self._lead = ".".join("0" for _ in self.shape[:-2])
        self.cache = cache
        self.written = file_time(folder / ".zarray")

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

    def write(self, row: int, col: int, values: NDArray[Any]) -> None:
        """Write a window that begins at a chunk's corner and ends at one or at the array's edge."""
        tall, wide = self.chunks[-2:]
        height, width = values.shape[-2:]
        assert row % tall == 0, "windows begin at a chunk"
        assert col % wide == 0, "windows begin at a chunk"
        for top in range(0, height, tall):
            for left in range(0, width, wide):
                block = values[..., top : top + tall, left : left + wide]
                self._encode((row + top) // tall, (col + left) // wide, block)

    def _path(self, i: int, j: int) -> Path:
        return self.folder / ".".join(filter(None, (self._lead, str(i), str(j))))

    def _decode(self, i: int, j: int) -> NDArray[Any]:
        try:
            data = self._path(i, j).read_bytes()
        except FileNotFoundError:
            return np.full(self.chunks, self.fill, self.dtype)
        return np.frombuffer(self.codec.decode(data), self.dtype).reshape(self.chunks)

    def _encode(self, i: int, j: int, block: NDArray[Any]) -> None:
        """Whole chunks on disk: the part beyond the array's edge holds the fill value."""
        if block.shape != self.chunks:
            whole = np.full(self.chunks, self.fill, self.dtype)
            whole[..., : block.shape[-2], : block.shape[-1]] = block
        else:
            whole = np.ascontiguousarray(block, self.dtype)
        path = self._path(i, j)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
        unfinished.write_bytes(self.codec.encode(whole))
        unfinished.replace(path)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, cache=CACHE)

    @classmethod
    def of(cls, folder: str | os.PathLike[str], name: str) -> Self:
        """The array of this name in a group's folder."""
        return cls(Path(folder) / name)


def file_time(path: Path) -> int:
    """When a file was written: an overwritten store must not be served from the cache."""
    return path.stat().st_mtime_ns
