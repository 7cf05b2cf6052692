"""Every way in which PEFT and transformers read or add an adapter gives the same logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.checkpoint import golden_cases
from tests.zoo import ENTRIES

# A block with lists on transformers 4, stacks with biases on both, parallel linears on 4.
NAMES = ["qwen3_moe", "gpt_oss", "granitemoe"]
RAGGED = {r".*layers\.0\..*\.1": 2, r".*layers\.1\..*\.[02]": 1}


class Saved(NamedTuple):
    base: Path
    adapter: Path
    inputs: dict[str, Any]
    before: torch.Tensor
    expected: torch.Tensor


def logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


@pytest.fixture(scope="module", params=[*NAMES, "ragged"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A base model and an adapter of its experts and attention, each in a directory."""
    name, options = (request.param, {}) if request.param != "ragged" else ("mixtral", {"expert_rank_pattern": RAGGED})
    directory = tmp_path_factory.mktemp(request.param)
    entry = ENTRIES[name]
    entry.build().save_pretrained(directory / "base")
    base = load(directory / "base")
    inputs = entry.inputs(base)
    before = logits(base, inputs)
    torch.manual_seed(3)
    config = MoELoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"], **options
    )
    model = get_peft_model(base, config)
    expected = logits(model, inputs)
    assert (before - expected).abs().max() > 1e-2
    model.save_pretrained(directory / "adapter")
    return Saved(directory / "base", directory / "adapter", inputs, before, expected)


def with_peft(saved: Saved, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(load(saved.base), saved.adapter, **options)


def with_peft_and_a_config(saved: Saved) -> nn.Module:
    return PeftModel.from_pretrained(load(saved.base), saved.adapter, config=PeftConfig.from_pretrained(saved.adapter))


def peft_load_adapter(saved: Saved, **options: Any) -> nn.Module:
    model = get_peft_model(load(saved.base), MoELoraConfig(r=2, target_experts=["down_proj"], init_lora_weights=False))
    result = model.load_adapter(saved.adapter, "second", **options)
    assert not result.missing_keys and not result.unexpected_keys
    model.set_adapter("second")
    return model


def peft_state_dict(saved: Saved) -> nn.Module:
    model = with_peft(saved)
    state = get_peft_model_state_dict(model)
    other = get_peft_model(load(saved.base), copy.deepcopy(model.peft_config["default"]))
    result = set_peft_model_state_dict(other, state)
    assert not [key for key in result.missing_keys if "lora_" in key] and not result.unexpected_keys
    return other


def peft_inject(saved: Saved) -> nn.Module:
    model = with_peft(saved)
    bare = inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), load(saved.base))
    set_peft_model_state_dict(bare, get_peft_model_state_dict(model))
    return bare


def transformers_load_adapter(saved: Saved, **options: Any) -> nn.Module:
    model = load(saved.base)
    model.load_adapter(str(saved.adapter), **options)
    return model


def transformers_second_adapter(saved: Saved) -> nn.Module:
    model = load(saved.base)
    model.add_adapter(MoELoraConfig(r=2, target_modules=[], init_lora_weights=False), "first")
    model.load_adapter(str(saved.adapter), adapter_name="second")
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]
    return model


