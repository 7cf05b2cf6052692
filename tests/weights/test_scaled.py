"""The codes that FP8 stores give to products on them, against the weights they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_moe.ops.scaled import CodedStack, ScaledStack
from peft_moe.weights import open_modules, open_stacked
from tests.weights.quantized import encode_stack, fp8_linear
from tests.weights.stores import COLS, EXPERTS, ROWS, SHAPE, Holder, linears, stacked, weights


def scaled(store: Any) -> ScaledStack | None:
    found = store.frozen()
    assert isinstance(found, CodedStack)
    assert torch.equal(found(), store.build())
    return found.codes()


def same(stack: ScaledStack | None, values: Tensor) -> None:
    """Element by element."""
    assert stack is not None and stack.shape == values.shape
    for one, expected in ((stack, values), (stack.mT, values.mT)):
        for e, n, k in [(0, 0, 0), (1, 79, 70), (2, 33, 17), (1, 40, 31), (0, 47, 71), (2, 79, 0)]:
            n, k = (n, k) if one is stack else (k, n)
            factor = one.scales[e, n // one.rows, k // one.columns].double()
            assert one.codes[e, n, k].double() * factor == expected[e, n, k]


@pytest.mark.parametrize("block", [(16, 8), (40, 36), (32, 32), (128, 128), (7, 50), (1, 72), (80, 1)])
def test_blocks(block: tuple[int, int]) -> None:
    store, _, values = stacked(block)
    same(scaled(store), values)


@pytest.mark.parametrize(("block", "equal"), [((8, 8), True), ((40, 72), True), ((32, 32), False)])
def test_gate_and_up_quantized_apart(block: tuple[int, int], equal: bool) -> None:
    store, _, values = stacked(block, name="gate_up_proj", halves=True)
    found = scaled(store)
    if equal:
        same(found, values)
    else:
        assert found is None


def test_scales_of_a_tensor_and_powers_of_two() -> None:
    codes, scales, _ = encode_stack(weights(), (ROWS, COLS))
    holder = Holder("down_proj", codes, scales.float()[0].view(1), "down_proj_weight_scale")
    store = open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")
    same(scaled(store), codes.double() * scales[0].item())
    store, _, values = stacked((32, 32), power_of_two=True)
    same(scaled(store), values)


def test_transposed() -> None:
    codes, scales, values = encode_stack(weights(), (16, 24))
    holder = Holder("down_proj", codes, scales.float(), "down_proj_scale_inv", (16, 24))
    store = open_stacked(holder, [("down_proj", True, False)], (EXPERTS, COLS, ROWS), "experts")
    stack = scaled(store)
    assert stack is not None
    same(stack.mT, values)


@pytest.mark.parametrize(("block", "equal"), [((8, 24), True), ((40, 72), True), ((1, 72), True), ((32, 32), False)])
def test_a_list_of_gates_and_ups(block: tuple[int, int], equal: bool) -> None:
    """Housed in one tensor, an expert's rows follow each other; blocks must not reach from gate into up."""
    torch.manual_seed(0)
    plain = [[nn.Linear(COLS, ROWS // 2, bias=False) for _ in range(2)] for _ in range(EXPERTS)]
    store = open_modules([[fp8_linear(one, block) for one in expert] for expert in plain], SHAPE, "experts")
    found = scaled(store)
    if not equal:
        assert found is None
        return
    assert found is not None and found.codes.shape == SHAPE
    rows, columns = (torch.arange(size) // block for size, block in ((ROWS, found.rows), (COLS, found.columns)))
    values = found.codes.double() * found.scales.double()[:, rows][:, :, columns]
    expected = torch.stack([torch.cat([one.weight.data for one in expert]) for expert in plain]).double()
    assert ((values - expected).abs() <= 1e-6 * expected.abs()).all()


def test_linears_of_several_sizes() -> None:
    modules, _ = linears("channel")
    assert scaled(open_modules(modules, SHAPE, "experts")) is None


def test_nothing_where_the_weights_are_kept() -> None:
    store, _, _ = stacked((16, 8))
    store.keep_built = True
    assert not isinstance(store.frozen(), CodedStack)
