"""Adapters that come and go once a model is compiled.

A compiled graph looks at no expert again: it runs what was found while it was traced. So while grouped forwards exist,
a hook of torch on the registration of modules changes `state` whenever a layer of a tuner is put into a model or taken
out of one. What is traced reads `state`; the compiler guards it, and traces anew.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .compat import BaseTunerLayer

state = "0"  # a text: numbers that change become symbols, which nothing guards
_hook: Any = None


def _note(module: nn.Module, name: str, child: nn.Module) -> None:
    global state
    if isinstance(child, BaseTunerLayer) or isinstance(module._modules.get(name), BaseTunerLayer):
        state = str(int(state) + 1)


def watch() -> None:
    """Begin to look, if not yet."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_note)


def rest() -> None:
    """Look no more."""
    global _hook
    if _hook is not None:
        _hook.remove()
    _hook = None
