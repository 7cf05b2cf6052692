"""FP8 weights of a list of linears, housed in one tensor with their scales, so that one pass reads all experts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from .built import chunks
from .fp8_pieces import FP8Piece, find_scale
from .house import CannotBeHoused, NamedHouse, WeightHouse, pointers


class FP8House:
    """The linears of one projection, all of them in FP8 with scales of one kind.

    Args: pieces: one a linear, in the order in which their rows follow each other, expert after expert.
    """

    def __init__(self, pieces: Sequence[FP8Piece]) -> None:
        self.pieces = list(pieces)
        modules = [piece.module for piece in self.pieces]
        self._codes = WeightHouse(modules)
        self._name = find_scale(modules[0], "weight")
        self._scales = None if self._name is None else NamedHouse(modules, self._name)
        self._joined: FP8Piece | None = None
        self._refused: list[int] | None = None

    def joined(self) -> FP8Piece | None:
        """One piece of all linears, `(n, rows, cols)`; `None` if they differ."""
        if self._scales is None:
            return None
        try:
            if self._joined is not None and self._codes.is_current() and self._scales.is_current():
                return self._joined
            places = pointers(self._codes.tensors())
        except KeyError:  # a scale has gone with its weight's FP8
            return None
        if places == self._refused:
            return None
        self._joined, self._refused = None, None
        if not self._alike():
            self._refused = places
            return None
        try:
            self._joined = self._join()
        except CannotBeHoused:
            self._refused = places
        return self._joined

    def _join(self) -> FP8Piece:
        assert self._scales is not None
        first, count = self.pieces[0], len(self.pieces)
        shape = first.scales().shape[1:]
        one_for_all = SimpleNamespace(weight=self._codes.move_in().view(count, *first.tensor.shape))
        setattr(one_for_all, self._name or "", self._scales.move_in().view(count, *shape))
        for setting in ("block_size", "config"):
            if hasattr(first.module, setting):
                setattr(one_for_all, setting, getattr(first.module, setting))
        joined = FP8Piece(one_for_all, "weight", first.where, first.rows)
        joined.check()
        return joined

    def _alike(self) -> bool:
        first = self.pieces[0]
        if first.tensor.device.type == "meta" or not first.packed:
            return False
        for piece in self.pieces:
            if find_scale(piece.module, "weight") != self._name or not piece.packed:
                return False
            if (piece.tensor.shape, piece.tensor.dtype) != (first.tensor.shape, first.tensor.dtype):
                return False
            if (piece.scale.shape, piece.scale.dtype) != (first.scale.shape, first.scale.dtype):
                return False
            if {piece.tensor.device, piece.scale.device} != {first.tensor.device} or piece.grid() != first.grid():
                return False
        return True

    def fill(self, joined: FP8Piece, out: Tensor) -> None:
        """Dequantize all of them into a contiguous `(E, out, in)`."""
        target = out.view(joined.codes.shape)
        if joined.dequantize_into(target):
            return
        wide = torch.promote_types(out.dtype, torch.float32)
        for chunk in chunks(len(target), joined.elements):
            target[chunk] = joined.dequantize(chunk, wide)

    def versions(self) -> list[int]:
        """Changes when any of it is written to."""
        assert self._scales is not None
        return self._codes.versions() + self._scales.versions()

    def release(self) -> None:
        """Give each tensor a storage of its own again."""
        self._codes.release()
        if self._scales is not None:
            self._scales.release()
        self._joined = None

    def abandon(self) -> None:
        """Forget the storage, which others house anew."""
        self._codes.abandon()
        if self._scales is not None:
            self._scales.abandon()
        self._joined = None
