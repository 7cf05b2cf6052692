"""Experts quantized with bitsandbytes: packed stacks, and lists of `Linear4bit` and `Linear8bitLt`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bnb_codes import FourBit
from .bnb_pieces import Codes, LinearPiece, StackPiece, is_packed_linear, is_packed_stack
from .built import BuiltWeight, split_path
from .requantized import Change, report

__all__ = ["BnbWeight", "is_packed_linear", "is_packed_stack", "open_bnb_modules", "open_bnb_stack"]


class BnbWeight(BuiltWeight):
    """The store of one projection quantized by bitsandbytes; arguments as those of `BuiltWeight`.

    Computes in the `compute_dtype` that the base states, else in the dtype of the weights that were quantized.
    Activations are never quantized: int8 experts run as their dequantized weights do.
    """

    @property
    def packed(self) -> bool:
        """Whether the weights are codes still: `densify` brings them into 16 bits."""
        return any(piece.packed for piece in self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].compute_dtype or self.activation_dtype

    @torch.no_grad()
    def _fill(self, out: Tensor, experts: Sequence[int], wide: torch.dtype) -> Tensor:
        everything = list(experts) == list(range(self.shape[0]))
        for piece in self.pieces:
            target = out[:, piece.rows]
            target = target.transpose(1, 2) if piece.transposed else target
            if everything and piece.expert is None and target.is_contiguous():
                piece.codes().read(0, target.numel(), target)
                continue
            if piece.expert not in (None, *experts):
                continue
            codes = piece.codes()
            for position, expert in enumerate(experts):
                if piece.expert not in (None, expert):
                    continue
                place = target[position]
                part = (
                    place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
                )
                codes.read(*piece.run(expert), part)
                if part is not place:
                    place.copy_(part)
        return out

    @property
    def builds_some(self) -> bool:
        """Whether experts can be picked on the device: of stacks, in which each is a whole number of blocks."""
        return super().builds_some and all(piece.aligned for piece in self.pieces)

    @torch.no_grad()
    def _fill_some(self, out: Tensor, slots: Tensor) -> Tensor:
        for piece in self.pieces:
            target = out[:, piece.rows]
            target = target.transpose(1, 2) if piece.transposed else target
            part = target if target.is_contiguous() else torch.empty(target.shape, dtype=out.dtype, device=out.device)
            piece.codes().read_runs(slots, piece.elements, part)
            if part is not target:
                target.copy_(part)
        return out

    @torch.no_grad()
    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """See `ExpertWeight.add_`: summed in fp32, requantized once, with the type, block size and kind of scales.

        Nothing is written before all deltas were drawn: a failure changes nothing. Raises `ValueError` if a result is
        not finite.
        """
        self._check_devices()
        copies: dict[int, Codes] = {}
        unpacked: dict[int, tuple[Tensor, Any]] = {}
        change = Change()
        try:
            for experts, delta in deltas:
                for value, expert in zip(delta, experts, strict=True):
                    change += self._add_one(copies, unpacked, expert, value)
            for changed in copies.values():
                if isinstance(changed, FourBit):
                    change += Change(error=changed.settle())
        except BaseException:
            for number, saved in unpacked.items():
                self.pieces[number].put(saved)
            raise
        for number, changed in copies.items():
            self.pieces[number].codes().take(changed)
        self._kept = None
        report(self.name, change)

    def _add_one(
        self, copies: dict[int, Any], unpacked: dict[int, tuple[Tensor, Any]], expert: int, value: Tensor
    ) -> Change:
        change = Change()
        for number, piece in enumerate(self.pieces):
            if piece.expert not in (None, expert):
                continue
            if number not in copies:
                if piece.repacked:
                    unpacked[number] = piece.saved()
                    piece.unpack()
                copies[number] = piece.codes().clone()
            codes, (start, stop) = copies[number], piece.run(expert)
            delta = value[piece.rows].to(self.device, torch.float32)
            delta = (delta.T if piece.transposed else delta).reshape(-1)
            exact = torch.empty(stop - start, device=self.device)
            codes.read(start, stop, exact)
            exact += delta
            if not torch.isfinite(exact).all():
                raise ValueError(
                    f"{piece.where}: merging leaves values of expert {expert} that are not finite; the adapter seems "
                    "broken. Nothing was changed."
                )
            codes.write(start, stop, exact)
            stored = torch.empty_like(exact)
            codes.read(start, stop, stored)  # nested scales are coded later: their own, small error is not in it
            change += Change.of(stored, exact, delta)
        return change

    def densify(self, dtype: torch.dtype) -> None:
        """Replace the packed weights by plain ones; cast those that are plain already. The store goes on to work."""
        for piece in self.pieces:
            piece.densify(dtype)
        self.activation_dtype, self._kept = dtype, None

    @torch.no_grad()
    def snapshot(self) -> list[Any]:
        return [piece.saved() for piece in self.pieces]

    @torch.no_grad()
    def restore(self, snapshot: list[Any]) -> None:
        for piece, saved in zip(self.pieces, snapshot, strict=True):
            piece.put(saved)
        self._kept = None


def open_bnb_stack(
    module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
) -> BnbWeight:
    """The store of packed parameters; the arguments are those of `open_stacked`."""
    pieces, start = [], 0
    for path, transposed, flat in parts:
        owner, parameter = split_path(module, path)
        if not is_packed_stack(module, path):
            raise ValueError(
                f"{name}.{path} is not packed, while other parts of its projection are: quantize all or none"
            )
        piece = StackPiece(owner, parameter, shape[0], slice(start, start), transposed, f"{name}.{path}")
        piece.check()
        held = piece.record.shape
        piece.experts = shape[0] if flat else held[0]
        stop = start + piece.elements // shape[2]
        piece.rows = slice(start, stop)
        pieces.append(piece)
        start = stop
    return BnbWeight(pieces, shape, name, pieces[0].record.dtype)


def open_bnb_modules(linears: Sequence[Sequence[Any]], shape: tuple[int, int, int], name: str) -> BnbWeight:
    """The store of the quantized linears of a list of experts; the arguments are those of `open_modules`."""
    pieces = []
    for expert, modules in enumerate(linears):
        start = 0
        for linear in modules:
            where = f"{name}.{expert}"
            if not is_packed_linear(linear):
                raise ValueError(
                    f"{where} holds {type(linear).__name__} in {linear.weight.dtype}, while other experts are "
                    "quantized by bitsandbytes: quantize all experts of a layer or none."
                )
            rows = slice(start, start + linear.out_features)
            pieces.append(LinearPiece(linear, expert, rows, f"{where} ({rows.start}:{rows.stop})"))
            start = rows.stop
    for piece in pieces:
        piece.check()
    # Linear8bitLt forgets the dtype of its weights, and itself multiplies in fp16.
    return BnbWeight(pieces, shape, name, pieces[0].original_dtype or torch.float16)
