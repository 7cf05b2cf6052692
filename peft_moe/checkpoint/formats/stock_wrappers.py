"""Which tensors of a stock PEFT adapter belong to which expert parameter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...layouts import ExpertsSpec, find_experts
from .. import native
from .foreign import ForeignAdapter
from .stock_layout import Stack, stacks

_FACTOR = re.compile(r"(.+?)((?:\.base_layer)*)\.lora_(A|B)\.weight")
_SLOTS = ("gate_up_proj", "up_proj", "down_proj")  # in the order in which every known base holds them


@dataclass(frozen=True)
class Wrapper:
    """The tensors of one expert parameter.

    Attributes: module: its path in the file. parameter: its name there. slot: of the native adapter.
        keys: `"lora_A"`, `"lora_B"` as the file calls them -> key. sizes: `(in, out)` of the base, if it is here.
        stack: how the base holds it, where it holds stacks. experts: of the base, if it is here.
    """

    module: str
    parameter: str
    slot: str
    keys: dict[str, str]
    sizes: tuple[int, int] | None = None
    stack: Stack | None = None
    experts: int | None = None


def wrappers(adapter: ForeignAdapter) -> tuple[list[Wrapper], list[str]]:
    """The wrappers of an adapter, and the keys of everything else.

    Raises `ValueError` naming the keys that fit no parameter of `target_parameters`.
    """
    targets = adapter.config.get("target_parameters")
    if not isinstance(targets, list) or not targets or not all(isinstance(one, str) and one for one in targets):
        raise ValueError(
            f"adapter {adapter.name!r}: `target_parameters` is {targets!r} in its config; expected the list of expert "
            "parameters that it adapts. Without it the file does not tell which tensor is whose."
        )
    groups, others = _groups(adapter, targets)
    if not groups:
        raise ValueError(
            f"adapter {adapter.name!r}: no tensors of experts for target_parameters={targets}; expected keys such as "
            f"{native.PREFIX}model.layers.0.{targets[0].rpartition('.')[0] or 'mlp.experts'}.lora_A.weight"
        )
    for target in targets:
        if not any(_wanted(name, [target]) for name in groups):
            raise ValueError(
                f"adapter {adapter.name!r}: it adapts {target!r} of `target_parameters` too, which is no projection of "
                "experts; the native format holds those, and linears by `target_modules`"
            )
    if adapter.base is None:
        found = [one for name, group in groups.items() for one in _by_name(adapter, name, group, targets)]
    else:
        _, found = adapter.base.first(lambda model: _by_model(adapter, model, groups, targets))
    return found, others


def _groups(adapter: ForeignAdapter, targets: list[str]) -> tuple[dict[str, dict[int, dict[str, str]]], list[str]]:
    """Module -> depth (0: outermost) -> factor -> key, and the other keys."""
    owners = {one.rpartition(".")[0] or "experts" for one in targets}
    groups: dict[str, dict[int, dict[str, str]]] = {}
    others = []
    for key in adapter.tensors.entries:
        match = _FACTOR.fullmatch(native.full_key(key).removeprefix(native.PREFIX))
        path = match.group(1) if match else ""
        if match is None or not any(path == one or path.endswith(f".{one}") for one in owners):
            others.append(key)
            continue
        depth = match.group(2).count(".base_layer")
        groups.setdefault(path, {}).setdefault(depth, {})[f"lora_{match.group(3)}"] = key
    for path, group in groups.items():
        for depth in range(max(group) + 1):
            missing = {"lora_A", "lora_B"} - set(group.get(depth, {}))
            if missing:
                where = f"{path}{'.base_layer' * depth}"
                raise ValueError(f"adapter {adapter.name!r}: {native.PREFIX}{where}.{min(missing)}.weight is missing")
    return groups, others


def _wanted(name: str, targets: list[str]) -> list[str]:
    """The parameters of a module that the targets name."""
    found = []
    for target in targets:
        owner, _, leaf = target.rpartition(".")
        if not owner or name == owner or name.endswith(f".{owner}"):
            found.append(leaf)
    return found


def _by_name(adapter: ForeignAdapter, name: str, group: dict[int, dict[str, str]], targets: list[str]) -> list[Wrapper]:
    """Without the base: parameters that are called as their projections are."""
    leaves = _wanted(name, targets)
    unknown = sorted(set(leaves) - set(_SLOTS))
    if unknown:
        adapter.require_base(f"what its parameters {', '.join(unknown)} of {name} hold, only the base tells")
    order = [one for one in _SLOTS if one in leaves]
    return [Wrapper(name, one, one, keys) for one, keys in _assigned(adapter, name, group, order)]


def _assigned(
    adapter: ForeignAdapter, name: str, group: dict[int, dict[str, str]], order: list[str]
) -> list[tuple[str, dict[str, str]]]:
    """Parameter -> keys. Args: order: of the parameters, the innermost wrapper first."""
    if len(order) != len(group):
        raise ValueError(
            f"adapter {adapter.name!r}: {name} has {len(group)} nested pairs of factors, and `target_parameters` names "
            f"{len(order)} of its parameters ({', '.join(order) or 'none'})"
        )
    return [(parameter, group[len(order) - 1 - position]) for position, parameter in enumerate(order)]


def _by_model(
    adapter: ForeignAdapter, model: Any, groups: dict[str, dict[int, dict[str, str]]], targets: list[str]
) -> list[Wrapper]:
    known = {native.canonical(f".{name}."): (name, spec) for name, spec in find_experts(model).items()}
    found = []
    for path, group in groups.items():
        if native.canonical(f".{path}.") not in known:
            raise ValueError(
                f"adapter {adapter.name!r}: {next(iter(group[0].values()))}: its base {type(model).__name__} has no "
                f"experts at {path}; they are at {', '.join(sorted(name for name, _ in known.values())[:3]) or 'none'}"
            )
        name, spec = known[native.canonical(f".{path}.")]
        found += _of_module(adapter, path, group, targets, name, spec, model.get_submodule(name))
    return found


def _of_module(
    adapter: ForeignAdapter, path: str, group: dict[int, dict[str, str]], targets: list[str], name: str,
    spec: ExpertsSpec, module: Any,
) -> list[Wrapper]:  # fmt: skip
    projections = {one.name: one for one in spec.projections}
    held = {} if spec.experts else {one.name: one for one in stacks(name, spec, module)}
    # A list of this version of transformers is a stack of another one, with the projections' own names.
    order = list(held) or [one for one in _SLOTS if one in projections]
    leaves = _wanted(path, targets)
    unknown = sorted(set(leaves) - set(order))
    if unknown:
        raise ValueError(
            f"adapter {adapter.name!r}: it adapts {', '.join(f'{path}.{one}' for one in unknown)}, which the native "
            f"format does not hold: it is none of the expert projections {', '.join(order)}"
        )
    found = []
    for parameter, keys in _assigned(adapter, path, group, [one for one in order if one in leaves]):
        stack = held.get(parameter)
        projection = projections[parameter] if stack is None else stack.projection
        sizes = (projection.in_features, projection.out_features)
        experts = spec.num_experts if stack is None else stack.shape[0]
        found.append(Wrapper(path, parameter, projection.name, keys, sizes, stack, experts))
    return found
