"""FP8 stores: reading and refusing, against formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_moe.weights import FP8Weight, open_modules, open_stacked
from tests.weights.quantized import E4M3, E5M2, encode_stack
from tests.weights.stores import COLS, EXPERTS, ROWS, SHAPE, Holder, linears, same, stacked, weights

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


@pytest.mark.parametrize("block", [(32, 32), (24, 20), (90, 100)])
@pytest.mark.parametrize("suffix", ["_scale", "_weight_scale"])
def test_blocks_of_a_stated_size_under_other_names(block: tuple[int, int], suffix: str) -> None:
    """compressed-tensors has blocks, too: what a module states counts where it fits, and is not inferred."""
    codes, scales, values = encode_stack(weights(), block)
    holder = Holder("down_proj", codes, scales.float(), f"down_proj{suffix}")
    holder.block_size = block
    same(open_stacked(holder, [("down_proj", False, False)], SHAPE, "experts").materialize(dtype=torch.float32), values)
    codes, scales, values = encode_stack(weights(), (1, COLS))  # by row, in a module that states one all the same
    holder = Holder("down_proj", codes, scales.float(), f"down_proj{suffix}")
    holder.block_size = block
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
