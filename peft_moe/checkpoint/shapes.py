"""What the shapes in an adapter file tell of the experts that it adapts, without the model."""

from __future__ import annotations

from itertools import accumulate

from ..layouts import ExpertsSpec, ProjectionSpec
from ..settings import adapted_experts, resolve
from . import native
from .merge.binding import AdapterFiles

MOST_EXPERTS = 4096  # experts of a module


def modules_of(files: AdapterFiles) -> dict[str, dict[tuple[str, str], str]]:
    """Path of an experts module -> (slot, factor) -> key of every expert tensor of a native adapter."""
    modules: dict[str, dict[tuple[str, str], str]] = {}
    for key in sorted(native.expert_keys(files.tensors.entries), key=natural):
        name, slot, factor = native.split_expert_key(native.full_key(key).removeprefix(native.PREFIX))
        modules.setdefault(name, {})[slot, factor] = key
    return modules


def spec_of(files: AdapterFiles, name: str, keys: dict[tuple[str, str], str]) -> ExpertsSpec:
    """The layout of a module as far as an adapter's shapes tell it.

    What they do not: parts, biases, how the rows of gate and up lie in a fused projection (`gate` is `None` there), and
    experts behind the last adapted one.

    Args: keys: of the module, as `modules_of` gives them.

    Raises `ValueError` for factors without their other half, or of shapes that no experts have.
    """
    shapes = {where: files.tensors.entries[key].shape for where, key in keys.items()}
    names = [slot for slot, factor in shapes if factor == "lora_B"]
    for slot, factor in shapes:
        a, b = (shapes.get((slot, one), ()) for one in ("lora_A", "lora_B"))
        if len(a) not in (2, 3) or len(a) != len(b) or ("gate_proj" in names) > ("up_proj" in names):
            raise ValueError(
                f"{files.tensors.path}: {keys[slot, factor]}: found factors of shapes {a} and {b}, expected (experts, "
                "r, in) and (experts, out, r), or (ranks, in) and (ranks, out)"
            )
        if len(a) == 3 and max(a[0], b[0]) > MOST_EXPERTS:
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
    chosen = adapted_experts(files.config, ExpertsSpec(MOST_EXPERTS, (), None), name)
    if chosen == ():
        raise ValueError(f"{files.tensors.path}: {name}: found tensors, and `expert_indices` of its config names none")
    if chosen is not None:
        count = chosen[-1] + 1
    elif len(a) == 3:
        count = max(a[0], b[0])
    else:
        ranks = resolve(files.config, ExpertsSpec(MOST_EXPERTS, tuple(projections), None), name).ranks
        totals = list(accumulate(ranks))
        if a[0] not in totals:
            raise ValueError(
                f"{files.tensors.path}: {keys[first, 'lora_A']}: {a[0]} rows fit no number of experts of the ranks in "
                "adapter_config.json"
            )
        count = totals.index(a[0]) + 1
    return ExpertsSpec(count, tuple(projections), None)


def natural(key: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in key.split(".")]
