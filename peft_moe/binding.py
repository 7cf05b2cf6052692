"""How grouped experts get into a module's forward, and out of it again.

A list of experts is no module that a block calls: the block reads single experts from it. So either the block's forward
is replaced, on that instance, by its grouped version (known blocks), or a hook on each expert's linears adds that
expert's part of the adapter (all others).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .forward import adapt_linear
from .layouts import ProjectionSpec
from .placement import check_adapters

if TYPE_CHECKING:
    from .layer import MoELoraLayer

# accelerate's hooks sit in `forward` and call `_old_forward`: the inner place is the module's own.
_PLACES = ("_old_forward", "forward")


class ReplacedForward:
    """Stands in the place of a module's forward, on that instance; the one before it is kept, and put back.

    An object and not a closure, so that a model can still be copied and pickled.
    """

    rank = 0  # where several replace the same forward, the higher ones are called first

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced: Any = None

    def install(self) -> None:
        """Take the place."""
        place = next(place for place in _PLACES if place in vars(self.module) or place == "forward")
        current, above = vars(self.module).get(place), None
        while isinstance(current, ReplacedForward) and current.rank > self.rank:
            current, above = current.replaced, current
        self.replaced = current
        if above is None:
            vars(self.module)[place] = self
        else:
            above.replaced = self

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def rest(self) -> None:
        """Called when another of this package takes the place above: it runs the experts now."""

    def remove(self) -> None:
        """Put the forward back that was there before, unless someone replaced this one since."""
        for place in _PLACES:
            current = vars(self.module).get(place)
            if current is self:
                if self.replaced is not None:
                    vars(self.module)[place] = self.replaced
                elif place == "forward":
                    del vars(self.module)[place]
                else:  # put there by accelerate after this one, and needed by its hook
                    vars(self.module)[place] = type(self.module).forward.__get__(self.module)
                return
            while isinstance(current, ReplacedForward):
                if current.replaced is self:
                    current.replaced = self.replaced
                    return
                current = current.replaced


def replaced_forwards(module: nn.Module) -> list[ReplacedForward]:
    """Those of this package that stand in the place of a module's forward, the first called first."""
    found: list[ReplacedForward] = []
    for place in _PLACES:
        current = vars(module).get(place)
        while isinstance(current, ReplacedForward):
            found.append(current)
            current = current.replaced
    return found


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the forward of its class, hooks of accelerate around it or not."""
    places = replaced_forwards(module)
    current = places[-1].replaced if places else None
    if not places:
        current = next((vars(module)[place] for place in _PLACES if place in vars(module)), None)
    return current is None or getattr(current, "__func__", None) is type(module).forward


class BlockForward(ReplacedForward):
    """A known block's forward, its experts run by the layer that adapts them; the one before it while that is idle."""

    rank = 1

    def __init__(self, block: nn.Module, layer: MoELoraLayer) -> None:
        super().__init__(block)
        self.layer = layer
        self.install()
        if isinstance(self.replaced, ReplacedForward):
            self.replaced.rest()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.left_to_base:
            return self.original(*args, **kwargs)
        block_forward = self.layer.spec.block_forward
        assert block_forward is not None
        return block_forward(self.module, self.layer.run_experts, *args, **kwargs)


class LinearHook:
    """Forward hook of one expert's linear."""

    def __init__(self, layer: MoELoraLayer, projection: ProjectionSpec, expert: int, rows: slice, linear: nn.Module):
        self.layer, self.projection, self.expert, self.rows = layer, projection, expert, rows
        self.handle = linear.register_forward_hook(self)

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if self.layer.idle:
            return out
        check_adapters(self.layer, out.device)
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
