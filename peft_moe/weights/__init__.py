"""How one frozen stack of expert weights is stored: one file a storage, all behind `ExpertWeight`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .base import ExpertWeight
from .bnb import BnbWeight, is_packed_linear, is_packed_stack, open_bnb_modules, open_bnb_stack
from .bnb_house import BnbHouse
from .bnb_pieces import put_linear, saved_linear
from .dense import DENSE_DTYPES, DenseStack, ModuleStack, parameter_at
from .fp8 import FP8Weight, open_fp8_modules, open_fp8_stack
from .fp8_house import FP8House
from .fp8_pieces import has_float8
from .mxfp4 import MXFP4Weight, find_packed4, open_mxfp4, refuse_unknown, refuse_without_weight

__all__ = [
    "DENSE_DTYPES",
    "BnbWeight",
    "DenseStack",
    "ExpertWeight",
    "FP8Weight",
    "MXFP4Weight",
    "ModuleStack",
    "is_packed_linear",
    "open_modules",
    "open_stacked",
    "put_linear",
    "saved_linear",
]


def open_stacked(
    module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
) -> ExpertWeight:
    """The store of a projection held in stacked parameters.

    Args:
        module: the experts module. parts: `(path, transposed, flat)` of each parameter, see `layouts.spec.Part`.
        shape: `(E, out, in)`. name: path of the module, for messages.

    Raises `ValueError` for a storage that no store can read.
    """
    if find_packed4(module, parts[0][0]) is not None:
        return open_mxfp4(module, parts, shape, name)
    if any(is_packed_stack(module, path) for path, _, _ in parts):
        return open_bnb_stack(module, parts, shape, name)
    tensors = [parameter_at(module, path) for path, _, _ in parts]
    if has_float8(tensors):
        return open_fp8_stack(module, parts, shape, name)
    refuse_unknown(tensors, name)
    return DenseStack(module, parts, shape, name)


def open_modules(linears: Sequence[Sequence[Any]], shape: tuple[int, int, int], name: str) -> ExpertWeight:
    """The store of a projection held in the linears of a list of expert modules.

    Args:
        linears: for each expert its linears, in the order in which their rows follow each other.
        shape: `(E, out, in)`. name: path of the experts module, for messages.

    Raises `ValueError` for a storage that no store can read.
    """
    if any(is_packed_linear(linear) for expert in linears for linear in expert):
        packed = open_bnb_modules(linears, shape, name)
        packed.house = BnbHouse(packed.pieces)
        return packed
    for linear in (linear for expert in linears for linear in expert):
        if getattr(linear, "weight", None) is None:
            refuse_without_weight(linear, name)
    weights = [linear.weight for expert in linears for linear in expert]
    if has_float8(weights):
        scaled = open_fp8_modules(linears, shape, name)
        scaled.house = FP8House(scaled.pieces)
        return scaled
    refuse_unknown(weights, name)
    return ModuleStack(linears, shape, name)
