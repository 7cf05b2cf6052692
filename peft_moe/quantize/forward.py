"""The forward of a packed experts module: its own indexes 16-bit stacks, which are not there any more."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layer import MoELoraLayer
from ..layouts import describe
from ..weights.bnb_records import RECORDS


def is_packed(module: nn.Module) -> bool:
    """Whether a module, or one below it, holds packed stacks."""
    return any(getattr(child, RECORDS, None) for child in module.modules())


class PackedForward:
    """Runs the experts of one module grouped, without adapters, while its stacks are packed; after that its own.

    An object and not a closure, so that a model can still be copied and pickled. Adapters do not come this way: they
    wrap the module and run its experts themselves.

    Args: module: the experts module, which gets this as its `forward`. name, parent: its path and what holds it.
    """

    def __init__(self, module: nn.Module, name: str, parent: nn.Module) -> None:
        self.module, self.name, self.parent = module, name, parent
        self.layer: MoELoraLayer | None = None
        self.replaced = vars(module).get("forward")
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_packed(self.module):
            if self.replaced is not None:
                return self.replaced(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)
        if self.layer is None:
            spec = describe(self.name, self.module, self.parent)
            assert spec is not None and spec.call is not None  # the module was packed because it has both
            self.layer = MoELoraLayer(self.module, spec, self.name)
        assert self.layer.spec.call is not None
        return self.layer.spec.call(self.module, self.layer, *args, **kwargs)
