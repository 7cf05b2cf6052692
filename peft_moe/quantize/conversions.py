"""Packed experts among the weight conversions of transformers 5, which know 16-bit experts alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import core_model_loading as loading
from ..compat import get_model_conversion_mapping
from ..weights.bnb_records import FOUR_BIT_NAMES

_Operation: Any = object if loading is None else loading.ConversionOps


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, list) else value


class QuantizeStacks(_Operation):
    """Quantizes stacked experts when all of one stack was read; what is no stack goes to the stock operation."""

    def __init__(self, hf_quantizer: Any, stock: Any) -> None:
        self.hf_quantizer, self.stock = hf_quantizer, stock

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """`{name: what was read}` -> `{name: the packed parameter}`."""
        mine = {name for name in input_dict if name in self.hf_quantizer.stacks}
        result: dict[str, Tensor] = {}
        for name in mine:
            result[name] = self.hf_quantizer.pack_stack(model, name, _first(input_dict.pop(name)))
        if input_dict:
            result |= self.stock.convert(input_dict, *args, model=model, **kwargs)
        return result


class RestoreStack(_Operation):
    """Puts packed bytes and their statistics together again."""

    def __init__(self, hf_quantizer: Any, name: str) -> None:
        self.hf_quantizer, self.name = hf_quantizer, name

    def __deepcopy__(self, memo: Any) -> RestoreStack:
        return self  # transformers copies a converter for each key; the quantizer has to stay the one

    def convert(self, input_dict: dict[str, Any], *args: Any, model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        """`{pattern: [tensor]}` of one stack -> `{name: the packed parameter}`."""
        found = {pattern.removeprefix(_escape(self.name)): _first(value) for pattern, value in input_dict.items()}
        packed = found.pop("", None)
        statistics = {_unescape(suffix).removeprefix("."): value for suffix, value in found.items()}
        if packed is None:
            raise ValueError(f"{self.name}: the checkpoint holds {sorted(statistics)} of it, and not the packed tensor")
        return {self.name: self.hf_quantizer.restore_stack(model, self.name, packed, statistics)}


class StackSingles(_Operation):
    """Makes one packed stack of experts that were quantized one by one; where a layer is in 16 bits, as usual.

    Args: conversion: the model's own converter, which stacks 16-bit experts. suffixes: see `single_suffixes`.
    """

    def __init__(self, hf_quantizer: Any, conversion: Any, suffixes: Sequence[str]) -> None:
        self.hf_quantizer, self.conversion, self.suffixes = hf_quantizer, conversion, list(suffixes)

    def __deepcopy__(self, memo: Any) -> StackSingles:
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str],
        full_layer_name: str, model: Any = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """`{pattern: [tensor of each expert]}` -> `{name: the packed parameter}`.

        Raises `ValueError` where tensors are missing, where some experts are packed and others are not, and where one
        stack cannot hold them exactly.
        """
        step = len(self.suffixes) + 1
        linears = [source_patterns[start : start + step] for start in range(0, len(source_patterns), step)]
        expected = model.get_parameter(full_layer_name)
        for pattern, found in input_dict.items():
            if len(found) != expected.shape[0]:
                raise ValueError(
                    f"{full_layer_name}: {len(found)} experts have {pattern}, expected {expected.shape[0]}: the "
                    "checkpoint lacks some, or keeps some experts in 16 bits and others packed, which a stack cannot. "
                    "Load it with the version of transformers that wrote it, or quantize the 16-bit checkpoint again."
                )
        if full_layer_name not in self.hf_quantizer.stacks:
            return self._in_16_bits(input_dict, [patterns[0] for patterns in linears], target_patterns, expected.dtype)
        singles = [
            self._single(input_dict, patterns, expert, full_layer_name)
            for expert in range(expected.shape[0])
            for patterns in linears
        ]
        return {full_layer_name: self.hf_quantizer.stack_singles(model, full_layer_name, singles)}

    def _single(
        self, found: dict[str, list[Tensor]], patterns: Sequence[str], expert: int, name: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if patterns[0] not in found:
            raise ValueError(f"{name}: the checkpoint holds no {patterns[0]} of it")
        named = zip(patterns[1:], self.suffixes, strict=True)
        return found[patterns[0]][expert], {suffix: found[key][expert] for key, suffix in named if key in found}

    def _in_16_bits(
        self, found: dict[str, Any], sources: list[str], targets: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        if set(found) != set(sources):
            raise ValueError(f"{targets[0]}: `llm_int8_skip_modules` leaves it in 16 bits, the checkpoint holds codes")
        values: dict[str, Any] = {source: [one.to(dtype) for one in found[source]] for source in sources}
        for operation in self.conversion.operations:
            values = operation.convert(values, source_patterns=sources, target_patterns=targets)
        return values


class ReadLinear(_Operation):
    """Reads packed linears as the stock operation does; where this model has none (routers), their weights.

    Args: stock: the operation of transformers.
    """

    def __init__(self, hf_quantizer: Any, stock: Any) -> None:
        self.hf_quantizer, self.stock = hf_quantizer, stock

    def __deepcopy__(self, memo: Any) -> ReadLinear:
        return self

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`{suffix: [tensor]}` of one weight -> `{name: the parameter}`. Raises `ValueError` where they misfit."""
        owner, _, leaf = full_layer_name.rpartition(".")
        if len(input_dict) == 1 or type(model.get_submodule(owner)).__name__ in ("Linear4bit", "Linear8bitLt"):
            return self.stock.convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        found = {pattern.removeprefix(f"{leaf}."): _first(value) for pattern, value in input_dict.items()}
        return {full_layer_name: self.hf_quantizer.read_linear(model, full_layer_name, found.pop(leaf), found)}


