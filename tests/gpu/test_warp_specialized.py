"""Hopper's warp-specialized products against a loop over experts in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from peft_moe.ops.triton.descriptors import has_warp_specialization

    if not has_warp_specialization(torch.device("cuda")):
        pytest.skip("no Hopper, or a Triton whose Gluon is not known", allow_module_level=True)

Case = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]


def case(
    counts: list[int], n_size: int, k_size: int, rank: int | None, transposed: bool, bias: bool, dtype: torch.dtype,
    left_over: int = 0, seed: int = 0,
) -> Case:  # fmt: skip
    """x, weight, b, low, bias and offsets; `left_over` rows at the end belong to no expert, and hold NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    experts, rows = len(counts), sum(counts) + left_over
    x = random(rows, k_size)
    x[sum(counts) :] = torch.nan
    weight = random(experts, k_size, n_size).mT if transposed else random(experts, n_size, k_size)
    b = low = None
    if rank is not None:
        b = random(experts, rank, n_size).mT if transposed else random(experts, n_size, rank)
        low = random(rows, rank)
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    return x, weight, b, low, random(experts, n_size) if bias else None, ends


def expected(
    x: Tensor, weight: Tensor, b: Tensor | None, low: Tensor | None, bias: Tensor | None, ends: Tensor
) -> Tensor:
    out = x.new_zeros(int(ends[-1]), weight.shape[1], dtype=torch.float64)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end].double() @ weight[expert].double().T
        if b is not None and low is not None:
            out[start:end] += low[start:end].double() @ b[expert].double().T
        if bias is not None:
            out[start:end] += bias[expert].double()
        start = end
    return out


@pytest.fixture
def multiply() -> Callable[[Case], Tensor]:
    from peft_moe.ops.triton.warp_specialized import multiply

    def run(case: Case) -> Tensor:
        x, weight, b, low, bias, ends = case
        out = torch.full((x.shape[0], weight.shape[1]), torch.inf, device="cuda", dtype=x.dtype)
        assert multiply(x, weight, b, low, bias, ends, out)
        return out

    return run


def check(case: Case, out: Tensor) -> None:
    want, rows = expected(*case), int(case[-1][-1])
    error = (out[:rows].double() - want).abs().max() / want.abs().max()
    assert error < 2 ** (-8 if out.dtype == torch.bfloat16 else -11)
    assert (out[rows:] == torch.inf).all()


@pytest.mark.parametrize(  # of transposed weights B's rank comes first: 8 and 24 are refused, see below
    ("transposed", "rank"), [(False, 8), (False, 24), *itertools.product((False, True), (None, 16, 64))]
)
@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(multiply: Callable[[Case], Tensor], transposed: bool, rank: int | None, bias: bool) -> None:
    """Whole tiles, halves of tiles, rows on either side of a half, and experts without any."""
    counts = [128, 0, 64, 65, 1, 0, 0, 300, 63, 127, 129, 1000, 0]
    one = case(counts, 512, 320, rank, transposed, bias, torch.bfloat16, left_over=37)
    check(one, multiply(one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_size", "k_size"), [(256, 64), (2880, 2880), (200, 128), (8, 72), (1000, 1000), (7168, 136)]
)
def test_sizes(multiply: Callable[[Case], Tensor], n_size: int, k_size: int, dtype: torch.dtype) -> None:
    """Sizes that no tile divides, one step along K, and more columns than a group of programs covers."""
    for transposed in (False, True) if k_size % 64 == 0 else (False,):
        one = case([70, 500, 3, 200], n_size, k_size, 16, transposed, True, dtype)
        check(one, multiply(one))


def test_many_and_few_experts(multiply: Callable[[Case], Tensor]) -> None:
    torch.manual_seed(0)
    for experts, mean in ((1, 9000), (300, 60), (3, 2)):
        one = case(torch.randint(0, 2 * mean, (experts,)).tolist(), 768, 256, 16, False, False, torch.bfloat16)
        check(one, multiply(one))


def test_what_it_does_not_take() -> None:
    """Refused without a trace; `project` has another kernel for these."""
    from peft_moe.ops.triton.warp_specialized import multiply

    fine = case([100, 200], 256, 128, 16, False, False, torch.bfloat16)
    x, weight, b, low, _, ends = fine
    out = torch.full((300, 256), torch.inf, device="cuda", dtype=torch.bfloat16)
    assert b is not None and low is not None
    refused: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = [
        (x.float(), weight.float(), None, None),
        (x[:, :100], weight[:, :, :100].transpose(1, 2).contiguous().mT, None, None),  # transposed, K = 100
        (x[:, 1:65], weight[:, :, 1:65], None, None),  # rows that start between 16-byte addresses
        (x, weight, b.repeat(1, 1, 8), low.repeat(1, 8)),  # rank 128
        (x, weight, b[:, :, :4].contiguous(), low[:, :4].contiguous()),  # rows of 8 bytes
        # rank 8 comes first: tiles of 16 would hold the next expert's
        (x, weight, b[:, :, :8].mT.contiguous().mT, low[:, :8].contiguous()),
        (x, weight[:1].expand(2, 256, 128), None, None),  # not one matrix
    ]
    for one_x, one_weight, one_b, one_low in refused:
        assert not multiply(one_x, one_weight, one_b, one_low, None, ends, out)
    odd = out.new_full((300, 252), torch.inf)
    assert not multiply(x, weight[:, :252].contiguous(), None, None, None, ends, odd)
    assert (out == torch.inf).all() and (odd == torch.inf).all()


def test_scale_of_a_wide_low_rank_product() -> None:
    from peft_moe.ops.triton.project import low_rank

    x, a, _, _, _, ends = case([100, 200], 128, 256, None, False, False, torch.bfloat16)
    check((2.0 * x, a, None, None, None, ends), low_rank(x, a, 2.0, ends))


def test_races(multiply: Callable[[Case], Tensor]) -> None:
    """The same inputs give the same bits, whatever ran before."""
    torch.manual_seed(1)
    cases = [
        case(torch.randint(0, 400, (64,)).tolist(), n_size, k_size, 16, transposed, False, torch.bfloat16, seed=seed)
        for seed, (n_size, k_size, transposed) in enumerate([(2048, 768, False), (2048, 1536, True), (512, 64, False)])
    ]
    first = [multiply(one) for one in cases]
    for one, out in zip(cases, first, strict=True):
        check(one, out)
    for _ in range(100):
        for one, out in zip(cases, first, strict=True):
            assert torch.equal(multiply(one), out)
