"""A file of one JSON object per line that grows with a run and is cut back when it resumes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """`metrics.jsonl` and its like: every row has a `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All complete rows; a last line cut short by a crash is left out.

        Raises:
            ValueError: if the file is damaged elsewhere.
        """
        if not self.path.is_file():
            return []
        try:
            lines = self.path.read_text("utf-8").splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except (ValueError, RecursionError) as damage:
            raise ValueError(f"{self.path} is damaged: {damage}") from damage

    def cut(self, step: int) -> None:
        """Drop the rows after a step: the run goes on from there and writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(self.path)
