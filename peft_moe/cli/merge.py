"""`peft-moe merge`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .output import AsJson, TrustRemoteCode, command, facts, size


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe merge Qwen/Qwen3-30B-A3B adapter merged",
        "peft-moe merge base-fp8 adapter merged-fp8 --requantize",
    )
    def merge(
        base: Annotated[str, typer.Argument(help="Checkpoint: a folder, or a name in the hub's local cache.")],
        adapter: Annotated[str, typer.Argument(help="Adapter: a folder, or a name in the hub's local cache.")],
        out: Annotated[str, typer.Argument(help="New folder, or that of an interrupted merge, which goes on.")],
        dtype: Annotated[
            str | None, typer.Option(help="Of all weights: bfloat16, float16, float32. As in the base, if left out.")
        ] = None,
        requantize: Annotated[bool, typer.Option("--requantize", help="Leave FP8 weights FP8.")] = False,
        device: Annotated[
            str | None, typer.Option(help="Where sums are made: cpu, cuda. A GPU if there is one.")
        ] = None,
        trust_remote_code: TrustRemoteCode = False,
        as_json: AsJson = False,
    ) -> Any:
        """Merge an adapter into a checkpoint on disk, in the memory of a few tensors."""
        from ..checkpoint.merge import merge_checkpoint

        made = merge_checkpoint(
            base, adapter, out, dtype, requantize=requantize, device=device, trust_remote_code=trust_remote_code
        )
        result = {
            "path": str(made.path), "files": made.files, "tensors": made.tensors, "merged": made.merged,
            "bytes": made.nbytes, "rounding": made.rounding,
        }  # fmt: skip
        if not as_json:
            shown: dict[str, Any] = {
                "written": f"{made.path}: {made.tensors} tensors in {made.files} files, {size(made.nbytes)}",
                "changed": f"{made.merged} tensors",
            }
            if requantize:
                shown["rounding"] = f"{100 * made.rounding:.1f} % of the adapter's own change"
            facts(shown)
        return result
