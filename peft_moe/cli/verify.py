"""`peft-moe verify`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import AsJson, TrustRemoteCode, command, facts, table


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "peft-moe verify adapter --base Qwen/Qwen3-30B-A3B", "peft-moe verify adapter --base base --layers 8")
    def verify(
        adapter: Annotated[str, typer.Argument(help="Adapter: a folder, or a name in the hub's local cache.")],
        base: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name in the hub's local cache.")],
        layers: Annotated[int, typer.Option(min=1, help="Experts modules and linears to look at, of each kind.")] = 3,
        experts: Annotated[int, typer.Option(min=1, help="Experts of each module to look at.")] = 2,
        device: Annotated[str, typer.Option(help="Where forwards run.")] = "cpu",
        seed: Annotated[int, typer.Option(help="Of the inputs, and of the experts that are chosen.")] = 0,
        trust_remote_code: TrustRemoteCode = False,
        as_json: AsJson = False,
    ) -> Any:
        """Check an adapter against its base: tensors fit; forward, merge and export are right on some layers."""
        from .checks import check_adapter

        result = check_adapter(adapter, base, layers, experts, device, seed, trust_remote_code)
        if not as_json:
            facts({"adapter": f"all {result['tensors']} tensors fit the model, each is used once"})
            table(
                "Largest difference to the float64 sum, relative to its largest value",
                ("parameter", "expert", "forward", "merge", "allowed", "result"),
                [
                    (one["parameter"], "-" if one["expert"] is None else one["expert"], one["forward"], one["merge"],
                     one["allowed"], "ok" if one["ok"] else "FAILED")
                    for one in result["slices"]
                ],
            )  # fmt: skip
            facts({"export": result["export"], "result": "ok" if result["ok"] else "FAILED"})
        return result
