"""What an adapter's two files say, worked out in float64 from plain JSON and safetensors' own loader.

Shares no code with the package. For the architecture of `seeds`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_PREFIX = "base_model.model."


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Everything in a file, as safetensors reads it."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def merged(base: dict[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """The checkpoint with the adapter in it, float64. Args: base: single experts under their own names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {
        key.removeprefix(_PREFIX): value.double()
        for key, value in tensors_of(adapter / "adapter_model.safetensors").items()
    }
    out = {key: value.double() for key, value in base.items()}
    for key, value in found.items():  # modules that are saved whole
        if "lora_" not in key:
            out[key] = value
    for key, a in found.items():
        if key.endswith(".lora_A.weight"):
            path = key.removesuffix(".lora_A.weight")
            alpha = _first(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
            scale = _scale(config, alpha, _first(config.get("rank_pattern"), path, config.get("r", 8)))
            delta = scale * found[f"{path}.lora_B.weight"] @ a
            out[f"{path}.weight"] = _apply(out[f"{path}.weight"], delta, found.get(f"{path}.lora_magnitude_vector"))
    modules = {key.rsplit(".", 2)[0] for key in found if re.search(r"_proj\.lora_[AB]$", key)}
    for module in modules:
        _experts(out, found, config, module)
    return out


def _experts(out: dict[str, Tensor], found: dict[str, Tensor], config: dict[str, Any], module: str) -> None:
    count = sum(key.startswith(f"{module}.") and key.endswith(".down_proj.weight") for key in out)
    indices = config.get("expert_indices")
    if isinstance(indices, dict):
        indices = next((value for key, value in indices.items() if int(key) == 0), [])
    adapted = sorted(range(count) if indices is None else indices)
    ranks, scales = [], []
    for expert in adapted:
        name = f"{module}.{expert}"
        rank = _first(config.get("expert_rank_pattern"), name, config.get("expert_r") or config.get("r", 8))
        alpha = config.get("lora_alpha", 8) if config.get("expert_alpha") is None else config["expert_alpha"]
        ranks.append(rank)
        scales.append(_scale(config, _first(config.get("expert_alpha_pattern"), name, alpha), rank))
    for position, expert in enumerate(adapted):
        for slot, parts in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
            slots = [slot] if f"{module}.{slot}.lora_A" in found else parts
            if f"{module}.{slots[0]}.lora_A" not in found:
                continue
            deltas, sizes = [], []
            for one in slots:
                a, b = (_of(found[f"{module}.{one}.lora_{x}"], position, ranks, x) for x in "AB")
                deltas.append(scales[position] * b @ a)
                size = found.get(f"{module}.{one}.lora_magnitude_vector")
                sizes.append(None if size is None else size[position])
            names = [f"{module}.{expert}.{part}.weight" for part in parts]
            weight = torch.cat([out[name] for name in names])
            size = None if sizes[0] is None else torch.cat(sizes)
            new = _apply(weight, torch.cat(deltas), size)
            for name, rows in zip(names, new.split([out[name].shape[0] for name in names]), strict=True):
                out[name] = rows


def _of(factor: Tensor, position: int, ranks: list[int], kind: str) -> Tensor:
    if factor.dim() == 3:
        return factor[position if factor.shape[0] > 1 else 0]
    start = sum(ranks[:position])
    rows = factor[start : start + ranks[position]]
    return rows if kind == "A" else rows.T


def _apply(weight: Tensor, delta: Tensor, size: Tensor | None) -> Tensor:
    if size is None:
        return weight + delta
    whole = weight + delta
    return size.reshape(-1, 1) * whole / whole.norm(dim=1, keepdim=True)


def _first(patterns: Any, name: str, default: Any) -> Any:
    pairs = patterns.items() if isinstance(patterns, dict) else patterns or ()
    return next((value for pattern, value in pairs if re.match(rf"(.*\.)?({pattern})$", name)), default)


def _scale(config: dict[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
