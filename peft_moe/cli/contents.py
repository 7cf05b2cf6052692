"""What an adapter holds, from its files alone: layers, ranks, norms, experts that do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import native
from ..checkpoint.merge.binding import AdapterFiles
from ..checkpoint.merge.deltas import ExpertFactors
from ..config import MoELoraConfig
from ..layouts import ExpertsSpec, ProjectionSpec
from ..settings import AdapterSettings, adapted_experts, nominal_scaling, resolve

_MOST = 4096  # experts of a module


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
    modules: dict[str, dict[tuple[str, str], str]] = {}
    for key in sorted(native.expert_keys(files.tensors.entries), key=_natural):
        name, slot, factor = native.split_expert_key(native.full_key(key).removeprefix(native.PREFIX))
        modules.setdefault(name, {})[slot, factor] = key
    cache: dict[ExpertFactors, Any] = {}
    for name, keys in modules.items():
        spec = _spec(files, name, keys)
        settings = resolve(files.config, spec, name)
        for projection in spec.projections:
            slots = settings.slots(projection)
            mine = {where: key for where, key in keys.items() if where[0] in slots}
            _check_shapes(files, mine, settings, projection, spec.num_experts)
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


def _check_shapes(
    files: AdapterFiles,
    keys: dict[tuple[str, str], str],
    settings: AdapterSettings,
    projection: ProjectionSpec,
    count: int,
) -> None:
    """Raise `ValueError` where the tensors of a projection are not what the config says of them."""
    found = {where: files.tensors.entries[key].shape for where, key in keys.items()}
    expected = {
        (slot, factor): shape
        for slot in settings.slots(projection)
        for factor, shape in settings.shapes(projection, slot, count).items()
    }
    if found != expected:
        wrong = sorted(where for where in {*found, *expected} if found.get(where) != expected.get(where))
        raise ValueError(
            f"{files.tensors.path}: {'.'.join(wrong[0])} (as {keys.get(wrong[0])}): found {found.get(wrong[0])}, and "
            f"adapter_config.json says {expected.get(wrong[0])}"
        )


def _spec(files: AdapterFiles, name: str, keys: dict[tuple[str, str], str]) -> ExpertsSpec:
    """The layout of a module as far as an adapter's shapes tell it."""
    shapes = {where: files.tensors.entries[key].shape for where, key in keys.items()}
    names = [slot for slot, factor in shapes if factor == "lora_B"]
    for slot, factor in shapes:
        a, b = (shapes.get((slot, one), ()) for one in ("lora_A", "lora_B"))
        if len(a) not in (2, 3) or len(a) != len(b) or ("gate_proj" in names) > ("up_proj" in names):
            raise ValueError(
                f"{files.tensors.path}: {keys[slot, factor]}: found factors of shapes {a} and {b}, expected (experts, "
                "r, in) and (experts, out, r), or (ranks, in) and (ranks, out)"
            )
        if len(a) == 3 and max(a[0], b[0]) > _MOST:
            raise ValueError(f"{files.tensors.path}: {keys[slot, factor]}: found {max(a[0], b[0])} experts")
    slots = {slot: (shapes[slot, "lora_B"][1], shapes[slot, "lora_A"][-1]) for slot in names}
    projections = []
    if "gate_proj" in slots:
        out, in_features = slots.pop("gate_proj")[0] + slots["up_proj"][0], slots.pop("up_proj")[1]
        projections.append(ProjectionSpec("gate_up_proj", "gate_up_proj", out, in_features, (), gate="concatenated"))
    for slot, (out, in_features) in slots.items():
        target = "down_proj" if slot == "down_proj" else "gate_up_proj"
        projections.append(ProjectionSpec(slot, target, out, in_features, ()))
    projections.sort(key=lambda one: one.target == "down_proj")
    first = next(iter(slots), "gate_proj")
    a, b = shapes[first, "lora_A"], shapes[first, "lora_B"]
    chosen = adapted_experts(files.config, ExpertsSpec(_MOST, (), None), name)
    if chosen == ():
        raise ValueError(f"{files.tensors.path}: {name}: found tensors, and `expert_indices` of its config names none")
    if chosen is not None:
        count = chosen[-1] + 1
    elif len(a) == 3:
        count = max(a[0], b[0])
    else:
        ranks = resolve(files.config, ExpertsSpec(_MOST, tuple(projections), None), name).ranks
        totals = list(accumulate(ranks))
        if a[0] not in totals:
            raise ValueError(
                f"{keys[first, 'lora_A']}: {a[0]} rows fit no number of experts of the ranks in adapter_config.json"
            )
        count = totals.index(a[0]) + 1
    return ExpertsSpec(count, tuple(projections), None)


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
    for key in sorted(files.tensors.entries, key=_natural):
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


def _natural(key: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]
