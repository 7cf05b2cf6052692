"""Loading FP8, MXFP4 and bitsandbytes checkpoints so that they stay packed in memory, on any device.

transformers dequantizes FP8 and MXFP4 while it loads them where it has no kernel for them, and on a CPU always; of
bitsandbytes it knows linears alone. `packed_config` gives a config with which `from_pretrained` keeps all as it is. Its
quantizers stand in transformers' registry under names of their own: nothing that loads without it changes.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from ..compat import HfQuantizer, core_model_loading, quantizer_registry
from ..quantize.config import BnbExpertsConfig
from ..weights.grid import FLOAT8
from .packed_modules import PackedLinear, pack_experts
from .packed_settings import PackedConfig, float8_group
from .scales import drop_unused_scales, recover_scales
from .static_scales import activation_parameter, for_numbers

FP8, MXFP4 = "peft_moe_fp8", "peft_moe_mxfp4"
BITSANDBYTES = "bitsandbytes"
_KINDS = {"fp8": FP8, "mxfp8": FP8, "mxfp4": MXFP4, "compressed-tensors": FP8}
SETTINGS_OF_FP8 = tuple(method for method, kind in _KINDS.items() if kind == FP8)


def packed_config(path: str, **kwargs: Any) -> Any:
    """The config of an FP8, MXFP4 or bitsandbytes checkpoint, with which `from_pretrained` leaves its weights packed.

        model = AutoModelForCausalLM.from_pretrained(path, config=packed_config(path), dtype=torch.bfloat16)

    Args: path: a folder, or a name on the hub. kwargs: for `AutoConfig.from_pretrained`.

    Raises `ValueError` if the checkpoint is not quantized, or in another way.
    """
    config = AutoConfig.from_pretrained(path, **kwargs)
    found = getattr(config, "quantization_config", None)
    settings = found if isinstance(found, dict) else found.to_dict() if found is not None else {}
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method == BITSANDBYTES:
        config.quantization_config = BnbExpertsConfig.from_dict(settings).to_dict()
        return config
    if method not in _KINDS:
        known = ", ".join(sorted([*_KINDS, BITSANDBYTES]))
        raise ValueError(
            f"{path}: its quantization is {method!r}, expected one of {known}. Load it with plain `from_pretrained`."
        )
    if method == "compressed-tensors":
        float8_group(settings, path)
    _register()
    config.quantization_config = {**settings, "quant_method": _KINDS[method], "original": settings}
    return config


class _PackedQuantizer(HfQuantizer):
    """What both quantizers share: no kernel, hence any device, and trainable with adapters."""

    requires_calibration = False
    requires_parameters_quantization = False
    quantization_config: PackedConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("`packed_config` is for checkpoints that are quantized already")

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """8-bit tensors and scales are taken as the file holds them: a cast from one kind to another ruins codes."""
        stored = str(param.get_dtype() if hasattr(param, "get_dtype") else param.dtype)
        if all("scale" in pattern for pattern in converter.source_patterns):
            return None
        if stored.startswith("F8") or "float8" in stored or dtype in FLOAT8:
            return None  # nor are 16-bit weights cast to codes, of layers that this checkpoint leaves in 16 bits
        return super().get_new_dtype(converter, param, dtype)

    def _skips(self, model: Any, name: str) -> bool:
        kept = self.quantization_config.modules_to_not_convert
        if kept is None:
            kept = self.quantization_config.get("ignore")
        kept = list(["lm_head"] if kept is None else kept)
        kept += list(getattr(model, "_keep_in_fp32_modules", None) or ())
        for pattern in kept:
            pattern = pattern.removesuffix(".weight")
            if pattern.startswith("re:"):
                if re.match(pattern[3:], name):
                    return True
            elif name == pattern or name.startswith(f"{pattern}.") or f".{name}.".find(f".{pattern}.") >= 0:
                return True
        return False

    # transformers 4 casts every floating tensor but e4m3 to the dtype asked for, e5m2 codes and scales too; without a
    # dtype it casts none. `update_missing_keys` is its last call before it loads.

    _packed: frozenset[str] = frozenset()
    _kept_in_fp32: tuple[str, ...] = ()

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        self._missing = set(missing_keys)
        self._asked = getattr(model.config, "_pre_quantization_dtype", None)
        if self._asked is not None:
            model.config._pre_quantization_dtype = None
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        asked = getattr(self, "_asked", None)
        if asked is not None:
            model.config._pre_quantization_dtype = asked
        for name, parameter in model.named_parameters():
            if "scale" in name or parameter.element_size() == 1 or not parameter.is_floating_point():
                continue
            if asked is not None:
                wide = any(part in name for part in self._kept_in_fp32)
                parameter.data = parameter.data.to(torch.float32 if wide else asked)
            elif name in self._packed:  # made for codes, filled with 16-bit weights
                parameter.data = parameter.data.to(model.dtype)
        self._settle_scales(model)
        for parameter in model.parameters():
            if parameter.element_size() == 1:
                parameter.requires_grad_(False)
        return model

    def _is_missing(self, name: str, parameter: torch.Tensor) -> bool:
        """Whether no key of the file filled a parameter: transformers 4 lists them, 5 marks those that are filled."""
        listed = getattr(self, "_missing", None)
        return not getattr(parameter, "_is_hf_initialized", False) if listed is None else name in listed

    def _settle_scales(self, model: Any) -> None:
        """Scales that no key of the file filled hold anything: they go, and what is FP8 without one is looked for."""
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            if leaf.endswith(("_scale_inv", "_scale", "_scales", "_blocks")) and self._is_missing(name, parameter):
                if leaf.endswith(("_scales", "_blocks")):
                    raise ValueError(
                        f"{model.config._name_or_path}: {name} is missing, without which the rest is noise"
                    )
                delattr(model.get_submodule(owner), leaf)
        drop_unused_scales(model)  # of layers that are 16-bit in this checkpoint
        recover_scales(model)


class PackedFP8Quantizer(_PackedQuantizer):
    """FP8 linears and experts, fine-grained or of compressed-tensors."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # The converters of a model merge the weights of its experts; this makes them merge the scales too.
        self.serialized_names = {"weight": ["weight", quantization_config.scale_name]}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._kept_in_fp32 = tuple(kwargs.get("keep_in_fp32_modules") or ())
        config = self.quantization_config
        for name, module in list(model.named_modules()):
            if self._skips(model, name):
                continue
            if isinstance(module, nn.Linear) and type(module).__name__ == "Linear":
                shape = config.scale_shape(module.out_features, module.in_features)
                with torch.device("meta"):
                    packed = PackedLinear(
                        module.in_features, module.out_features, module.bias is not None, config.scale_name, shape,
                        config.scale_dtype, config.weight_block_size,
                    )  # fmt: skip
                if config.activation_scale_name is not None:
                    number = activation_parameter(*((1,) if config.scale_name == "weight_scale" else ()))
                    packed.register_parameter(config.activation_scale_name, number)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, packed)
            elif name.endswith(".experts"):
                self._pack(module)
        self._packed = frozenset(name for name, one in model.named_parameters() if one.dtype in FLOAT8)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """No; what transformers 5 takes from it is that the shape of a parameter is not its business.

        A stacked checkpoint has one scale an expert where single experts have two, of gate and of up. Stores check it.
        """
        return core_model_loading is not None and "scale" in param_name.rpartition(".")[2]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        updated = super().update_weight_conversions(weight_conversions, model)
        return for_numbers(updated, model, self.quantization_config.activation_scale_name)

    def _pack(self, module: Any) -> None:
        names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if _is_3d(getattr(module, name, None))]
        if not names:
            return
        tensors, activation = {}, self.quantization_config.activation_scale_name
        for name in names:
            weight = getattr(module, name)
            count, rows, cols = weight.shape
            apart = name == "gate_up_proj" and not getattr(module, "is_transposed", False)
            shape = self.quantization_config.scale_shape(rows // 2 if apart else rows, cols)
            if shape in ((), (1,)):
                shape = (2 if apart else 1,)  # one an expert, one for gate and one for up
            elif apart:
                shape = (2 * shape[0], *shape[1:])
            tensors[name] = {
                name: torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device="meta"),
                f"{name}{self.quantization_config.scale_name.removeprefix('weight')}": torch.empty(
                    count, *shape, dtype=self.quantization_config.scale_dtype, device="meta"
                ),
            }
            if activation is not None:
                tensors[name][f"{name}_{activation}"] = activation_parameter(count, 2 if apart else 1)
        pack_experts(module, tensors)
        module.block_size = self.quantization_config.weight_block_size


