"""Reading text files that a user gives."""

import configparser
import csv
import io
from pathlib import Path
from typing import Any

from ringmoe_cli.errors import RingmoeError


def read_text(path: Path) -> str:
    """Its text, without a byte order mark.

    Raises:
        RingmoeError: naming the file, if it is not UTF-8.
        OSError: if it cannot be read.
    """
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as damage:
        raise RingmoeError(f"{path} is not text in UTF-8: {damage}") from damage


def read_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not empty.

    Raises:
        RingmoeError: as `read_text`, and for a field longer than any sane one.
    """
    try:
        return [row for row in csv.reader(io.StringIO(read_text(path), newline="")) if row]
    except csv.Error as damage:
        raise RingmoeError(f"{path} is not CSV: {damage}") from damage


def read_yaml(path: Path) -> Any:
    """The values in a YAML file; plain ones only, never code.

    Raises:
        RingmoeError: as `read_text`, and if it is not YAML.
    """
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as damage:
        raise RingmoeError(f"{path} is not YAML: {damage}") from damage


def read_setting(path: Path, section: str, name: str, default: str) -> str:
    """One value of an INI file, which may lack it or not be there at all.

    Raises:
        RingmoeError: as `read_text`, and if it is not INI.
    """
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read_string(read_text(path) if path.is_file() else "")
    except configparser.Error as damage:
        raise RingmoeError(f"{path} is not INI: {damage}") from damage
    return settings.get(section, name, fallback=default)
