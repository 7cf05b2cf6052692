"""`peft-moe inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import AsJson, TrustRemoteCode, command, facts, size, table


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "peft-moe inspect adapter",
        "peft-moe inspect adapter --plot norms.png",
        "peft-moe inspect Qwen/Qwen3-30B-A3B --json",
    )
    def inspect(
        path: Annotated[str, typer.Argument(metavar="ADAPTER|MODEL", help="A folder, or a name in the hub's cache.")],
        plot: Annotated[
            Path | None, typer.Option(help="Write a picture of the deltas' norms by layer and expert.")
        ] = None,
        trust_remote_code: TrustRemoteCode = False,
        as_json: AsJson = False,
    ) -> Any:
        """Show what an adapter or a checkpoint holds: layout, ranks, experts, sizes, norms, experts that do nothing."""
        from ..checkpoint.merge.source import adapter_folder

        if _is_model(path):
            if plot is not None:
                raise ValueError(f"{path} is a model: --plot shows the deltas of an adapter")
            from .models import describe_model

            result = describe_model(path, trust_remote_code)
            if not as_json:
                _show_model(result)
            return result
        from .contents import describe_adapter

        result = describe_adapter(adapter_folder(path))
        if plot is not None:
            _plot(result, plot)
            result["plot"] = str(plot)
        if not as_json:
            _show_adapter(result)
        return result


def _is_model(path: str) -> bool:
    from ..compat import cached_file

    folder = Path(path)
    if folder.is_dir():
        if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"{path} holds neither adapter_config.json nor config.json")
        return not (folder / "adapter_config.json").is_file()
    try:
        return cached_file(path, "config.json", local_files_only=True) is not None
    except (OSError, ValueError):
        return False


def _show_adapter(found: dict[str, Any]) -> None:
    facts({
        "adapter": found["path"],
        "type": f"{found['type']}, {found['layout']}" + (", DoRA" if found["dora"] else ""),
        "base model": found["base"],
        "rank, alpha": f"{found['r']}, {found['lora_alpha']} (of linears)",
        "size": f"{found['parameters']:,} parameters in {found['tensors']} tensors, {size(found['bytes'])} "
        f"({', '.join(found['dtypes'])})",
    })  # fmt: skip
    rows = [
        (one["module"], one["projection"], len(one["experts"]), _span(one["ranks"]), "x".join(map(str, one["shape"])),
         one["norm"], min(one["norms"], default=0.0), max(one["norms"], default=0.0), len(one["dead"]))
        for one in found["experts"]
    ]  # fmt: skip
    columns = ("module", "projection", "experts", "ranks", "shape", "norm", "least", "most", "dead")
    table("Experts (Frobenius norms of the deltas)", columns, rows)
    table(
        "Linears",
        ("module", "rank", "shape", "norm"),
        [(one["module"], one["rank"], "x".join(map(str, one["shape"])), one["norm"]) for one in found["linears"]],
    )
    notes: dict[str, Any] = {}
    if found["stock_expert_parameters"]:
        notes["note"] = "its experts are in stock PEFT's layout: `peft-moe convert` makes them readable here"
    if found["dead"]:
        shown = ", ".join(found["dead"][:8])
        notes["dead"] = f"{len(found['dead'])} whose delta is zero: {shown}{' …' if len(found['dead']) > 8 else ''}"
    if found["not_finite"]:
        notes["broken"] = f"values that are not finite: {', '.join(found['not_finite'][:8])}"
    if notes:
        facts(notes)


def _span(ranks: list[int]) -> str:
    return f"{min(ranks)}" if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"


def _show_model(found: dict[str, Any]) -> None:
    facts({
        "model": found["path"],
        "type": f"{found['model_type']} ({', '.join(found['architectures'])})",
        "quantization": found["quantization"] or "none",
        "size": f"{found['tensors']} tensors in {found['files']} files, {size(found['bytes'])}",
        "of experts": f"{size(found['expert_bytes'])}",
    })  # fmt: skip
    rows = [
        (one["module"], one["held_as"], one["in_files"], one["experts"], one["projection"],
         "x".join(map(str, one["shape"])), one["orientation"], one["gate"] or "-", "yes" if one["bias"] else "no",
         ", ".join(one["stored_as"]))
        for one in found["experts"]
    ]  # fmt: skip
    columns = ("module", "held as", "in files", "experts", "projection", "out x in", "orientation", "gate", "bias",
               "stored as")  # fmt: skip
    table("Experts", columns, rows)
    if found["refused"]:
        facts({name: f"cannot be adapted: {why}" for name, why in found["refused"].items()})


def _plot(found: dict[str, Any], path: Path) -> None:
    """Layers against experts, one picture a projection; what has no adapter is left blank."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    if not found["experts"]:
        raise ValueError(f"{found['path']} has no expert adapters of this package's layout to plot")
    matplotlib.use("Agg")
    import numpy
    from matplotlib import pyplot

    names = sorted({one["projection"] for one in found["experts"]}, reverse=False)
    figure, axes = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        rows = [one for one in found["experts"] if one["projection"] == name]
        picture = numpy.full((len(rows), 1 + max(max(one["experts"]) for one in rows)), numpy.nan)
        for position, one in enumerate(rows):
            picture[position, one["experts"]] = one["norms"]
        image = axis.imshow(picture, aspect="auto", interpolation="nearest", vmin=0)
        axis.set(title=f"{name}: norm of the delta", xlabel="expert", ylabel="layer with experts")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