class PackedMXFP4Quantizer(_PackedQuantizer):
    """The experts of GPT-OSS as blocks and scales."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._kept_in_fp32 = tuple(kwargs.get("keep_in_fp32_modules") or ())
        for name, module in list(model.named_modules()):
            if type(module).__name__ != "GptOssExperts" or self._skips(model, name):
                continue
            tensors = {}
            for plain in ("gate_up_proj", "down_proj"):
                experts, cols, rows = getattr(module, plain).shape
                groups = cols // 32
                tensors[plain] = {
                    f"{plain}_blocks": torch.empty(experts, rows, groups, 16, dtype=torch.uint8, device="meta"),
                    f"{plain}_scales": torch.empty(experts, rows, groups, dtype=torch.uint8, device="meta"),
                }
            module.is_transposed = True  # `(E, in, out)`, which the class of transformers 4 does not say
            pack_experts(module, tensors)
        return model


def _is_3d(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dim() == 3


def _register() -> None:
    for name, quantizer in ((FP8, PackedFP8Quantizer), (MXFP4, PackedMXFP4Quantizer)):
        if name not in quantizer_registry.AUTO_QUANTIZER_MAPPING:
            quantizer_registry.register_quantization_config(name)(PackedConfig)
            quantizer_registry.register_quantizer(name)(quantizer)
