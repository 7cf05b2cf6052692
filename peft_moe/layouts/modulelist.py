"""Experts held as a list of MLP modules: transformers 4, remote code, and the few such models of transformers 5.

For a known block the whole block runs grouped (`blocks.py`). For any other block each expert's linears are adapted
where they stand, one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops.activation import SILU_GATED
from .blocks import expert_activation, expert_form, find_block_forward
from .spec import ExpertsSpec, Part, ProjectionSpec
from .stacked import is_silu


def _first(base: nn.Module) -> nn.Module:
    return next(iter(base.children()))


def _activation(base: nn.Module) -> Callable[[Tensor], Tensor]:
    found = expert_activation(_first(base))
    assert found is not None  # `describe_modules` chose by it
    return found


def _gated(base: nn.Module, pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return _activation(base)(gate) * up


def _ungated(base: nn.Module, pre: Tensor) -> Tensor:
    return _activation(base)(pre)


def _fused(base: nn.Module, pre: Tensor) -> Tensor:
    form = expert_form(_first(base))
    assert form is not None
    return form.activation(pre)


def _linear_shape(linear: Any) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _identity(activation: Callable[..., Any]) -> object:
    """Equal for activations that compute the same: modules of one class and settings, or one function."""
    if isinstance(activation, nn.Module):
        return id(activation) if any(True for _ in activation.parameters()) else (type(activation), repr(activation))
    if isinstance(activation, functools.partial):
        return activation.func, repr(sorted(activation.keywords.items()))
    return activation


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")


def _refuse(reason: str) -> ExpertsSpec:
    return ExpertsSpec(0, (), None, refused=reason)


def describe_modules(name: str, module: nn.Module, block: nn.Module) -> ExpertsSpec | None:
    """The spec of a `ModuleList` or `ModuleDict` of experts; `None` if `module` is none.

    Args: name: module path in the model. block: the module that holds `module`.
    """
    leaf = name.rpartition(".")[2]
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not leaf.endswith("experts") or "shared" in leaf:
        return None
    children = {child_name: child for child_name, child in module._modules.items() if child is not None}
    if not children:
        return None
    if all(_is_linear(child) for child in children.values()):
        return _single_linears(children)
    forms = {child_name: form for child_name, child in children.items() if (form := expert_form(child)) is not None}
    if not forms:
        kinds = sorted({type(child).__name__ for child in children.values()})
        return _refuse(
            f"none of its experts ({', '.join(kinds)}) is an MLP of two or three linears and an activation: adapt its "
            "linears through target_modules"
        )
    experts = tuple(forms)
    form, first = forms[experts[0]], children[experts[0]]
    leaves = {(one.gate, one.up, one.down, one.fused) for one in forms.values()}
    if len(leaves) > 1:
        return _refuse(f"its experts are not alike: {sorted(map(str, leaves))}")
    gate, up, down = form.gate, form.up, form.down
    names = [leaf for leaf in (gate, up, down) if leaf is not None]
    shapes = {tuple(_linear_shape(getattr(children[expert], leaf)) for leaf in names) for expert in experts}
    if len(shapes) > 1:
        return _refuse(f"its experts differ in shape: {sorted(shapes)}")
    inner, hidden = _linear_shape(getattr(first, up))
    if len({id(child) for child in children.values()}) < len(children):
        return _refuse("one module stands for several of its experts")
    if len({_identity(one.activation) for one in forms.values()}) > 1:
        return _refuse("its experts differ in activation")
    has_bias = any(getattr(getattr(first, leaf), "bias", None) is not None for leaf in names)
    block_forward = None if has_bias else find_block_forward(block)
    if gate is None:
        projection = ProjectionSpec("up_proj", "gate_up_proj", inner, hidden, (Part(up),))
    else:
        projection = ProjectionSpec(
            "gate_up_proj", "gate_up_proj", 2 * inner, hidden, (Part(gate), Part(up)), gate="concatenated"
        )
    out_features, in_features = _linear_shape(getattr(first, down))
    return ExpertsSpec(
        num_experts=len(experts),
        projections=(projection, ProjectionSpec("down_proj", "down_proj", out_features, in_features, (Part(down),))),
        call=None,
        activation=_fused if form.fused else (_ungated if gate is None else _gated),
        closed_form=SILU_GATED if gate is not None and not form.fused and is_silu(form.activation) else None,
        experts=experts,
        block_forward=block_forward,
        sentinels=len(experts) < len(children),
    )


def _single_linears(children: dict[str, nn.Module]) -> ExpertsSpec:
    """Each expert is one linear (VitPose): a single projection."""
    shapes = {_linear_shape(child) for child in children.values()}
    if len(shapes) > 1:
        return _refuse(f"its experts differ in shape: {sorted(shapes)}")
    out_features, in_features = shapes.pop()
    projection = ProjectionSpec("down_proj", "down_proj", out_features, in_features, (Part(""),))
    return ExpertsSpec(len(children), (projection,), None, experts=tuple(children))
