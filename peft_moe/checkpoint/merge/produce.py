"""The bytes of one tensor of the result: copied, cast, dequantized, changed, or changed and requantized."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...weights.requantized import Change as Rounding
from ..header import CODES, DTYPES
from ..tensor_file import bytes_of
from .edits import Edit
from .source import Source
from .stored import Stored, StoredFP8

_ELEMENTS = 2**24  # of a tensor that are held in fp32 at a time, where nothing asks for more


@dataclass(eq=False)
class Output:
    """One tensor of the result. Attributes: key, code, shape: as its file's header will say them."""

    key: str
    code: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * DTYPES[self.code].itemsize

    def parts(self, device: torch.device) -> Iterator[Any]:
        """Its data, in order, in pieces that support the buffer protocol."""
        raise NotImplementedError


@dataclass(eq=False)
class Copied(Output):
    """As it is."""

    source: Source

    @property
    def nbytes(self) -> int:
        return self.source.entry(self.key).nbytes

    def parts(self, device: torch.device) -> Iterator[Any]:
        return self.source.shards[self.source.owner[self.key]].chunks(self.key)


@dataclass(eq=False)
class Plain(Output):
    """Numbers in `code`: cast or dequantized, and changed where there is an edit."""

    stored: Stored
    edit: Edit | None

    def parts(self, device: torch.device) -> Iterator[Any]:
        replaced = None if self.edit is None else self.edit.replaced
        dtype = DTYPES[self.code]
        double = torch.float64 in (dtype, self.stored.dtype)
        wide = torch.float64 if double else torch.float32
        for first, last, expert in blocks(self.stored, self.edit):
            if replaced is None:
                values = self.stored.read(first, last, wide, device)
            else:
                values = replaced.value().to(device, wide)
            delta = None if self.edit is None else self.edit.delta(expert, device)
            if delta is not None:
                values += delta.to(wide)
            result = values.to(dtype)
            if delta is not None and not torch.isfinite(result).all():
                where = self.key if expert is None else f"{self.key}, expert {expert}"
                raise ValueError(
                    f"NaNs detected in the merged weights. {where}: the sum has values that are not finite in {dtype}; "
                    "the adapter seems broken. The result was not finished."
                )
            yield buffer(result)
        self.stored.release()


def blocks(stored: Stored, edit: Edit | None) -> Iterator[tuple[int, int, int | None]]:
    """(first row, last row, expert or `None`): the parts in which a tensor is made."""
    shape = stored.shape
    if edit is not None and edit.stacked:
        experts = edit.flat or shape[0]
        rows = shape[0] // experts
        yield from ((expert * rows, (expert + 1) * rows, expert) for expert in range(experts))
    elif edit is not None or len(shape) < 2 or (stored.packed and len(shape) == 2):
        yield 0, shape[0] if shape else 1, None
    else:
        step = max(1, _ELEMENTS // max(1, math.prod(shape[1:])))
        for first in range(0, shape[0], step):
            yield first, min(first + step, shape[0]), None


@dataclass(eq=False)
class Requantized(Output):
    """FP8 codes after a change (`scales=False`), or their scales. Both are made from the same numbers, twice.

    Attributes: rounding: where what rounding did is summed up, of the codes.
    """

    stored: StoredFP8
    edit: Edit
    scales: bool
    rounding: Rounding

    def parts(self, device: torch.device) -> Iterator[Any]:
        count = self.stored.shape[0] if len(self.stored.shape) == 3 else 1
        if self.edit.stacked and self.stored.by_slice:
            for expert in range(count):
                yield self._part(expert, expert + 1, self.edit.delta(expert, device), device)
            return
        if not self.edit.stacked:
            delta = self.edit.delta(None, device)
        else:
            found = [self.edit.delta(expert, device) for expert in range(count)]
            zero = torch.zeros(1, *self.stored.shape[1:], device=device)
            delta = torch.cat([zero if one is None else one for one in found])
        yield self._part(0, count, delta, device)

    def _part(self, first: int, last: int, delta: Tensor | None, device: torch.device) -> Any:
        piece = self.stored.piece(first, last, device)
        codes, scale = piece.tensor, piece.scale
        if delta is not None:
            delta = delta.view(last - first, *piece.codes.shape[1:])
            try:
                new, found, change = piece.requantize(list(range(last - first)), delta, torch.float32)
            except ValueError as error:
                raise ValueError(f"{self.key}: {error}. The result was not finished.") from error
            assert found is not None
            codes, scale = new, found.contiguous()
            if not self.scales:
                self.rounding.error, self.rounding.delta = (
                    self.rounding.error + change.error,
                    self.rounding.delta + change.delta,
                )
        return buffer(scale if self.scales else codes)


def buffer(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it lies in memory in order."""
    return bytes_of(tensor.detach().cpu()).numpy()


def code_of(dtype: torch.dtype) -> str:
    """How a header spells a dtype."""
    return CODES[dtype]
