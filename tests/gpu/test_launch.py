"""Remembered versions of kernels are the right ones, and profilers see them run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from peft_moe.ops.activation import SILU_GATED

pytestmark = pytest.mark.gpu


def assert_right(pre: Tensor) -> None:
    from peft_moe.ops.triton.rowwise import gated

    gate, up = pre.double().chunk(2, dim=-1)
    all_of_one = torch.tensor([len(pre)], dtype=torch.int32, device=pre.device)
    hidden, _ = gated(SILU_GATED, pre, None, 1.0, all_of_one)
    torch.testing.assert_close(hidden.double(), silu(gate) * up, rtol=1e-2, atol=1e-2)


def test_alignment_and_sizes_change() -> None:
    """A version made for addresses and sizes that are multiples of 16 is not used for others, and the other way."""
    memory = torch.randn(4 * 2 * 96 + 8, device="cuda").bfloat16()
    for _ in range(3):
        for start in (0, 1, 8):
            for inner in (96, 95, 1, 64):
                assert_right(memory[start : start + 4 * 2 * inner].view(4, 2 * inner))


def test_hooks_are_called() -> None:
    from triton import knobs

    pre = torch.randn(4, 64, device="cuda").bfloat16()
    for _ in range(3):
        assert_right(pre)
    seen: list[Any] = []
    chain = knobs.runtime.launch_enter_hook
    if not hasattr(chain, "add"):
        pytest.skip("one hook, not a chain of them")
    chain.add(seen.append)
    try:
        assert_right(pre)
    finally:
        chain.remove(seen.append)
    assert len(seen) == 1 and seen[0].get()["name"] == "_gated_kernel"
    assert_right(pre)
    assert len(seen) == 1
