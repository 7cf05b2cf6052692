"""What the ops keep for backward, and that nothing of the size of a weight stack is ever made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe.ops.activation import SILU_GATED
from peft_moe.ops.experts import Projection, expert_mlp
from peft_moe.ops.linear import frozen_linear, lora_linear
from peft_moe.ops.routing import route

# The stacks are far larger than everything else: 128 * 64 * 48 against 24 rows.
EXPERTS, TOKENS, TOP_K, HIDDEN, INNER, RANK = 128, 12, 2, 64, 24, 4
ROWS = TOKENS * TOP_K
STACK = EXPERTS * HIDDEN * INNER  # elements of the smaller stack


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes anew, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, one.numel())
        return out


def kept(run: Callable[[], Tensor], inputs: list[Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes of distinct storages kept for backward besides those of the inputs."""
    known = {one.untyped_storage().data_ptr() for one in inputs}
    storages: dict[int, int] = {}
    alive = []  # a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), sum(storages.values())


def projections(dtype: torch.dtype) -> tuple[Projection, Projection]:
    def stack(out: int, into: int) -> Projection:
        return Projection(
            torch.randn(EXPERTS, out, into).to(dtype), None,
            torch.randn(EXPERTS, RANK, into).to(dtype).requires_grad_(),
            torch.randn(EXPERTS, out, RANK).to(dtype).requires_grad_(),
        )  # fmt: skip

    return stack(2 * INNER, HIDDEN), stack(HIDDEN, INNER)


@pytest.mark.parametrize("backend", ["auto", "loop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("sentinels", [True, False])
def test_expert_mlp(backend: str, dtype: torch.dtype, closed: bool, sentinels: bool) -> None:
    up, down = projections(dtype)
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weights = torch.rand(TOKENS, TOP_K).requires_grad_()
    index = torch.randint(EXPERTS, (TOKENS, TOP_K))
    gate = SILU_GATED if closed else lambda pre: torch.tanh(pre[..., ::2]) * pre[..., 1::2]
    inputs = [x, weights, up.weight, up.a, up.b, down.weight, down.a, down.b]

    def run() -> Tensor:
        return expert_mlp(x, weights, route(index, EXPERTS, sentinels), up, down, gate, backend, dtype)

    run().sum().backward()  # trials of the backends are over
    with Largest() as largest:
        out, found = kept(run, inputs)
        out.sum().backward()
    assert largest.elements <= max(up.a.numel(), ROWS * 2 * INNER), "something as large as a stack was made"
    assert largest.elements < STACK / 4

    pre, low = ROWS * 2 * INNER * dtype.itemsize, 2 * ROWS * RANK * dtype.itemsize
    sorting, offsets, valid = 4 * ROWS * 8, EXPERTS * 4, ROWS * sentinels
    assert found == pre + low + sorting + offsets + valid


def test_frozen_linear_keeps_nothing() -> None:
    up, _ = projections(torch.float32)
    offsets = torch.full((EXPERTS,), ROWS, dtype=torch.int32)
    x = torch.randn(ROWS, HIDDEN, requires_grad=True)
    with Largest() as largest:
        out, found = kept(lambda: frozen_linear(x, up.weight, offsets, "auto"), [x, up.weight, offsets])
        out.sum().backward()
        out, built = kept(lambda: frozen_linear(x, lambda: up.weight, offsets, "auto"), [x, offsets])
        out.sum().backward()
    assert found == 0 and built == 0
    assert largest.elements <= ROWS * HIDDEN


def test_lora_linear_keeps_the_low_rank_rows() -> None:
    up, _ = projections(torch.float32)
    offsets = torch.full((EXPERTS,), ROWS, dtype=torch.int32)
    x = torch.randn(ROWS, HIDDEN, requires_grad=True)
    with Largest() as largest:
        out, found = kept(lambda: lora_linear(x, up.a, up.b, offsets, "auto"), [x, up.a, up.b, offsets])
        out.sum().backward()
    assert found == ROWS * RANK * 4
    assert largest.elements < STACK / 4
