"""The command line, `peft-moe`. Its libraries are an extra: `pip install "peft-moe[cli]"`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command line; exits the process."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f'peft-moe needs {" and ".join(missing)}: pip install "peft-moe[cli]"', file=sys.stderr)
        sys.exit(3)
    from .app import app

    app(prog_name="peft-moe")
