"""How each tensor of a checkpoint is stored, and its numbers whatever that is.

A stored tensor has the name and shape of the plain weight. What else belongs to it in the file (scales, statistics) are
its companions, which are written only where the result stays in the same storage.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...weights.bnb_records import INT8_LINEAR_NAMES, record_from, record_of_linear
from ...weights.fp8_pieces import FP8Piece, scale_names
from ...weights.grid import FLOAT8
from ...weights.mxfp4 import open_mxfp4
from .source import Source

_ACTIVATION_SCALES = ("input_scale", "activation_scale", "input_activation_scale", "activation_scale_inv")


class _Holder:
    """Stands where the readers of packed weights expect a module: it has the tensors as attributes."""

    def __init__(self, **tensors: Any) -> None:
        self.__dict__.update(tensors)

    block_size: tuple[int, int] | None


class Stored:
    """A plain tensor, and what all storages share.

    Attributes: name: of the plain weight. key: whose place in the file it takes. companions: keys that belong to it.
        shape: of the plain weight. dtype: of its numbers in the file; `None` for codes.
    """

    packed = False

    def __init__(
        self, source: Source, name: str, key: str, shape: tuple[int, ...], companions: tuple[str, ...]
    ) -> None:
        self.source, self.name, self.key, self.shape, self.companions = source, name, key, shape, companions
        entry = source.entry(key)
        self.code, self.dtype = entry.code, None if self.packed else entry.dtype

    def read(self, first: int, last: int, wide: torch.dtype, device: torch.device) -> Tensor:
        """The rows `first` to `last` of the first axis in fp32 or fp64; a tensor without axes as it is."""
        return self.source.read(self.key, *((first, last) if self.shape else ())).to(device).to(wide)

    def release(self) -> None:
        """Let go of what was kept between reads."""


class StoredFP8(Stored):
    """FP8 codes and their scale. Args: scale: its key, in any shard; `None`: it is missing. block: the stated size."""

    packed = True

    def __init__(
        self, source: Source, key: str, scale: str | None, block: tuple[int, int] | None, companions: tuple[str, ...]
    ) -> None:
        super().__init__(source, key, key, source.entry(key).shape, companions)
        self.scale, self.block = scale, block

    @property
    def by_slice(self) -> bool:
        """Whether each slice of the first axis of a stack has scales of its own."""
        assert self.scale is not None
        shape = self.source.entry(self.scale).shape
        return len(self.shape) == 3 and math.prod(shape) > 1 and shape[:1] == self.shape[:1]

    def check(self) -> None:
        """Raise `ValueError` if there is no scale."""
        if self.scale is None:
            raise ValueError(
                f"{self.key} is stored as {self.code} and the checkpoint has no scale for it: looked for "
                f"{', '.join(scale_names(self.key.rpartition('.')[2]))} beside it, in all files. FP8 codes mean "
                "nothing without their scale."
            )

    def piece(self, first: int, last: int, device: torch.device) -> FP8Piece:
        """The codes of some slices (of a matrix: all) with their scale, which has to be there."""
        assert self.scale is not None
        leaf = self.key.rpartition(".")[2]
        rows = (first, last) if len(self.shape) == 3 else ()
        codes = self.source.read(self.key, *rows)
        scale = self.source.read(self.scale, *(rows if self.by_slice else ()))
        tensors = {leaf: codes.to(device), self.scale.rpartition(".")[2]: scale.to(device)}
        piece = FP8Piece(_Holder(**tensors, block_size=self.block), leaf, self.key, slice(None))
        piece.halves = codes.dim() == 3 and "gate_up" in leaf
        piece.check()
        return piece

    def read(self, first: int, last: int, wide: torch.dtype, device: torch.device) -> Tensor:
        values = self.piece(first, last, device).dequantize(slice(None), wide)
        return values if len(self.shape) == 3 else values[0, first:last]


class StoredBnb(Stored):
    """Codes of bitsandbytes: 4 bits with statistics beside them, or 8 bits with `SCB`."""

    packed = True

    def __init__(self, source: Source, key: str, companions: tuple[str, ...]) -> None:
        super().__init__(source, key, key, (), companions)
        self._codes: Any = None
        self._linear_int8 = any(one.endswith(".SCB") and not one.startswith(f"{key}.") for one in companions)
        if self._linear_int8:
            self.shape = source.entry(key).shape
        else:
            self.shape = tuple(record_from(self._statistics(), "cpu", None).shape)

    def _statistics(self) -> dict[str, Tensor]:
        start = f"{self.key}."
        return {one.removeprefix(start): self.source.read(one) for one in self.companions if one.startswith(start)}

    def read(self, first: int, last: int, wide: torch.dtype, device: torch.device) -> Tensor:
        if self._codes is None:
            data = self.source.read(self.key).to(device)
            if self._linear_int8:
                beside = {one.rpartition(".")[2]: self.source.read(one) for one in self.companions}
                self._codes = record_of_linear(data, beside, wide, None).codes(data)
            else:
                self._codes = record_from(self._statistics(), device, None).codes(data)
        size = math.prod(self.shape[1:])
        out = torch.empty(last - first, *self.shape[1:], dtype=wide, device=device)
        self._codes.read(first * size, last * size, out)
        return out

    def release(self) -> None:
        self._codes = None


class StoredMXFP4(Stored):
    """Blocks `(E, out, in / 32, 16)` and scales `(E, out, in / 32)` of a plain weight `(E, in, out)`."""

    packed = True

    def __init__(self, source: Source, key: str, scales: str) -> None:
        experts, rows, groups, width = source.entry(key).shape
        shape = (experts, 2 * width * groups, rows)
        super().__init__(source, key.removesuffix("_blocks"), key, shape, (scales,))

    def read(self, first: int, last: int, wide: torch.dtype, device: torch.device) -> Tensor:
        leaf = self.name.rpartition(".")[2]
        held: Any = _Holder(
            **{f"{leaf}_blocks": self.source.read(self.key, first, last).to(device)},
            **{f"{leaf}_scales": self.source.read(self.companions[0], first, last).to(device)},
        )
        shape = (last - first, self.shape[2], self.shape[1])
        store = open_mxfp4(held, [(leaf, True, False)], shape, self.name.rpartition(".")[0])
        return store.materialize(None, wide).transpose(1, 2)


def open_stored(source: Source, block: tuple[int, int] | None) -> dict[str, Stored]:
    """Every tensor of a checkpoint by the name of its plain weight; companions are with what they belong to.

    Args: block: the size of FP8 blocks that the config states; `None`: it states none.
    """
    found: dict[str, Stored] = {}
    by_owner: dict[str, list[str]] = {}  # "a.b.weight.absmax" stands under "a.b.weight"
    for key in source.owner:
        parts = key.split(".")
        for cut in range(max(1, len(parts) - 3), len(parts)):
            by_owner.setdefault(".".join(parts[:cut]), []).append(key)
    for key in source.owner:
        one = _open(source, key, block, by_owner.get(key, []))
        if one is not None:
            found[one.name] = one
    taken = {companion for one in found.values() for companion in one.companions}
    return {name: one for name, one in found.items() if one.key not in taken}


def _open(source: Source, key: str, block: tuple[int, int] | None, below: list[str]) -> Stored | None:
    entry = source.entry(key)
    owner, _, leaf = key.rpartition(".")
    start = f"{owner}." if owner else ""
    if any(one.startswith((f"{key}.quant_state.", f"{key}.absmax")) for one in below):
        return StoredBnb(source, key, tuple(below))
    if entry.code == "I8" and leaf == "weight" and f"{start}SCB" in source:
        statistics = (start + name for name in INT8_LINEAR_NAMES)
        return StoredBnb(source, key, tuple(one for one in statistics if one in source))
    if leaf.endswith("_blocks") and entry.code == "U8" and f"{key.removesuffix('_blocks')}_scales" in source:
        return StoredMXFP4(source, key, f"{key.removesuffix('_blocks')}_scales")
    if entry.dtype in FLOAT8:
        scale = next((start + name for name in scale_names(leaf) if start + name in source), None)
        stem = start if leaf == "weight" else f"{key}_"
        beside = tuple(stem + name for name in _ACTIVATION_SCALES if stem + name in source)
        return StoredFP8(source, key, scale, block, (*((scale,) if scale else ()), *beside))
    return Stored(source, key, key, entry.shape, ())
