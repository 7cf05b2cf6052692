"""`peft-moe convert`."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer

from .output import AsJson, command, facts


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe convert adapter adapter-vllm --to vllm",
        "peft-moe convert old-adapter adapter --from unsloth",
    )
    def convert(
        source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of an adapter.")],
        target: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
        to: Annotated[
            str, typer.Option(help="native (this package's), or what it is exported for: peft, vllm, sglang.")
        ] = "native",
        source_format: Annotated[
            str, typer.Option("--from", help="Format of SRC, where its file does not tell: peft, unsloth, ….")
        ] = "auto",
        assume_layout: Annotated[
            str | None, typer.Option(help="Layout of stock expert tensors, where nothing in the file tells it.")
        ] = None,
        as_json: AsJson = False,
    ) -> Any:
        """Convert an adapter from or to the format of another tool."""
        package: Any = importlib.import_module("peft_moe")
        if to == "native":
            options = {} if assume_layout is None else {"assume_layout": assume_layout}
            package.import_adapter(source, target, format=source_format, **options)
        elif source_format != "auto" or assume_layout is not None:
            raise ValueError("--from and --assume-layout say how SRC is read: convert it to native first, then to the "
                             f"format {to!r}")  # fmt: skip
        else:
            package.export_adapter(source, target, format=to)
        if not as_json:
            facts({"written": target, "format": to})
        return {"path": target, "format": to}
