"""What one expert of a `ModuleList` is: the names of its projections and its activation.

An expert is recognised by running its own class's forward on a symbol that records what is done to it. No tensor is
touched and nothing is patched, so this is safe on meta, quantized, offloaded and wrapped experts. A forward that does
anything besides "project, activate, multiply, project" is not recognised, and the caller treats the expert as unknown.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Experts of transformers whose forward branches on dtypes (so no symbol can pass through it), by module and class.
_UNTRACEABLE_NATIVE = {
    ("transformers.models.nllb_moe.modeling_nllb_moe", "NllbMoeDenseActDense"): ("fc1", "fc2", "act"),
    ("transformers.models.switch_transformers.modeling_switch_transformers", "SwitchTransformersDenseActDense"): (
        "wi",
        "wo",
        "act",
    ),
}


@dataclass(frozen=True)
class ExpertForm:
    """One expert MLP: `down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` when `gate` is None.

    `fused` says that the activation takes the concatenation `[gate(x), up(x)]` along the last dimension and does the
    multiplication itself (SituAndMul, SiluAndMul and the like).
    """

    gate: str | None
    up: str
    down: str
    activation: Callable[..., Any]
    fused: bool = False


class _Untraceable(Exception):
    """The forward looked at something that a symbol does not have."""


class _Symbol:
    """A value inside a forward: the operation that made it, its operands and its options."""

    __slots__ = ("op", "args", "options")

    def __init__(self, op: Any, args: tuple[Any, ...] = (), options: dict[str, Any] | None = None):
        self.op = op
        self.args = args
        self.options = options or {}

    def __mul__(self, other: Any) -> _Symbol:
        return _Symbol(operator.mul, (self, other))

    def __rmul__(self, other: Any) -> _Symbol:
        return _Symbol(operator.mul, (other, self))

    def mul(self, other: Any) -> _Symbol:
        return _Symbol(operator.mul, (self, other))

    def __getattr__(self, name: str) -> Any:
        raise _Untraceable(name)

    def __bool__(self) -> bool:
        raise _Untraceable("bool")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> _Symbol:
        return _Symbol(operator.mul if func is torch.mul else func, args, kwargs)


class _Recorder:
    """Stands in for `self` in the expert's forward: its modules and functions record, its settings are real."""

    def __init__(self, expert: nn.Module):
        object.__setattr__(self, "_expert", expert)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._expert, name)
        bound_method = getattr(value, "__self__", None) is self._expert
        if not callable(value) or bound_method or isinstance(value, type):
            return value

        def record(*args: Any, **kwargs: Any) -> _Symbol:
            return _Symbol(name, args, kwargs)

        return record

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Untraceable(f"assignment to self.{name}")


def expert_form(expert: nn.Module) -> ExpertForm | None:
    """The form of a gated or ungated MLP expert; None where its forward does anything else.

    Args:
        expert: one child of the `ModuleList`; its projections may be any module with `in_features`/`out_features`
            (plain, quantized or adapted linears).
    """
    native = _UNTRACEABLE_NATIVE.get((type(expert).__module__, type(expert).__name__))
    if native is not None:
        up, down, activation = native
        if all(hasattr(expert, name) for name in native):
            return ExpertForm(None, up, down, getattr(expert, activation))
        return None
    source = _Symbol("input")
    try:
        result = type(expert).forward(_Recorder(expert), source)  # type: ignore[arg-type]
    except (_Untraceable, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError):
        return None  # not a forward of one tensor made of modules, functions and products
    return _match(expert, result, source)


def expert_leaf_names(expert: nn.Module) -> tuple[str | None, str, str] | None:
    """Attribute names `(gate, up, down)` of an MLP expert's projections; gate is None for an ungated MLP.

    `("gate_proj", "up_proj", "down_proj")` or `("w1", "w3", "w2")` for the gated ones, `(None, "fc1", "fc2")` and the
    like for the ungated. None where the expert is not such an MLP.
    """
    form = expert_form(expert)
    return None if form is None else (form.gate, form.up, form.down)


def expert_activation(expert: nn.Module) -> Callable[..., Any] | None:
    """The function (or module) that the expert applies to its gate, or to its only up projection.

    None where the expert is not recognised and where the activation takes gate and up together (`ExpertForm.fused`):
    such an activation cannot be applied to the gate alone.
    """
    key = _activation_key(expert)
    if key is None:
        return None
    return _functions[key] if key in _functions else getattr(expert, key)


#: Activations that are no module of their expert (functions of torch, with their options bound), by key.
_functions: dict[str, Callable[..., Any]] = {}


