"""Which experts modules of a model a config adapts, and what is said where it names none."""

from __future__ import annotations

import copy
import re

from torch import nn

from .compat import ExcludedModule, check_target_module_exists
from .config import MoELoraConfig
from .layer import MoELoraLayer
from .layouts import ExpertsSpec, find_experts
from .ops.grouped import log_once
from .settings import adapted_experts, layer_number, targeted_projections

# Names of the linears of an expert, on some layout.
_OF_EXPERTS = {
    "experts",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "w1",
    "w2",
    "w3",
    "fc1",
    "fc2",
    "wi",
    "wo",
}


def all_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """Path -> spec of all experts modules, adapted already or not."""
    found = {name: module.spec for name, module in model.named_modules() if isinstance(module, MoELoraLayer)}
    return found | {name: spec for name, spec in find_experts(model).items() if not is_inside(name, found)}


def is_inside(name: str, experts: dict[str, ExpertsSpec]) -> bool:
    """Whether a path is that of an experts module or of something below one."""
    return any(name == one or name.startswith(f"{one}.") for one in experts)


def targeted_experts(
    model: nn.Module, config: MoELoraConfig, experts: dict[str, ExpertsSpec]
) -> dict[str, ExpertsSpec]:
    """Those of `experts` that a config adapts. Raises `ValueError` where they cannot be adapted."""
    if not config.expert_targets:
        return {}
    if not experts:
        raise ValueError(_no_experts(model))
    _check_layers(config, experts)
    targets: dict[str, ExpertsSpec] = {}
    for name, spec in experts.items():
        if not asks_for(config, name):
            continue
        if spec.refused is not None:
            raise ValueError(
                f"{name} ({type(model.get_submodule(name)).__name__}) cannot be adapted: {spec.refused}. Exclude "
                f"it with `exclude_modules`, or set `target_experts=[]`."
            )
        if targeted_projections(config, spec) and adapted_experts(config, spec, name) != ():
            targets[name] = spec
    if not targets and config.expert_indices is not None:
        raise ValueError(
            f"MoELoraConfig: `expert_indices={config.expert_indices}` leaves no expert to adapt. Name experts, or "
            "set `target_experts=[]` to adapt linears alone."
        )
    return targets


def asks_for(config: MoELoraConfig, name: str) -> bool:
    """Whether `exclude_modules`, `modules_to_save` and `layers_to_transform` leave an experts module in."""
    own = copy.copy(config)
    own.target_modules = {name.rpartition(".")[2]}  # a full name would go past `layers_to_transform`
    found = check_target_module_exists(own, name)
    return bool(found) and not isinstance(found, ExcludedModule)


def check_target_modules(model: nn.Module, config: MoELoraConfig, experts: dict[str, ExpertsSpec]) -> None:
    """Raise `ValueError` if `target_modules` names no linear at all, and say which of its entries name none.

    PEFT looks only whether anything is adapted, which the experts always are. Names of an expert's own linears
    are no mistake: whoever lists them wants the experts adapted.
    """
    wanted = config.target_modules
    if not wanted or wanted == "all-linear" or config.file_shapes is not None:
        return
    outside = [name for name, _ in model.named_modules() if name and not is_inside(name, experts)]
    if isinstance(wanted, str):
        entries = [wanted]
        missing = [] if any(re.fullmatch(wanted, name) for name in outside) else [wanted]
    else:
        entries = sorted(wanted)
        missing = [one for one in entries if not any(n == one or n.endswith(f".{one}") for n in outside)]
    missing = [one for one in missing if one.rpartition(".")[2] not in _OF_EXPERTS]
    if missing and len(missing) == len(entries):
        raise ValueError(
            f"MoELoraConfig: `target_modules` matches no module outside the experts: {missing}. Name linears of "
            "this model, or set `target_modules=[]` to adapt experts alone."
        )
    if missing:
        log_once(f"target_modules: {missing} match no module of {type(model).__name__} outside its experts")


def _no_experts(model: nn.Module) -> str:
    names = [
        name for name, _ in model.named_modules() if any(word in name.lower() for word in ("expert", "moe", "mlp"))
    ]
    near = ", ".join(names[:6]) or ", ".join(name for name, _ in list(model.named_modules())[1:7])
    return (
        f"{type(model).__name__} has no routed experts that peft-moe knows. Looked for stacked 3-D parameters "
        "(gate_up_proj or up_proj with down_proj) and for lists of expert MLPs named `experts`; the nearest modules "
        f"are {near}. Set `target_experts=[]` to adapt linears alone."
    )


def _check_layers(config: MoELoraConfig, experts: dict[str, ExpertsSpec]) -> None:
    """Raise `ValueError` if `expert_indices` names a layer that has no experts."""
    if isinstance(config.expert_indices, dict):
        known = {layer_number(name) for name in experts}
        unknown = sorted(set(config.expert_indices) - known)  # type: ignore[operator]
        if unknown:
            raise ValueError(
                f"MoELoraConfig: `expert_indices` names layers {unknown}, which have no experts; expected layers among "
                f"{sorted(number for number in known if number is not None)}."
            )
