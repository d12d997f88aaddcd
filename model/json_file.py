"""Reading a JSON file that somebody else may have written."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it holds no JSON object.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as damage:
        raise ValueError(f"{path} is no JSON: {damage}") from damage
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object but a {type(found).__name__}")
    return found
