"""Every private name of PEFT and transformers that this package touches, gathered in one place.

Checked against peft 0.21.2, transformers 4.57.6 and 5.23.0. `tests/test_compat.py` says which one moved.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import mapping
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _ExcludedModule,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import hotswap
from torch import nn
from transformers.quantizers import auto as quantizer_registry
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils import cached_file, has_file
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

try:
    from re import _parser as regex_parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as regex_parser

try:
    from transformers import core_model_loading
    from transformers.conversion_mapping import get_model_conversion_mapping
except ImportError:  # transformers 4 converts no weights
    core_model_loading = get_model_conversion_mapping = None  # type: ignore[assignment]

try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # it needs transformers 5
    convert_peft_config_for_transformers = None

__all__ = [
    "BaseTunerLayer",
    "Bnb4BitHfQuantizer",
    "Bnb8BitHfQuantizer",
    "ExcludedModule",
    "HfQuantizer",
    "LoraLayer",
    "LoraLinear",
    "LoraModel",
    "QuantizationConfigMixin",
    "QuantizationMethod",
    "RegistryTable",
    "add_enum_member",
    "cached_file",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "core_model_loading",
    "get_model_conversion_mapping",
    "has_file",
    "model_class",
    "onload",
    "onload_below",
    "peft_tables",
    "quantizer_registry",
    "regex_parser",
    "targets_taken_for_experts",
    "through_hook",
    "transformers_major",
]

ExcludedModule = _ExcludedModule


def targets_taken_for_experts(config: Any, model: Any) -> list[str]:
    """Entries of `target_modules` that stock PEFT, reading a LORA adapter, turns into parameters of experts."""
    if convert_peft_config_for_transformers is None or not config.target_modules:
        return []
    read = copy.deepcopy(config)
    convert_peft_config_for_transformers(read, model, None)
    if isinstance(config.target_modules, str):
        return sorted(set(read.target_parameters or ()) - set(config.target_parameters or ()))
    return sorted(set(config.target_modules) - set(read.target_modules))


def transformers_major() -> int:
    """The first number of the version of the installed transformers."""
    return int(transformers.__version__.partition(".")[0])


def model_class(name: Any) -> Any:
    """The class of transformers that a config names under `architectures`; `None` if it has no model of that name."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None  # a config from a stranger calls nothing else


def add_enum_member(cls: type[enum.Enum], name: str) -> None:
    """Add a member to a string enum, as its metaclass would have at class creation."""
    member: Any = str.__new__(cls, name)  # type: ignore[type-var]
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(cls._member_names_)
    member.__objclass__ = cls
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[name] = member
    type.__setattr__(cls, name, member)


@dataclass(frozen=True)
class RegistryTable:
    """One of PEFT's tables from tuner type to something."""

    name: str
    table: Any

    def __hash__(self) -> int:
        return hash(self.name)


# What two adapters must agree on to be hot-swapped, beside what PEFT asks of LoRA: all that shapes or scales experts.
_HOTSWAP_KEYS = [
    "r", "lora_alpha", "use_rslora", "lora_dropout", "alpha_pattern", "use_dora", "target_experts", "expert_r",
    "expert_alpha", "expert_rank_pattern", "expert_alpha_pattern", "expert_indices", "split_gate_up", "share_experts",
]  # fmt: skip


def peft_tables(config_cls: type, model_cls: Any) -> dict[RegistryTable, Any]:
    """PEFT's tables and what this tuner enters there.

    `register_peft_method` is not used: it raises on a second registration and on the prefix `lora_`, which this tuner
    shares with LoRA on purpose (its linears are PEFT's own LoRA layers).
    """
    return {
        RegistryTable("PEFT_TYPE_TO_CONFIG_MAPPING", mapping.PEFT_TYPE_TO_CONFIG_MAPPING): config_cls,
        RegistryTable("PEFT_TYPE_TO_TUNER_MAPPING", mapping.PEFT_TYPE_TO_TUNER_MAPPING): model_cls,
        RegistryTable("PEFT_TYPE_TO_PREFIX_MAPPING", mapping.PEFT_TYPE_TO_PREFIX_MAPPING): model_cls.prefix,
        RegistryTable("CONFIG_KEYS_TO_CHECK", hotswap.CONFIG_KEYS_TO_CHECK): _HOTSWAP_KEYS,
    }


@contextmanager
def _onloaded(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.empty(0))


def onload(module: nn.Module) -> AbstractContextManager[None]:
    """Run a module's accelerate hook (offloaded weights come to their device) around code that reads its weights."""
    hook = getattr(module, "_hf_hook", None)
    return nullcontext() if hook is None else _onloaded(module, hook)


@contextmanager
def onload_below(*modules: nn.Module) -> Iterator[None]:
    """Run the hooks of all modules in and below these that hold tensors on the meta device; others rest."""
    with ExitStack() as stack:
        for module in modules:
            for child in module.modules():
                hook = getattr(child, "_hf_hook", None)
                held = child._parameters.values()
                if hook is not None and any(one is not None and one.device.type == "meta" for one in held):
                    stack.enter_context(_onloaded(child, hook))
        yield


def through_hook(module: nn.Module, run: Any, *args: Any, **kwargs: Any) -> Any:
    """`run(*args, **kwargs)` as the forward of a module: inside its accelerate hook, which may move the arguments."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return run(*args, **kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        out = run(*args, **kwargs)
    except BaseException:
        hook.post_forward(module, torch.empty(0))
        raise
    return hook.post_forward(module, out)