@torch.compiler.assume_constant_result
def _activation_key(expert: nn.Module) -> str | None:
    """The name of the activation's module below the expert, or a key of `_functions`.

    A string, because `torch.compile` can take that for a constant; it cannot follow how an expert is recognised.
    """
    form = expert_form(expert)
    if form is None or form.fused:
        return None
    for name, child in expert.named_children():
        if child is form.activation:
            return name
    function: Any = form.activation
    options = ""
    if isinstance(function, functools.partial):
        function, options = function.func, str(sorted(function.keywords.items()))
    key = f"{id(function)} {options}"
    _functions.setdefault(key, form.activation)  # keeps the function alive, so that its id stays its own
    return key


def _match(expert: nn.Module, result: Any, source: _Symbol) -> ExpertForm | None:
    """Reads the recorded expression from its end: down projection, product, activation, projections of the input."""
    result = _skip_inert(expert, result)
    down = _projection(expert, result)
    if down is None:
        return None
    inner = _skip_inert(expert, result.args[0])
    if not isinstance(inner, _Symbol):
        return None

    if inner.op is operator.mul:
        for activated, plain in (inner.args, inner.args[::-1]):
            up, activation = _projection(expert, plain, source), _activation(expert, activated)
            if up is None or activation is None:
                continue
            gate = _projection(expert, activated.args[0], source)
            if gate is not None and gate != up:
                return ExpertForm(gate, up, down, activation)
        return None

    activation = _activation(expert, inner)
    if activation is None:
        return None
    operand = inner.args[0]
    up = _projection(expert, operand, source)
    if up is not None:
        return ExpertForm(None, up, down, activation)
    pair = _concatenated(operand)
    if pair is not None:
        gate, up = (_projection(expert, part, source) for part in pair)
        if gate is not None and up is not None and gate != up:
            return ExpertForm(gate, up, down, activation, fused=True)
    return None


def _concatenated(value: Any) -> tuple[Any, Any] | None:
    """The two operands of a `torch.cat` along the last dimension, else None."""
    if not isinstance(value, _Symbol) or value.op not in (torch.cat, torch.concat, torch.concatenate):
        return None
    parts = value.args[0] if value.args else value.options.get("tensors")
    dim = value.args[1] if len(value.args) > 1 else value.options.get("dim", 0)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim != -1:
        return None
    return parts[0], parts[1]


def _projection(expert: nn.Module, value: Any, source: _Symbol | None = None) -> str | None:
    """The name of the linear that made `value` (from `source`, if given), else None."""
    if not isinstance(value, _Symbol) or not isinstance(value.op, str) or len(value.args) != 1 or value.options:
        return None
    if source is not None and value.args[0] is not source:
        return None
    module = getattr(expert, value.op, None)
    linear = isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "out_features")
    return value.op if linear else None


def _activation(expert: nn.Module, value: Any) -> Callable[..., Any] | None:
    """The function that made `value` from exactly one operand, with its options bound, else None."""
    if not isinstance(value, _Symbol) or len(value.args) != 1 or value.op is operator.mul:
        return None
    # In place or not is the original's business: it saved memory there, here it would overwrite what is saved.
    options = {name: setting for name, setting in value.options.items() if name != "inplace"}
    if not isinstance(value.op, str):
        function = value.op
    elif value.op == "input" or _projection(expert, value) is not None:
        return None
    else:
        function = getattr(expert, value.op)
    return functools.partial(function, **options) if options else function


def _skip_inert(expert: nn.Module, value: Any) -> Any:
    """Steps over modules that change nothing: Identity, and Dropout with p = 0."""
    while isinstance(value, _Symbol) and isinstance(value.op, str) and len(value.args) == 1:
        module = getattr(expert, value.op, None)
        if not (isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)):
            break
        value = value.args[0]
    return value


def mlp_experts(container: object, identities: bool = False) -> int:
    """Number of MLP experts in a `ModuleList` that holds MLPs of one class and nothing else; 0 where it does not.

    A container that is already adapted is looked at below its adapter (`base_layer`). Entries that are `None` (experts
    of other ranks) make it unusable, as do children of several classes.

    Args:
        container: the block's experts.
        identities: allow `nn.Identity` children after the last MLP; they are not counted.
    """
    while isinstance(base := getattr(container, "base_layer", None), nn.Module):
        container = base
    if not isinstance(container, nn.ModuleList):
        return 0
    experts = list(container)
    while identities and experts and isinstance(experts[-1], nn.Identity):
        experts.pop()
    if not experts or experts[0] is None or any(type(expert) is not type(experts[0]) for expert in experts):
        return 0
    return len(experts) if expert_form(experts[0]) is not None else 0
