"""The machine a command runs on: its device, and how it hands out memory."""

import ctypes
import os
import sys

from ringmoe_cli.errors import RingmoeError

GDAL_CACHE_MB = 64
"""GDAL's block cache, where a scene does not need more."""
KEPT_KERNELS = 256
"""Compiled kernels that oneDNN keeps: with 64 a small model takes a quarter longer."""
KEPT_BYTES = 16 << 20
"""Buffers up to this size are kept for the next batch instead of returned to the system."""
KEPT_OF_UPDATES, KEPT_BESIDE_GATHERED = 1 << 30, 8 << 20
"""The same for training: no matrix of gradients is larger, and all come again. Where blocks are
gathered from other processes, their buffers lie between those of the next ones, and a process that
kept them all held a third to two thirds more."""
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt."""


def chosen_device(name: str) -> str:
    """The device meant by `--device`; `auto` is the first GPU if there is one.

    Raises:
        RingmoeError: for a device that this machine lacks.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError as error:
        raise RingmoeError(f"--device {name} is no device; say auto, cpu or cuda") from error
    here = torch.accelerator.current_accelerator(check_available=True)
    kinds = {"cpu"} | ({here.type} if here else set())
    count = torch.accelerator.device_count() if wanted.type != "cpu" else 1
    if wanted.type not in kinds or (wanted.index or 0) >= count:
        raise RingmoeError(f"--device {name} is not here; use --device cpu")
    return name


def use_memory_steadily() -> None:
    """Keep buffers between batches and caches small; to be called before GDAL or oneDNN works.

    glibc returns every big buffer to the system when it is freed and the next batch faults it in
    again, page by page.
    """
    os.environ.setdefault("GDAL_CACHEMAX", str(GDAL_CACHE_MB))
    keep_few_kernels()
    libc = glibc()
    if libc:
        libc.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(ARENA_MAX, 1)  # what one thread frees, another may use


def keep_memory_of_updates(gathered: bool = False) -> None:
    """Keep what an update of training frees for the next one; to be called before oneDNN works.

    Gradients and activations are of the same sizes again, and to fault those of nine experts in
    page by page takes up to a third of a layer's time.

    Args:
        gathered: whether blocks are gathered from several processes for every update.
    """
    keep_few_kernels()
    libc = glibc()
    if libc:
        libc.mallopt(MMAP_THRESHOLD, KEPT_BESIDE_GATHERED if gathered else KEPT_OF_UPDATES)
        libc.mallopt(TRIM_THRESHOLD, -1)  # else all is returned between two large updates


def return_unused_memory() -> None:
    """Give back what loading a model left between its weights: 74 MB of `tiny`, packed."""
    libc = glibc()
    if libc:
        libc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is the one whose memory can be steered."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


def keep_few_kernels() -> None:
    """Keep oneDNN's cache of compiled kernels small; to be called before it works.

    Experts see another number of tokens in every batch, and oneDNN keeps a kernel for each of the
    last thousand shapes: hundreds of megabytes that are hardly ever used again.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KEPT_KERNELS))
