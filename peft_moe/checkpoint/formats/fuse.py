"""The factors of an experts module as other tools hold them: one pair a projection, or one pair a linear.

Shapes: E experts of the base, E' adapted ones, r their largest rank. All functions keep the dtype of the file unless
they fold scalings in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...layouts import ProjectionSpec
from ..tensor_file import bytes_of
from .native import ExpertsAdapter


def target_of(slot: str) -> str:
    """The name by which `target_experts` selects a slot."""
    return "down_proj" if slot == "down_proj" else "gate_up_proj"


def fused_rank(one: ExpertsAdapter, projection: ProjectionSpec) -> int:
    """The rank of a projection as one pair: twice the largest where gate and up have an A each."""
    return one.settings.rank * len(one.settings.slots(projection))


def fused(one: ExpertsAdapter, projection: ProjectionSpec, factor: str) -> Tensor:
    """One factor of a projection of the adapted experts: `lora_A (E', r', in)` or `lora_B (E', out, r')`.

    Where gate and up have an A each, r' is 2r: A holds both, and B is block-diagonal. The scaling is not in it.
    """
    slots = one.settings.slots(projection)
    if len(slots) == 1:
        return one.factor(slots[0], factor)
    gate, up = (one.factor(slot, factor) for slot in slots)
    if factor == "lora_A":
        return torch.cat((gate, up), dim=1)
    both = gate.new_zeros(gate.shape[0], projection.out_features, 2 * gate.shape[2])
    both[:, projection.gate_rows(up=False), : gate.shape[2]] = gate
    both[:, projection.gate_rows(up=True), gate.shape[2] :] = up
    return both


def relative_scaling(one: ExpertsAdapter) -> Tensor | None:
    """`(E', 1, 1)` fp64: scaling of each adapted expert relative to that of the first; `None`: all are equal."""
    if one.settings.scaling is None:
        return None
    return torch.tensor(one.settings.scaling, dtype=torch.float64)[:, None, None]


def scaled(value: Tensor, ratio: Tensor | None) -> Tensor:
    """A factor times ratios, in `scaled_dtype`."""
    return value if ratio is None else (value.double() * ratio).to(scaled_dtype(value.dtype, ratio))


def scaled_dtype(dtype: torch.dtype, ratio: Tensor | None) -> torch.dtype:
    """Twice as wide: the dtype of the file would round the products, and its numbers could not be had back."""
    if ratio is None:
        return dtype
    return torch.float32 if dtype.itemsize < 4 else torch.float64


def full_factor(one: ExpertsAdapter, projection: ProjectionSpec, count: int, factor: str) -> Tensor:
    """`fused` for `count` experts: zeros where there is no adapter, scalings relative to the first folded into B."""
    value = one.spread(fused(one, projection, factor))
    if factor == "lora_B":
        ratio = relative_scaling(one)
        value = scaled(value, None if ratio is None else one.spread(ratio))
    missing = count - value.shape[0]  # experts at the end of a stack that have no weights of their own
    return value if not missing else torch.cat((value, value.new_zeros(missing, *value.shape[1:])))


def full_dtype(one: ExpertsAdapter, projection: ProjectionSpec, factor: str) -> torch.dtype:
    """The dtype of `full_factor`."""
    dtypes = [one.dtype(slot, factor) for slot in one.settings.slots(projection)]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"{one.name}.{projection.name}: its halves are in {' and '.join(map(str, dtypes))}; save it in one"
        )
    return scaled_dtype(dtypes[0], relative_scaling(one)) if factor == "lora_B" else dtypes[0]


def alpha_for(scaling: float, rank: int, rslora: bool) -> float:
    """The alpha that gives a scaling at a rank; an integer where it is one but for rounding."""
    found = scaling * (math.sqrt(rank) if rslora else rank)
    near = round(found)
    return near if near and math.isclose(found, near, rel_tol=1e-12) else found


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, NaNs and signs of zeros too."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bytes_of(one), bytes_of(other))


def linears(one: ExpertsAdapter, projection: ProjectionSpec) -> dict[str, tuple[str, slice]]:
    """Linear of an expert (`gate_proj`, `up_proj`, `down_proj`) -> (slot that adapts it, its rows of the slot's B).

    A slot that adapts gate and up as one gives both the same A, which changes nothing of the function.
    Raises `ValueError` where only the base could tell which rows are the gate's.
    """
    slots = one.settings.slots(projection)
    if len(slots) > 1:
        return {slot: (slot, slice(None)) for slot in slots}
    if projection.name != "gate_up_proj":
        return {projection.name: (projection.name, slice(None))}
    if projection.gate is None:
        raise ValueError(
            f"{one.name}.gate_up_proj: only the base tells which rows are the gate's, and it is not here: name it with "
            "`base=` (`--base`), a folder with its config.json or a model in the hub's cache; weights are not needed."
        )
    return {
        "gate_proj": ("gate_up_proj", projection.gate_rows(up=False)),
        "up_proj": ("gate_up_proj", projection.gate_rows(up=True)),
    }
