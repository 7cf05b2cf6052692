"""Linears of experts -> native."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...layouts import ExpertsSpec, ProjectionSpec, find_experts
from .. import native
from . import record
from .foreign import ForeignAdapter
from .pairs import Found, Pair, to_native
from .plan import Converted
from .stock_import import check_lora, rank_and_scaling

_LINEARS = {
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip
_KEY = re.compile(r"(.+)\.(\d{1,9})\.([A-Za-z0-9_]+)\.lora_(A|B)\.weight")
_DORA = re.compile(r".+\.experts\.\d{1,9}\.[A-Za-z0-9_]+\.lora_magnitude_vector(\.weight)?")


def linear_of(key: str) -> tuple[str, int, str, str] | None:
    """(module, expert, name of the linear, factor) of a key such as `…experts.3.gate_proj.lora_A.weight`."""
    match = _KEY.fullmatch(native.full_key(key).removeprefix(native.PREFIX))
    if match is None or match.group(1).rpartition(".")[2] != "experts":
        return None
    return match.group(1), int(match.group(2)), match.group(3), f"lora_{match.group(4)}"


@dataclass(frozen=True)
class _Linear:
    """The factors of one linear of one expert. Attributes: name: its path. keys: factor -> key."""

    name: str
    keys: dict[str, str]


_Modules = dict[str, dict[int, dict[str, _Linear]]]  # module -> expert -> slot -> linear


def read(adapter: ForeignAdapter) -> Converted:
    """Exactly: gate and up keep their own A (`split_gate_up`), every expert its own rank and alpha.

    Where not all experts are adapted, the others stay so (`expert_indices`); a linear that is not adapted on some
    expert gets zeros.
    """
    check_lora(adapter)
    modules, others = _collect(adapter)
    pairs: list[Pair] = []
    indices: dict[str, tuple[int, ...]] = {}
    gated = any(slot == "gate_proj" for experts in modules.values() for one in experts.values() for slot in one)
    for name, experts in modules.items():
        spec = _spec(adapter, name)
        chosen = tuple(sorted(experts))
        if chosen != tuple(range(spec.num_experts if spec else len(chosen))):
            indices[name] = chosen
        gated_here = gated if spec is None else any(one.gate is not None for one in spec.projections)
        slots = {slot for one in experts.values() for slot in one}
        if gated_here and slots & {"gate_proj", "up_proj"}:
            slots |= {"gate_proj", "up_proj"}
        elif "up_proj" in slots and spec is None:
            adapter.require_base(f"whether the experts at {name} have a gate, only the base tells")
        ordered = sorted(slots, key=("gate_proj", "up_proj", "down_proj").index)
        pairs += [_pair(adapter, name, slot, [experts[one] for one in chosen]) for slot in ordered]
    split = any(pair.slot == "gate_proj" for pair in pairs)
    found = Found(pairs, others, [], indices, folded=False, fields={"split_gate_up": split})
    return to_native(adapter, found, _joined(adapter, found))


def _spec(adapter: ForeignAdapter, name: str) -> ExpertsSpec | None:
    if adapter.base is None:
        return None

    def find(model: Any) -> ExpertsSpec:
        for path, spec in find_experts(model).items():
            if native.canonical(f".{path}.") == native.canonical(f".{name}."):
                return spec
        raise ValueError(f"adapter {adapter.name!r}: its base {type(model).__name__} has no experts at {name}")

    return adapter.base.first(find)[1]


def _collect(adapter: ForeignAdapter) -> tuple[_Modules, list[str]]:
    """The linears of experts, and the keys of everything else."""
    if adapter.config.get("target_parameters"):
        raise ValueError(f"adapter {adapter.name!r}: its config has `target_parameters`: its format is 'peft'")
    modules: _Modules = {}
    others = []
    for key in adapter.tensors.entries:
        if _DORA.fullmatch(key):
            raise ValueError(f"adapter {adapter.name!r}: {key}: DoRA on linears of experts is not imported")
        found = linear_of(key)
        if found is None:
            others.append(key)
            continue
        name, expert, linear, factor = found
        if linear not in _LINEARS:
            raise ValueError(
                f"adapter {adapter.name!r}: {key}: found the linear {linear!r} of an expert, expected one of "
                f"{', '.join(_LINEARS)}"
            )
        slots = modules.setdefault(name, {}).setdefault(expert, {})
        one = slots.setdefault(_LINEARS[linear], _Linear(f"{name}.{expert}.{linear}", {}))
        one.keys[factor] = key
    if not modules:
        raise ValueError(
            f"adapter {adapter.name!r}: no tensors of experts' linears; expected keys such as "
            f"{native.PREFIX}model.layers.0.mlp.experts.3.gate_proj.lora_A.weight"
        )
    return modules, others


def _pair(adapter: ForeignAdapter, module: str, slot: str, experts: list[dict[str, _Linear]]) -> Pair:
    present = [one[slot] for one in experts if slot in one]
    if not present:  # of gate and up only the other is adapted
        other = "up_proj" if slot == "gate_proj" else "gate_proj"
        given = _pair(adapter, module, other, experts)
        return replace(given, slot=slot, read=lambda factor: torch.zeros_like(given.read(factor)))
    shapes = {one.name: _shapes(adapter, one) for one in present}
    sizes = {(a[1], b[0]) for a, b in shapes.values()}
    if len(sizes) > 1:
        raise ValueError(f"adapter {adapter.name!r}: the linears {slot} of {module} differ in size: {sorted(sizes)}")
    (in_features, out_features), *_ = sizes
    ranks, scalings = [], []
    for one in experts:
        if slot in one:
            rank, scaling = rank_and_scaling(adapter.config, one[slot].name)
            if shapes[one[slot].name][0][0] != rank:
                raise ValueError(
                    f"adapter {adapter.name!r}: {one[slot].keys['lora_A']}: found shape {shapes[one[slot].name][0]}, "
                    f"expected {rank} rows, the rank that its config states"
                )
        else:
            rank, scaling = rank_and_scaling(adapter.config, next(iter(one.values())).name)
        ranks.append(rank)
        scalings.append(scaling)
    dtypes = {factor: _dtype(adapter, [one.keys[factor] for one in present]) for factor in ("lora_A", "lora_B")}

    def stack(factor: str) -> Tensor:
        size = in_features if factor == "lora_A" else out_features
        shape = (len(experts), max(ranks), size) if factor == "lora_A" else (len(experts), size, max(ranks))
        made = torch.zeros(shape, dtype=dtypes[factor])
        for position, one in enumerate(experts):
            if slot in one:
                value = adapter.tensors.read(one[slot].keys[factor])
                made[position][tuple(slice(length) for length in value.shape)] = value
        return made

    return Pair(module, slot, tuple(ranks), tuple(scalings), in_features, out_features, dtypes, stack)


def _shapes(adapter: ForeignAdapter, one: _Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    missing = {"lora_A", "lora_B"} - set(one.keys)
    if missing:
        raise ValueError(f"adapter {adapter.name!r}: {native.PREFIX}{one.name}.{min(missing)}.weight is missing")
    a, b = adapter.shape(one.keys["lora_A"]), adapter.shape(one.keys["lora_B"])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise ValueError(
            f"adapter {adapter.name!r}: {one.keys['lora_A']} and lora_B beside it: found shapes {a} and {b}, expected "
            "(r, in) and (out, r)"
        )
    return a, b


def _dtype(adapter: ForeignAdapter, keys: list[str]) -> torch.dtype:
    found = {adapter.tensors.entries[key].dtype for key in keys}
    if len(found) > 1 or None in found or not all(one.is_floating_point for one in found if one is not None):
        raise ValueError(
            f"adapter {adapter.name!r}: {keys[0]} and its like: found dtypes {found}, expected a floating one"
        )
    (only,) = found
    assert only is not None
    return only


def _joined(adapter: ForeignAdapter, found: Found) -> Found | None:
    """The same with gate and up as one pair, which is how a note counts; `None` without a note."""
    noted = record.read(adapter)
    if noted is None:
        return None
    pairs: list[Pair] = []
    for name, own in found.modules().items():
        by_slot = {pair.slot: pair for pair in own}
        if "gate_proj" in by_slot:
            gate, up = by_slot.pop("gate_proj"), by_slot.pop("up_proj")
            kind = next(
                (one for path, one in noted.gates.items() if native.canonical(path) == native.canonical(name)), None
            )
            pairs.append(_join(gate, up, kind, noted.config.split_gate_up))
        pairs += by_slot.values()
    return replace(found, pairs=pairs)


def _join(gate: Pair, up: Pair, kind: str | None, split: bool) -> Pair:
    rank, out_features = gate.rank, gate.out_features + up.out_features
    projection = ProjectionSpec("gate_up_proj", "gate_up_proj", out_features, gate.in_features, (), gate=kind)

    def read(factor: str) -> Tensor:
        one, other = gate.read(factor), up.read(factor)
        if factor == "lora_A":
            if split:
                return torch.cat((one, other), dim=1)
            if not torch.equal(one, other):
                raise ValueError(f"{gate.module}: gate and up have an A each")
            return one
        made = one.new_zeros(one.shape[0], out_features, 2 * rank if split else rank)
        made[:, projection.gate_rows(up=False), :rank] = one
        made[:, projection.gate_rows(up=True), rank if split else 0 :] = other
        return made

    return replace(gate, slot="gate_up_proj", out_features=out_features, read=read)
