"""`peft-moe convert`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import AsJson, command, facts


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe convert adapter adapter-peft --to peft",
        "peft-moe convert old-adapter adapter --from unsloth --assume-layout contiguous_r",
        "peft-moe convert stock-adapter adapter --base Qwen/Qwen3-30B-A3B",
    )
    def convert(
        source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of an adapter.")],
        target: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
        to: Annotated[
            str, typer.Option(help="native (this package's), or whom it is exported for; see docs/formats.md.")
        ] = "native",
        source_format: Annotated[
            str, typer.Option("--from", help="Format of SRC, where its files do not tell.")
        ] = "auto",
        assume_layout: Annotated[
            str | None, typer.Option(help="How tensors of experts lie in SRC, where its files do not tell.")
        ] = None,
        base: Annotated[
            str | None,
            typer.Option(
                help="Base model, folder or name in the hub's cache; default: what SRC says. No weights needed."
            ),
        ] = None,
        trust_remote_code: Annotated[
            bool, typer.Option("--trust-remote-code", help="Run code that lies beside the config of the base.")
        ] = False,
        as_json: AsJson = False,
    ) -> Any:
        """Convert an adapter from or to the format of another tool."""
        from .. import export_adapter, import_adapter

        options: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code}
        if to == "native":
            import_adapter(source, target, format=source_format, assume_layout=assume_layout, **options)
        elif source_format != "auto" or assume_layout is not None:
            raise ValueError(
                f"--from and --assume-layout say how SRC is read: convert it to native first, then to the format {to!r}"
            )
        else:
            export_adapter(source, target, format=to, **options)
        if not as_json:
            facts({"written": target, "format": to})
        return {"path": target, "format": to}
