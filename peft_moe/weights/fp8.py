"""FP8 weights with their scales: they stay FP8 in memory, and are rebuilt in 16 bits for each product.

Every storage is cut into pieces, each one tensor of the base with its scale: see `fp8_pieces`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.scaled import CodedStack, ScaledStack
from .built import BuiltWeight, split_path, stated_dtype
from .dense import DENSE_DTYPES
from .fp8_pieces import FP8Piece
from .requantized import Change, report


class FP8Weight(BuiltWeight):
    """The store of one projection in FP8; arguments as those of `BuiltWeight`.

    Raises `ValueError` for an FP8 weight without a usable scale.
    """

    def frozen(self) -> Callable[[], Tensor]:
        """See `ExpertWeight.frozen`: also the codes, where they are not kept in 16 bits anyway."""
        joined = self._check()
        build = partial(self._build, joined, self.dtype)
        return build if self.keep_built else CodedStack(build, partial(self._codes, joined))

    def __repr__(self) -> str:
        if self.keep_built or self.device.type != "cuda" or find_spec("triton") is None:
            return super().__repr__()
        from ..ops.triton.probe import measured

        rows = measured(self.device)
        on_codes = "measured at its first call" if rows is None else f"{rows} rows an expert"
        return f"{super().__repr__()[:-1]}, products on codes up to: {on_codes})"

    def _codes(self, joined: FP8Piece | None) -> ScaledStack | None:
        """All experts as one stack of codes, `None` where several tensors or irregular blocks make it up."""
        piece = self.pieces[0] if joined is None else joined
        if joined is None and (len(self.pieces) > 1 or piece.expert is not None):
            return None
        found = piece.scaled(self.shape[0])
        return None if found is None else found.mT if piece.transposed else found

    @torch.no_grad()
    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """See `ExpertWeight.add_`: summed in fp32, requantized once with new scales of the same granularity.

        Nothing is written before all deltas were drawn and all results are finite: a failure changes nothing.
        Raises `ValueError` if an expert comes twice, or a result is not finite.
        """
        self._check_devices()
        drawn: set[int] = set()
        ready: list[tuple[FP8Piece, list[int], Tensor, Tensor | None]] = []
        shared = [p for p in self.pieces if p.packed and p.expert is None and p.scale.numel() == 1 < self.shape[0]]
        later: list[tuple[list[int], Tensor]] = []  # one scale for all experts needs all of them at once
        change = Change()
        for experts, delta in deltas:
            chosen = list(experts)
            if drawn.intersection(chosen) or len(set(chosen)) < len(chosen):
                raise ValueError(f"{self.name}: experts {sorted(drawn.intersection(chosen))} come twice in one merge")
            drawn.update(chosen)
            if shared:
                later.append((chosen, delta))
            for piece in self.pieces:
                if piece not in shared:
                    change += self._prepare(piece, chosen, delta, ready)
        if later:
            whole = torch.zeros(self.shape, dtype=later[0][1].dtype, device=self.device)
            for chosen, delta in later:
                whole[chosen] = delta.to(self.device)
            for piece in shared:
                change += self._prepare(piece, list(range(self.shape[0])), whole, ready)
        for piece, chosen, codes, scales in ready:
            piece.write(chosen, codes, scales)
        self._kept = None
        report(self.name, change)

    def _prepare(self, piece: FP8Piece, experts: list[int], delta: Tensor, ready: list[Any]) -> Change:
        if piece.expert is not None:
            if piece.expert not in experts:
                return Change()
            position = experts.index(piece.expert)
            delta, experts = delta[position : position + 1], [0]
        delta = delta[:, piece.rows].to(self.device)
        delta = delta.transpose(1, 2) if piece.transposed else delta
        wide = torch.promote_types(delta.dtype, torch.float32)
        try:
            codes, scales, change = piece.requantize(experts, delta.to(wide), wide)
        except ValueError as error:
            raise ValueError(f"{piece.where}: {error}. Nothing was changed.") from error
        ready.append((piece, experts, codes, scales))
        return change


def open_fp8_stack(
    module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
) -> FP8Weight:
    """The store of stacked FP8 parameters; the arguments are those of `open_stacked`."""
    pieces, start = [], 0
    for path, transposed, flat in parts:
        owner, weight = split_path(module, path)
        if flat:
            raise ValueError(
                f"{name}.{path}: FP8 experts that lie in one matrix under each other are not supported; expected a "
                "3-D parameter. Load the model dequantized."
            )
        rows = getattr(owner, weight).shape[2 if transposed else 1]
        halves = "gate_up" in weight and not transposed and getattr(owner, "is_concatenated", True)
        rows_of = slice(start, start + rows)
        pieces.append(FP8Piece(owner, weight, f"{name}.{path}", rows_of, transposed=transposed, halves=halves))
        start += rows
    return FP8Weight(pieces, shape, name, stated_dtype(module))


def open_fp8_modules(linears: Sequence[Sequence[Any]], shape: tuple[int, int, int], name: str) -> FP8Weight:
    """The store of the FP8 linears of a list of experts; the arguments are those of `open_modules`."""
    pieces = []
    for expert, modules in enumerate(linears):
        start = 0
        for linear in modules:
            rows = slice(start, start + linear.weight.shape[0])
            pieces.append(FP8Piece(linear, "weight", f"{name}.{expert} ({rows.start}:{rows.stop})", rows, expert))
            start = rows.stop
    dense = next(
        (linear.weight.dtype for one in linears for linear in one if linear.weight.dtype in DENSE_DTYPES), None
    )
    return FP8Weight(pieces, shape, name, dense or torch.bfloat16)
