"""The codes of a list of quantized linears, housed in one tensor, so that one kernel reads all experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .bnb_codes import EightBit, FourBit, functional
from .bnb_pieces import LinearPiece
from .house import CannotBeHoused, House, WeightHouse, pointers

_state_of = attrgetter("quant_state")
_scales_of = attrgetter("SCB")


class _Scales(House):
    """The scales (or those of the scales) of linears in 4 bits."""

    def __init__(self, codes: WeightHouse, path: str) -> None:
        super().__init__()
        self._codes, self._of_state = codes, attrgetter(path)
        self._owner, _, self._name = f"self.{path}".rpartition(".")

    def tensors(self) -> list[Tensor]:
        return list(map(self._of_state, map(_state_of, self._codes.tensors())))

    def put(self, number: int, value: Tensor) -> None:
        state = _state_of(self._codes.tensors()[number])
        setattr(state.state2 if self._owner.endswith("state2") else state, self._name, value)


class _Codes8(WeightHouse):
    """int8 codes, which a linear keeps under a second name: in its parameter, and after a forward in its state."""

    def __init__(self, linears: Sequence[Any]) -> None:
        super().__init__(linears)
        self._linears = list(linears)

    def put(self, number: int, value: Tensor) -> None:
        linear, weight = self._linears[number], self.tensors()[number]
        weight.data = value
        owners: tuple[Any, ...] = (weight, linear.state)
        for owner in owners:
            if getattr(owner, "CB", None) is not None:
                owner.CB = weight.data


class _Scales8(House):
    """The scales of int8 linears: beside the weight, or after a forward in the state of its linear."""

    def __init__(self, codes: WeightHouse, linears: Sequence[Any]) -> None:
        super().__init__()
        self._codes, self._linears = codes, list(linears)

    def tensors(self) -> list[Tensor]:
        found = list(map(_scales_of, self._codes.tensors()))
        if any(map(is_, found, repeat(None))):
            return [one if one is not None else self._linears[i].state.SCB for i, one in enumerate(found)]
        return found

    def put(self, number: int, value: Tensor) -> None:
        owners: tuple[Any, ...] = (self._codes.tensors()[number], self._linears[number].state)
        for owner in owners:
            if getattr(owner, "SCB", None) is not None:
                owner.SCB = value


class JoinedFourBit(FourBit):
    """4-bit codes of several tensors of one size, one after the other.

    Args: offsets: of their nested scales, `(n,)`; `None` if the scales are not nested.
    """

    def __init__(self, data: Tensor, state: Any, offsets: Tensor | None) -> None:
        super().__init__(data, state)
        self._offsets = offsets

    def _shifts(self) -> tuple[Tensor, int]:
        assert self._offsets is not None
        return self._offsets, self.state.absmax.numel() // self._offsets.numel()

    def _shift(self, scales: Tensor, first: int) -> Tensor:
        assert self._offsets is not None
        size = self.state.absmax.numel() // self._offsets.numel()
        if first % size == 0 and scales.numel() % size == 0:  # whole tensors: in place
            count = scales.numel() // size
            return scales.view(count, size).add_(self._offsets[first // size :][:count, None]).view(-1)
        owner = torch.arange(first, first + scales.numel(), device=scales.device) // size
        return scales + self._offsets[owner]


class BnbHouse:
    """The linears of one projection, all of them packed alike: their codes and scales in one tensor each.

    Args: pieces: one a linear, in the order in which their rows follow each other, expert after expert.
    """

    def __init__(self, pieces: Sequence[LinearPiece]) -> None:
        self.pieces = list(pieces)
        linears = [piece.linear for piece in self.pieces]
        self._eight = linears[0].weight.dtype == torch.int8 and getattr(linears[0], "quant_state", None) is None
        self._codes = _Codes8(linears) if self._eight else WeightHouse(linears)
        self._scales = _Scales8(self._codes, linears) if self._eight else _Scales(self._codes, "absmax")
        self._nested: _Scales | None = None
        self._joined: FourBit | EightBit | None = None
        self._refused: list[int] | None = None  # pointers of codes that cannot be housed

    def _houses(self) -> list[House]:
        return [self._codes, self._scales, *([] if self._nested is None else [self._nested])]

    def joined(self) -> FourBit | EightBit | None:
        """All codes as one run of elements; `None` if they differ in kind, or do not consist of whole blocks."""
        try:
            if self._joined is not None and all(house.is_current() for house in self._houses()):
                return self._joined
            places = pointers(self._codes.tensors())
        except AttributeError:  # a linear without statistics, or with plain weights
            return None
        if places == self._refused:
            return None
        self._joined = None
        if not self._alike():
            self._refused = places
            return None
        self._refused = None
        try:
            self._joined = self._join_8() if self._eight else self._join_4()
        except CannotBeHoused:
            self._refused = places
        return self._joined

    def fill(self, joined: FourBit | EightBit, out: Tensor) -> None:
        """Decode all of them into a contiguous tensor."""
        joined.read(0, out.numel(), out)

    def versions(self) -> list[int]:
        """Changes when any of it is written to."""
        return [version for house in self._houses() for version in house.versions()]

    def _alike(self) -> bool:
        if not all(piece.packed and piece.is_int8 == self._eight and not piece.repacked for piece in self.pieces):
            return False
        if len({piece.linear.weight.shape for piece in self.pieces}) > 1:
            return False
        if len({(piece.linear.weight.dtype, piece.linear.weight.device) for piece in self.pieces}) > 1:
            return False
        if self.pieces[0].linear.weight.device.type == "meta":
            return False
        if self._eight:
            return all(len(scales) == len(self.pieces[0].linear.weight) for scales in self._scales.tensors())
        states: list[Any] = [getattr(piece.linear.weight, "quant_state", None) for piece in self.pieces]
        device = self.pieces[0].linear.weight.device
        if any(state is None or state.absmax.device != device for state in states):
            return False
        facts = {
            (state.blocksize, state.quant_type, state.nested, tuple(state.shape), state.absmax.numel(),
             state.absmax.dtype, *((state.state2.blocksize, state.state2.absmax.numel()) if state.nested else ()))
            for state in states
        }  # fmt: skip
        if len(facts) > 1:
            return False
        first = states[0]
        if first.shape.numel() % first.blocksize:
            return False
        if not first.nested:
            return True
        return first.absmax.numel() % first.state2.blocksize == 0 and all(
            torch.equal(state.state2.code, first.state2.code) for state in states[1:]
        )

    def _join_8(self) -> EightBit:
        columns = self.pieces[0].linear.weight.shape[1]
        return EightBit(self._codes.move_in().view(-1, columns), self._scales.move_in())

    def _join_4(self) -> JoinedFourBit:
        states = [_state_of(piece.linear.weight) for piece in self.pieces]
        first, functions = states[0], functional()
        codes, scales = self._codes.move_in(), self._scales.move_in()
        outer = offsets = None
        if first.nested:
            self._nested = self._nested or _Scales(self._codes, "state2.absmax")
            inner = first.state2
            outer = functions.QuantState(
                self._nested.move_in(), code=inner.code, blocksize=inner.blocksize, dtype=inner.dtype
            )
            offsets = torch.stack([state.offset.reshape(()) for state in states])
        whole = functions.QuantState(
            scales, shape=torch.Size((len(states), first.shape.numel())), code=first.code, blocksize=first.blocksize,
            quant_type=first.quant_type, dtype=first.dtype, state2=outer, offset=first.offset,
        )  # fmt: skip
        return JoinedFourBit(codes, whole, offsets)

    def release(self) -> None:
        """Give each tensor a storage of its own again."""
        for house in self._houses():
            house.release()
        self._joined = None

    def abandon(self) -> None:
        """Forget the storages, which others house anew."""
        for house in self._houses():
            house.abandon()
        self._joined = None
