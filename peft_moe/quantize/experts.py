"""Which tensors of a model are stacked experts, and quantizing them in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..layouts import find_experts
from ..weights.bnb_codes import library
from ..weights.bnb_pieces import is_packed_linear
from ..weights.bnb_records import find_record, install
from ..weights.built import split_path
from ..weights.dense import DENSE_DTYPES
from .config import BnbExpertsConfig, PackSettings
from .forward import PackedForward
from .packing import check_values, pack

logger = logging.getLogger("peft_moe")


@dataclass(frozen=True)
class Stack:
    """One stacked parameter. Attributes: experts: path of its experts module. path: of the parameter, below that."""

    experts: str
    path: str

    @property
    def name(self) -> str:
        """Its path in the model."""
        return f"{self.experts}.{self.path}"


def is_skipped(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether `llm_int8_skip_modules` names a module: by its path, by the start or the end of it, or as a regex."""
    for pattern in patterns or ():
        at_start = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name)
        if at_start or name.endswith(f".{pattern}") or f".{pattern}." in f".{name}.":
            return True
    return False


def find_stacks(model: nn.Module, skip: Sequence[str] | None) -> list[Stack]:
    """Every stacked parameter of routed experts that is not skipped, layer by layer.

    Raises `ValueError` for stacked experts of an unknown layout.
    """
    stacks = []
    for name, spec in find_experts(model).items():
        if spec.experts or is_skipped(name, skip):
            continue
        module = model.get_submodule(name)
        if spec.refused is not None:
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue  # its linears are linears like any other
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be quantized: {spec.refused}. Leave it in 16 bits with "
                "`llm_int8_skip_modules`."
            )
        paths = [part.path for projection in spec.projections for part in projection.parts]
        stacks += [Stack(name, path) for path in paths if not is_skipped(f"{name}.{path}", skip)]
    return stacks


def listed_linears(model: nn.Module, skip: Sequence[str] | None) -> Iterator[tuple[str, nn.Module, str]]:
    """(path, its holder, its name) of each plain linear inside a list of experts that is not skipped."""
    for name, spec in find_experts(model).items():
        module = model.get_submodule(name)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or (not spec.experts and spec.refused is None):
            continue
        for path, child in list(module.named_modules()):
            full = f"{name}.{path}"
            if type(child) is nn.Linear and not is_skipped(full, skip) and not is_skipped(name, skip):
                holder, _, leaf = path.rpartition(".")
                yield full, module.get_submodule(holder) if holder else module, leaf


