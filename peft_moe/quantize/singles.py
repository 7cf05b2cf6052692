"""Experts that were quantized one by one, as one packed stack: transformers 4 holds a list where 5 holds a stack.

Nothing is quantized again. Codes and scales of the linears follow each other as their rows do in the stack, so every
weight decodes to the number that it was before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..weights.bnb_codes import FourBit, functional
from ..weights.bnb_records import Int8State, PackedRecord

Single = tuple[Tensor, PackedRecord]


def join_singles(singles: Sequence[Single], experts: int) -> Single:
    """One stack `(E, out, in)` of the packed linears of E experts.

    Args: singles: packed tensors with their records, the linears of an expert after one another, expert after expert.

    Returns: the packed bytes, uint8 `(n,)`, or int8 codes `(E * out, in)`, and their record.

    Raises `ValueError` where no stack can hold them exactly: kinds of codes that differ, or blocks that end inside a
    linear.
    """
    records = [record for _, record in singles]
    first = records[0]
    if len({(str(record.dtype), record.shape[1], type(record.state)) for record in records}) > 1:
        kinds = sorted({f"{tuple(record.shape)} {record.dtype}" for record in records})
        raise ValueError(f"the experts were quantized from weights of different kinds: {', '.join(kinds)}")
    apart = [record.shape[0] for record in records]
    each = apart[: len(apart) // experts]
    if apart != each * experts:
        raise ValueError(f"the experts have linears of different sizes: {sorted(set(apart))} rows")
    shape = torch.Size((experts, sum(each), first.shape[1]))
    if isinstance(first.state, Int8State):
        state = Int8State(torch.cat([record.state.SCB for record in records]), shape, first.dtype)
        return torch.cat([codes for codes, _ in singles]), PackedRecord(state, first.compute_dtype)
    return _join_blocks(singles, shape)


def _join_blocks(singles: Sequence[Single], shape: torch.Size) -> Single:
    states = [record.state for _, record in singles]
    state: Any = states[0]
    size, kind = state.blocksize, state.quant_type
    if {(one.blocksize, one.quant_type) for one in states} != {(size, kind)}:
        found = sorted({f"{one.quant_type} in blocks of {one.blocksize}" for one in states})
        raise ValueError(f"the experts were quantized in different ways: {', '.join(found)}")
    if not all(torch.equal(one.code, state.code) for one in states):
        raise ValueError(f"the experts were quantized with different tables of {kind} values")
    for one in states:
        if one.shape.numel() % size:
            raise ValueError(
                f"a linear of shape {tuple(one.shape)} is no whole number of blocks of {size}: the last block of each "
                "expert is a short one, which a stack has at its end alone"
            )
    codes = [FourBit(packed, one) for (packed, _), one in zip(singles, states, strict=True)]
    # Nested scales have an offset for each linear, a stack has one for all: they are decoded, which is exact.
    scales = torch.cat([one.scales(0, one.numel // size) for one in codes])
    joined = functional().QuantState(
        scales, shape=shape, code=state.code, blocksize=size, quant_type=kind, dtype=state.dtype
    )
    return torch.cat([one.bytes for one in codes]), PackedRecord(joined, singles[0][1].compute_dtype)
