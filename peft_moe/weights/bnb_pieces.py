"""One tensor of a base that bitsandbytes has quantized: a packed stack, or the weight of one linear of one expert."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .bnb_codes import EightBit, FourBit, Plain, functional
from .bnb_records import Int8State, find_record, saved_state, uninstall
from .built import split_path

Codes = FourBit | EightBit | Plain

_PACKED_CLASSES = ("Params4bit", "Int8Params")


def is_packed_linear(linear: Any) -> bool:
    """Whether a linear holds 4-bit or int8 codes of bitsandbytes (and no 16-bit weights, as `has_fp16_weights` has)."""
    weight = getattr(linear, "weight", None)  # linears of other packed formats have none
    if weight is None:
        return False
    if type(weight).__name__ == "Int8Params":
        return weight.dtype == torch.int8
    return type(weight).__name__ == "Params4bit" or getattr(linear, "quant_state", None) is not None


def is_packed_stack(module: nn.Module, path: str) -> bool:
    """Whether the parameter at a path below a module is packed by bitsandbytes."""
    owner, name = split_path(module, path)
    if parametrize.is_parametrized(owner, name):
        return True
    return find_record(owner, name) is not None or type(getattr(owner, name)).__name__ in _PACKED_CLASSES


class StackPiece:
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
    def source(self) -> tuple[Any, str]:
        return self.owner, self.parameter

    @property
    def record(self) -> Any:
        """Statistics of the parameter."""
        return find_record(self.owner, self.parameter)

    @property
    def parameters(self) -> list[Tensor]:
        return [getattr(self.owner, self.parameter)]

    @property
    def packed(self) -> bool:
        """Whether it is packed still, see `densify`."""
        return self.record is not None

    @property
    def elements(self) -> int:
        shape = self.record.shape if self.packed else self.parameters[0].shape
        return shape.numel() // self.experts

    @property
    def aligned(self) -> bool:
        """Whether every expert is a whole number of blocks."""
        state = self.record.state if self.packed else None
        return self.elements % getattr(state, "blocksize", 1) == 0

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """In which the base multiplies, where it says so."""
        return self.record.compute_dtype if self.packed else None

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

    def codes(self) -> Codes:
        """The codes, with the statistics on their device."""
        return self.record.codes(self.parameters[0]) if self.packed else Plain(self.parameters[0])

    def run(self, expert: int) -> tuple[int, int]:
        """The elements of one expert."""
        return expert * self.elements, (expert + 1) * self.elements

    def saved(self) -> tuple[Tensor, Any]:
        """The stored bytes and statistics."""
        return saved_state(self.parameters[0], self.record.state if self.packed else None)

    def put(self, saved: tuple[Tensor, Any]) -> None:
        """Put saved ones back."""
        codes = self.codes()
        if isinstance(codes, Plain):
            codes.take(Plain(saved[0]))
            return
        codes.take(type(codes)(saved[0], saved[1].SCB if isinstance(saved[1], Int8State) else saved[1]))  # type: ignore[arg-type]
        if isinstance(codes, FourBit) and codes.state.nested:
            codes.state.offset.copy_(saved[1].offset)

    def densify(self, dtype: torch.dtype) -> None:
        if not self.packed:
            self.parameters[0].data = self.parameters[0].data.to(dtype)
            return
        uninstall(self.owner, self.parameter, self.record.dense(self.parameters[0], dtype))


class LinearPiece:
    """The packed weight of one linear of one expert."""

    transposed = False

    def __init__(self, linear: Any, expert: int, rows: slice, where: str) -> None:
        self.linear, self.expert, self.rows, self.where = linear, expert, rows, where

    @property
    def source(self) -> tuple[Any, str]:
        return self.linear, "weight"

    @property
    def parameters(self) -> list[Tensor]:
        return [self.linear.weight]

    @property
    def elements(self) -> int:
        return self.linear.in_features * self.linear.out_features

    @property
    def packed(self) -> bool:
        """Whether it is packed still, see `densify`."""
        return is_packed_linear(self.linear)

    @property
    def is_int8(self) -> bool:
        """Whether its codes are int8, not 4 bits."""
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
        if not self.is_int8:
            return self._state.dtype if not self.repacked else self._state.original_dtype
        bias = getattr(self.linear, "bias", None)
        return getattr(self.linear, "original_dtype", None if bias is None else bias.dtype)

    @property
    def repacked(self) -> bool:
        """Whether a forward on the CPU has put the 4-bit codes into an order of its own."""
        return not self.is_int8 and bool(getattr(self._state, "packing_format_for_cpu", False))

    def check(self) -> None:
        kind = type(self.linear).__name__
        if self.is_int8:
            if self._scales is None and self.linear.weight.device.type != "meta":
                raise ValueError(
                    f"{self.where} ({kind}) holds int8 codes without SCB, their scales: they mean nothing."
                )
        elif self._state is None:
            raise ValueError(
                f"{self.where} ({kind}) holds no quant_state: it was not quantized yet, or its statistics got lost. "
                "Move the model to its device first, which quantizes it."
            )

    def codes(self) -> Codes:
        """The codes in their usual order; of weights that a forward on the CPU has repacked, a copy."""
        weight = self.linear.weight
        if not self.packed:
            return Plain(weight)
        if self.is_int8:
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
        state = self._scales if self.is_int8 else self._state if self.packed else None
        return saved_state(self.linear.weight, state)

    def put(self, saved: tuple[Tensor, Any]) -> None:
        """Put saved ones back; repacked ones too."""
        data, state = saved
        weight = self.linear.weight
        if weight.data.shape == data.shape and weight.dtype == data.dtype:
            weight.data.copy_(data)
        else:
            weight.data = data.to(weight.device, copy=True)
        if self.is_int8:
            scales = self._scales
            assert scales is not None
            scales.copy_(state)
        elif self.packed:
            current = self._state
            vars(current).clear()
            vars(current).update(vars(copy.deepcopy(state)))
            current.to(weight.device)

    def densify(self, dtype: torch.dtype) -> None:
        linear = self.linear
        if not self.packed:
            linear.weight.data = linear.weight.data.to(dtype)
            return
        dense = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=linear.weight.device)
        self.codes().read(0, dense.numel(), dense)
        for name in ("compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "state", "index"):
            vars(linear).pop(name, None)
        # The module itself has to stay: its block and its hooks hold it.
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(dense, requires_grad=False)
        if linear.bias is not None:
            linear.bias.data = linear.bias.data.to(dtype)


def saved_linear(linear: Any) -> tuple[Tensor, Any]:
    """A copy of the weight of any linear, packed or not, with the statistics that belong to it."""
    if is_packed_linear(linear):
        return LinearPiece(linear, 0, slice(None), type(linear).__name__).saved()
    return linear.weight.detach().clone(), None


def put_linear(linear: Any, saved: tuple[Tensor, Any]) -> None:
    """Put a saved weight back, bit for bit."""
    if saved[1] is not None:
        LinearPiece(linear, 0, slice(None), type(linear).__name__).put(saved)
    else:
        linear.weight.data.copy_(saved[0])
