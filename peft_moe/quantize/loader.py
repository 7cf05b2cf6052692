"""transformers' quantizers for `BnbExpertsConfig`: `from_pretrained` and `save_pretrained` on transformers 4.57 and 5.

They are the stock quantizers of bitsandbytes, which go on to quantize linears, with stacked experts beside them. What
differs between the two versions of transformers is here and in `conversions.py`:

- transformers 5 asks `param_needs_quantization` and lets an operation turn what it read into what the module holds.
- transformers 4 hands each tensor, in the order of the file, to `create_quantized_param`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import Bnb4BitHfQuantizer, Bnb8BitHfQuantizer
from ..compat import quantizer_registry as auto
from ..weights.bnb_pieces import is_packed_linear
from ..weights.bnb_records import (
    FOUR_BIT_NAMES,
    INT8_LINEAR_NAMES,
    RECORDS,
    PackedRecord,
    find_record,
    install,
    record_from,
    record_of_linear,
    statistics_names,
    uninstall,
)
from ..weights.built import split_path
from ..weights.dense import DENSE_DTYPES
from . import conversions
from .config import METHODS, BnbExpertsConfig, stock_method
from .experts import Stack, bind, find_stacks, is_skipped, linears_elsewhere, listed_linears
from .packing import pack, parameter_of
from .singles import join_singles


class _ExpertsQuantizer:
    """What the 4-bit and the 8-bit quantizer have in common; mixed in before a stock quantizer."""

    quantization_config: BnbExpertsConfig
    pre_quantized: bool

    def __init__(self, quantization_config: BnbExpertsConfig, **kwargs: Any) -> None:
        # The method by which transformers found this class is not one that it, PEFT and accelerate know later on.
        quantization_config = copy.copy(quantization_config)
        quantization_config.quant_method = stock_method()
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        self.stacks: dict[str, Stack] = {}
        self._gathered: dict[str, dict[str, Tensor]] = {}

    # --- which tensors -------------------------------------------------------------------------------------------

    def get_modules_to_not_convert(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """As the stock one, with what it would overlook: patterns on listed experts, and `experts_only`."""
        names = list(super().get_modules_to_not_convert(model, *args, **kwargs))  # type: ignore[misc]
        skip = self.quantization_config.llm_int8_skip_modules
        inside = {full for full, _, _ in listed_linears(model, None)}
        names += sorted(inside - {full for full, _, _ in listed_linears(model, skip)})
        if self.quantization_config.experts_only:
            names += [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in inside]
        return names

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Nothing: transformers would replace the stacked experts of some models by lists, whose linears it knows."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        skip = self.quantization_config.llm_int8_skip_modules
        self.stacks = {stack.name: stack for stack in find_stacks(model, skip)}
        kept = self.get_modules_to_not_convert(model, skip, None)
        if self.quantization_config.experts_only and not list(listed_linears(model, skip)):
            self.modules_to_not_convert = kept  # nothing for the stock quantizer, which would warn of it
            model.config.quantization_config = self.quantization_config
        else:
            super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]
        # What keeps linears in 16 bits (offloaded modules, an output layer) keeps experts, too.
        fixed = [name for name in self.modules_to_not_convert if name not in kept]
        self.stacks = {name: stack for name, stack in self.stacks.items() if not is_skipped(stack.experts, fixed)}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this parameter (on transformers 4: or a statistic of one) is one of ours or of the stock linears."""
        if self._stack_of(param_name) is not None:
            return True
        return super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]

    def _stack_of(self, key: str) -> Stack | None:
        """The stack to which a key belongs, its own or that of one of its statistics."""
        if key in self.stacks:
            return self.stacks[key]
        for suffix in self._suffixes():
            if key.endswith(f".{suffix}") and key.removesuffix(f".{suffix}") in self.stacks:
                return self.stacks[key.removesuffix(f".{suffix}")]
        return None

    def _suffixes(self) -> list[str]:
        settings = self.quantization_config.settings()
        return statistics_names(settings.quant_type, settings.nested)

    # --- what both versions do with a stack ----------------------------------------------------------------------

    def pack_stack(self, model: Any, name: str, values: Tensor) -> nn.Parameter:
        """Quantize what was read and record it; the caller puts the parameter in place."""
        parameter, record = pack(values, self.quantization_config.settings())
        return self._install(model, name, parameter, record)

    def restore_stack(self, model: Any, name: str, packed: Tensor, statistics: dict[str, Tensor]) -> nn.Parameter:
        """The parameter of packed bytes that were read with their statistics. Raises `ValueError` where they misfit."""
        if not statistics and packed.shape == model.get_parameter(name).shape:
            raise ValueError(_plain(name))
        try:
            record = record_from(statistics, packed.device, self.quantization_config.compute_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. The checkpoint is not complete.") from error
        return self._place(model, name, packed, record)

    def stack_singles(self, model: Any, name: str, singles: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> nn.Parameter:
        """The parameter of linears that were packed one by one, `(packed, statistics)` each: see `join_singles`."""
        if all(not facts and codes.dtype in DENSE_DTYPES and codes.dim() == 2 for codes, facts in singles):
            raise ValueError(_plain(name))
        compute_dtype, dtype = self.quantization_config.compute_dtype, model.get_parameter(name).dtype
        try:
            found = [(codes, record_of_linear(codes, facts, dtype, compute_dtype)) for codes, facts in singles]
            packed, record = join_singles(found, model.get_parameter(name).shape[0])
        except ValueError as error:
            raise ValueError(
                f"{name}: its experts were quantized one by one, and cannot be stacked as they are: {error}. Load the "
                "checkpoint with the version of transformers that wrote it, or quantize the 16-bit checkpoint again."
            ) from error
        return self._place(model, name, packed, record)

    def read_linear(self, model: Any, name: str, packed: Tensor, statistics: dict[str, Tensor]) -> Tensor:
        """The weights of a linear that was packed, for a model that holds them plainly (a router)."""
        expected = model.get_parameter(name)
        try:
            record = record_of_linear(packed, statistics, expected.dtype, None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. The checkpoint is not complete.") from error
        if record.shape != expected.shape:
            raise ValueError(_misfit(name, record.shape, expected.shape))
        return record.dense(packed, expected.dtype)

    def _place(self, model: Any, name: str, packed: Tensor, record: PackedRecord) -> nn.Parameter:
        config = self.quantization_config
        owner, leaf = split_path(model, name)
        expected, count = getattr(owner, leaf), record.shape.numel()
        if find_record(owner, leaf) is None and tuple(expected.shape) != tuple(record.shape):
            raise ValueError(_misfit(name, record.shape, expected.shape))
        bytes_ = count if config.load_in_8bit else -(-count // 2)
        if packed.numel() * packed.element_size() != bytes_:
            raise ValueError(
                f"{name}: {tuple(record.shape)} takes {bytes_} bytes, found {tuple(packed.shape)} in {packed.dtype}"
            )
        if config.load_in_4bit and packed.dtype == torch.uint8:
            packed = packed.reshape(-1).view(config.bnb_4bit_quant_storage).unsqueeze(1)
        return self._install(model, name, parameter_of(packed, record), record)

    def _install(self, model: Any, name: str, parameter: nn.Parameter, record: Any) -> nn.Parameter:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers draws it anew
        install(*split_path(model, name), parameter, record)
        return parameter

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        missing = [name for name in self.stacks if not _is_packed(model, name)]
        if missing:
            found = sorted({suffix for name in missing for suffix in self._gathered.get(name, {})})
            raise ValueError(
                f"{missing[0]} (and {len(missing) - 1} more) was not loaded as packed experts"
                f"{f': of it only {found} came' if found else ''}. Expected in the checkpoint: the stacked tensor and "
                f"its statistics {self._suffixes()}. A checkpoint of single experts that were quantized on another "
                "version of transformers is not converted: load it with the version that wrote it, or quantize the "
                "16-bit checkpoint."
            )
        dtype = getattr(model, "dtype", None)
        for module in model.modules():
            if type(module).__name__ == "Linear8bitLt" and dtype is not None:
                module.original_dtype = dtype  # which its weight does not tell any more
        bind(model, list(self.stacks.values()))
        conversions.keep_stacked(model, list(self.stacks))
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed experts carry their statistics in the state dict."""
        return True

    def _dequantize(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") or (args[0] if args else None) or getattr(model.config, "dtype", None)
        for name in self.stacks:
            owner, leaf = split_path(model, name)
            record = find_record(owner, leaf)
            if record is not None and leaf in getattr(owner, RECORDS, {}):
                uninstall(owner, leaf, record.dense(getattr(owner, leaf), dtype or record.dtype))
        if any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules()):
            return super()._dequantize(model, *args, **kwargs)  # type: ignore[misc]
        return model

    # --- transformers 5 ------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> Any:
        """The operation that quantizes what was read; one for experts and linears, told apart by name."""
        return conversions.quantize_operation(self, super().get_quantize_ops())  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The converters of packed experts come before those of the model, which know 16-bit experts alone."""
        updated = super().update_weight_conversions(weight_conversions, model)  # type: ignore[misc]
        if not self.pre_quantized:
            return updated
        singles = INT8_LINEAR_NAMES if self.quantization_config.load_in_8bit else FOUR_BIT_NAMES
        return conversions.for_packed_checkpoint(self, updated, list(self.stacks), self._suffixes(), singles)

    # --- transformers 4 ------------------------------------------------------------------------------------------

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """The last call before tensors are read. Raises `ValueError` where a checkpoint lacks statistics."""
        there = set(loaded_keys)
        for name in self.stacks if self.pre_quantized else ():
            lost = [suffix for suffix in self._suffixes() if f"{name}.{suffix}" not in there]
            if name in there and len(lost) == len(self._suffixes()):
                raise ValueError(_plain(name))
            if name in there and lost:
                raise ValueError(f"{name}: the checkpoint lacks its statistics {lost}. The checkpoint is not complete.")
        return super().update_expected_keys(model, expected_keys, loaded_keys)  # type: ignore[misc]

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str]) -> list[str]:
        """Statistics are expected."""
        keys = super().update_unexpected_keys(model, unexpected_keys)  # type: ignore[misc]
        return [key for key in keys if self._stack_of(key) is None]

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantize a stack that was read, or gather it and its statistics until all are there."""
        stack = self._stack_of(param_name)
        if stack is None:
            self._check_not_cast(param_name, param_value)
            super().create_quantized_param(model, param_value, param_name, target_device, *args, **kwargs)  # type: ignore[misc]
            return
        value = param_value.to(target_device)
        if not self.pre_quantized:
            self.pack_stack(model, stack.name, value)
            return
        gathered = self._gathered.setdefault(stack.name, {})
        gathered[param_name.removeprefix(stack.name).removeprefix(".")] = value
        if len(gathered) == len(self._suffixes()) + 1:
            del self._gathered[stack.name]
            self.restore_stack(model, stack.name, gathered.pop(""), gathered)

    def _check_not_cast(self, name: str, value: Tensor) -> None:
        """Raise `ValueError` if transformers 4 has cast packed bytes of a linear as if they were numbers."""
        storage = self.quantization_config.bnb_4bit_quant_storage
        if (
            self.pre_quantized and self.quantization_config.load_in_4bit and name.endswith(".weight")
            and storage.is_floating_point and value.dtype != storage
        ):  # fmt: skip
            raise ValueError(
                f"{name} is packed in {storage}, and transformers has cast its bytes to {value.dtype}, which destroys "
                f"them. Load this checkpoint with `dtype={storage}`."
            )

    def get_param_name(self, param_name: str) -> str:
        """The parameter to which a statistic belongs."""
        stack = self._stack_of(param_name)
        return stack.name if stack is not None else super().get_param_name(param_name)  # type: ignore[misc]


class BnbExperts4BitQuantizer(_ExpertsQuantizer, Bnb4BitHfQuantizer):
    """4 bits: nf4 and fp4."""


class BnbExperts8BitQuantizer(_ExpertsQuantizer, Bnb8BitHfQuantizer):
    """8 bits: int8 with a scale for each row."""


_CLASSES: dict[int, Any] = {4: BnbExperts4BitQuantizer, 8: BnbExperts8BitQuantizer}


def register() -> None:
    """Make transformers find config and quantizers by the methods in `METHODS`. Does nothing the second time.

    Raises `ValueError` if another package holds the names.
    """
    for bits, method in METHODS.items():
        for table, mine in (
            (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, BnbExpertsConfig), (auto.AUTO_QUANTIZER_MAPPING, _CLASSES[bits]),
        ):  # fmt: skip
            found = table.get(method)
            if found is not None and (found.__module__, found.__qualname__) != (mine.__module__, mine.__qualname__):
                raise ValueError(
                    f"transformers knows the quantization method {method!r} already, as {found.__module__}."
                    f"{found.__qualname__}: peft-moe and that package cannot be imported together."
                )
            table.pop(method, None)
        auto.register_quantization_config(method)(BnbExpertsConfig)
        auto.register_quantizer(method)(_CLASSES[bits])


def declare(model: nn.Module, config: BnbExpertsConfig, stacks: Sequence[Stack]) -> None:
    """Tell transformers that a model in memory has quantized experts, so that it saves and trains it as one."""
    if not isinstance(model, PreTrainedModel):
        return
    config = copy.deepcopy(config)
    # Linears elsewhere may have been quantized by stock transformers: a saved config has to say which.
    elsewhere = linears_elsewhere(model)
    plain = [name for name, linear in elsewhere.items() if not is_packed_linear(linear)]
    config.experts_only = len(plain) == len(elsewhere)
    if not config.experts_only:
        config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *plain]
        of_linears = getattr(getattr(model, "hf_quantizer", None), "quantization_config", config)
        for setting in ("bnb_4bit_compute_dtype", "llm_int8_threshold"):
            setattr(config, setting, getattr(of_linears, setting, getattr(config, setting)))
    quantizer = _CLASSES[8 if config.load_in_8bit else 4](config, pre_quantized=False)
    quantizer.stacks = {stack.name: stack for stack in stacks}
    quantizer.modules_to_not_convert = quantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, None)
    model.hf_quantizer, model.is_quantized = quantizer, True  # type: ignore[assignment]
    model.quantization_method = stock_method()  # type: ignore[assignment]
    model.config.quantization_config = quantizer.quantization_config
    setattr(model, f"is_loaded_in_{8 if config.load_in_8bit else 4}bit", True)
    conversions.keep_stacked(model, [stack.name for stack in stacks])


def _misfit(name: str, found: Any, expected: Any) -> str:
    return (
        f"{name}: the checkpoint packs a weight of shape {tuple(found)}, the model expects {tuple(expected)}: its "
        "config.json does not belong to these weights."
    )


def _plain(name: str) -> str:
    return (
        f"{name}: the checkpoint has no statistics of it: its linears alone are quantized, and its experts in 16 bits. "
        "Load it with plain `from_pretrained`, without `packed_config`, and quantize the experts then: "
        "`peft_moe.quantize_experts(model, config)`."
    )


def _is_packed(model: Any, name: str) -> bool:
    owner, leaf = split_path(model, name)
    return find_record(owner, leaf) is not None and getattr(owner, leaf).device.type != "meta"
