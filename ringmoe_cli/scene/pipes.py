"""Scenes from standard input and maps to standard output, by way of files: GDAL needs to seek."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringmoe_cli.errors import RingmoeError

STDIN, STDOUT = "/vsistdin/", "/vsistdout/"
"""GDAL's names for the two; `-o -` means the second too."""


def is_stdout(output: Path | None) -> bool:
    """Whether the map itself goes to standard output."""
    return str(output) in ("-", STDOUT, STDOUT.rstrip("/"))


@contextmanager
def piped(scene: str, output: Path | None) -> Iterator[tuple[str, Path | None]]:
    """Scene and output as files: what comes on stdin is spooled, what goes to stdout is copied.

    Nothing reaches stdout unless the map is whole.

    Raises:
        RingmoeError: if stdin brings nothing, or stdout is a terminal.
    """
    to_stdout = is_stdout(output)
    if to_stdout and sys.stdout.isatty():
        raise RingmoeError(f"-o {output} would write a GeoTIFF to the terminal; redirect it")
    with tempfile.TemporaryDirectory(prefix="ringmoe-") as folder:
        spooled = spool(Path(folder)) if scene == STDIN else scene
        result = Path(folder, "map.tif") if to_stdout else output
        yield spooled, result or Path()
        if to_stdout:
            with Path(folder, "map.tif").open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def spool(folder: Path) -> str:
    """Standard input as a file.

    Raises:
        RingmoeError: if it is empty.
    """
    file = folder / "stdin.tif"
    with file.open("wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target)
    if not file.stat().st_size:
        raise RingmoeError(f"{STDIN}: nothing came on standard input")
    return str(file)