class RefuseSingle(_Operation):
    """Stands where a converter would rearrange the packed bytes of single experts as if they were weights."""

    def __init__(self, target: str) -> None:
        self.target = target

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Raises `ValueError`."""
        raise ValueError(
            f"{self.target}: the checkpoint holds experts that were quantized in another arrangement than the model "
            "has: their packed bytes would have to be transposed or interleaved. Load the checkpoint with the version "
            "of transformers that wrote it, or quantize the 16-bit checkpoint again."
        )


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _unescape(pattern: str) -> str:
    return pattern.replace(r"\.", ".")


def quantize_operation(hf_quantizer: Any, stock: Any) -> Any:
    """See `QuantizeStacks`."""
    return QuantizeStacks(hf_quantizer, stock)


def _targets(conversion: Any, names: Sequence[str]) -> bool:
    """Whether a converter makes (or, saving, takes apart) one of these parameters."""
    if not isinstance(conversion, loading.WeightConverter):
        return False
    patterns = [re.compile(rf"{pattern}(?!\w)") for pattern in conversion.target_patterns if "\\1" not in pattern]
    return any(pattern.search(name) for pattern in patterns for name in names)


def for_packed_checkpoint(
    hf_quantizer: Any, conversions: list[Any], names: Sequence[str], suffixes: Sequence[str], singles: Sequence[str]
) -> list[Any]:
    """Converters that read packed stacks, before all others; those that would stack weights stack codes, or refuse.

    Args: names: of the stacks. suffixes: of the statistics of a stack. singles: of those of one linear.
    """
    mine = [
        loading.WeightConverter(
            [_escape(name), *(f"{_escape(name)}\\.{_escape(suffix)}" for suffix in suffixes)], name,
            [RestoreStack(hf_quantizer, name)],
        )
        for name in names
    ]  # fmt: skip
    rest = []
    for conversion in conversions:
        if _is_stock(conversion):
            (operation,) = conversion.operations
            sources, targets = list(conversion._original_source_patterns), list(conversion._original_target_patterns)
            conversion = conversion.copy(sources, targets, operations=[ReadLinear(hf_quantizer, operation)])
        elif _targets(conversion, names):
            conversion = _of_singles(hf_quantizer, conversion, singles)
        rest.append(conversion)
    return [*mine, *rest]


def _of_singles(hf_quantizer: Any, conversion: Any, suffixes: Sequence[str]) -> Any:
    sources, targets = list(conversion._original_source_patterns), list(conversion._original_target_patterns)
    if not _only_stacks(conversion):
        return conversion.copy(sources, targets, operations=[RefuseSingle(targets[0])])
    operation = StackSingles(hf_quantizer, conversion, suffixes)
    # `weight` -> `weight.absmax` of 4 bits, but `SCB` of int8, which belongs to the linear
    packed = [
        f"{source}.{suffix}" if suffix in FOUR_BIT_NAMES else f"{source.removesuffix('weight')}{suffix}"
        for source in sources
        for suffix in ("weight", *suffixes)
    ]
    return conversion.copy(packed, targets, operations=[operation])


def _only_stacks(conversion: Any) -> bool:
    """Whether a converter puts the linears of experts under each other, and nothing else."""
    kinds = [(type(operation), operation.dim) for operation in conversion.operations if hasattr(operation, "dim")]
    whole = [(loading.MergeModulelist, 0), (loading.Concatenate, 1)]
    sources, targets = conversion.source_patterns, conversion.target_patterns
    return (
        kinds == whole[: len(conversion.operations)]
        and len(targets) == 1
        and (len(sources) == 1 or len(kinds) == 2)
        and all("*." in source and source.endswith(".weight") for source in sources)
    )


def keep_stacked(model: Any, names: Sequence[str]) -> None:
    """Let `save_pretrained` write packed stacks as they are: no conversion may take them apart into experts."""
    if loading is None or not names:
        return
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        found = get_model_conversion_mapping(model, add_legacy=False)
        # As transformers does for a model that was not loaded: nothing tells whether a checkpoint had the prefix.
        found = [one for one in found if not isinstance(one, loading.PrefixChange)]
    model._weight_conversions = [
        one for one in found if not _targets(one, names) and not _is_mine(one) and not _is_stock(one)
    ]


_MINE = (RestoreStack, StackSingles, ReadLinear, RefuseSingle)


def _is_mine(conversion: Any) -> bool:
    return any(isinstance(operation, _MINE) for operation in getattr(conversion, "operations", ()))


def _is_stock(conversion: Any) -> bool:
    """Whether a converter reads packed linears: it has no way back, and saving needs none."""
    return any(type(operation).__name__.startswith("Bnb") for operation in getattr(conversion, "operations", ()))
