"""FP8 stores: merging, restoring and going to 16 bits, against formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from peft_moe.weights import open_modules, open_stacked
from tests.weights.quantized import E5M2, encode, encode_stack
from tests.weights.stores import COLS, EXPERTS, ROWS, SHAPE, Holder, linears, same, stacked, weights

STORES: dict[str, Any] = {
    "block": lambda: stacked((32, 32))[0],
    "odd": lambda: stacked((7, 50))[0],
    "e5m2": lambda: stacked((32, 32), E5M2)[0],
    "ue8m0": lambda: stacked((32, 32), power_of_two=True)[0],
    "ue8m0 in fp32": lambda: _powers_in_fp32(),
    "halves": lambda: stacked((32, 32), name="gate_up_proj", halves=True)[0],
    "channel": lambda: _plain((1, COLS), (EXPERTS, ROWS, 1)),
    "tensor": lambda: _plain((ROWS, COLS), (EXPERTS,)),
    "linears": lambda: open_modules(linears("block")[0], SHAPE, "experts"),
    "linears by tensor": lambda: open_modules(linears("tensor")[0], SHAPE, "experts"),
}


def _plain(block: tuple[int, int], view: tuple[int, ...]) -> Any:
    codes, scales, _ = encode_stack(weights(), block)
    holder = Holder("down_proj", codes, scales.float().view(view), "down_proj_weight_scale")
    return open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")


def _powers_in_fp32() -> Any:
    store, holder, _ = stacked((32, 32), power_of_two=True)
    scale = holder.down_proj_scale_inv.data.float()
    holder.down_proj_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    return store


@pytest.mark.parametrize("kind", STORES)
def test_requantized_sum(kind: str) -> None:
    """Within half a step of the code, for new scales; the other experts keep their bytes; restore gives all back."""
    store = STORES[kind]()
    before, bytes_before = store.materialize(None, torch.float64), _bytes(store)
    saved = store.snapshot()
    delta = 3 * weights(1)[:2]
    store.add_([([2], delta[:1]), ([0], delta[1:])])
    found = store.materialize(None, torch.float64)
    expected = before.clone()
    expected[[2, 0]] += delta.double()
    assert torch.equal(found[1], before[1])
    code_eps = 2**-2 if kind == "e5m2" else 2**-3
    top = 57344 if kind == "e5m2" else 448
    smallest = 2**-16 if kind == "e5m2" else 2**-9
    for expert in (0, 2):
        # half a step of the mantissa, or half the smallest code at the largest scale there is
        scale = expected[expert].abs().max() / top * (2 if kind.startswith("ue8m0") else 1)
        bound = (code_eps / 2 + 1e-6) * expected[expert].abs() + 0.51 * smallest * scale
        assert ((found[expert] - expected[expert]).abs() <= bound).all()
    store.restore(saved)
    assert _bytes(store) == bytes_before


def _bytes(store: Any) -> list[bytes]:
    return [
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        for piece in store.pieces
        for tensor in piece.parameters
    ]


@pytest.mark.parametrize("kind", STORES)
def test_a_delta_of_zero_changes_no_byte(kind: str) -> None:
    store = STORES[kind]()
    before = _bytes(store)
    store.add_([([0, 2], torch.zeros(2, ROWS, COLS))])
    assert _bytes(store) == before


def test_new_scales_are_those_of_a_fresh_quantization() -> None:
    store, holder, values = stacked((32, 32))
    delta = weights(1)
    store.add_([(range(EXPERTS), delta)])
    codes, scales, _ = encode_stack((values + delta.double()).float(), (32, 32))
    assert torch.allclose(holder.down_proj_scale_inv.double(), scales, rtol=1e-6)
    differing = holder.down_proj.view(torch.uint8) != codes.view(torch.uint8)
    assert differing.float().mean() < 1e-3  # ties, told apart by the last bit of fp32


@pytest.mark.parametrize("kind", STORES)
def test_scales_that_are_powers_of_two_stay_such(kind: str) -> None:
    """Some kernels read nothing but their exponents, whatever the dtype in which a checkpoint holds them."""
    store = STORES[kind]()
    store.add_([(range(EXPERTS), weights(1))])
    scales = torch.cat([piece.scale.float().reshape(-1) for piece in store.pieces])
    rounded = torch.exp2(torch.round(torch.log2(scales.double()))).float()
    assert torch.equal(scales, rounded) == kind.startswith("ue8m0")


def test_blocks_of_zeros() -> None:
    store, holder, values = stacked((32, 32))
    delta = torch.zeros(1, ROWS, COLS)
    delta[0, :32, :32] = -values[1, :32, :32].float()
    delta[0, 32:64, 64:] = -values[1, 32:64, 64:].float()
    store.add_([([1], delta)])
    found = store.materialize([1], torch.float64)[0]
    assert not found[:32, :32].any() and not found[32:64, 64:].any()
    assert torch.isfinite(holder.down_proj_scale_inv).all() and (holder.down_proj_scale_inv > 0).all()
    assert torch.equal(found[64:], store.materialize(None, torch.float64)[1, 64:])
    store.add_([([1], torch.ones(1, ROWS, COLS))])  # and out of zero again
    same(store.materialize([1], torch.float64)[0, :32, :32], torch.ones(32, 32, dtype=torch.float64), 2**30)


def test_one_scale_for_all_experts() -> None:
    codes, scales, values = encode_stack(weights().view(1, -1, COLS), (EXPERTS * ROWS, COLS))
    holder = Holder("down_proj", codes.view(SHAPE), scales.float().view(()), "down_proj_weight_scale")
    store: Any = open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")
    values = values.view(SHAPE)
    same(store.materialize(None, torch.float32), values)
    delta = 50 * weights(1)[:1]
    store.add_([([1], delta)])
    expected = values.clone()
    expected[1] += delta[0]
    assert holder.down_proj_weight_scale.shape == ()
    error = (store.materialize(None, torch.float64) - expected).abs()
    assert (error <= (2**-4 + 1e-6) * expected.abs() + 0.51 * 2**-9 * expected.abs().max() / 448).all()


def test_a_failure_while_deltas_are_drawn_changes_nothing() -> None:
    store, _, _ = stacked((32, 32))
    before = _bytes(store)

    def deltas() -> Any:
        yield [0], torch.ones(1, ROWS, COLS)
        assert _bytes(store) == before, "written before all were drawn"
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.add_(deltas())
    assert _bytes(store) == before
    bad = torch.ones(2, ROWS, COLS)
    bad[1, 5, 5] = float("inf")
    with pytest.raises(ValueError, match=r"experts\.down_proj: .*not finite.*Nothing was changed"):
        store.add_([([0, 1], bad)])
    assert _bytes(store) == before
    with pytest.raises(ValueError, match="come twice"):
        store.add_([([0], bad[:1]), ([0], bad[:1])])
    assert _bytes(store) == before


def test_tiny_values_do_not_become_nan() -> None:
    codes, scales, _ = encode(torch.full((4, 4), 1e-30), (4, 4))
    holder = Holder("down_proj", codes[None], scales.float()[None], "down_proj_scale_inv", (4, 4))
    store = open_stacked(holder, [("down_proj", False, False)], (1, 4, 4), "experts")
    store.add_([([0], torch.full((1, 4, 4), -1e-30) + 1e-44)])
    assert torch.isfinite(store.materialize(None, torch.float32)).all()


def test_requantization_that_eats_the_adapter_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store, _, _ = stacked((32, 32))
    with caplog.at_level("WARNING", logger="peft_moe"):
        store.add_([([0], 10 * weights(1)[:1])])
    assert not caplog.records
    before = store.materialize(None, torch.float64)
    delta = 0.01 * weights(2)[:1]
    with caplog.at_level("WARNING", logger="peft_moe"):
        store.add_([([0], delta)])
    lost = store.materialize(None, torch.float64)[0] - before[0] - delta[0]
    share = float(lost.norm() / delta.double().norm())
    assert f"{100 * share:.0f}%" in caplog.text and "experts" in caplog.text


@pytest.mark.parametrize("kind", STORES)
def test_densify(kind: str) -> None:
    store = STORES[kind]()
    expected = store.materialize(None, torch.bfloat16)
    modules = {piece.module for piece in store.pieces}
    store.densify(torch.bfloat16)
    assert not store.packed and store.dtype == torch.bfloat16
    assert torch.equal(store.materialize(), expected)
    for module in modules:
        names = {name: parameter.dtype for name, parameter in module.named_parameters()}
        assert set(names.values()) == {torch.bfloat16} and not any("scale" in name for name in names)
        assert not any(parameter.requires_grad for parameter in module.parameters())
    delta = weights(1)[:1]
    store.add_([([1], delta)])
    assert torch.equal(store.materialize([1])[0], (expected[1].float() + delta[0]).to(torch.bfloat16))


def test_freeze_and_copies() -> None:
    store, holder, values = stacked((32, 32))
    for parameter in holder.parameters():
        parameter.requires_grad_(True)
    store.freeze()
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    other = copy.deepcopy(store)
    other.add_([([0], torch.ones(1, ROWS, COLS))])
    same(store.materialize(None, torch.float32), values)
    assert "float8_e4m3fn" in repr(store)
