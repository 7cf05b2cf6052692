"""`peft-moe convert`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..checkpoint.formats.registry import FORMATS
from .output import AsJson, TrustRemoteCode, command, facts

_NAMES = ", ".join(sorted(one.name for one in FORMATS))


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe convert adapter adapter-peft --to peft",
        "peft-moe convert adapter adapter-sglang --to sglang --option layout=stacked --option rank=32",
        "peft-moe convert old-adapter adapter --from unsloth --assume-layout contiguous_r",
        "peft-moe convert stock-adapter adapter --base Qwen/Qwen3-30B-A3B",
    )
    def convert(
        source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of an adapter.")],
        target: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
        to: Annotated[
            str, typer.Option(help=f"native (this package's), or whom it is exported for: {_NAMES} (docs/formats.md).")
        ] = "native",
        source_format: Annotated[
            str, typer.Option("--from", help="Format of SRC, one of the same, where its files do not tell.")
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
        option: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME=VALUE", help="An option of the format that --to names; see its page."),
        ] = None,
        trust_remote_code: TrustRemoteCode = False,
        as_json: AsJson = False,
    ) -> Any:
        """Convert an adapter from or to the format of another tool."""
        from .. import export_adapter, import_adapter

        options: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code}
        own = _own(option or [], options)
        if to == "native" and own:
            raise ValueError(f"--option {next(iter(own))}: options are of the format that --to names")
        if to == "native":
            import_adapter(source, target, format=source_format, assume_layout=assume_layout, **options)
        elif source_format != "auto" or assume_layout is not None:
            raise ValueError(
                f"--from and --assume-layout say how SRC is read: convert it to native first, then to the format {to!r}"
            )
        else:
            export_adapter(source, target, to, **options, **own)
        if not as_json:
            facts({"written": target, "format": to})
        return {"path": target, "format": to}


def _own(given: list[str], others: dict[str, Any]) -> dict[str, Any]:
    """`NAME=VALUE` -> name and value, a number where it is one. Args: others: options that the command has itself."""
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"--option {one!r}: expected NAME=VALUE, each name once, such as layout=stacked")
        if name in others or name in ("src", "dst", "format", "progress"):
            raise ValueError(f"--option {one!r}: {name} is none of the format's own options; see `convert --help`")
        found[name] = int(value) if value.isdecimal() else value
    return found
