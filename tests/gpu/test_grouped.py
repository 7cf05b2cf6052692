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
from tests.grouped.test_blocks import Model
from tests.layouts.block_cases import HIDDEN, Case
from tests.layouts.test_blocks import OLD

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


@pytest.mark.parametrize("kind", ["dense", "nf4", "nested"])
@pytest.mark.parametrize("case", OLD, ids=str)
def test_every_family_against_its_own_forward(case: Case, kind: str) -> None:
    block = case.build().to("cuda", torch.bfloat16)
    for name in getattr(block, "keep_in_fp32", ()):
        getattr(block, name).float()
    block.experts.requires_grad_(False)
    model = Model(block)
    if kind != "dense":
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nested"}
        quantize_experts(model, BnbExpertsConfig(bnb_4bit_compute_dtype=torch.bfloat16, **four))
    x = torch.randn(2, 7, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        block.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        out = block(leaf * 1.0)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(out.dtype))
        routers = [p.grad for n, p in block.named_parameters() if n.startswith(case.router) and p.grad is not None]
        return [out.detach(), leaf.grad, *routers]

    want = run()
    assert enable_grouped_experts(model).grouped == ["mlp.experts"]
    for found, value in zip(run(), want, strict=True):
        if not value.any():  # a sparse mixer in eval gives its router no gradient
            assert not found.any()
            continue
        assert cosine_similarity(found.double().flatten(), value.double().flatten(), dim=0) > 0.9999


def test_kept_weights_follow_the_device() -> None:
    model = layer(torch.bfloat16, "nf4").cpu()
    enable_grouped_experts(model, dequantize="cache")
    x = torch.randn(1, 16, SIZES["hidden_size"], dtype=torch.bfloat16)
    on_cpu = step(model, x)
    model.cuda()
    on_gpu = step(model, x.cuda())
    for key, value in on_cpu.items():
        # Gradients move with their parameters; rounded otherwise on a CPU, a few tokens may be routed elsewhere.
        found, value = on_gpu[key].cpu().double().flatten(0, -2), value.cpu().double().flatten(0, -2)
        assert cosine_similarity(found, value, dim=1).median() > 0.999, key
    stores = getattr(model["mlp"], "forward", None) or model["mlp"].experts.forward
    if hasattr(stores, "experts") and stores.experts is not None:
        assert all(store.frozen()().device.type == "cuda" for store in stores.experts.stores.values())


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


def test_experts_on_several_devices() -> None:
    """One linear (or stack) that stays behind on the CPU: noticed at the next call, and when it is back."""
    model = layer(torch.bfloat16)
    x = torch.randn(1, 512, SIZES["hidden_size"], device="cuda", dtype=torch.bfloat16)
    enable_grouped_experts(model)
    want = step(model, x)
    last = list(model["mlp"].experts.parameters())[-1]
    last.data = last.data.cpu()
    with pytest.raises(RuntimeError, match="device"):  # the block's own forward
        step(model, x)
    assert "several devices" in next(iter(enable_grouped_experts(model).left_alone.values()))
    last.data = last.data.cuda()
    assert enable_grouped_experts(model).grouped
    for key, value in step(model, x).items():
        assert cosine_similarity(value.double().flatten(), want[key].double().flatten(), dim=0) > 0.9999, key
