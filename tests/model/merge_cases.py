"""Adapted models of the tests of merging, and what they compare."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_moe import MoELoraConfig
from tests.zoo import ENTRIES, first_floating

# On transformers 4: a list of experts in a known block, a transposed stack with biases, parallel linears.
NAMES = ["qwen3_moe", "gpt_oss", "granitemoe"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LINEARS = ["q_proj", "o_proj"]


def build(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    return ENTRIES[name].build().to(dtype)


def output(model: nn.Module, name: str = "qwen3_moe") -> Tensor:
    with torch.no_grad():
        return first_floating(model(**ENTRIES[name].inputs(model)))


def adapted(name: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(2)
    options = {"r": 3, "lora_alpha": 6, "target_modules": LINEARS, **options}
    return get_peft_model(build(name, dtype), MoELoraConfig(init_lora_weights=False, **options)).eval()


def add(model: PeftModel, adapter: str, seed: int = 5, **options: Any) -> None:
    torch.manual_seed(seed)
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **options}
    model.add_adapter(adapter, MoELoraConfig(init_lora_weights=False, **options))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base's tensors under their original names."""
    model = model.base_model.model if isinstance(model, PeftModel) else model
    found = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items() if "lora_" not in key}
    return {key: value.clone() for key, value in found.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.is_floating_point() else tensor


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(bits(found[key]), bits(expected[key]))]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in base_weights(model).items() if not torch.equal(value, before[key])}
