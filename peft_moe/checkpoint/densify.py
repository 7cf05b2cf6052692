"""From a packed model to a 16-bit one: plain weights, the model's own classes, no mark of a quantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import LoraLinear
from ..layouts import find_experts
from ..linears import is_fp8_linear
from ..stores import open_store
from ..weights import is_packed_linear, open_modules
from .packed_modules import unpack_class


def plain_linears(model: nn.Module, dtype: torch.dtype, skip: tuple[str, ...] = ()) -> None:
    """Turn every quantized linear of a model into a plain one, in place. skip: prefixes of names to leave alone."""
    for name, module in model.named_modules():
        if type(module).__module__ == "peft.tuners.lora.bnb":
            module.__class__ = LoraLinear  # which merges into plain weights
            module.is_target_conv_1d_layer = False  # type: ignore[assignment]
        packed = is_fp8_linear(module) or (isinstance(module, nn.Linear) and is_packed_linear(module))
        if packed and not name.startswith(skip):
            linear: Any = module
            store: Any = open_modules([[linear]], (1, linear.out_features, linear.in_features), name)
            store.densify(dtype)
        if type(module).__name__ in ("PackedLinear", "FP8Linear") and not is_fp8_linear(module):
            module.__class__ = nn.Linear


def plain_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring what experts are still packed into plain weights, and give all of them the model's own class."""
    for name, spec in find_experts(model).items():
        base = model.get_submodule(name)
        for projection in spec.projections:
            store: Any = open_store(base, spec, projection, name)
            if store.packed:
                store.densify(dtype)
    plain_linears(model, dtype)
    for module in list(model.modules()):
        unpack_class(module)
    _own_classes(model)


def _own_classes(model: Any) -> None:
    """Experts modules that a quantizer put in the place of the model's own are replaced by those again."""
    foreign = [name for name, module in model.named_modules() if type(module).__name__ == "FP8Experts"]
    if not foreign:
        return
    with torch.device("meta"):
        fresh = type(model)(model.config)
    for name in foreign:
        old, new = model.get_submodule(name), fresh.get_submodule(name)
        values: dict[str, Tensor] = dict(old.named_parameters(recurse=False))
        missing = {key for key, _ in new.named_parameters()} - set(values)
        if missing:
            raise ValueError(f"{name}: {type(new).__name__} has parameters {sorted(missing)} that FP8 experts lack")
        for key, _ in list(new.named_parameters(recurse=False)):
            setattr(new, key, nn.Parameter(values[key].data, requires_grad=False))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(old.training))


def unmark(model: Any, dtype: torch.dtype) -> None:
    """Take the marks of a quantization off a model that has none any more, so that it saves as a plain one."""
    if any(is_fp8_linear(module) for module in model.modules()):
        return
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    elif hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = None  # those of the packed checkpoint; a plain model finds its own
    if hasattr(model, "config"):
        model.config.dtype = dtype
