"""Small models, quantized, and the 16-bit models that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_moe import BnbExpertsConfig, MoELoraConfig
from tests.zoo import ENTRIES, first_floating
from tests.zoo.entry import entry, token_ids

SCALING = 2.0
LOAD = {"attn_implementation": "eager", "dtype": torch.float32}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "experts_blocksize": 128},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
}
#: Square weights an expert and sides that a CPU's 4-bit kernels can multiply with. A list of experts on transformers 4.
SIZES = {"moe_intermediate_size": 128}


def small(name: str = "qwen3_moe", **overrides: Any) -> nn.Module:
    """A model in training mode: in eval mode a CPU repacks `Linear4bit`, which has rules of its own about sizes."""
    if name == "qwen3_moe":
        return entry(name, "Qwen3MoeForCausalLM", "", **{**SIZES, **overrides}).build().train()
    return ENTRIES[name].build().train()


def config(kind: str, **options: Any) -> BnbExpertsConfig:
    return BnbExpertsConfig(**{**CONFIGS[kind], "experts_only": True, **options})


def inputs(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": token_ids(), "use_cache": False}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return first_floating(model(**inputs(model)))


def decoded(packed: Tensor, state: Any) -> Tensor:
    """As rows of one block: a CPU kernel of bitsandbytes is wrong about rows that are no whole blocks."""
    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return _functional().dequantize_4bit(packed, flat).view(state.shape)


def dequantized(module: nn.Module) -> dict[str, Tensor]:
    """Path below a model -> weights of everything that is packed there, by bitsandbytes' own functions."""
    found = {}
    for path, child in module.named_modules():
        for name, record in vars(child).get("packed_weights", {}).items():
            parameter = getattr(child, name)
            if parameter.dtype == torch.int8:
                value = _functional().int8_vectorwise_dequant(parameter.data, record.state.SCB)
            else:
                value = decoded(parameter.data, record.state)
            found[f"{path}.{name}"] = value.reshape(record.shape)
        if type(child).__name__ == "Linear4bit":
            found[f"{path}.weight"] = decoded(child.weight.data, child.weight.quant_state)
        if type(child).__name__ == "Linear8bitLt":
            scales = child.state.SCB if child.weight.SCB is None else child.weight.SCB
            found[f"{path}.weight"] = _functional().int8_vectorwise_dequant(child.weight.data, scales)
    assert found
    return found


def twin(base: nn.Module, quantized: nn.Module) -> nn.Module:
    """A 16-bit copy of `base` with the weights that the quantized model stands for."""
    reference = copy.deepcopy(base).requires_grad_(True)
    with torch.no_grad():
        for path, value in dequantized(quantized).items():
            reference.get_parameter(path).copy_(value)
    return reference


def attach(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    values = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False}
    return get_peft_model(model, MoELoraConfig(**(values | options)))


def raw(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.replace(".base_layer", "").removeprefix("base_model.model."): value.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        for key, value in copy.deepcopy(model).state_dict().items()
        if "lora_" not in key
    }


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


def _functional() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional
