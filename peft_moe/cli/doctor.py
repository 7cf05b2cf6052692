"""`peft-moe doctor`."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer

from .. import __version__
from .output import AsJson, command, facts, table

_ASKED = ("peft-moe", "torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "triton", "kernels")
_DTYPES = ("bfloat16", "float16", "float32")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "peft-moe doctor", "peft-moe doctor --json")
    def doctor(as_json: AsJson = False) -> Any:
        """Say which versions and devices there are, which backend would run on them, and why."""
        result = diagnose()
        if not as_json:
            facts({"python": platform.python_version(), "system": platform.platform()})
            table("Packages", ("package", "installed", "needed"), [
                (one["name"], one["version"] or "-", one["needed"] or ("optional" if result["compared"] else "-"))
                for one in result["packages"]
            ])  # fmt: skip
            table("Backends", ("device", "dtype", "experts", "why"), [
                (one["device"], one["dtype"], one["backend"], one["why"]) for one in result["backends"]
            ])  # fmt: skip
            for problem in result["problems"]:
                facts({"problem": problem})
            if not result["compared"]:
                facts({"note": "peft-moe is not installed but run from its sources: versions were not compared"})
            elif result["ok"]:
                facts({"result": "everything that is needed is there"})
        return result


def diagnose() -> dict[str, Any]:
    """Versions, devices, backends and problems."""
    packages = [_package(name) for name in _ASKED]
    problems = [
        f"{one['name']} {one['version'] or 'is missing'}: {one['needed']} is needed; pip install -U {one['name']}"
        for one in packages
        if not one["fits"]
    ]
    return {
        "ok": not problems,
        "compared": bool(_needed()),
        "python": platform.python_version(),
        "packages": packages,
        "backends": _backends(),
        "problems": problems,
    }


def _package(name: str) -> dict[str, Any]:
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = __version__ if name == "peft-moe" else None  # run from a folder of sources
    needed = _needed().get(name, "")
    fits = bool(found) and _fits(found or "", needed) if needed else True
    return {"name": name, "version": found, "needed": needed, "fits": fits}


def _needed() -> dict[str, str]:
    """Required package -> the versions that will do."""
    found = {}
    try:
        lines = requires("peft-moe") or []
    except PackageNotFoundError:  # run from a folder of sources
        lines = []
    for line in lines:
        if "extra ==" not in line:
            name, rest = re.match(r"([\w-]+)\s*(.*)", line.partition(";")[0]).groups()  # type: ignore[union-attr]
            found[name] = rest.strip()
    return found


def _fits(found: str, needed: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(needed).contains(found, prereleases=True)


def _backends() -> list[dict[str, str]]:
    import torch

    devices = ["cpu", *[f"cuda:{index}" for index in range(torch.cuda.device_count())]]
    found = []
    for name in devices:
        device = torch.device(name)
        shown = name if device.type == "cpu" else f"{name} ({torch.cuda.get_device_name(device)})"
        for dtype in _DTYPES:
            backend, why = _backend(device, getattr(torch, dtype))
            found.append({"device": shown, "dtype": dtype, "backend": backend, "why": why})
    return found


def _backend(device: Any, dtype: Any) -> tuple[str, str]:
    """What `experts_backend="auto"` takes for ranks that kernels know, and the reason."""
    from ..ops import backends, grouped

    chosen = backends.choose("auto", device, dtype, 16, 128)
    if chosen == "triton":
        return "triton", f"16 bits on this GPU, rank up to {backends.MAX_KERNEL_RANK}; above grouped_mm"
    reasons: list[str] = []
    if device.type != "cuda":
        reasons.append("no GPU")
    elif dtype.itemsize != 2:
        reasons.append("the kernels know 16-bit weights alone")
    elif not backends.triton_runs(device, dtype):
        reasons.append("triton is missing, or the GPU is older than compute capability 8.0")
    why = grouped.native_problem(device, dtype)
    if why is None:
        return "grouped_mm", "; ".join([*reasons, "torch's own grouped product was tried and is right"])
    return "loop", "; ".join([*reasons, why])