WAYS: dict[str, Callable[[Saved], nn.Module]] = {
    "PeftModel.from_pretrained": with_peft,
    "PeftModel.from_pretrained, config": with_peft_and_a_config,
    "PeftModel.from_pretrained, low_cpu_mem_usage": lambda one: with_peft(one, low_cpu_mem_usage=True),
    "PeftModel.from_pretrained, is_trainable": lambda one: with_peft(one, is_trainable=True),
    "PeftModel.load_adapter": peft_load_adapter,
    "PeftModel.load_adapter, low_cpu_mem_usage": lambda one: peft_load_adapter(one, low_cpu_mem_usage=True),
    "set_peft_model_state_dict": peft_state_dict,
    "inject_adapter_in_model": peft_inject,
    "AutoPeftModelForCausalLM": lambda one: AutoPeftModelForCausalLM.from_pretrained(one.adapter),
    "load_adapter of transformers": transformers_load_adapter,
    "load_adapter of transformers, low_cpu_mem_usage": lambda one: transformers_load_adapter(
        one, low_cpu_mem_usage=True
    ),
    "load_adapter of transformers, second": transformers_second_adapter,
    "AutoModelForCausalLM of the adapter's directory": lambda one: load(one.adapter),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapter_is_read(way, saved):
    model = WAYS[way](saved)
    layers = [one for one in model.modules() if isinstance(one, MoELoraLayer)]
    assert layers and not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(logits(model, saved.inputs), saved.expected, rtol=1e-5, atol=1e-5)
    trainable = {name for name, one in model.named_parameters() if one.requires_grad}
    assert not {name for name in trainable if "lora_" not in name}, "the base is not frozen"
    if way.endswith("is_trainable"):
        assert len(trainable) == len([name for name, _ in model.named_parameters() if "lora_" in name])
    elif way.startswith("PeftModel.from_pretrained"):
        assert not trainable


def test_config(saved):
    assert isinstance(AutoPeftModelForCausalLM.from_pretrained(saved.adapter), PeftModelForCausalLM)
    config = PeftConfig.from_pretrained(saved.adapter)
    assert type(config) is MoELoraConfig and config.base_model_name_or_path == str(saved.base)


def test_adapter_of_transformers(saved, tmp_path):
    """`add_adapter`, `disable_adapters`, `save_pretrained`, `delete_adapter` of a plain transformers model."""
    model = load(saved.base)
    model.add_adapter(MoELoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]))
    changed = logits(model, saved.inputs)
    assert (changed - saved.before).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(logits(model, saved.inputs), saved.before)
    model.enable_adapters()
    torch.testing.assert_close(logits(model, saved.inputs), changed)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "model.safetensors").exists()
    again = with_peft(saved._replace(adapter=tmp_path))
    torch.testing.assert_close(logits(again, saved.inputs), changed)
    other = transformers_load_adapter(saved._replace(adapter=tmp_path))
    torch.testing.assert_close(logits(other, saved.inputs), changed)
    if hasattr(model, "delete_adapter"):
        model.delete_adapter("default")
        torch.testing.assert_close(logits(model, saved.inputs), saved.before)


def test_two_adapters_are_saved_and_read_each_by_itself(saved, tmp_path):
    model = with_peft(saved)
    model.add_adapter("second", MoELoraConfig(r=2, target_experts=["gate_up_proj"], init_lora_weights=False))
    model.set_adapter("second")
    second = logits(model, saved.inputs)
    assert (second - saved.expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    assert {path.parent for path in tmp_path.rglob("adapter_config.json")} == {tmp_path, tmp_path / "second"}
    back = PeftModel.from_pretrained(load(saved.base), tmp_path / "second")
    torch.testing.assert_close(logits(back, saved.inputs), second)
    back = PeftModel.from_pretrained(load(saved.base), tmp_path)
    torch.testing.assert_close(logits(back, saved.inputs), saved.expected)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, saved.inputs), saved.expected)


def test_reload_over_an_adapter_in_memory(saved):
    model = with_peft(saved, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model, saved.inputs), saved.before)
    model.load_adapter(saved.adapter, "default")
    torch.testing.assert_close(logits(model, saved.inputs), saved.expected)


def test_low_cpu_mem_usage_leaves_the_adapter_on_meta_until_it_is_read(saved):
    config = PeftConfig.from_pretrained(saved.adapter)
    model = get_peft_model(load(saved.base), config, low_cpu_mem_usage=True)
    metas = {name for name, one in model.named_parameters() if one.is_meta}
    assert metas == {name for name, _ in model.named_parameters() if "lora_" in name} and metas
    state = get_peft_model_state_dict(with_peft(saved))
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(model, saved.inputs), saved.expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_adapter(dtype, saved):
    base = load(saved.base).to(dtype)
    model = PeftModel.from_pretrained(base, saved.adapter)
    assert {one.dtype for name, one in model.named_parameters() if "lora_" in name} == {torch.float32}
    base = load(saved.base).to(dtype)
    model = PeftModel.from_pretrained(base, saved.adapter, autocast_adapter_dtype=False)
    assert {one.dtype for name, one in model.named_parameters() if "lora_" in name} == {dtype}
    assert torch.isfinite(logits(model, saved.inputs)).all()


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="names change on transformers 5")
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "phimoe",
        pytest.param(
            "granitemoe",
            marks=pytest.mark.xfail(
                strict=True, reason="transformers knows no rule for its parallel linears and only logs the missing keys"
            ),
        ),
    ],
)
def test_adapter_of_transformers_4_by_the_loader_of_transformers_5(name):
    """Here transformers maps names by rules of its own; `PeftModel.from_pretrained` reads all of them."""
    home = golden_cases.HOME / name / "transformers_4"
    model = golden_cases.load_base(name)
    model.load_adapter(str(home))
    expected = load_file(home / "logits.safetensors")["adapted"]
    torch.testing.assert_close(golden_cases.logits(model.eval()), expected, rtol=1e-5, atol=2e-5)
