"""FP8 stacks on a CUDA device: the one-pass kernel against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_moe.weights import open_stacked

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("rows", "cols", "block"), [(256, 384, 128), (200, 144, 128), (96, 80, 32), (64, 64, None)])
def test_stack(rows: int, cols: int, block: int | None, dtype: torch.dtype) -> None:
    experts = 5
    generator = torch.Generator(device="cuda").manual_seed(rows + cols)
    codes = torch.randn(experts, rows, cols, generator=generator, device="cuda").to(dtype)
    r, c = (1, 1) if block is None else (-(-rows // block), -(-cols // block))
    scales = torch.rand(experts, r, c, generator=generator, device="cuda") + 0.1
    module = nn.Module()
    module.block_size = None if block is None else (block, block)
    module.down_proj = nn.Parameter(codes, requires_grad=False)
    name = "down_proj_weight_scale" if block is None else "down_proj_scale_inv"
    module.register_parameter(name, nn.Parameter(scales, requires_grad=False))
    store = open_stacked(module, [("down_proj", False, False)], (experts, rows, cols), "model.experts")
    step_rows, step_cols = (rows, cols) if block is None else (block, block)
    spread = scales.repeat_interleave(step_rows, 1)[:, :rows].repeat_interleave(step_cols, 2)[..., :cols]
    expected = (codes.double() * spread.double()).bfloat16()
    built = store.frozen()
    found = built() if callable(built) else built
    assert torch.equal(found, expected)
