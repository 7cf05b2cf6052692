"""The grouped products, the choice of their backend, and what is said when the native one cannot run."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peft_moe.ops import grouped
from peft_moe.ops.backends import padded_rank
from peft_moe.ops.grouped import grouped_mm, grouped_outer, log_once, native_works
from tests.ops import loops
from tests.ops.cases import BACKENDS, DTYPES, SIZES, assert_close, few, laid_out, poisoned, strided

CPU = torch.device("cpu")


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@few
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 3), SIZES, SIZES, DTYPES, BACKENDS,
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_products(
    counts: list[int], extra: int, into: int, out: int, dtype: torch.dtype, backend: str, transposed: bool, wide: bool
) -> None:
    """`extra` rows past the last offset belong to nobody."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows = (torch.randn(len(owners) + extra, into) / into**0.5).to(dtype)
    grads = torch.randn(len(owners) + extra, out).to(dtype)
    rows, grads = (strided(rows), strided(grads)) if wide else (rows, grads)
    matrices = laid_out(torch.randn(len(counts), into, out).to(dtype), transposed)
    with poisoned():
        found = grouped_mm(rows, matrices, offsets_of(counts), backend)
        outer = grouped_outer(grads, rows, offsets_of(counts), backend)
    assert found.shape == (len(rows), out) and found.dtype == dtype
    assert_close(found[: len(owners)], loops.products(rows, matrices, owners), dtype, "rows")
    assert outer.dtype == dtype
    assert_close(outer, loops.outers(grads, rows, owners, len(counts)), dtype, "outer")
    for expert, count in enumerate(counts):
        assert count or not outer[expert].any(), f"expert {expert} has no row but an outer product"


@pytest.mark.parametrize("experts", [128, 1024, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_experts(experts: int, dtype: torch.dtype) -> None:
    counts = [expert % 3 % 2 for expert in range(experts)]
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    rows, matrices = torch.randn(len(owners), 8).to(dtype), torch.randn(experts, 8, 8).to(dtype)
    with poisoned():
        found = grouped_mm(rows, matrices, offsets_of(counts))
        outer = grouped_outer(rows, rows, offsets_of(counts))
    assert_close(found, loops.products(rows, matrices, owners), dtype, "rows")
    assert_close(outer, loops.outers(rows, rows, owners, experts), dtype, "outer")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has not said anything yet."""
    log_once.cache_clear()
    native_works.cache_clear()
    caplog.set_level(logging.WARNING, logger="peft_moe")
    return caplog


def run(experts: int, into: int, out: int, dtype: torch.dtype, backend: str, transposed: bool = False) -> None:
    matrices = laid_out(torch.randn(experts, into, out).to(dtype), transposed)
    grouped_mm(torch.randn(4, into).to(dtype), matrices, offsets_of([4] + [0] * (experts - 1)), backend)


NEEDS_NATIVE = pytest.mark.skipif(not native_works(CPU, torch.float32), reason="no grouped_mm on the CPU in this torch")


@NEEDS_NATIVE
@pytest.mark.parametrize(
    ("experts", "into", "out", "dtype", "transposed", "said"),
    [
        (1025, 8, 8, torch.float32, False, "1025 experts"),
        (2, 8, 5, torch.float32, False, "16 bytes"),
        (2, 8, 5, torch.float32, True, "16 bytes"),
        (2, 5, 8, torch.float32, False, "16 bytes"),
        (2, 12, 8, torch.bfloat16, False, "16 bytes"),
        (2, 8, 8, torch.float64, False, "float64"),
    ],
)
def test_fallback_is_said_once(
    experts: int,
    into: int,
    out: int,
    dtype: torch.dtype,
    transposed: bool,
    said: str,
    log: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):
        run(experts, into, out, dtype, "grouped_mm", transposed)
    assert len(log.messages) == 1 and said in log.messages[0] and "loop" in log.messages[0]


@NEEDS_NATIVE
def test_fast_path_says_nothing(log: pytest.LogCaptureFixture) -> None:
    run(3, 16, 8, torch.bfloat16, "auto")
    run(1024, 8, 8, torch.float32, "auto")
    run(2, 5, 3, torch.float32, "loop")  # asked for
    assert not log.messages


@NEEDS_NATIVE
def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = grouped._native
    monkeypatch.setattr(grouped, "_native", lambda *args, **kwargs: calls.append(1) or native(*args, **kwargs))
    run(2, 8, 8, torch.float32, "loop")
    assert not calls
    run(2, 8, 8, torch.float32, "auto")
    run(2, 8, 8, torch.float32, "grouped_mm")
    assert len(calls) == 2


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_trial_finds_a_bad_kernel(fault: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    def bad(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no such kernel")
        if b.dim() == 2:
            return torch.zeros(offs.numel(), a.shape[0], b.shape[1], dtype=a.dtype)
        return torch.zeros(a.shape[0], b.shape[2], dtype=a.dtype)

    monkeypatch.setattr(grouped, "_native", bad)
    assert not native_works(CPU, torch.float32)
    assert len(log.messages) == 1 and "loop" in log.messages[0]
    native_works.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8), (torch.float64, 2)]
)
def test_padded_rank(dtype: torch.dtype, multiple: int) -> None:
    assert [padded_rank(rank, dtype, "grouped_mm") for rank in (1, multiple, multiple + 1)] == [
        multiple,
        multiple,
        2 * multiple,
    ]
