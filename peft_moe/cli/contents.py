"""What an adapter holds, from its files alone: layers, ranks, norms, experts that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import native
from ..checkpoint.merge.binding import AdapterFiles
from ..checkpoint.merge.deltas import ExpertFactors
from ..checkpoint.shapes import modules_of, natural, spec_of
from ..config import MoELoraConfig
from ..settings import nominal_scaling, resolve


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Everything `peft-moe inspect` shows of an adapter. Raises `ValueError` for files that cannot be read."""
    files = AdapterFiles(folder, stock=True)
    config, entries = files.config, files.tensors.entries
    layers = list(_layers(files)) if isinstance(config, MoELoraConfig) else []
    linears = [*_linears(files)]
    mine = isinstance(config, MoELoraConfig)
    stock = [] if mine or not getattr(config, "target_parameters", None) else sorted(config.target_parameters)
    return {
        "kind": "adapter",
        "path": str(folder),
        "type": str(getattr(config.peft_type, "value", config.peft_type)),
        "layout": config.layout if mine else ("PEFT target_parameters" if stock else "linears alone"),
        "base": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "dora": bool(config.use_dora),
        "tensors": len(entries),
        "parameters": sum(torch.Size(one.shape).numel() for one in entries.values()),
        "bytes": sum(one.nbytes for one in entries.values()),
        "dtypes": sorted({one.code for one in entries.values()}),
        "stock_expert_parameters": stock,
        "experts": layers,
        "linears": linears,
        "dead": [f"{one['module']}.{one['projection']}.{e}" for one in layers for e in one["dead"]]
        + [one["module"] for one in linears if one["norm"] == 0],
        "not_finite": [one["module"] for one in [*layers, *linears] if not one["finite"]],
    }


def _layers(files: AdapterFiles) -> Iterator[dict[str, Any]]:
    cache: dict[ExpertFactors, Any] = {}
    for name, keys in modules_of(files).items():
        spec = spec_of(files, name, keys)
        settings = resolve(files.config, spec, name)
        found = {native.full_key(key): files.tensors.entries[key].shape for key in keys.values()}
        native.check_shapes(found, native.expected_shapes(name, spec, settings), files.name)
        for projection in spec.projections:
            slots = settings.slots(projection)
            mine = {where: key for where, key in keys.items() if where[0] in slots}
            factors = ExpertFactors(
                files.tensors, mine, settings, projection, nominal_scaling(files.config), spec.num_experts, cache
            )
            a, b, _ = factors.load(torch.device("cpu"))
            norms = delta_norms(a, b)
            adapted = list(settings.adapted(spec.num_experts))
            yield {
                "module": name,
                "projection": projection.name,
                "experts": adapted,
                "ranks": list(settings.ranks),
                "shape": [projection.out_features, projection.in_features],
                "norms": norms.tolist(),
                "norm": float(norms.square().sum().sqrt()),
                "dead": [expert for expert, norm in zip(adapted, norms.tolist(), strict=True) if norm == 0],
                "finite": bool(torch.isfinite(norms).all()),
            }


def delta_norms(a: Tensor, b: Tensor) -> Tensor:
    """`(E,)`: Frobenius norms of `B A`, from the Gram matrices of A `(E, r, in)` and B `(E, out, r)`.

    From the product itself where that is smaller, so that memory is bounded by that of the factors.
    """
    a, b = a.double(), b.double()
    if a.shape[1] ** 2 > a.shape[2] * b.shape[1]:
        return (b @ a).square().sum((1, 2)).sqrt()
    return ((a @ a.mT) * (b.mT @ b)).sum((1, 2)).clamp(min=0).sqrt()


def _linears(files: AdapterFiles) -> Iterator[dict[str, Any]]:
    expert = native.expert_keys(files.tensors.entries)
    stock = bool(getattr(files.config, "target_parameters", None))
    for key in sorted(files.tensors.entries, key=natural):
        other = key.replace(".lora_A.", ".lora_B.")
        if key in expert or other == key or other not in files.tensors.entries or (stock and ".experts." in key):
            continue
        path = native.full_key(key).removeprefix(native.PREFIX).partition(".lora_A.")[0]
        a, b = files.tensors.read(key), files.tensors.read(other)
        if a.dim() != 2 or b.dim() != 2:
            continue
        if a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{files.tensors.path}: {key}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (r, "
                "in) and (out, r)"
            )
        norm = float(delta_norms(a[None], b[None])[0]) * files.linear_scaling(path)
        yield {
            "module": path,
            "rank": a.shape[0],
            "shape": [b.shape[0], a.shape[1]],
            "norm": norm,
            "finite": norm == norm and norm != float("inf"),
        }
