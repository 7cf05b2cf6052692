"""`add_weighted_adapter` on experts: PEFT's combinations, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from .adapter import factors, slot_factors
from .config import MoELoraConfig
from .layouts import TARGETS, ProjectionSpec
from .settings import layer_number
from .targets import asks_for

if TYPE_CHECKING:
    from .layer import MoELoraLayer
    from .model import MoELoraModel


_ADDING = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # add factors, or deltas with "_svd"
_COMBINATIONS = ("svd", "cat", *_ADDING, *(f"{name}_svd" for name in _ADDING if name != "linear"))


@dataclass
class Plan:
    """One combination of adapters. `rank`, `targets`, `indices`, `split` are those of the new adapter's experts.

    layers: `layers_to_transform` of the new adapter, on linears too.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    combination: str
    rank: int
    targets: list[str]
    indices: dict[int, list[int]] | None
    split: bool
    layers: list[int] | int | None
    options: dict[str, Any] = field(default_factory=dict)


def plan(
    model: MoELoraModel, adapters: Sequence[str], weights: Sequence[float], combination: str, **options: Any
) -> Plan:
    """What the new adapter looks like on experts.

    Raises `ValueError` where adapters cannot be combined: DoRA on experts, different ranks with a combination that adds
    factors, or modules that one config cannot describe. Nothing is changed then.
    """
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown:
        raise ValueError(f"Adapter {unknown[0]} does not exist, found {', '.join(model.peft_config)}")
    combination = "linear" if len(adapters) == 1 else combination
    if combination not in _COMBINATIONS:
        raise ValueError(f"Invalid combination_type: {combination}, expected one of {', '.join(_COMBINATIONS)}")
    if len(weights) != len(adapters) or not adapters:
        raise ValueError(
            f"add_weighted_adapter: {len(adapters)} adapters and {len(weights)} weights; expected one weight each."
        )
    if any(word in combination for word in ("ties", "dare", "prune")) and options.get("density") is None:
        raise ValueError(f"combination_type={combination!r} needs `density`, the share of values to keep.")
    having = [
        (layer, name, layer.adapters[name])
        for layer in model.expert_layers
        for name in adapters
        if name in layer.adapters
    ]
    for layer, name, settings in having:
        if settings.use_dora:
            raise ValueError(f"{layer.name}: adapter {name!r} uses DoRA, whose experts cannot be combined by weights")
    split = bool(having) and all(settings.split_gate_up for _, _, settings in having)
    ranks = {
        name: max((s.rank * (2 if s.split_gate_up and not split else 1) for _, n, s in having if n == name), default=0)
        for name in adapters
    }
    present = [rank for rank in ranks.values() if rank]
    if combination == "cat":
        rank = sum(present)
    elif combination.endswith("svd"):
        rank = options.get("svd_rank") or max(present, default=0)
    else:
        rank = max(present, default=0)
        if len(set(present)) > 1:
            raise ValueError(
                f"combination_type={combination!r} adds factors, which needs one rank for all adapters; their expert "
                f"adapters have {ranks}. Use 'cat' or 'svd'."
            )
    covered = {target for layer, _, s in having for target in TARGETS if _targets(layer, s.projections, target)}
    indices: dict[int, list[int]] | None = {}
    for layer, _, settings in having:
        number = layer_number(layer.name)
        if settings.experts is None or number is None:
            indices = None
            break
        assert indices is not None
        indices[number] = sorted({*indices.get(number, ()), *settings.experts})
    configs = [model.peft_config[name] for name in adapters]
    layers = _layers(configs) if configs else None
    for layer, name, _ in having:
        if not asks_for(replace(configs[0], layers_to_transform=layers), layer.name):
            raise ValueError(
                f"{layer.name}: adapter {name!r} is on these experts, and the new adapter takes its modules from the "
                f"config of {adapters[0]!r}, which leaves them out (`exclude_modules`, `modules_to_save` or "
                "`layers_pattern`). Name an adapter that has them first, or combine adapters on the same modules."
            )
    return Plan(
        adapters=list(adapters),
        weights=list(weights),
        combination=combination,
        rank=rank,
        targets=[target for target in TARGETS if target in covered],
        indices=indices,
        split=split,
        layers=layers,
        options=options,
    )


def _layers(configs: Sequence[MoELoraConfig]) -> list[int] | int | None:
    """The layers of all adapters together; `None`: all. Raises `ValueError` where their linears do not allow that."""
    given = [config.layers_to_transform for config in configs]
    if all(one == given[0] for one in given):
        return given[0]
    if any(config.target_modules != configs[0].target_modules for config in configs):
        raise ValueError(
            "adapters that differ both in `layers_to_transform` and in `target_modules` cannot be combined: the new "
            "adapter would be on linears that none of them adapts."
        )
    if any(one is None or one == [] for one in given):
        return None
    return sorted({layer for one in given for layer in (one if isinstance(one, list) else [one])})


def _targets(layer: MoELoraLayer, names: Sequence[str], target: str) -> bool:
    return any(one.name in names and one.target == target for one in layer.spec.projections)


