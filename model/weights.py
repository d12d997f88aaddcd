"""Weight files of other programs, tensor by tensor: .safetensors (one or sharded), .npz, .ckpt.

Files that can hold code (.pth, .pt, .bin, .pkl) are not read.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import INDEX, weight_map
from model.ckpt import CkptWeights
from model.shards import NAMES, Entry, Files, Spec, read_header

NPY = ".npy"


class Weights(Protocol):
    """Named tensors in files: what they are at once, their values on demand."""

    specs: Mapping[str, Spec]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


def open_weights(path: Path) -> Weights:
    """Open a weight file, or a folder of safetensors shards with its index.

    Raises:
        ValueError: for a kind of file that is not read, or a damaged one.
    """
    if path.is_dir():
        return SafetensorsWeights(safetensors_of(path))
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return SafetensorsWeights([path])
    if path.suffix == ".npz":
        return NpzWeights(path)
    if path.suffix == ".ckpt" and not is_torch(path):
        return CkptWeights(path)
    raise ValueError(
        f"{path.name}: only .safetensors, .npz and MindSpore's .ckpt are read; other files can "
        "hold code. Save the same names and arrays with safetensors or numpy.savez"
    )


def is_torch(path: Path) -> bool:
    """Whether a .ckpt is PyTorch's instead: a zip archive or a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith((b"PK", b"\x80"))


def safetensors_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of its index, or the only one."""
    index = folder / INDEX
    if index.is_file():
        files = set(weight_map(folder).values())
        return [folder / name for name in sorted(files)]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} .safetensors files and no index; name one")
    return found


class SafetensorsWeights:
    """Tensors of safetensors files."""

    def __init__(self, paths: list[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for path in paths:
            self.entries.update(read_header(path)[0])
        self.specs: Mapping[str, Spec] = {n: entry.spec for n, entry in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        entry = self.entries[name]
        tensor = torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        with Files() as files:
            files.read(entry, tensor)
        return tensor


class NpzWeights:
    """Arrays of a numpy archive; its headers are read at once, its arrays on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n.endswith(NPY)]
                self.specs: Mapping[str, Spec] = {
                    n.removesuffix(NPY): npy_spec(archive, n) for n in names
                }
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as damage:
            raise ValueError(f"{path} is damaged or no .npz of plain arrays: {damage}") from damage

    def read(self, name: str) -> Tensor:
        """One array."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                return torch.from_numpy(np.ascontiguousarray(archive[name]))
        except (zipfile.BadZipFile, ValueError, EOFError, OSError) as damage:
            raise ValueError(f"{self.path}: {name} is damaged: {damage}") from damage


def npy_spec(archive: zipfile.ZipFile, member: str) -> Spec:
    """Dtype and shape of one array of an archive."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return Spec(member.removesuffix(NPY), torch_dtype(dtype), shape)


def torch_dtype(dtype: "np.dtype[np.generic]") -> torch.dtype:
    """The torch form of a numpy dtype.

    Raises:
        ValueError: if a checkpoint cannot hold it.
    """
    if dtype.hasobject or dtype.kind not in "fiub":
        raise ValueError(f"arrays of {dtype} are not weights")
    found: torch.dtype = torch.from_numpy(np.zeros(0, dtype.newbyteorder("="))).dtype
    if found not in NAMES:
        raise ValueError(f"arrays of {dtype} are not weights")
    return found
