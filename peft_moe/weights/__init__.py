"""How one frozen stack of expert weights is stored: one file a storage, all behind `ExpertWeight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import ExpertWeight
from .dense import DenseStack, ModuleStack

__all__ = ["DenseStack", "ExpertWeight", "ModuleStack", "open_modules", "open_stacked"]


def open_stacked(
    module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
) -> ExpertWeight:
    """The store of a projection held in stacked parameters.

    Args:
        module: the experts module. parts: `(path, transposed, flat)` of each parameter, see `layouts.spec.Part`.
        shape: `(E, out, in)`. name: path of the module, for messages.

    Raises `ValueError` for a storage that no store can read.
    """
    return DenseStack(module, parts, shape, name)


def open_modules(linears: Sequence[Sequence[Any]], shape: tuple[int, int, int], name: str) -> ExpertWeight:
    """The store of a projection held in the linears of a list of expert modules.

    Args:
        linears: for each expert its linears, in the order in which their rows follow each other.
        shape: `(E, out, in)`. name: path of the experts module, for messages.

    Raises `ValueError` for a storage that no store can read.
    """
    return ModuleStack(linears, shape, name)
