"""How a base model holds its experts. `find_experts` is the only question the rest of the package asks."""

from __future__ import annotations

from torch import nn

from .modulelist import describe_modules
from .spec import TARGETS, ExpertsSpec, Part, ProjectionSpec
from .stacked import describe_stacked

__all__ = ["TARGETS", "ExpertsSpec", "Part", "ProjectionSpec", "describe", "find_experts"]


def describe(name: str, module: nn.Module, parent: nn.Module) -> ExpertsSpec | None:
    """The spec of one module, `None` if it holds no experts.

    Args: name: its path in the model. parent: the module that holds it.
    """
    if "original_module" in module._modules:  # `modules_to_save` of PEFT: it shows the tensors of what it wraps
        return None
    return describe_stacked(name, module) or describe_modules(name, module, parent)


def find_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """Path -> spec of every experts module of a model. A `spec.refused` says why one cannot be adapted."""
    found: dict[str, ExpertsSpec] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix) for prefix in inside):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        spec = describe(name, module, parent)
        if spec is not None:
            found[name] = spec
            inside.append(name + ".")
    return found
