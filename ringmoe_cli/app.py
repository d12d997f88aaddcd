"""The `ringmoe` command: one line per sub-command, and what happens when one fails."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import cleandoc
from typing import Any, NoReturn

import typer

from ringmoe_cli import __version__, console
from ringmoe_cli.commands.convert import convert
from ringmoe_cli.commands.demo import demo
from ringmoe_cli.commands.embed import embed
from ringmoe_cli.commands.evaluate import evaluate
from ringmoe_cli.commands.finetune import finetune
from ringmoe_cli.commands.inspect import inspect
from ringmoe_cli.commands.plan import plan
from ringmoe_cli.commands.predict import predict
from ringmoe_cli.commands.pretrain import pretrain
from ringmoe_cli.commands.prune import prune
from ringmoe_cli.commands.tile import tile
from ringmoe_cli.errors import RingmoeError
from ringmoe_cli.ranks import launched

COMMANDS: tuple[Callable[..., None], ...] = (
    demo,
    tile,
    pretrain,
    finetune,
    evaluate,
    predict,
    embed,
    prune,
    convert,
    inspect,
    plan,
)
"""In the order of use."""

LONGEST = 900
"""Characters of an error message; what is longer quotes a damaged file."""

app = typer.Typer(
    name="ringmoe",
    help="RingMoE: from satellite scenes to maps. Start with `ringmoe demo`.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        console.result(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """RingMoE: from satellite scenes to maps. Start with `ringmoe demo`."""


def help_text(function: Callable[..., None]) -> str:
    """A command's docstring as help: paragraphs re-flowed, the examples left as they stand."""
    text, _, examples = cleandoc(function.__doc__ or "").partition("\nExamples:\n")
    paragraphs = "\n\n".join(" ".join(p.split()) for p in text.split("\n\n"))
    return f"{paragraphs}\n\n\b\nExamples:\n{examples}"


for command in COMMANDS:
    app.command(command.__name__, help=help_text(command))(command)


def interrupted(*_: Any) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does, so that it can save its state."""
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 failed with one line on stderr, 2 usage, 130 interrupted.
    A closed pipe is silence.
    """
    signal.signal(signal.SIGTERM, interrupted)
    code = exit_code()
    if launched():
        end_at_once(code)
    sys.exit(code)


def exit_code() -> int:
    """Run the command line; how it ended."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BrokenPipeError:
        silence_stdout()
    except KeyboardInterrupt:
        return 130
    except (RingmoeError, ValueError, OSError, MemoryError) as failure:
        if os.environ.get("RINGMOE_TRACEBACK"):
            raise
        console.error(one_line(failure))
        return 1
    return 0


def end_at_once(code: int) -> NoReturn:
    """End one of several processes without Python's tidying up.

    Caches of torch keep process groups, and gloo's threads with them, until the very end, where
    they now and then abort a process that has done its work.
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def one_line(failure: BaseException) -> str:
    """What went wrong, on one line, however much of a bad file it quotes."""
    text = " ".join(str(failure).split()) or type(failure).__name__
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    if isinstance(failure, MemoryError):
        return f"out of memory: {text}"
    return text


def silence_stdout() -> None:
    """Keep Python from complaining about the closed pipe once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
