"""What the user sees: results on stdout, talk on stderr, progress on a terminal only.

Only rank 0 of a distributed run speaks. `NO_COLOR` is honoured; pipes get plain lines.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 15.0
"""Between two progress lines where stderr is not a terminal."""

SECRETS = re.compile(
    r"(?<=://)[^/\s@]+(?=@)"  # user:password@
    r"|(?<=[?&])(?:X-Amz|X-Goog|sig|se|token|AWSAccessKeyId|Signature)[^=&\s]*=[^&\s\"']+",
    re.IGNORECASE,
)
"""What a URL holds to be let in."""


class State:
    """Flags set once by the command line."""

    quiet = False
    json = False


def is_main_process() -> bool:
    """Whether this process may speak: rank 0 under torchrun or SLURM, or the only one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def hidden(text: str) -> str:
    """The text without the credentials of URLs in it."""
    return SECRETS.sub("***", text)


def result(value: object) -> None:
    """Print one result to stdout: a path or line of text, or a mapping as one JSON line."""
    if not is_main_process():
        return
    text = json.dumps(value, default=plain) if isinstance(value, Mapping) else str(value)
    sys.stdout.write(hidden(text) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """JSON form of what `json` does not know: numpy scalars, arrays, tuples, paths."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def say(text: str) -> None:
    """Say something useful on stderr."""
    if is_main_process() and not State.quiet:
        sys.stderr.write(hidden(text) + "\n")


def warn(text: str) -> None:
    """Say what may surprise; not silenced by `--quiet`."""
    if is_main_process():
        sys.stderr.write(f"warning: {hidden(text)}\n")


def error(text: str) -> None:
    """The one line of a failed command."""
    sys.stderr.write(f"error: {hidden(text)}\n")


def on_terminal() -> bool:
    """Whether stderr is a terminal that should get live progress."""
    return sys.stderr.isatty() and is_main_process() and not State.quiet


@contextmanager
def progress(total: float, what: str, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Progress with rate and ETA: a live bar on a terminal, a plain line now and then elsewhere.

    Yields:
        advance(n=1, extra=""): call it as the work goes on.
    """
    if on_terminal():
        with live_bar(total, what, unit) as advance:
            yield advance
    else:
        yield plain_lines(total, what, unit)


@contextmanager
def live_bar(total: float, what: str, unit: str) -> Iterator[Callable[..., None]]:
    """A rich progress bar on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}"),
    )
    start, done = time.monotonic(), 0.0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, rate="", extra="")

        def advance(n: float = 1, extra: str = "") -> None:
            nonlocal done
            done += n
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=n, rate=f"{rate:.1f} {unit}/s", extra=extra)

        yield advance


def plain_lines(total: float, what: str, unit: str) -> Callable[..., None]:
    """Progress for pipes and logs: one line every `PLAIN_SECONDS`, and none for short work."""
    start = last = time.monotonic()
    done = 0.0

    def advance(n: float = 1, extra: str = "") -> None:
        nonlocal last, done
        done += n
        now = time.monotonic()
        if now - last < PLAIN_SECONDS:
            return
        last = now
        rate = done / (now - start)
        left = (total - done) / rate if rate else 0
        speed = f"{rate:.1f} {unit}/s, {left:.0f} s left"
        say(f"{what}: {done:.0f}/{total} {unit}, {speed}  {extra}".rstrip())

    return advance


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people, on stdout: rich on a terminal, aligned plain text elsewhere."""
    if not is_main_process():
        return
    cells = [[str(c) for c in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*columns, title=title or None, title_justify="left")
        for row in cells:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    widths = [max(len(c) for c in column) for column in zip(columns, *cells, strict=True)]
    lines = [title] if title else []
    lines += [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in [list(columns), *cells]
    ]
    sys.stdout.write("\n".join(lines) + "\n")
