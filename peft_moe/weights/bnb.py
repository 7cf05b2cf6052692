"""Experts quantized with bitsandbytes: packed stacks, and lists of `Linear4bit` and `Linear8bitLt`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .bnb_codes import EightBit, FourBit, functional
from .bnb_records import Int8State, find_record, saved_state, uninstall
from .built import BuiltWeight, split_path
from .requantized import Change, report

_PACKED_CLASSES = ("Params4bit", "Int8Params")


def is_packed_linear(linear: Any) -> bool:
    """Whether a linear holds 4-bit or int8 codes of bitsandbytes (and no 16-bit weights, as `has_fp16_weights` has)."""
    weight = linear.weight
    if type(weight).__name__ == "Int8Params":
        return weight.dtype == torch.int8
    return type(weight).__name__ == "Params4bit" or getattr(linear, "quant_state", None) is not None


def is_packed_stack(module: nn.Module, path: str) -> bool:
    """Whether the parameter at a path below a module is packed by bitsandbytes."""
    owner, name = split_path(module, path)
    if parametrize.is_parametrized(owner, name):
        return True
    return find_record(owner, name) is not None or type(getattr(owner, name)).__name__ in _PACKED_CLASSES


class _StackPiece:
    """A packed parameter of all experts.

    Args: owner, parameter: it is `owner.<parameter>`. experts: how many it holds, perhaps more than the projection
    has. rows, transposed: see `built.Piece`. where: its path, for messages.
    """

    expert = None
    repacked = False

    def __init__(self, owner: Any, parameter: str, experts: int, rows: slice, transposed: bool, where: str) -> None:
        self.owner, self.parameter, self.where = owner, parameter, where
        self.experts, self.rows, self.transposed = experts, rows, transposed

    @property
    def record(self) -> Any:
        """Statistics of the parameter."""
        return find_record(self.owner, self.parameter)

    @property
    def parameters(self) -> list[Tensor]:
        return [getattr(self.owner, self.parameter)]

    @property
    def elements(self) -> int:
        return self.record.shape.numel() // self.experts

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which the base multiplies, where it says so."""
        return self.record.compute_dtype

    def check(self) -> None:
        if parametrize.is_parametrized(self.owner, self.parameter):
            raise ValueError(
                f"{self.where} is quantized by a parametrization ({type(self.owner).__name__}.parametrizations), which "
                "shows 16-bit weights and forgets what is added to them. Load the model in 16 bits and call "
                "`peft_moe.quantize_experts(model, config)`, or load it with `BnbExpertsConfig`."
            )
        if self.record is None:
            raise ValueError(
                f"{self.where} is a {type(self.parameters[0]).__name__} without a quant_state: its codes cannot be "
                "read. If it was not quantized yet, move the model to its device first."
            )

    def codes(self) -> FourBit | EightBit:
        """The codes, with the statistics on their device."""
        return self.record.codes(self.parameters[0])

    def run(self, expert: int) -> tuple[int, int]:
        """The elements of one expert."""
        return expert * self.elements, (expert + 1) * self.elements

    def saved(self) -> tuple[Tensor, Any]:
        """The stored bytes and statistics."""
        return saved_state(self.parameters[0], self.record.state)

    def put(self, saved: tuple[Tensor, Any]) -> None:
        """Put saved ones back."""
        codes = self.codes()
        codes.take(type(codes)(saved[0], saved[1].SCB if isinstance(saved[1], Int8State) else saved[1]))  # type: ignore[arg-type]
        if isinstance(codes, FourBit) and codes.state.nested:
            codes.state.offset.copy_(saved[1].offset)

    def densify(self, dtype: torch.dtype) -> None:
        codes = self.codes()
        dense = torch.empty(self.record.shape, dtype=dtype, device=self.parameters[0].device)
        codes.read(0, dense.numel(), dense)
        uninstall(self.owner, self.parameter, dense)


