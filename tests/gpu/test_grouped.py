"""Grouped frozen experts on a GPU: a block of 128 experts, 16-bit and in NF4, against its own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from peft_moe import BnbExpertsConfig, disable_grouped_experts, enable_grouped_experts, quantize_experts

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 128, "num_experts_per_tok": 8}


def layer(dtype: torch.dtype, kind: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(norm_topk_prob=True, **SIZES)
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).to("cuda", dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model = nn.ModuleDict({"mlp": block})
    if kind != "dense":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nested"}
        quantize_experts(model, BnbExpertsConfig(**({"load_in_8bit": True} if kind == "int8" else four)))
    block.experts.requires_grad_(False)
    return model


def step(model: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    found = model["mlp"](x)
    found = found[0] if isinstance(found, tuple) else found
    model.zero_grad(set_to_none=True)
    found.backward(torch.linspace(-1, 1, found.numel(), device=found.device).view_as(found).to(found.dtype))
    return {"output": found.detach(), "x": x.grad, "router": model["mlp"].gate.weight.grad}


@pytest.mark.parametrize("kind", ["dense", "nf4", "nested", "int8"])
@pytest.mark.parametrize("tokens", [1, 7, 512])
def test_against_the_block_itself(kind: str, tokens: int) -> None:
    model = layer(torch.bfloat16, kind)
    x = torch.randn(1, tokens, SIZES["hidden_size"], device="cuda", dtype=torch.bfloat16)
    want = step(model, x)
    assert enable_grouped_experts(model).grouped == ["mlp.experts"]
    found = step(model, x)
    # int8 linears quantize their activations; the grouped forward does not
    bound = 0.999 if kind == "int8" else 0.9999
    for key, value in want.items():
        assert cosine_similarity(found[key].double().flatten(), value.double().flatten(), dim=0) > bound, key
    disable_grouped_experts(model)
    again = step(model, x)
    assert all(torch.equal(again[key], value) for key, value in want.items() if key == "output")


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_no_word_from_the_device(kind: str) -> None:
    """Once nothing changes, a call waits for nothing: neither its checks nor its experts."""
    model = layer(torch.bfloat16, kind)
    enable_grouped_experts(model)
    x = torch.randn(1, 64, SIZES["hidden_size"], device="cuda", dtype=torch.bfloat16)
    step(model, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_block_on_the_cpu_beside_one_on_the_gpu() -> None:
    """Support is found out for each device by itself."""
    model = layer(torch.float32)
    other = copy.deepcopy(model).cpu()
    both = nn.ModuleDict({"a": model, "b": other})
    assert len(enable_grouped_experts(both).grouped) == 2
    x = torch.randn(1, 16, SIZES["hidden_size"])
    on_gpu, on_cpu = step(model, x.cuda()), step(other, x)
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[key].cpu(), value, rtol=2e-3, atol=2e-3)
    moved = step(other.cuda(), x.cuda())
    for key, value in on_gpu.items():
        torch.testing.assert_close(moved[key], value, rtol=1e-5, atol=1e-5)
