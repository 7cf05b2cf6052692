"""4-bit codes on a CUDA device: the one-pass kernel against bitsandbytes' own, bit for bit, and against a formula."""

from __future__ import annotations

import pytest
import torch

from peft_moe.ops.triton.four_bit import Nested, dequantize_4bit
from peft_moe.weights import open_stacked
from tests.weights.test_mxfp4 import Holder, pack, weights

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("size", [64, 128, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_equals_bitsandbytes(kind: str, size: int, nested: bool, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(300 * 4096, device="cuda").to(dtype)
    packed, state = functional.quantize_4bit(values, blocksize=size, quant_type=kind, compress_statistics=nested)
    expected = functional.dequantize_4bit(packed, state)
    outer = None
    if nested:
        inner = state.state2
        outer = Nested(inner.code, inner.absmax, inner.blocksize, state.offset.reshape(1), state.absmax.numel())

    def found(count: int, first: int = 0, runs: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.full((count,), float("nan"), dtype=dtype, device="cuda")
        return dequantize_4bit(packed.view(-1), state.absmax, state.code, size, out, first, runs, outer)

    assert torch.equal(found(values.numel()), expected)
    assert torch.equal(found(7 * size, first=5), expected[5 * size : 12 * size])
    runs = torch.tensor([99, 0, 42, 42], device="cuda")
    assert torch.equal(found(4 * 3 * 4096, runs=runs), expected.view(100, -1)[runs].view(-1))


@pytest.mark.parametrize("form", ["blocks", "int8 e8m0", "int8 float"])
def test_mxfp4(form: str) -> None:
    shape = (5, 48, 96)
    blocks, scales, exact = pack(weights(shape))
    flat = blocks.reshape(5, 48, 48).view(torch.int8)
    holder = {
        "blocks": lambda: Holder(down_proj_blocks=blocks, down_proj_scales=scales),
        "int8 e8m0": lambda: Holder(down_proj=flat, down_proj_scale_inv=scales.view(torch.float8_e8m0fnu)),
        "int8 float": lambda: Holder(down_proj=flat, down_proj_scale_inv=torch.exp2(scales.float() - 127)),
    }[form]().cuda()
    store = open_stacked(holder, [("down_proj", True, False)], shape, "experts")
    assert store.pieces[0].dequantize_into(torch.empty(shape, dtype=torch.bfloat16, device="cuda"))  # type: ignore
    assert torch.equal(store.frozen()().cpu().double(), exact)  # type: ignore[operator]
    slots = torch.tensor([3, 0], device="cuda")
    assert torch.equal(store.build_some(slots).cpu().double(), exact[[3, 0]])  # type: ignore[attr-defined]
