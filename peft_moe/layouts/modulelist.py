"""Experts held as a list of MLP modules: transformers 4, remote code, and the few such models of transformers 5.

For a known block the whole block runs grouped (`blocks.py`). For any other block each expert's linears are adapted
where they stand, one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops.activation import SILU_GATED
from .blocks import expert_activation, expert_leaf_names, find_block_forward
from .spec import ExpertsSpec, Part, ProjectionSpec
from .stacked import is_silu


def _activation(base: nn.Module) -> Callable[[Tensor], Tensor]:
    found = expert_activation(next(iter(base.children())))
    assert found is not None  # a block whose experts have none is not run grouped
    return found


def _gated(base: nn.Module, pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return _activation(base)(gate) * up


def _ungated(base: nn.Module, pre: Tensor) -> Tensor:
    return _activation(base)(pre)


def _linear_shape(linear: Any) -> tuple[int, int]:
    return linear.out_features, linear.in_features


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
    children = {child_name: child for child_name, child in module.named_children() if child is not None}
    if not children:
        return None
    if all(_is_linear(child) for child in children.values()):
        return _single_linears(children)
    leaves = {child_name: expert_leaf_names(child) for child_name, child in children.items()}
    experts = tuple(child_name for child_name, found in leaves.items() if found is not None)
    if not experts:
        kinds = sorted({type(child).__name__ for child in children.values()})
        return _refuse(
            f"none of its experts ({', '.join(kinds)}) has linears under the known names (gate_proj, up_proj, down_proj"
            " or w1, w3, w2): adapt its linears through target_modules"
        )
    if len({leaves[expert] for expert in experts}) > 1:
        return _refuse(f"its experts have linears under different names: {sorted({str(leaves[e]) for e in experts})}")
    gate, up, down = leaves[experts[0]]  # type: ignore[misc]
    first = children[experts[0]]
    names = [leaf_name for leaf_name in (gate, up, down) if leaf_name is not None]
    shapes = {tuple(_linear_shape(getattr(children[e], leaf_name)) for leaf_name in names) for e in experts}
    if len(shapes) > 1:
        return _refuse(f"its experts differ in shape: {sorted(shapes)}")
    inner, hidden = _linear_shape(getattr(first, up))
    has_bias = any(getattr(getattr(first, leaf_name), "bias", None) is not None for leaf_name in names)
    activation = expert_activation(first)
    block_forward = None if has_bias or activation is None else find_block_forward(block)
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
        activation=_ungated if gate is None else _gated,
        closed_form=SILU_GATED if gate is not None and is_silu(activation) else None,
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
