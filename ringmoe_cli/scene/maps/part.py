"""Unfinished outputs: a folder `OUT.part` of finished row bands that a later run takes over."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.scene.writer import failures_named, sync

MANIFEST = "manifest.json"


class Part:
    """Row bands of an output in the making, kept across interruptions.

    A band's file appears by rename after it is on disk, so that what is there is whole. Runs with
    other inputs or settings start anew.
    """

    def __init__(self, output: Path, about: Mapping[str, Any]) -> None:
        """Prepare; nothing is touched before `with`.

        Args:
            output: the file this becomes.
            about: everything that decides the output's bits.
        """
        self.folder = part_folder(output)
        self.about = json.dumps(about, sort_keys=True, default=str)
        self.resumed = False

    def __enter__(self) -> Self:
        with failures_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock()
        manifest = self.folder / MANIFEST
        self.resumed = manifest.is_file() and manifest.read_text() == self.about
        if not self.resumed:
            for stale in self.folder.iterdir():
                if stale.name != "lock":
                    stale.unlink()
            with failures_named(manifest):
                manifest.with_suffix(".new").write_text(self.about)
                manifest.with_suffix(".new").replace(manifest)
        return self

    def lock(self) -> None:
        """Keep other processes out.

        Raises:
            RingmoeError: if another run is writing this output.
        """
        self.held = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.held)
            raise RingmoeError(f"another run is writing {self.folder}; wait for it") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            shutil.rmtree(self.folder)
        os.close(self.held)

    def load(self, row: int) -> dict[str, NDArray[Any]] | None:
        """The band that starts at a row, if it is finished."""
        return load_band(self.folder, row)

    def has(self, row: int) -> bool:
        """Whether the band that starts at a row is on disk."""
        return band_file(self.folder, row).exists()

    def save(self, row: int, band: Mapping[str, NDArray[Any]]) -> None:
        """Keep a finished band."""
        save_band(self.folder, row, band)


def part_folder(output: Path) -> Path:
    """Where an output grows."""
    return output.with_name(output.name + ".part")


def band_file(folder: Path, row: int) -> Path:
    """Where the band that starts at a row is kept."""
    return folder / f"rows-{row:08d}.safetensors"


def load_band(folder: Path, row: int) -> dict[str, NDArray[Any]] | None:
    """A finished band; None if there is none, or if the disk has damaged it."""
    file = band_file(folder, row)
    if not file.exists():
        return None
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError):
        return None


def save_band(folder: Path, row: int, band: Mapping[str, NDArray[Any]]) -> None:
    """Write a band under a temporary name, sync it, rename it; any process may do it."""
    file = band_file(folder, row)
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        with failures_named(file):
            try:
                save_file(dict(band), fresh)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            sync(fresh)
            fresh.replace(file)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
