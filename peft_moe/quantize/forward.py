"""The forward of a packed experts module: its own indexes 16-bit stacks, which are not there any more."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..binding import ReplacedForward
from ..frozen import FrozenExperts
from ..layouts import describe
from ..weights.bnb_records import RECORDS


def is_packed(module: nn.Module) -> bool:
    """Whether a module, or one below it, holds packed stacks."""
    return any(getattr(child, RECORDS, None) for child in module.modules())


class PackedForward(ReplacedForward):
    """Runs the experts of one module grouped, without adapters, while its stacks are packed; after that its own.

    Adapters do not come this way: they wrap the module and run its experts themselves.

    Args: module: the experts module, which gets this as its `forward`. name, parent: its path and what holds it.
    """

    def __init__(self, module: nn.Module, name: str, parent: nn.Module) -> None:
        super().__init__(module)
        self.name, self.parent = name, parent
        self.experts: FrozenExperts | None = None
        self.install()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_packed(self.module):
            return self.original(*args, **kwargs)
        if self.experts is None:
            spec = describe(self.name, self.module, self.parent)
            assert spec is not None and spec.call is not None  # the module was packed because it has both
            self.experts = FrozenExperts(self.module, spec, self.name)
        assert self.experts.spec.call is not None
        return self.experts.spec.call(self.module, self.experts, *args, **kwargs)
