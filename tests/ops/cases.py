"""Random cases for the ops, and when a result is close enough to float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_moe.ops import grouped
from tests.ops import loops

few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Strides of 1, 3, 5 and 20 elements are no multiple of 16 bytes in some or all dtypes.
SIZES = st.sampled_from([1, 3, 5, 8, 16, 20])
RANKS = st.sampled_from([1, 3, 4, 5, 8, 16, 20])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
BACKENDS = st.sampled_from(["auto", "grouped_mm", "loop"])
ROUTINGS = st.sampled_from(["random", "one expert", "two experts", "sentinels", "only sentinels"])


@dataclass
class Case:
    """One call of an expert MLP.

    x (T, H), weights (T, k), index (T, k) int64 with num_experts for no expert, gate: name and (S, N) callable.
    """

    x: Tensor
    weights: Tensor
    index: Tensor
    up: loops.Stack
    down: loops.Stack
    gate: str
    backend: str
    experts: int
    sentinels: bool

    @property
    def owners(self) -> list[int]:
        """Of every row, sorted by expert, without the rows of no expert."""
        return sorted(expert for expert in self.index.flatten().tolist() if expert < self.experts)

    @property
    def idle(self) -> list[int]:
        """Experts without a token."""
        return [expert for expert in range(self.experts) if expert not in self.owners]


def draw_index(kind: str, tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """Choices (T, k) of distinct experts where there are enough of them."""
    if kind == "one expert":
        return torch.full((tokens, top_k), int(torch.randint(experts, (), generator=generator)))
    if kind == "only sentinels":
        return torch.full((tokens, top_k), experts)
    order = [torch.randperm(experts, generator=generator) for _ in range(tokens)]
    chosen = torch.stack([one.repeat(top_k)[:top_k] for one in order]) if order else torch.zeros(0, top_k).long()
    if kind == "two experts":
        chosen = chosen % 2 * (experts - 1)
    if kind == "sentinels":
        chosen[torch.rand(chosen.shape, generator=generator) < 0.4] = experts
    return chosen


def laid_out(tensor: Tensor, transposed: bool) -> Tensor:
    """The same values, held with the last two dimensions swapped."""
    return tensor.mT.contiguous().mT if transposed else tensor


def strided(tensor: Tensor) -> Tensor:
    """The same values in every other column of a wider tensor."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@st.composite
def stacks(
    draw: st.DrawFn, experts: int, out: int, into: int, dtype: torch.dtype, generator: torch.Generator
) -> loops.Stack:
    """A projection with values that keep its output of order one."""

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5).to(dtype)

    weight = laid_out(normal(experts, out, into, fan_in=into), draw(st.booleans()))
    bias = normal(experts, out) if draw(st.booleans()) else None
    if not draw(st.sampled_from([True, True, False])):
        return loops.Stack(weight, bias)
    rank = draw(RANKS)
    return loops.Stack(weight, bias, normal(experts, rank, into, fan_in=into), normal(experts, out, rank, fan_in=rank))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Everything an expert MLP may meet, in small."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype, experts, tokens = draw(DTYPES), draw(st.integers(1, 8)), draw(st.sampled_from([0, 1, 2, 7, 12]))
    top_k, hidden, inner = draw(st.integers(1, min(experts, 4))), draw(SIZES), draw(SIZES)
    kink = "clamped" if dtype in (torch.float32, torch.float64) else "softcapped"
    gate, kind = draw(st.sampled_from(["silu", "silu", kink, "squared_relu"])), draw(ROUTINGS)
    first = inner if gate == "squared_relu" else 2 * inner
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.25
    return Case(
        x=strided(x) if draw(st.booleans()) else x,
        weights=weights.to(draw(st.sampled_from([dtype, torch.float32, torch.bfloat16, torch.float64]))),
        index=draw_index(kind, tokens, top_k, experts, generator),
        up=draw(stacks(experts, first, hidden, dtype, generator)),
        down=draw(stacks(experts, hidden, inner, dtype, generator)),
        gate=gate,
        backend=draw(BACKENDS),
        experts=experts,
        sentinels="sentinels" in kind or draw(st.booleans()),
    )


def assert_close(
    found: Tensor | None, expected: Tensor, dtype: torch.dtype, what: str, factor: float = 6.0, summands: float = 0.0
) -> None:
    """‖found - expected‖ is within `factor` roundings of values that are of order one.

    Each of the handful of products and sums in a row of ops rounds its result once, by at most half an epsilon.
    `summands`: the norm of what is summed up, where much of it may cancel.
    """
    assert found is not None, f"{what}: nothing"
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = float((found.detach().double() - expected.detach()).norm())
    bound = factor * torch.finfo(dtype).eps * float(expected.detach().norm() + expected.numel() ** 0.5 + summands)
    assert error <= bound or found.numel() == 0, f"{what}: error {error:.3g}, allowed {bound:.3g} in {dtype}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Torch's grouped product with NaN wherever it promises nothing.

    That is in the rows at or past the last offset, and, of the outer product, in groups without rows: some devices
    leave both as they find them in memory.
    """
    native = grouped._native

    def poison(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = native(a, b, offs=offs)
        if a.dim() == 2 and b.dim() == 3:
            out[int(offs[-1]) :] = float("nan")
        else:
            sizes = [end - start for start, end in zip([0, *offs.tolist()], offs.tolist(), strict=False)]
            for group, size in enumerate(sizes):
                if size == 0:
                    out[group] = float("nan")
        return out

    with pytest.MonkeyPatch.context() as patch:
        grouped.native_works(torch.device("cpu"), torch.float32)  # its own trial wants the real product
        grouped.native_works(torch.device("cpu"), torch.bfloat16)
        grouped.native_works(torch.device("cpu"), torch.float16)
        patch.setattr(grouped, "_native", poison)
        yield