class _LinearPiece:
    """The packed weight of one linear of one expert."""

    transposed = False

    def __init__(self, linear: Any, expert: int, rows: slice, where: str) -> None:
        self.linear, self.expert, self.rows, self.where = linear, expert, rows, where

    @property
    def parameters(self) -> list[Tensor]:
        return [self.linear.weight]

    @property
    def elements(self) -> int:
        return self.linear.in_features * self.linear.out_features

    @property
    def _is_int8(self) -> bool:
        return self.linear.weight.dtype == torch.int8 and getattr(self.linear, "quant_state", None) is None

    @property
    def _state(self) -> Any:
        """Of 4-bit weights; the module keeps it where the parameter has lost it."""
        state = getattr(self.linear.weight, "quant_state", None)
        return getattr(self.linear, "quant_state", None) if state is None else state

    @property
    def _scales(self) -> Tensor | None:
        """Of int8 weights; they move to the module's state with its first forward."""
        scales = getattr(self.linear.weight, "SCB", None)
        return self.linear.state.SCB if scales is None else scales

    @property
    def compute_dtype(self) -> torch.dtype | None:
        return getattr(self.linear, "compute_dtype", None)

    @property
    def original_dtype(self) -> torch.dtype | None:
        """Of what was quantized, as far as anything tells."""
        if not self._is_int8:
            return self._state.dtype if not self.repacked else self._state.original_dtype
        bias = getattr(self.linear, "bias", None)
        return getattr(self.linear, "original_dtype", None if bias is None else bias.dtype)

    @property
    def repacked(self) -> bool:
        """Whether a forward on the CPU has put the 4-bit codes into an order of its own."""
        return not self._is_int8 and bool(getattr(self._state, "packing_format_for_cpu", False))

    def check(self) -> None:
        kind = type(self.linear).__name__
        if self._is_int8:
            if self._scales is None and self.linear.weight.device.type != "meta":
                raise ValueError(f"{self.where} ({kind}) holds int8 codes without SCB, their scales: they mean nothing.")
        elif self._state is None:
            raise ValueError(
                f"{self.where} ({kind}) holds no quant_state: it was not quantized yet, or its statistics got lost. "
                "Move the model to its device first, which quantizes it."
            )

    def codes(self) -> FourBit | EightBit:
        """The codes in their usual order; of weights that a forward on the CPU has repacked, a copy."""
        weight = self.linear.weight
        if self._is_int8:
            scales = self._scales
            assert scales is not None
            if scales.device != weight.device:
                raise ValueError(f"{self.where}: weights on {weight.device}, their scales (SCB) on {scales.device}")
            return EightBit(weight, scales)
        state = self._state
        if state.absmax.device != weight.device and weight.device.type != "meta":
            state.to(weight.device)
        if not self.repacked:
            return FourBit(weight, state)
        state = copy.copy(state)
        state.original_nested = False  # its scales were decoded; coding them again would lose a little
        data, state = functional()._convert_weight_packed_for_cpu_inverse(weight.data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
        return FourBit(data, state)

    def run(self, expert: int) -> tuple[int, int]:
        """The elements of the expert: all."""
        return 0, self.elements

    def unpack(self) -> None:
        """Put repacked codes back into their usual order, so that they can be written."""
        weight, state = self.linear.weight, self._state
        data, state = functional()._convert_weight_packed_for_cpu_inverse(weight.data, state)
        if not state.nested:
            state.absmax = state.absmax.T.reshape(-1).float()
        weight.data = data
        weight.quant_state = self.linear.quant_state = state

    def saved(self) -> tuple[Tensor, Any]:
        """The stored bytes and statistics."""
        return saved_state(self.linear.weight, self._scales if self._is_int8 else self._state)

    def put(self, saved: tuple[Tensor, Any]) -> None:
        """Put saved ones back; repacked ones too."""
        data, state = saved
        weight = self.linear.weight
        if weight.data.shape == data.shape and weight.dtype == data.dtype:
            weight.data.copy_(data)
        else:
            weight.data = data.to(weight.device, copy=True)
        if self._is_int8:
            scales = self._scales
            assert scales is not None
            scales.copy_(state)
        else:
            current = self._state
            vars(current).clear()
            vars(current).update(vars(copy.deepcopy(state)))
            current.to(weight.device)

    def densify(self, dtype: torch.dtype) -> None:
        linear = self.linear
        dense = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=linear.weight.device)
        self.codes().read(0, dense.numel(), dense)
        for name in ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "state", "index"):
            vars(linear).pop(name, None)
        # The module itself has to stay: its block and its hooks hold it.
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(dense, requires_grad=False)
        if linear.bias is not None:
            linear.bias.data = linear.bias.data.to(dtype)


class BnbWeight(BuiltWeight):
    """The store of one projection quantized by bitsandbytes; arguments as those of `BuiltWeight`.

    Computes in the `compute_dtype` that the base states, else in the dtype of the weights that were quantized.
    Activations are never quantized: int8 experts run as their dequantized weights do.
    """

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
            codes = piece.codes() if piece.expert is None or piece.expert in experts else None
            for position, expert in enumerate(experts):
                if piece.expert not in (None, expert):
                    continue
                place = target[position]
                part = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
                codes.read(*piece.run(expert), part)
                if part is not place:
                    place.copy_(part)
        return out

    @torch.no_grad()
    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """See `ExpertWeight.add_`: summed in fp32, requantized once, with the type, block size and kind of scales.

        Nothing is written before all deltas were drawn: a failure changes nothing. Raises `ValueError` if a result is
        not finite.
        """
        self._check_devices()
        copies: dict[int, FourBit | EightBit] = {}
        unpacked: dict[int, tuple[Tensor, Any]] = {}
        change = Change()
        try:
            for experts, delta in deltas:
                for value, expert in zip(delta, experts, strict=True):
                    change += self._add_one(copies, unpacked, expert, value)
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
            raise ValueError(f"{name}.{path} is not packed, while other parts of its projection are: quantize all or none")
        piece = _StackPiece(owner, parameter, shape[0], slice(start, start), transposed, f"{name}.{path}")
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
                    f"{where} holds {type(linear).__name__} in {linear.weight.dtype}, while other experts are quantized "
                    "by bitsandbytes: quantize all experts of a layer or none."
                )
            rows = slice(start, start + linear.out_features)
            pieces.append(_LinearPiece(linear, expert, rows, f"{where} ({rows.start}:{rows.stop})"))
            start = rows.stop
    for piece in pieces:
        piece.check()
    # Linear8bitLt forgets the dtype of its weights, and itself multiplies in fp16.
    return BnbWeight(pieces, shape, name, pieces[0].original_dtype or torch.float16)
