"""The factors of an experts module as servers hold them, on tensors.

Shapes: E experts of the base, E' adapted ones, r the rank of the adapter as served, to which others are padded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ...layouts import ProjectionSpec
from .fuse import fused, linears, scaled
from .native import ExpertsAdapter

LINEARS = ("gate_proj", "up_proj", "down_proj")
FACTORS = ("lora_A", "lora_B")

#: (leaf, factor) -> `lora_A (E, r, in)` or `lora_B (E, out, r)`
Stacks = dict[tuple[str, str], Tensor]


def apart(one: ExpertsAdapter, rank: int, ratio: Tensor | None) -> Stacks:
    """Gate, up and down of all experts; zeros for what has no adapter.

    Args: ratio: `(E', 1, 1)`, what B is multiplied with; `None`: nothing.
    """
    found: Stacks = {}
    for projection in one.spec.projections:
        if projection.name not in one.settings.projections:
            found |= dict(_zeros(one, projection, rank))
            continue
        for leaf, (slot, rows) in linears(one, projection).items():
            found[leaf, "lora_A"] = finished(one, one.factor(slot, "lora_A"), "lora_A", rank, ratio)
            found[leaf, "lora_B"] = finished(one, one.factor(slot, "lora_B")[:, rows], "lora_B", rank, ratio)
    return found


def joined(one: ExpertsAdapter, rank: int, ratio: Tensor | None) -> Stacks:
    """Gate and up as one, with the rows in the order of the base, and down."""
    found: Stacks = {}
    for projection in one.spec.projections:
        if projection.name not in one.settings.projections:
            zeros = dict(_zeros(one, projection, rank))
            if projection.gate is not None:
                a = zeros["gate_proj", "lora_A"]
                b = torch.cat([zeros[leaf, "lora_B"] for leaf in LINEARS[:2]], dim=1)
                zeros = {("gate_up_proj", "lora_A"): a, ("gate_up_proj", "lora_B"): b}
            found |= zeros
            continue
        for factor in FACTORS:
            found[projection.name, factor] = finished(one, fused(one, projection, factor), factor, rank, ratio)
    return found


def finished(one: ExpertsAdapter, value: Tensor, factor: str, rank: int, ratio: Tensor | None) -> Tensor:
    """Factors of the adapted experts -> of all, scaled, of the rank that is served."""
    return one.spread(padded(scaled(value, ratio) if factor == "lora_B" else value, factor, rank)).contiguous()


def padded(value: Tensor, factor: str, rank: int) -> Tensor:
    """`lora_A (..., r', in)` or `lora_B (..., out, r')` with zeros up to the rank."""
    missing = rank - value.shape[-2 if factor == "lora_A" else -1]
    return functional.pad(value, (0, 0, 0, missing) if factor == "lora_A" else (0, missing)).contiguous()


def with_gate_order(gate: Tensor, up: Tensor, projection: ProjectionSpec) -> Tensor:
    """`(E, I, r)` each -> `(E, 2I, r)`, rows in the order of the base."""
    both = gate.new_empty(gate.shape[0], gate.shape[1] + up.shape[1], gate.shape[2])
    both[:, projection.gate_rows(up=False)], both[:, projection.gate_rows(up=True)] = gate, up
    return both


def _zeros(one: ExpertsAdapter, projection: ProjectionSpec, rank: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
    slot = one.slots()[0][1]
    gated = projection.gate is not None
    rows = projection.out_features // 2 if gated else projection.out_features
    for leaf in LINEARS[:2] if gated else (projection.name,):
        for factor, shape in (("lora_A", (rank, projection.in_features)), ("lora_B", (rows, rank))):
            yield (leaf, factor), torch.zeros(one.spec.num_experts, *shape, dtype=one.dtype(slot, factor))
