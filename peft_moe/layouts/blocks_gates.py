"""Calling the gate of a remote-code block where its author meant it for inference only.

Two things stand in the way of training, and both are undone without touching a value: an assertion that the gate is
not in training mode, and an update in place of scores that the backward still needs.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Functions whose backward reads their own result.
_KEEP_RESULT = frozenset({torch.sigmoid, torch.softmax, torch.Tensor.sigmoid, torch.Tensor.softmax})
_KEEP_RESULT |= {torch.nn.functional.sigmoid, torch.nn.functional.softmax}


@dataclass(frozen=True)
class _Traits:
    asserts_inference: bool
    updates_in_place: bool


_traits: dict[type, _Traits] = {}


def call_gate(gate: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What `gate(*args, **kwargs)` returns in its own mode, or in inference mode where it refuses to train.

    The gate is called as a module, hooks included. Its `training` flag is as before afterwards, exceptions included.
    """
    traits = gate_traits(type(gate))
    # Gates that know several methods refuse to train with `noaux_tc` alone and have a training mode for the others.
    refuses = traits.asserts_inference and getattr(gate, "topk_method", "noaux_tc") == "noaux_tc"
    call = _in_inference_mode if gate.training and refuses else _as_it_is
    if traits.updates_in_place and torch.is_grad_enabled():
        with _FreshScores():
            return call(gate, args, kwargs)
    return call(gate, args, kwargs)


@torch.compiler.assume_constant_result
def gate_traits(cls: type) -> _Traits:
    """What the forward of this class of gates does that stands in the way of training; read from its code once.

    `torch.compile` takes the answer for a constant instead of following how it is found.
    """
    if cls not in _traits:
        forward = plain_function(cls, "forward")
        asserts, in_place = False, False
        if forward is not None:
            asserts = "training" in code_names(forward.__code__) and _has_assert(forward)
            in_place = _has_update(forward)
        _traits[cls] = _Traits(asserts, in_place)
    return _traits[cls]


def plain_function(cls: type, name: str) -> FunctionType | None:
    """The method below its decorators (`torch.no_grad` and the like), None where there is no such method."""
    method = getattr(cls, name, None)
    if method is None:
        return None
    method = inspect.unwrap(method)
    return method if isinstance(method, FunctionType) else None


def code_names(code: CodeType) -> frozenset[str]:
    """Every attribute and global name that the code uses, nested functions included."""
    nested = (code_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(code.co_names).union(*nested)


class _FreshScores(TorchFunctionMode):
    """Hands out copies of scores, so that an update in place leaves what the backward reads as it was."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.clone() if func in _KEEP_RESULT else result


def _as_it_is(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return gate(*args, **kwargs)


def _in_inference_mode(gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Only the gate's own flag changes: a module below it keeps its mode."""
    gate.training = False
    try:
        return gate(*args, **kwargs)
    finally:
        gate.training = True


def _has_assert(function: FunctionType) -> bool:
    return "AssertionError" in code_names(function.__code__) or any(
        instruction.opname == "LOAD_ASSERTION_ERROR" or instruction.argval is AssertionError
        for instruction in dis.get_instructions(function)
    )


def _has_update(function: FunctionType) -> bool:
    """Whether the code has an augmented assignment (`+=`) or calls its method form (`add_`)."""
    if code_names(function.__code__) & {"add_", "sub_", "mul_", "div_"}:
        return True
    return any(
        instruction.opname.startswith("INPLACE_")
        or (instruction.opname == "BINARY_OP" and instruction.argrepr.endswith("="))
        for instruction in dis.get_instructions(function)
    )
