"""FP8 stores: reading, writing and refusing, against formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_moe.weights import FP8Weight, open_modules, open_stacked
from tests.weights.quantized import E4M3, E5M2, channel_linear, encode, encode_stack, fp8_linear

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


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("block", [(16, 8), (40, 36), (32, 32), (128, 128), (7, 50), (80, 72), (1, 72), (80, 1)])
def test_blocks(block: tuple[int, int], dtype: torch.dtype) -> None:
    store, _, values = stacked(block, dtype)
    assert isinstance(store, FP8Weight) and store.packed
    same(store.materialize(None, torch.float32), values)
    same(store.materialize([2, 0], torch.float64), values[[2, 0]])
    store.activation_dtype = torch.bfloat16
    built = store.frozen()()
    assert built.dtype == torch.bfloat16
    same(built, values)


def test_powers_of_two() -> None:
    store, holder, values = stacked((32, 32), power_of_two=True)
    same(store.materialize(None, torch.float32), values)
    holder.down_proj_scale_inv = nn.Parameter(holder.down_proj_scale_inv.data.view(torch.uint8), requires_grad=False)
    same(store.materialize(None, torch.float32), values)  # the same bytes, as some checkpoints hold them


@pytest.mark.parametrize("block", [(32, 32), (64, 64), (128, 128), (16, 24), (40, 72)])
def test_gate_and_up_quantized_apart(block: tuple[int, int]) -> None:
    """As the experts of a checkpoint are, whatever the rows that the blocks do not divide.

    With (64, 64) there are as many scales as the joined rows would have: only the codes can tell.
    """
    store, _, values = stacked(block, name="gate_up_proj", halves=True)
    same(store.materialize(None, torch.float32), values)
    whole, _, together = stacked(block, name="gate_up_proj")
    same(whole.materialize(None, torch.float32), together)


@pytest.mark.parametrize("view", [(EXPERTS, ROWS, 1), (EXPERTS, ROWS)])
@pytest.mark.parametrize("suffix", ["_scale", "_weight_scale", "_scale_inv"])
def test_per_channel(view: tuple[int, ...], suffix: str) -> None:
    codes, scales, values = encode_stack(weights(), (1, COLS))
    holder = Holder("down_proj", codes, scales.float().view(view), f"down_proj{suffix}")
    same(open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts").materialize(dtype=torch.float32), values)


@pytest.mark.parametrize("view", [(EXPERTS, 1, 1), (EXPERTS,)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_per_tensor(view: tuple[int, ...], stored: torch.dtype) -> None:
    codes, scales, _ = encode_stack(weights(), (ROWS, COLS))
    scale = scales.to(stored).view(view)
    holder = Holder("down_proj", codes, scale, "down_proj_weight_scale")
    expected = codes.double() * scale.double().view(EXPERTS, 1, 1)
    store = open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")
    same(store.materialize(None, torch.float32), expected)


def test_one_scale_for_gate_and_one_for_up() -> None:
    """What `FP8Experts` holds without a block size."""
    codes, scales, values = encode_stack(weights(), (ROWS // 2, COLS))
    holder = Holder("gate_up_proj", codes, scales.float(), "gate_up_proj_scale_inv")
    assert scales.shape == (EXPERTS, 2, 1)
    store = open_stacked(holder, [("gate_up_proj", False, False)], SHAPE, "experts")
    same(store.materialize(None, torch.float32), values)


def test_transposed_stack() -> None:
    codes, scales, values = encode_stack(weights(), (ROWS, 1))
    holder = Holder("down_proj", codes, scales.float(), "down_proj_scale")
    store = open_stacked(holder, [("down_proj", True, False)], (EXPERTS, COLS, ROWS), "experts")
    same(store.materialize(None, torch.float32), values.transpose(1, 2))
    store.activation_dtype = torch.float32  # type: ignore[attr-defined]
    same(store.frozen()(), values.transpose(1, 2))  # type: ignore[operator]


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


@pytest.mark.parametrize("kind", ["block", "channel", "tensor", "row"])
def test_linears(kind: str) -> None:
    modules, values = linears(kind)
    store = open_modules(modules, SHAPE, "experts")
    assert isinstance(store, FP8Weight)
    assert ((store.materialize(None, torch.float32).double() - values).abs() <= 1e-6 * values.abs()).all()
    same(store.materialize([1], torch.float64), store.materialize(None, torch.float64)[[1]].double())


def test_a_decompressed_linear_is_not_scaled_again() -> None:
    modules, values = linears("channel")
    done: Any = modules[1][0]
    done.weight = nn.Parameter(values[1, :48].to(torch.bfloat16), requires_grad=False)
    assert done.weight_scale is not None
    store = open_modules(modules, SHAPE, "experts")
    found = store.materialize(None, torch.float32)
    same(found[1, :48], values[1, :48].to(torch.bfloat16).double())
    same(found[0], values[0])
    for expert in modules:  # the rest while the adapter is on: the store looks at every call
        for one in expert:
            if one.weight.dtype == E4M3:
                wide = one.weight.float() * one.weight_scale  # type: ignore[operator]
                one.weight = nn.Parameter(wide, requires_grad=False)
    assert not store.packed
    same(store.materialize([0], torch.float32), values[[0]])


def test_weights_stay_fp8_and_share_one_workspace() -> None:
    store, holder, _ = stacked((32, 32))
    first = store.frozen()()
    second = stacked((16, 16))[0].frozen()()
    assert first.data_ptr() == second.data_ptr()
    assert holder.down_proj.dtype == E4M3


def test_kept_weights_are_rebuilt_when_they_change() -> None:
    store, holder, values = stacked((32, 32))
    store.activation_dtype = torch.float32
    store.keep_built = True
    kept = store.frozen()()
    assert store.frozen()() is kept
    stacked((16, 16))[0].frozen()()
    same(kept, values)  # not the shared workspace
    store.activation_dtype = torch.bfloat16
    assert store.frozen()().dtype == torch.bfloat16
    with torch.no_grad():
        holder.down_proj_scale_inv.mul_(2)
    same(store.frozen()(), 2 * values)
    before = store.frozen()()
    store.add_([([0], torch.ones(1, ROWS, COLS))])
    assert store.frozen()() is not before
    store.keep_built = False
    assert store._kept is None


# --- refusing --------------------------------------------------------------------------------------------------------


def test_no_scale_raises_and_says_what_was_looked_for() -> None:
    codes, _, _ = encode_stack(weights(), (32, 32))
    holder = Holder("down_proj", codes, None, "")
    with pytest.raises(
        ValueError, match=r"model\.experts\.down_proj.*without a scale.*down_proj_scale_inv.*weight_scale"
    ):
        open_stacked(holder, [("down_proj", False, False)], SHAPE, "model.experts")
    modules, _ = linears("channel")
    del modules[2][1].weight_scale  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"mlp\.experts\.2 .*looked for weight_scale_inv, weight_scale"):
        open_modules(modules, SHAPE, "mlp.experts")


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((EXPERTS, 2, 3), (32, 32)),
        ((EXPERTS, 3, 2), (32, 32)),
        ((EXPERTS, 1, 1), (32, 32)),
        ((EXPERTS - 1, 3, 3), (32, 32)),
        ((3, 3, 3, 3), (32, 32)),
        ((EXPERTS, ROWS + 1, 1), None),
        ((EXPERTS + 1,), None),
        ((EXPERTS, 7, 1), None),
    ],
)
def test_scales_that_do_not_fit(shape: tuple[int, ...], block: Any) -> None:
    codes, _, _ = encode_stack(weights(), (32, 32))
    holder = Holder("down_proj", codes, torch.ones(shape), "down_proj_scale_inv", block)
    with pytest.raises(ValueError, match=r"experts\.down_proj: a scale of shape .* does not fit"):
        open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(value: float) -> None:
    codes, scales, _ = encode_stack(weights(), (32, 32))
    scales[1, 2, 0] = value
    holder = Holder("down_proj", codes, scales.float(), "down_proj_scale_inv", (32, 32))
    with pytest.raises(ValueError, match="not finite"):
        open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")


def test_a_block_size_that_nobody_states_is_not_guessed() -> None:
    codes, scales, _ = encode_stack(weights(), (64, 64))  # 2 x 2 scales over 80 x 72: 40 or 64 rows each?
    holder = Holder("down_proj", codes, scales.float(), "down_proj_scale_inv")
    with pytest.raises(ValueError, match="states no block size"):
        open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts")


# --- writing ---------------------------------------------------------------------------------------------------------

STORES: dict[str, Any] = {
    "block": lambda: stacked((32, 32))[0],
    "odd": lambda: stacked((7, 50))[0],
    "e5m2": lambda: stacked((32, 32), E5M2)[0],
    "ue8m0": lambda: stacked((32, 32), power_of_two=True)[0],
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
        scale = expected[expert].abs().max() / top * (2 if kind == "ue8m0" else 1)
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
