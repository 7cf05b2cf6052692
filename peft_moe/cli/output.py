"""What commands print, for people and for programs, and with which code they end."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OK, FAILED, USAGE, INPUT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 130

CODES = (
    "Exit codes: 0 success; 1 a check failed; 2 wrong usage; 3 an input cannot be used (the message says why); "
    "4 an error inside peft-moe (PEFT_MOE_TRACEBACK=1 shows where); 130 interrupted."
)
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that lies beside the config of the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
_PIPED = 200  # columns where nobody looks on: rich would break names of modules into pieces at 80
_terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
out = Console() if _terminal else Console(width=_PIPED)


def example(*lines: str) -> str:
    """The end of a command's help: examples and exit codes."""
    return "\n\n".join(["Example:", *[f"    $ {line}" for line in lines], CODES])


def command(app: typer.Typer, *examples: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a command: what it returns is printed with `--json`, what it raises becomes an exit code.

    Args: examples: calls, for its help.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            as_json = kwargs.get("as_json", False)
            try:
                result = function(*args, **kwargs)
            except KeyboardInterrupt:
                _fail("interrupted", as_json, INTERRUPTED)
            except (ValueError, OSError, ImportError) as error:
                _reraise_if_asked()
                _fail(str(error) or type(error).__name__, as_json, INPUT)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:
                _reraise_if_asked()
                _fail(f"{type(error).__name__}: {error}", as_json, INTERNAL)
            else:
                failed = isinstance(result, dict) and result.get("ok") is False
                if as_json:
                    print(json.dumps(result, indent=2))
                raise typer.Exit(FAILED if failed else OK)

        run.__doc__ = f"{inspect.getdoc(function)}\n\n{example(*examples)}"
        return app.command(**options)(run)

    return decorate


def _reraise_if_asked() -> None:
    if os.environ.get("PEFT_MOE_TRACEBACK"):
        raise  # noqa: PLE0704  # called while an exception is handled


def _fail(message: str, as_json: bool, code: int) -> None:
    if as_json:
        print(json.dumps({"error": message, "code": code}, indent=2))
    print(f"peft-moe: {_harmless(message)}", file=sys.stderr)
    raise typer.Exit(code)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; numbers stand to the right."""
    if not rows:
        return
    made = Table(title=title, title_justify="left")
    for position, name in enumerate(columns):
        numeric = all(isinstance(row[position], (int, float)) for row in rows)
        made.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*[f"{one:.4g}" if isinstance(one, float) else plain(one) for one in row])
    out.print(made)


def plain(value: Any) -> str:
    """The text of a value that may come from a file: neither markup nor codes that a terminal obeys."""
    return escape(_harmless(str(value)))


def _harmless(text: str) -> str:
    return "".join(one if one.isprintable() or one == "\n" else "\ufffd" for one in text)


def facts(pairs: dict[str, Any]) -> None:
    """Print names and values, one a line."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        out.print(f"[bold]{name:<{width}}[/bold]  {plain(value)}", highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
