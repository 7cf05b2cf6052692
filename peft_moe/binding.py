"""How the layer of a list of experts gets into its block's forward.

A list is no module that a block calls: the block reads single experts from it. So either the block's forward is
replaced, on that instance, by its grouped version (known blocks), or a hook on each expert's linears adds that
expert's part of the adapter (all others). Both are taken out again when the layer is unloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .forward import adapt_linear
from .layouts import ProjectionSpec

if TYPE_CHECKING:
    from .layer import MoELoraLayer


class BlockForward:
    """A known block's forward with its experts run grouped; the block's own while no adapter is active.

    An object and not a closure, so that a model can still be copied and pickled.
    """

    def __init__(self, block: nn.Module, layer: MoELoraLayer) -> None:
        self.block, self.layer = block, layer
        # accelerate's hooks sit in `forward` and call `_old_forward`: take the inner place.
        self.attribute = "_old_forward" if "_old_forward" in vars(block) else "forward"
        self.replaced = vars(block).get(self.attribute)
        vars(block)[self.attribute] = self

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.block).forward(self.block, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.left_to_base:
            return self.original(*args, **kwargs)
        block_forward = self.layer.spec.block_forward
        assert block_forward is not None
        return block_forward(self.block, self.layer.run_experts, *args, **kwargs)

    def remove(self) -> None:
        """Give the block its own forward back, unless someone replaced it since."""
        if vars(self.block).get(self.attribute) is not self:
            return
        if self.replaced is None:
            del vars(self.block)[self.attribute]
        else:
            vars(self.block)[self.attribute] = self.replaced


class LinearHook:
    """Forward hook of one expert's linear."""

    def __init__(self, layer: MoELoraLayer, projection: ProjectionSpec, expert: int, rows: slice, linear: nn.Module):
        self.layer, self.projection, self.expert, self.rows = layer, projection, expert, rows
        self.handle = linear.register_forward_hook(self)

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.layer.idle:
            return out
        return adapt_linear(self.layer, self.projection, self.expert, self.rows, args[0], out)

    def remove(self) -> None:
        """Take the hook out."""
        self.handle.remove()


def hook_linears(layer: MoELoraLayer) -> list[LinearHook]:
    """A hook on every linear of every expert."""
    hooks = []
    for projection in layer.spec.projections:
        for expert, name in enumerate(layer.spec.experts):
            start = 0
            for part in projection.parts:
                linear: Any = layer.base_layer.get_submodule(f"{name}.{part.path}".rstrip("."))
                rows = slice(start, start + linear.out_features)
                hooks.append(LinearHook(layer, projection, expert, rows, linear))
                start = rows.stop
    return hooks