def linears_elsewhere(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears outside of all routed experts, by path."""
    inside = tuple(f"{name}." for name in find_experts(model))
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in found.items() if not name.startswith(inside)}


def _check_elsewhere(model: nn.Module, config: BnbExpertsConfig) -> None:
    """Raise `ValueError` if linears are quantized in a way that one config cannot name together with `config`."""
    settings = config.settings()
    nested = settings.nested and settings.quant_type != "int8"
    for name, linear in linears_elsewhere(model).items():
        if is_packed_linear(linear):
            state: Any = getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)
            found = ("int8", False) if state is None else (state.quant_type, state.nested)
            if found != (settings.quant_type, nested):
                raise ValueError(
                    f"quantize_experts: {name} is in {_kind(*found)}, and the experts were to be in "
                    f"{_kind(settings.quant_type, nested)}: no config says both, so the model could not be saved. Ask "
                    "for the same of the experts, or load the linears in 16 bits."
                )
        elif getattr(getattr(linear, "weight", None), "dtype", None) not in DENSE_DTYPES:
            held = ", ".join(sorted({str(tensor.dtype) for tensor in linear.state_dict().values()}))
            raise ValueError(
                f"quantize_experts: {name} holds {held}, so this model is quantized in another way, "
                "and no config says both. Start from the 16-bit checkpoint."
            )


def _kind(quant_type: str, nested: bool) -> str:
    return f"{quant_type} with double quantization" if nested else quant_type


def bind(model: nn.Module, stacks: Sequence[Stack]) -> None:
    """Give the experts modules of packed stacks a forward that can read them."""
    for name in dict.fromkeys(stack.experts for stack in stacks):
        module = model.get_submodule(name)
        if not isinstance(vars(module).get("forward"), PackedForward):
            PackedForward(module, name, model.get_submodule(name.rpartition(".")[0]))


def pack_parameter(module: nn.Module, path: str, settings: PackSettings) -> None:
    """Replace the stacked parameter at a path below a module by its packed form."""
    owner, name = split_path(module, path)
    if find_record(owner, name) is not None:
        raise ValueError(f"{path} of {type(module).__name__} is quantized already")
    parameter, record = pack(getattr(owner, name).data, settings)
    install(owner, name, parameter, record)


def pack_linear(linear: nn.Linear, config: BnbExpertsConfig) -> nn.Module:
    """A `Linear4bit` or `Linear8bitLt` with the quantized weight of a linear, and its bias."""
    modules, weight = library().nn, linear.weight.data
    arguments: tuple[Any, ...] = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        if config.load_in_8bit:
            found = modules.Linear8bitLt(*arguments, has_fp16_weights=False, threshold=config.llm_int8_threshold)
        else:
            found = modules.Linear4bit(
                *arguments, config.compute_dtype, config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type,
                config.bnb_4bit_quant_storage,
            )  # fmt: skip
    # Blocks of 64, as stock: bitsandbytes' kernels for linears on CPUs need rows that are whole blocks.
    parameter: Any
    parameter, record = pack(weight, replace(config.settings(), blocksize=64))
    if config.load_in_8bit:
        parameter.CB = parameter.data
        found.original_dtype = weight.dtype
    else:
        parameter.module, found.quant_state = found, record.state
    found.weight, found.bias = parameter, linear.bias
    found.source_cls = type(linear)
    found.train(linear.training)
    return found.requires_grad_(False)


def quantize_experts(model: nn.Module, config: BnbExpertsConfig) -> nn.Module:
    """Quantize the routed experts of a model in memory, in place, one tensor at a time; linears elsewhere stay.

    Args:
        model: its experts in 16 or 32 bits, on any device. config: `experts_only` is implied.

    Returns the model. Raises `ValueError`, and changes nothing, if it has no experts that could be quantized, for
    weights that are quantized already or not finite, for linears that are quantized in another way than `config`
    says, and for adapted models: quantize first, then attach adapters.
    """
    skip = config.llm_int8_skip_modules
    if any(hasattr(module, "adapter_layer_names") for module in model.modules()):
        raise ValueError(
            "quantize_experts: the model carries adapters already. Quantize the base first, then attach adapters; or "
            "unload them (`model.unload()`) before."
        )
    stacks, linears = find_stacks(model, skip), list(listed_linears(model, skip))
    if not stacks and not linears:
        raise ValueError(
            f"quantize_experts: {type(model).__name__} has no routed experts to quantize"
            f"{f' besides those that {skip} leaves out' if skip else ''}."
        )
    for name in [*(stack.name for stack in stacks), *(f"{full}.weight" for full, _, _ in linears)]:
        _check(model, name)
    _check_elsewhere(model, config)
    settings = config.settings()
    for stack in stacks:
        pack_parameter(model.get_submodule(stack.experts), stack.path, settings)
    for _, holder, leaf in linears:
        setattr(holder, leaf, pack_linear(getattr(holder, leaf), config))
    bind(model, stacks)
    from .loader import declare

    declare(model, config, stacks)
    return model


def _check(model: nn.Module, name: str) -> None:
    """Raise `ValueError` if a parameter cannot be quantized."""
    owner, leaf = split_path(model, name)
    values = getattr(owner, leaf, None)
    if find_record(owner, leaf) is not None or not isinstance(values, torch.Tensor):
        raise ValueError(f"{name} of {type(owner).__name__} is quantized already")
    if values.device.type == "meta":
        raise ValueError(f"quantize_experts: {name} is on the meta device: load the model first")
    try:
        check_values(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
