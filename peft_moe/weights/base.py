"""The protocol of a frozen stack. Nothing else in the package knows how weights are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.linear import FrozenStack


class ExpertWeight(Protocol):
    """The frozen weights of one projection of all experts, seen as `(E, out, in)`.

    Stores read the base's tensors at every call: a base may be moved, cast or re-loaded under them.
    """

    shape: tuple[int, int, int]
    keep_built: bool  # keep 16-bit weights that had to be built (`dequantize="cache"`); nothing to do for dense ones

    @property
    def packed(self) -> bool:
        """Whether it is codes and scales, built before they multiply; `densify(dtype)` makes plain weights of them."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base computes with these weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""

    def frozen(self) -> FrozenStack:
        """What the ops multiply with: the `(E, out, in)` tensor, or what builds it."""

    def materialize(self, experts: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`(E', out, in)` of the given experts (`None`: all) in `dtype` (`None`: `self.dtype`)."""

    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """Add fp32 deltas, each `(experts, (E', out, in))`; every expert is summed in fp32 and rounded once.

        While the deltas are drawn, `materialize` still gives the weights of before for experts not yet drawn.
        """

    def snapshot(self) -> Any:
        """A copy of the stored bytes, for `restore`."""

    def restore(self, snapshot: Any) -> None:
        """Put the bytes of a snapshot back, bit for bit."""

    def freeze(self) -> None:
        """Set `requires_grad` of the stored tensors to False."""

    def prepare(self) -> None:
        """Do now what the next `frozen` would do first, which `torch.compile` cannot follow."""

    def release(self) -> None:
        """Give up what was made for multiplying: a common storage of many modules, weights that were built."""

    def abandon(self) -> None:
        """The same, where another store has taken over the modules."""

    def same_source(self, other: Any) -> bool:
        """Whether another store of this class reads the same tensors' modules."""
