"""The pieces of the generic path: a frozen projection, an adapter on it, an activation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_moe.ops.activation import SILU_GATED, GatedSwish, activate, activate_backward
from peft_moe.ops.linear import frozen_linear, lora_linear
from tests.ops import loops
from tests.ops.cases import BACKENDS, DTYPES, RANKS, SIZES, assert_close, few, laid_out, poisoned, strided

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=8)


@few
@given(COUNTS, st.integers(0, 2), SIZES, SIZES, DTYPES, BACKENDS, st.booleans(), st.booleans(), st.booleans())
def test_frozen_linear(
    counts: list[int], extra: int, into: int, out: int, dtype: torch.dtype, backend: str, transposed: bool,
    built: bool, stride_zero: bool,
) -> None:  # fmt: skip
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = strided(torch.randn(len(owners) + extra, into).to(dtype)).requires_grad_()
    weight = laid_out((torch.randn(len(counts), out, into) / into**0.5).to(dtype), transposed)
    grad = torch.ones(1, 1).to(dtype).expand(len(x), out) if stride_zero else torch.randn(len(x), out).to(dtype)
    with poisoned():
        found = frozen_linear(x, (lambda: weight) if built else weight, offsets, backend)
        found.backward(grad)
    real = len(owners)
    assert_close(found[:real], loops.products(x.detach(), weight.mT, owners), dtype, "out")
    assert_close(x.grad[:real], loops.products(grad, weight, owners) / 1.0, dtype, "d x", factor=12)


@few
@given(COUNTS, st.integers(0, 2), SIZES, SIZES, RANKS, DTYPES, BACKENDS, st.booleans())
def test_lora_linear(
    counts: list[int], extra: int, into: int, out: int, rank: int, dtype: torch.dtype, backend: str, stride_zero: bool
) -> None:
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = strided(torch.randn(len(owners) + extra, into).to(dtype)).requires_grad_()
    a = (torch.randn(len(counts), rank, into) / into**0.5).to(dtype).requires_grad_()
    b = (torch.randn(len(counts), out, rank) / rank**0.5).to(dtype).requires_grad_()
    grad = torch.ones(1, 1).to(dtype).expand(len(x), out) if stride_zero else torch.randn(len(x), out).to(dtype)
    wide = [one.detach().double().requires_grad_() for one in (x, a, b)]
    expected = torch.zeros(len(owners), out, dtype=torch.float64) + 0 * sum(one.sum() for one in wide)
    for row, owner in enumerate(owners):
        expected[row] = expected[row] + wide[2][owner] @ (wide[1][owner] @ wide[0][row])
    expected.backward(grad[: len(owners)].double())
    with poisoned():
        found = lora_linear(x, a, b, offsets, backend)
        found.backward(grad)
    assert_close(found[: len(owners)], expected, dtype, "out")
    assert_close(x.grad[: len(owners)], wide[0].grad[: len(owners)], dtype, "d x", factor=12)
    assert_close(a.grad, wide[1].grad, dtype, "d A", factor=12)
    assert_close(b.grad, wide[2].grad, dtype, "d B", factor=12)
    for expert, count in enumerate(counts):
        assert count or not (a.grad[expert].any() or b.grad[expert].any()), f"expert {expert} saw nothing"


@few
@given(st.integers(0, 6), st.integers(1, 9), DTYPES, st.sampled_from(["silu", "clamped", "squared_relu"]))
def test_activation(rows: int, inner: int, dtype: torch.dtype, kind: str) -> None:
    loop = {"silu": loops.silu_gate, "clamped": loops.swish_plus_one, "squared_relu": loops.squared_relu}[kind]
    pre = torch.randn(rows, inner if kind == "squared_relu" else 2 * inner).to(dtype)
    if kind == "clamped":  # away from the kinks, where rounding decides on which side a value falls
        pre = torch.where((pre.abs() - 0.8).abs() < 0.05, pre.new_tensor(0.5), pre)
    grad = torch.randn(rows, inner).to(dtype)
    wide = pre.clone().double().requires_grad_()
    expected = torch.stack([loop(row) for row in wide]) if rows else torch.zeros(0, inner).double() + wide.sum()
    expected.backward(grad.double())
    closed = {"silu": SILU_GATED, "clamped": GatedSwish(alpha=1.702, shift=1.0, limit=0.8, interleaved=True)}
    activation = closed.get(kind, torch.vmap(loop))
    assert_close(activate(activation, pre), expected, dtype, "out")
    found = activate_backward(activation, pre, grad)
    assert found.dtype == dtype
    assert_close(found, wide.grad, dtype, "d pre")
    assert not pre.requires_grad, "the caller's tensor was changed"


@pytest.mark.parametrize("value", [-200.0, -30.0, 0.0, 30.0, 200.0])
def test_silu_backward_at_the_ends(value: float) -> None:
    pre, grad = torch.full((1, 2), value, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16)
    assert torch.isfinite(activate_backward(SILU_GATED, pre, grad)).all()
