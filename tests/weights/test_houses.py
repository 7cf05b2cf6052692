"""Lists of quantized linears, housed: one read of all experts gives what one read a linear gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_moe.weights import open_modules
from peft_moe.weights.house import WeightHouse
from tests.weights.stores import SHAPE
from tests.weights.stores import linears as fp8_linears
from tests.weights.test_bnb_linears import linears as bnb_linears

# 256 scales a linear: nested ones are coded in blocks of that many.
BNB = {"nf4": (64, 128), "fp4": (64, 128), "nested": (128, 128), "int8": (64, 128)}
KINDS = [*BNB, "block", "channel", "tensor", "row"]


def case(kind: str) -> tuple[list[list[Any]], Any]:
    """(linears, their store) of three experts with two linears each."""
    if kind in BNB:
        out, size = BNB[kind]
        experts = bnb_linears(kind, out, size)
        rows = sum(linear.out_features for linear in experts[0])
        return experts, open_modules(experts, (len(experts), rows, size), "experts")
    experts, _ = fp8_linears(kind)
    for one in experts:  # alike in shape
        one[:] = [one[0], copy.deepcopy(one[0])]
    rows = 2 * experts[0][0].out_features
    return experts, open_modules(experts, (len(experts), rows, SHAPE[2]), "experts")


def tensors(experts: list[list[Any]]) -> list[Tensor]:
    return [value for expert in experts for linear in expert for value in linear.state_dict().values()]


@pytest.mark.parametrize("kind", KINDS)
def test_one_read_of_all_is_many_of_one(kind: str) -> None:
    experts, store = case(kind)
    before = [value.clone() for value in tensors(experts)]
    wanted = torch.stack([store.materialize([expert], torch.float32)[0] for expert in range(store.shape[0])])
    store.activation_dtype = torch.float32
    assert store.house.joined() is not None, "housed"
    assert torch.equal(store.frozen()(), wanted)
    assert torch.equal(store.materialize(dtype=torch.float32), wanted)
    for found, value in zip(tensors(experts), before, strict=True):
        assert found.dtype == value.dtype and torch.equal(found.view(torch.uint8), value.view(torch.uint8))
    assert store.house.joined() is store.house.joined()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_twice(kind: str) -> None:
    experts, store = case(kind)
    store.frozen()()
    weights = [linear.weight for expert in experts for linear in expert]
    sizes = [weight.numel() * weight.element_size() for weight in weights]

    def adjacent() -> list[bool]:
        return [a.data_ptr() + n == b.data_ptr() for a, n, b in zip(weights, sizes, weights[1:], strict=False)]

    assert all(adjacent())
    assert [weight.untyped_storage().nbytes() for weight in weights] == sizes, "tools take one storage for tied"
    store.release()
    assert not all(adjacent())
    assert [weight.untyped_storage().nbytes() for weight in weights] == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_and_restored_ones_are_read(kind: str) -> None:
    experts, store = case(kind)
    store.activation_dtype = torch.float32
    before = store.frozen()().clone()
    saved = store.snapshot()
    torch.manual_seed(1)
    store.add_([([1], torch.randn(1, *store.shape[1:]))])
    wanted = store.materialize([0, 1, 2], torch.float32)
    found = store.frozen()()
    assert torch.equal(found, torch.stack([store.materialize([e], torch.float32)[0] for e in range(3)]))
    assert torch.equal(found, wanted) and not torch.equal(found, before)
    store.restore(saved)
    assert torch.equal(store.frozen()(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_that_moved_is_housed_anew(kind: str) -> None:
    experts, store = case(kind)
    store.activation_dtype = torch.float32
    before = store.frozen()().clone()
    linear = experts[2][1]
    linear.weight.data = linear.weight.data.clone()
    assert torch.equal(store.frozen()(), before)
    other = copy.deepcopy(experts), copy.deepcopy(store)
    assert torch.equal(other[1].frozen()(), before)


@pytest.mark.parametrize("kind", ["nf4", "block"])
def test_linears_that_differ_are_read_one_by_one(kind: str) -> None:
    if kind == "nf4":
        experts = bnb_linears("nf4")
        experts[1] = bnb_linears("fp4")[1]
        shape = (len(experts), sum(one.out_features for one in experts[0]), experts[0][0].in_features)
    else:
        experts, _ = fp8_linears("block")  # gate and up of unlike heights
        shape = SHAPE
    store: Any = open_modules(experts, shape, "experts")
    store.activation_dtype = torch.float32
    assert store.house.joined() is None and store.house.joined() is None
    wanted = torch.stack([store.materialize([expert], torch.float32)[0] for expert in range(shape[0])])
    assert torch.equal(store.frozen()(), wanted)


def test_weights_that_cannot_lie_in_one_are_refused() -> None:
    linears = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    linears[1].bfloat16()
    with pytest.raises(ValueError, match="several dtypes"):
        WeightHouse(linears).move_in()
    linears[1].float().to("meta")
    with pytest.raises(ValueError, match="meta device"):
        WeightHouse(linears).move_in()


@pytest.mark.parametrize("change", ["another parameter", "another dtype", "the same"])
def test_a_list_that_changed_before_its_graph_was_traced(change: str) -> None:
    torch._dynamo.reset()
    experts = [[nn.Linear(8, 4, bias=False).requires_grad_(False)] for _ in range(3)]
    store = open_modules(experts, (3, 4, 8), "experts")
    store.frozen()
    if change == "another parameter":
        experts[1][0].weight = nn.Parameter(experts[1][0].weight.detach() * 2, requires_grad=False)
    elif change == "another dtype":
        for (linear,) in experts:
            linear.double()
    found = torch.compile(lambda: store.frozen() * 1, backend="eager", fullgraph=True)()
    wanted = torch.stack([linear.weight for (linear,) in experts])
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
