"""Routing: the sort by expert, its inverse, and the sums back to tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_moe.ops.routing import Gather, combine, compact, has_sentinels, mask_rows, route
from tests.ops.cases import DTYPES, ROUTINGS, assert_close, draw_index, few, strided


@st.composite
def indices(draw: st.DrawFn) -> tuple[Tensor, int]:
    experts, tokens = draw(st.integers(1, 8)), draw(st.sampled_from([0, 1, 2, 9]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return draw_index(draw(ROUTINGS), tokens, draw(st.integers(1, experts)), experts, generator), experts


def check_routing(index: Tensor, experts: int) -> None:
    routing = route(index, experts, sentinels=True)
    rows = [(int(expert), row) for row, expert in enumerate(index.flatten())]
    expected = sorted(rows)  # by expert, then in the order in which they came
    assert routing.order.tolist() == [row for _, row in expected]
    assert [routing.order.tolist()[place] for place in routing.inverse.tolist()] == list(range(len(rows)))
    assert routing.experts.tolist() == [min(expert, experts - 1) for expert, _ in expected]
    assert routing.offsets.dtype == torch.int32 and routing.offsets.is_contiguous()
    assert routing.offsets.tolist() == [sum(one <= expert for one, _ in rows) for expert in range(experts)]
    assert routing.top_k == index.shape[1]
    assert routing.valid is not None
    assert routing.valid.flatten().tolist() == [expert < experts for expert, _ in expected]
    assert has_sentinels(index, experts) == any(expert >= experts for expert, _ in rows)


@few
@given(indices())
def test_route(case: tuple[Tensor, int]) -> None:
    check_routing(*case)


@few
@given(indices())
def test_compact(case: tuple[Tensor, int]) -> None:
    """Every row finds its own expert in the slots, and only rows of an expert lie before the end."""
    index, experts = case
    if index.numel() == 0:
        return
    whole = route(index, experts, sentinels=True)
    routing, slots = compact(whole, experts)
    assert slots.shape == (min(index.numel(), experts),)
    assert torch.equal(slots[routing.experts], whole.experts)
    assert routing.offsets.dtype == torch.int32 and len(routing.offsets) == len(slots)
    start = 0
    for expert, end in zip(slots.tolist(), routing.offsets.tolist(), strict=True):
        assert all(one == expert for one in whole.experts[start:end].tolist())
        start = end
    assert start == int((index < experts).sum())
    assert torch.equal(routing.order, whole.order) and torch.equal(routing.inverse, whole.inverse)


@pytest.mark.parametrize("experts", [128, 1024, 1025])
def test_route_many(experts: int) -> None:
    check_routing(torch.randint(experts + 1, (50, 4)), experts)


def test_route_without_sentinels_has_no_mask() -> None:
    assert route(torch.tensor([[0, 1]]), 2, sentinels=False).valid is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_route_takes_any_integer(dtype: torch.dtype) -> None:
    routing = route(torch.tensor([[2, 0], [1, 2]], dtype=dtype), 3, sentinels=False)
    assert routing.order.tolist() == [1, 2, 0, 3]
    assert routing.offsets.tolist() == [1, 2, 4]


def test_mask_rows_removes_nan() -> None:
    rows = torch.tensor([[1.0], [float("nan")]], requires_grad=True)
    masked = mask_rows(rows, torch.tensor([[True], [False]]))
    assert masked.tolist() == [[1.0], [0.0]]
    assert mask_rows(rows, None) is rows


@few
@given(indices(), DTYPES, st.integers(1, 5), st.booleans())
def test_gather(case: tuple[Tensor, int], dtype: torch.dtype, width: int, wide: bool) -> None:
    index, experts = case
    x = torch.randn(index.shape[0], width).to(dtype)
    x = (strided(x) if wide else x).requires_grad_()
    routing = route(index, experts, sentinels=True)
    rows = Gather.apply(x, routing.source, routing.inverse, routing.top_k, routing.valid)
    expected = sorted((int(expert), place) for place, expert in enumerate(index.flatten()))
    tokens = [place // index.shape[1] for _, place in expected]
    assert torch.equal(rows, x.detach()[tokens])

    grad = torch.randn(rows.shape).to(dtype)
    d_x = torch.zeros(x.shape, dtype=torch.float64)
    for row, ((expert, _), token) in enumerate(zip(expected, tokens, strict=True)):
        if expert < experts:
            d_x[token] += grad[row].double()
    grad[[row for row, (expert, _) in enumerate(expected) if expert >= experts]] = float("nan")
    rows.backward(grad)
    assert_close(x.grad, d_x, dtype, "d x")


@few
@given(indices(), DTYPES, DTYPES, st.integers(1, 5))
def test_combine(case: tuple[Tensor, int], dtype: torch.dtype, weight_dtype: torch.dtype, width: int) -> None:
    index, experts = case
    tokens, top_k = index.shape
    routing = route(index, experts, sentinels=True)
    rows = torch.randn(index.numel(), width).to(dtype)
    weights = torch.rand(tokens, top_k).to(weight_dtype).requires_grad_()
    wide_rows, wide_weights = (one.detach().clone().double().requires_grad_() for one in (rows, weights))
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    places = sorted((int(expert), place) for place, expert in enumerate(index.flatten()))
    for row, (expert, place) in enumerate(places):
        if expert < experts:
            token, choice = divmod(place, top_k)
            expected[token] = expected[token] + wide_weights[token, choice] * wide_rows[row]
        else:
            rows[row] = float("nan")
    rows.requires_grad_()
    found = combine(rows, weights, routing, torch.float32)
    assert found.dtype == torch.float32
    coarse = dtype if torch.finfo(dtype).eps > torch.finfo(weight_dtype).eps else weight_dtype
    coarse = torch.float32 if coarse == torch.float64 else coarse
    assert_close(found, expected, coarse, "out")
    if not tokens:
        return
    grad = torch.randn(found.shape)
    found.backward(grad)
    if not expected.requires_grad:  # no row has an expert
        assert not rows.grad.any() and not weights.grad.any()
        return
    expected.backward(grad.double())
    assert_close(rows.grad, wide_rows.grad, coarse, "d rows")
    assert_close(weights.grad, wide_weights.grad, coarse, "d weights")
