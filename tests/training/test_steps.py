"""Gradients under checkpointing, autocast and accumulation, against those of a plain step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from tests.model.tiny import BUILDERS, config
from tests.reference import relative
from tests.zoo import ENTRIES

NAMES = ["qwen3_moe", "gpt_oss", "mixtral", "llama4_text"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.3},
    {"use_dora": True},
    {"expert_indices": [0, 2], "expert_rank_pattern": {r".*\.2": 1}},
]
WITHOUT_DROPOUT = [options for options in OPTIONS if "lora_dropout" not in options]  # other tensors, other masks


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    base = BUILDERS[name]() if name in BUILDERS else ENTRIES[name].build()
    return get_peft_model(base, config(target_modules=["q_proj"], **options)).train()


def batch(size: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (size, 8), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, *batches: dict[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """Gradients of the mean loss over the batches, accumulated."""
    model.zero_grad()
    torch.manual_seed(seed)  # dropout
    for one in batches:
        (model(**one, use_cache=False).loss / len(batches)).backward()
    found = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().sum() > 0, key
        assert relative(found[key], gradient) <= tolerance, key


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, options: dict[str, Any], reentrant: bool) -> None:
    model = build(name, **options)
    model.enable_input_require_grads()
    expected = gradients(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    experts = next(module for key, module in model.named_modules() if key.endswith("layers.0.self_attn"))
    experts.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, batch())
    assert len(calls) == 2, "nothing was checkpointed"
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("options", WITHOUT_DROPOUT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    whole = batch(4)
    halves = [{key: value[half] for key, value in whole.items()} for half in (slice(0, 2), slice(2, 4))]
    assert_same(gradients(model, *halves), gradients(model, whole), 1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("options", WITHOUT_DROPOUT, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str, options: dict[str, Any], checkpointing: bool) -> None:
    """Master weights in fp32, computing in bf16: near the step in fp32, gradients in the dtype of the parameters."""
    model = build(name, **options)
    expected = gradients(model, batch())
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch()).logits.dtype in (torch.bfloat16, torch.float32)
        found = gradients(model, batch())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    dot = sum(float((found[key] * gradient).sum()) for key, gradient in expected.items())
    norms = [sum(float(one.square().sum()) for one in gradients.values()) ** 0.5 for gradients in (found, expected)]
    assert dot / (norms[0] * norms[1]) > 0.9, "the direction of the step"  # some tokens go to another expert
    assert 0.8 < norms[0] / norms[1] < 1.25


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "bf16 under autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sixteen_bit_base_trains_fp32_adapters(name: str, autocast: bool) -> None:
    torch.manual_seed(1)
    base = BUILDERS[name]() if name in BUILDERS else ENTRIES[name].build()
    model = get_peft_model(copy.deepcopy(base).bfloat16(), config(target_modules=["q_proj"])).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(model, batch())
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "remote_list"])
def test_the_base_is_frozen_whatever_it_was(name: str) -> None:
    torch.manual_seed(1)
    base = (BUILDERS[name]() if name in BUILDERS else ENTRIES[name].build()).requires_grad_(True)
    before = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, config())
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_" in key and ".experts." in key for key in trainable)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = batch()["input_ids"]
    for _ in range(2):
        model(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    merged = model.unload().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in before.items())
