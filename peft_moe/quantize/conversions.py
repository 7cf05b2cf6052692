"""Packed experts among the weight conversions of transformers 5, which know 16-bit experts alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..compat import core_model_loading as loading
from ..compat import get_model_conversion_mapping

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


class RefuseSingle(_Operation):
    """Stands where a converter would stack the packed bytes of single experts as if they were weights."""

    def __init__(self, target: str) -> None:
        self.target = target

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Raises `ValueError`."""
        raise ValueError(
            f"{self.target}: the checkpoint holds experts that were quantized one by one (by transformers 4), and this "
            "model stacks them. Their packed bytes cannot be stacked as they are. Load the checkpoint with the version "
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
    hf_quantizer: Any, conversions: list[Any], names: Sequence[str], suffixes: Sequence[str]
) -> list[Any]:
    """Converters that read packed stacks, before all others; those that would stack single experts refuse."""
    mine = [
        loading.WeightConverter(
            [_escape(name), *(f"{_escape(name)}\\.{_escape(suffix)}" for suffix in suffixes)], name,
            [RestoreStack(hf_quantizer, name)],
        )
        for name in names
    ]  # fmt: skip
    rest = []
    for conversion in conversions:
        if _targets(conversion, names) and not _is_stock(conversion):
            target = conversion.target_patterns[0]
            conversion = conversion.copy(
                list(conversion._original_source_patterns), list(conversion._original_target_patterns),
                operations=[RefuseSingle(target)],
            )  # fmt: skip
        rest.append(conversion)
    return [*mine, *rest]


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


def _is_mine(conversion: Any) -> bool:
    return any(
        isinstance(operation, (RestoreStack, RefuseSingle)) for operation in getattr(conversion, "operations", ())
    )


def _is_stock(conversion: Any) -> bool:
    """Whether a converter reads packed linears: it has no way back, and saving needs none."""
    return any(type(operation).__name__.startswith("Bnb") for operation in getattr(conversion, "operations", ()))
