"""Every block of transformers 4, enabled, against its own forward: 16-bit, nf4, int8 and FP8 experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

from peft_moe import BnbExpertsConfig, enable_grouped_experts, quantize_experts
from tests.grouped.cases import counted
from tests.layouts.block_cases import Case, tokens
from tests.layouts.test_blocks import JITTERED, OLD, leaves
from tests.quantize_cases import dequantized
from tests.weights.quantized import channel_linear, fp8_linear

families = pytest.mark.parametrize("case", OLD, ids=str)


class Model(nn.Module):
    """A block where a model has it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block


def step(block: nn.Module, case: Case, dtype: torch.dtype = torch.float32, seed: int = 3) -> dict[str, Any]:
    """One forward and backward: everything that can be compared."""
    block.zero_grad(set_to_none=True)
    leaf = tokens().to(dtype).requires_grad_()
    x = leaf * 1.0
    torch.manual_seed(seed)
    result = block(x)
    rng = torch.get_rng_state()
    outputs = leaves(result)
    direction = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
    ((outputs[0].float() * direction).sum() + sum((one.float() ** 2).sum() * 0.01 for one in outputs[1:])).backward()
    routers = {n: p.grad for n, p in block.named_parameters() if n.startswith(case.router + ".") and p.grad is not None}
    assert routers
    return {
        "kind": type(result),
        "outputs": [one.detach() for one in outputs],
        "input": x.detach(),
        "rng": rng,
        "gradients": {"x": leaf.grad, **routers},
    }


def compare(block: nn.Module, reference: nn.Module, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """The enabled block against another whose own forward runs."""
    want = step(reference, case, dtype)
    with counted() as calls:
        got = step(block, case, dtype)
    assert calls == ["mlp.experts"]
    assert got["kind"] is want["kind"] and len(got["outputs"]) == len(want["outputs"])
    assert torch.equal(got["input"], want["input"]) and torch.equal(got["rng"], want["rng"])
    for ours, theirs in zip(got["outputs"][1:], want["outputs"][1:], strict=True):
        assert torch.equal(ours, theirs), "router logits differ"
    pairs = {"output": (got["outputs"][0], want["outputs"][0])}
    pairs |= {name: (got["gradients"][name], theirs) for name, theirs in want["gradients"].items()}
    for name, (ours, theirs) in pairs.items():
        assert ours.dtype == theirs.dtype and theirs.abs().sum() > 0, name
        if dtype == torch.float32:
            assert_close(ours, theirs, rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
        else:
            ours, theirs = ours.flatten().double(), theirs.flatten().double()
            assert cosine_similarity(ours, theirs, dim=0) > 0.9999, name


def frozen(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    block = case.build().to(dtype)
    for name in getattr(block, "keep_in_fp32", ()):
        getattr(block, name).float()
    block.experts.requires_grad_(False)
    return block


def linears(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, one) for name, one in block.experts.named_modules() if isinstance(one, nn.Linear)]


def quantized(block: nn.Module, kind: str) -> nn.Module:
    """The block with other experts; `block` becomes its dense twin."""
    packed = copy.deepcopy(block)
    if kind in ("nf4", "nested", "int8"):
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": kind == "nested"}
        config = BnbExpertsConfig(**({"load_in_8bit": True} if kind == "int8" else four))
        quantize_experts(Model(packed), config)
        with torch.no_grad():
            for path, value in dequantized(packed).items():
                block.get_parameter(path).copy_(value)
        return packed
    convert = fp8_linear if kind == "fp8-block" else channel_linear
    for name, linear in linears(block):
        parent, _, leaf = name.rpartition(".")
        setattr(packed.experts.get_submodule(parent), leaf, convert(linear))
    packed.experts.requires_grad_(False)
    return packed


@families
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_as_the_block_itself(case: Case, training: bool) -> None:
    reference = frozen(case).train(training)
    block = copy.deepcopy(reference)
    report = enable_grouped_experts(Model(block))
    assert report.grouped == ["mlp.experts"] and not report.left_alone
    compare(block, reference, case)


@families
def test_bf16(case: Case) -> None:
    reference = frozen(case, torch.bfloat16)
    block = copy.deepcopy(reference)
    enable_grouped_experts(Model(block))
    compare(block, reference, case, torch.bfloat16)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8", "fp8-block", "fp8-channel"])
def test_quantized_experts(case: Case, kind: str, dtype: torch.dtype) -> None:
    """Against the block on the dequantized weights."""
    reference = frozen(case, dtype)
    block = quantized(reference, kind)
    assert enable_grouped_experts(Model(block)).grouped == ["mlp.experts"]
    compare(block, reference, case, dtype)


@pytest.mark.parametrize("case", JITTERED, ids=str)
def test_jitter(case: Case) -> None:
    """Drawn in the block's order, in training alone, and multiplied into the caller's tensor."""
    reference = frozen(case)
    for name in case.jitter:
        setattr(reference, name, 0.3)
    block = copy.deepcopy(reference)
    enable_grouped_experts(Model(block))
    for training in (True, False):
        compare(block.train(training), reference.train(training), case)


@families
def test_autocast(case: Case) -> None:
    """fp32 experts under autocast multiply in its dtype, as their linears do."""
    if case.family == "longcat_flash":
        pytest.skip("its own forward raises under autocast: it adds fp32 identities to a bf16 sum")
    reference = frozen(case)
    block = copy.deepcopy(reference)
    enable_grouped_experts(Model(block))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = leaves(reference(tokens())), leaves(block(tokens()))
    assert [(one.dtype, one.shape) for one in got] == [(one.dtype, one.shape) for one in want]

    def angle(a: Tensor, b: Tensor) -> float:
        return float(cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))

    assert angle(got[0], want[0]) > 0.9999
    with torch.no_grad():
        exact = leaves(reference(tokens()))[0]
    assert angle(got[0], exact) < 1 - 1e-9, "computed in fp32"
