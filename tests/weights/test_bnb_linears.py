"""Lists of `Linear4bit` and `Linear8bitLt`, and what the bitsandbytes store refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_moe.quantize.experts import pack_parameter
from peft_moe.weights import BnbWeight, open_modules
from tests.reference import relative
from tests.weights.test_bnb import KINDS, Experts, open_, packed

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional


# --- lists of linears ----------------------------------------------------------------------------------------------


def linears(kind: str, out: int = 64, size: int = 128) -> list[list[Any]]:
    """Two linears an expert, as bitsandbytes makes them."""

    def one() -> Any:
        if kind == "int8":
            linear = bnb.nn.Linear8bitLt(size, out, bias=False, has_fp16_weights=False)
        else:
            settings = {"compress_statistics": kind == "nested", "quant_type": "fp4" if kind == "fp4" else "nf4"}
            linear = bnb.nn.Linear4bit(size, out, bias=False, **settings)
        linear.weight.data = torch.randn(out, size)
        return linear.to("cpu")

    return [[one(), one()] for _ in range(3)]


def rows_of(experts: list[list[Any]]) -> Tensor:
    def one(linear: Any) -> Tensor:
        weight = linear.weight
        if weight.dtype == torch.int8:
            return F.int8_vectorwise_dequant(weight.data, linear.state.SCB if weight.SCB is None else weight.SCB)
        return F.dequantize_4bit(weight.data, weight.quant_state)

    return torch.stack([torch.cat([one(linear) for linear in expert]) for expert in experts])


def linear_bytes(experts: list[list[Any]]) -> list[dict[str, Tensor]]:
    return [
        {**linear.state_dict(), "raw": linear.weight.data.clone()}
        for expert in copy.deepcopy(experts)  # a state dict undoes the repacking of a CPU, in place
        for linear in expert
    ]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested", "int8"])
def test_lists_of_linears(kind: str) -> None:
    experts = linears(kind)
    store = open_modules(experts, (3, 128, 128), "block.experts")
    assert isinstance(store, BnbWeight) and store.dtype == (torch.float16 if kind == "int8" else torch.float32)
    store.activation_dtype = torch.float32
    wanted = rows_of(experts)
    assert torch.equal(store.frozen()(), wanted)
    assert torch.equal(store.materialize([2, 0]), wanted[[2, 0]])
    before, snapshot, delta = linear_bytes(experts), store.snapshot(), 0.3 * torch.randn(2, 128, 128)
    store.add_(iter([([1, 2], delta)]))
    found = rows_of(experts)
    assert torch.equal(found[0], wanted[0]) and torch.equal(store.materialize(), found)
    assert relative(found[1:], wanted[1:] + delta) < (0.01 if kind == "int8" else 0.2)
    with torch.no_grad():  # the linears themselves compute with it (and int8 ones move their scales)
        x = torch.randn(5, 128, requires_grad=kind != "int8")
        out = experts[1][0].train()(x) if kind != "int8" else experts[1][0](x.half()).float()
    assert relative(out, x @ found[1, :64].T) < 0.05
    assert torch.equal(store.materialize(), found)
    store.restore(snapshot)
    after = linear_bytes(experts)
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    store.densify(torch.float32)
    assert {type(linear) for expert in experts for linear in expert} == {nn.Linear}
    assert relative(experts[2][1](x), x @ wanted[2, 64:].T) < 1e-5


@pytest.mark.parametrize("nested", [False, True])
def test_linears_that_a_cpu_has_repacked(nested: bool) -> None:
    experts = linears("nested" if nested else "nf4")
    wanted = rows_of(experts)
    for linear in experts[1]:
        data, state = F._convert_weight_packed_for_cpu(linear.weight.data, linear.weight.quant_state)
        linear.weight.data, linear.weight.quant_state = data, state
    weight = experts[1][0].weight
    assert not torch.equal(F.dequantize_4bit(weight.data, weight.quant_state)[0], wanted[1, 0])
    store = open_modules(experts, (3, 128, 128), "block.experts")
    assert store.dtype == torch.float32
    # Repacking rounds the scales to bfloat16; the codes are the same.
    assert relative(store.materialize(), wanted) < 2**-8 and torch.equal(store.materialize([0]), wanted[[0]])
    repacked = store.materialize()
    raw = [linear.weight.data.clone() for linear in experts[1]]
    snapshot, delta = store.snapshot(), 0.3 * torch.randn(3, 128, 128)
    store.add_(iter([([0, 1, 2], delta)]))
    assert not any(getattr(linear.weight.quant_state, "packing_format_for_cpu", False) for linear in experts[1])
    assert relative(store.materialize(), wanted + delta) < 0.2
    assert torch.equal(rows_of(experts), store.materialize())
    store.restore(snapshot)
    assert all(torch.equal(linear.weight.data, one) for linear, one in zip(experts[1], raw, strict=True))
    assert torch.equal(store.materialize(), repacked)
    with pytest.raises(ValueError, match="not finite"):
        store.add_(iter([([1], torch.full((1, 128, 128), float("inf")))]))
    assert all(torch.equal(linear.weight.data, one) for linear, one in zip(experts[1], raw, strict=True))
    assert torch.equal(store.materialize(), repacked)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_codes_without_statistics_are_refused() -> None:
    module = packed("nf4")
    module.packed_weights.clear()
    module.up.quant_state = None
    with pytest.raises(ValueError, match=r"layer\.experts\.up is a Params4bit without a quant_state"):
        open_(module)
    experts = linears("nf4")
    experts[1][0].weight.quant_state = experts[1][0].quant_state = None
    with pytest.raises(ValueError, match=r"block\.experts\.1 \(0:64\) \(Linear4bit\) holds no quant_state"):
        open_modules(experts, (3, 128, 128), "block.experts")
    experts = linears("int8")
    experts[0][1].weight.SCB = None
    with pytest.raises(ValueError, match=r"block\.experts\.0 \(64:128\).*SCB"):
        open_modules(experts, (3, 128, 128), "block.experts")


def test_mixtures_and_parametrizations_are_refused() -> None:
    module = Experts()
    pack_parameter(module, "w", KINDS["nf4"])
    with pytest.raises(ValueError, match=r"layer\.experts\.v is not packed"):
        open_(module, "flat")
    with pytest.raises(ValueError, match="already"):
        pack_parameter(module, "w", KINDS["nf4"])
    experts = linears("nf4")
    experts[2][0] = nn.Linear(128, 64)
    with pytest.raises(ValueError, match=r"block\.experts\.2 holds Linear in torch\.float32"):
        open_modules(experts, (3, 128, 128), "block.experts")
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = Experts()
    replace_parameter_4bit(module, "up")
    with pytest.raises(ValueError, match=r"parametrization.*quantize_experts"):
        open_(module)


def test_offloaded_weights_are_refused_by_name() -> None:
    module = packed("nf4")
    store = open_(module)
    module.up = nn.Parameter(module.up.detach().as_subclass(torch.Tensor).to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer\.experts.*meta"):
        store.frozen()()
