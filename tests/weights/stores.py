"""FP8 stores made by hand, with the float64 weights that they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_moe.weights import FP8Weight, open_stacked
from tests.weights.quantized import E4M3, channel_linear, encode_stack, fp8_linear

EXPERTS, ROWS, COLS = 3, 80, 72
SHAPE = (EXPERTS, ROWS, COLS)


class Holder(nn.Module):
    """A module with stacked FP8 weights under the given names."""

    def __init__(self, name: str, codes: Tensor, scale: Tensor | None, scale_name: str, block: Any = None) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        if scale is not None:
            self.register_parameter(scale_name, nn.Parameter(scale, requires_grad=False))
        if block is not None:
            self.block_size = block


def weights(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Values over several orders of magnitude, so that a misplaced scale cannot go unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator)
    return found * torch.exp(torch.randn(shape[0], shape[1], 1, generator=generator))


def stacked(
    block: tuple[int, int], dtype: torch.dtype = E4M3, name: str = "down_proj", **options: Any
) -> tuple[FP8Weight, Holder, Tensor]:
    codes, scales, values = encode_stack(weights(), block, dtype, **options)
    stored = scales.float()
    if options.get("power_of_two"):
        stored = stored.to(torch.float8_e8m0fnu)
    holder = Holder(name, codes, stored, f"{name}_scale_inv", block)
    return open_stacked(holder, [(name, False, False)], SHAPE, "experts"), holder, values  # type: ignore[return-value]


def same(found: Tensor, expected: Tensor, ulps: float = 1.0) -> None:
    """Equal up to the rounding of one product in the dtype found."""
    eps = torch.finfo(found.dtype).eps
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= ulps * eps * expected.abs() + 1e-300).all()


def linears(kind: str, seed: int = 0) -> tuple[list[list[nn.Module]], Tensor]:
    """Three experts with two linears each, and the float64 stack that they stand for."""
    torch.manual_seed(seed)
    plain = [[nn.Linear(COLS, rows, bias=False) for rows in (48, 32)] for _ in range(EXPERTS)]
    convert = {
        "block": lambda one: fp8_linear(one, (32, 50)),
        "channel": channel_linear,
        "tensor": lambda one: channel_linear(one, per_tensor=True),
        "row": _row_scale,
    }[kind]
    quantized = [[convert(one) for one in expert] for expert in plain]
    exact = []
    for expert in quantized:
        for one in expert:
            if kind == "block":
                continue
            scale = one.weight_scale.double()
            exact.append(one.weight.double() * (scale.T if kind == "row" else scale))
    if kind == "block":
        return quantized, torch.stack([torch.cat([one.weight.data for one in expert]) for expert in plain]).double()
    return quantized, torch.cat(exact).view(EXPERTS, ROWS, COLS)


def _row_scale(linear: nn.Linear) -> nn.Linear:
    """`weight_scale` `(1, out)`, as the row-wise kernels of transformers 5 hold it."""
    found = channel_linear(linear)
    found.weight_scale = nn.Parameter(found.weight_scale.data.T.contiguous(), requires_grad=False)  # type: ignore
    return found
