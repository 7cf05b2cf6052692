"""The tiny models that adapters are tried on, and what is asked of them in more than one test."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.model.deltas import deltas, randomise
from tests.remote_code import RemoteConfig, RemoteForCausalLM
from tests.zoo import ENTRIES
from tests.zoo.builder import reinitialise
from tests.zoo.entry import token_ids

CLOSE = 2e-5


def _remote() -> nn.Module:
    model = RemoteForCausalLM(RemoteConfig(vocab_size=64, hidden_size=64, moe_intermediate_size=40))
    reinitialise(model)
    return model.eval()


#: Stacked parameters, interleaved and with biases, and a list of experts: on transformers 4 `qwen3_moe` is a list too.
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "qwen3_moe": ENTRIES["qwen3_moe"].build,
    "gpt_oss": ENTRIES["gpt_oss"].build,
    "remote_list": _remote,
}


MODELS = list(BUILDERS)
EXPERTS = {"qwen3_moe": 4, "gpt_oss": 4, "remote_list": 8}


def text(model: nn.Module) -> dict[str, Any]:
    """Token ids (2, 8) for any of the models."""
    return {"input_ids": token_ids()} if isinstance(model, RemoteForCausalLM) else ENTRIES["qwen3_moe"].inputs(model)


def config(**options: Any) -> MoELoraConfig:
    values: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False}
    return MoELoraConfig(**(values | options))


def experts_of(model: nn.Module) -> list[MoELoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoELoraLayer)]


def stock_layers(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and not isinstance(module, MoELoraLayer)
    ]


def trainable(model: nn.Module) -> set[str]:
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


def adapter_parameters(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    return {
        key: parameter
        for key, parameter in model.named_parameters()
        if re.search(rf"\.lora_\w+\.{adapter}(\.weight)?$", key)
    }


def three_adapters(name: str) -> tuple[nn.Module, PeftModel, dict[str, Any]]:
    """Base, model, and the deltas of three adapters that differ in rank, targets, experts and scaling."""
    base = BUILDERS[name]()
    model = get_peft_model(copy.deepcopy(base), config(target_experts=["gate_up_proj"]), adapter_name="x")
    model.add_adapter("y", config(r=5, lora_alpha=2, target_experts=["down_proj"], expert_indices=[0, 2]))
    layers = {1: [1, 2, 3]}
    model.add_adapter("z", config(r=4, lora_alpha=3, use_rslora=True, expert_indices=layers))
    for seed, adapter in enumerate("xyz"):
        randomise(model, adapter, seed, scale=0.2)
    count = EXPERTS[name]
    return (
        base,
        model,
        {
            "x": deltas(model, "x", 2.0, num_experts=count),
            "y": deltas(model, "y", 0.4, [0, 2], num_experts=count),
            "z": deltas(model, "z", 1.5, layers, num_experts=count),
        },
    )