@contextmanager
def in_progress(model: MoELoraModel, current: Plan) -> Iterator[None]:
    """While PEFT combines the linears: it injects the new adapter, and must pass over the experts' parameters."""
    layers = model.expert_layers
    model.weighting = current
    for layer in layers:
        layer.hidden_from_lora_model = True
    try:
        yield
    finally:
        model.weighting = None
        for layer in layers:
            layer.hidden_from_lora_model = False


def adjusted(model: MoELoraModel, config: MoELoraConfig) -> MoELoraConfig:
    """The config of an adapter being added: during a combination that of its plan, else itself."""
    current = getattr(model, "weighting", None)
    if current is None:
        return config
    changes: dict[str, Any] = {
        "target_experts": current.targets,
        "expert_rank_pattern": {},
        "expert_alpha_pattern": {},
        "expert_indices": current.indices,
        "split_gate_up": current.split,
        "share_experts": None,
        "init_lora_weights": True,
        "use_rslora": False,  # the scalings are in the factors: that of the new adapter is alpha / r = 1
        "layers_to_transform": current.layers,
    }
    if current.rank:
        changes |= {"expert_r": current.rank, "expert_alpha": float(current.rank)}
    return replace(config, **changes)


@torch.no_grad()
def combine(layer: MoELoraLayer, name: str, current: Plan) -> None:
    """Fill the parameters of the new adapter on one layer."""
    if name not in layer.adapters:
        return
    settings = layer.adapters[name]
    for projection in layer.spec.projections:
        if projection.name not in settings.projections:
            continue
        for slot in settings.slots(projection):
            child = layer.projections[slot]
            a, b = child.lora_A[name].data, child.lora_B[name].data
            a.zero_()
            b.zero_()
            for position, expert in enumerate(settings.adapted(layer.spec.num_experts)):
                new_a, new_b = _combine_expert(layer, projection, slot, expert, current)
                a[position, : new_a.shape[0]] = new_a.to(a)
                b[position, :, : new_b.shape[1]] = new_b.to(b)


def _combine_expert(
    layer: MoELoraLayer, projection: ProjectionSpec, slot: str, expert: int, current: Plan
) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    shares: list[tuple[float, float]] = []  # (weight, scaling) of each adapter that has this expert
    for name, weight in zip(current.adapters, current.weights, strict=True):
        settings = layer.adapters.get(name)
        if settings is None or projection.name not in settings.projections:
            continue
        experts = settings.adapted(layer.spec.num_experts)
        if expert not in experts:
            continue
        position = list(experts).index(expert)
        unscaled = replace(settings, factor=1.0, scaling=None)
        if slot in settings.slots(projection):
            a, b = slot_factors(layer.projections[slot], name, unscaled, 1.0)
        else:
            a, b = factors(layer.projections, name, unscaled, 1.0, projection)
        found.append((a[position].float(), b[position].float()))
        shares.append((float(weight), float(settings.expert_scaling(position, layer.scaling[name]))))
    if not found:
        return torch.zeros(0, projection.in_features), torch.zeros(projection.out_features, 0)
    scales = [weight * scaling for weight, scaling in shares]
    if current.combination == "cat":
        a = torch.cat([a * scale for (a, _), scale in zip(found, scales, strict=True)])
        return a, torch.cat([b for _, b in found], dim=1)
    device = found[0][0].device
    if current.combination.endswith("svd"):
        deltas = [scaling * (b @ a) for (_, scaling), (a, b) in zip(shares, found, strict=True)]
        weights = torch.tensor([weight for weight, _ in shares], device=device)
        base = current.combination.removesuffix("svd").removesuffix("_") or "linear"
        return _svd(_add(base, deltas, weights, current.options), current)
    found = [_padded(a, b, current.rank) for a, b in found]
    signs = torch.tensor([1.0 if scale >= 0 else -1.0 for scale in scales], device=device)
    roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales], device=device)
    a = _add(current.combination, [a for a, _ in found], roots * signs, current.options)
    return a, _add(current.combination, [b for _, b in found], roots, current.options)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - a.shape[0]
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))


def _add(combination: str, tensors: list[Tensor], weights: Tensor, options: dict[str, Any]) -> Tensor:
    density, sign = options.get("density"), options.get("majority_sign_method", "total")
    if combination == "linear":
        return task_arithmetic(tensors, weights)
    if combination == "ties":
        return ties(tensors, weights, density, sign)
    if combination == "dare_linear":
        return dare_linear(tensors, weights, density)
    if combination == "dare_ties":
        return dare_ties(tensors, weights, density, sign)
    if combination == "magnitude_prune":
        return magnitude_prune(tensors, weights, density)
    raise ValueError(f"Invalid combination_type: {combination}")


def _svd(delta: Tensor, current: Plan) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False, driver=current.options.get("svd_driver"))
    u, vh = u[:, : current.rank] * s[: current.rank], vh[: current.rank]
    clamp = current.options.get("svd_clamp")
    if clamp is not None:
        high = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), clamp)
        u, vh = u.clamp(-high, high), vh.clamp(-high, high)
    return vh, u
