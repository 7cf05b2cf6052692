"""Records what modules receive and return during a real forward."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """One call: the module's name, the module, its positional arguments (keywords put in order) and its result."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    output: Any


def capture(model: nn.Module, inputs: dict[str, Any], pattern: str) -> list[Call]:
    """Run `model(**inputs)` without gradients and return every call of a module whose name matches `pattern` in full.

    Tensors among the arguments are copied, as some blocks scale their input in place.
    """
    calls: list[Call] = []
    hooks = []
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):
            hooks += _watch(name, module, calls)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _watch(name: str, module: nn.Module, calls: list[Call]) -> list[Any]:
    received: list[tuple[Any, ...]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()
        received.append(tuple(value.clone() if torch.is_tensor(value) else value for value in arguments))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(Call(name, module, received.pop(), output))

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
