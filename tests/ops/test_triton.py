"""The Triton kernels, in Triton's interpreter on the CPU, against the same float64 loops as the torch path.

The interpreter computes bf16 wrongly, so it is fp32 and fp16 here; `tests/gpu` runs bf16 on a device.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.cases import Case, cases
from tests.ops.test_experts import check, plain_case

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_in_the_interpreter")
slow = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a device the kernels are compiled: tests/gpu")
def test_in_the_interpreter() -> None:
    """The tests below in a process of their own: Triton reads the setting when it is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


@interpreted
@slow
@given(cases(), st.sampled_from([torch.float32, torch.float16]))
def test_whole_mlp(case: Case, dtype: torch.dtype) -> None:
    """Output and every gradient, over routings, sizes, biases, gates, orientations and ranks."""

    def cast(stack: object) -> object:
        fields = ("weight", "bias", "a", "b")
        values = {name: getattr(stack, name) for name in fields}
        return dataclasses.replace(stack, **{k: None if v is None else v.to(dtype) for k, v in values.items()})

    weights = case.weights.float() if case.weights.dtype == torch.bfloat16 else case.weights
    # In fp16 rounding decides on which side of a kink a value falls.
    gate = "softcapped" if case.gate == "clamped" and dtype == torch.float16 else case.gate
    check(
        dataclasses.replace(
            case,
            x=case.x.to(dtype),
            weights=weights,
            up=cast(case.up),
            down=cast(case.down),
            gate=gate,
            backend="triton",
        )  # fmt: skip
    )


@interpreted
@pytest.mark.parametrize(("rows", "columns", "step"), [(16, 32, 16), (32, 16, 32), (64, 64, 16), (128, 32, 16)])
@pytest.mark.parametrize("width", [48, 40])
def test_tiles(rows: int, columns: int, step: int, width: int) -> None:
    """Whatever the tile sizes, and where they do not divide the shapes."""
    from peft_moe.ops.triton.project import project

    torch.manual_seed(rows + width)
    experts, out_features, rank = 3, 72, 16
    owners = torch.tensor([0] * 5 + [2] * (40 if rows < 128 else 140))  # of 128, half tiles and whole ones
    offsets = torch.searchsorted(owners, torch.arange(experts), right=True).int()
    x, source = torch.randn(20, width), torch.randint(0, 20, (len(owners),))
    weight, a = torch.randn(experts, out_features, width), torch.randn(experts, rank, width)
    b, bias = torch.randn(experts, out_features, rank), torch.randn(experts, out_features)
    tiles = {"ROWS": rows, "COLUMNS": columns, "STEP": step, "num_warps": 4, "num_stages": 1}
    for layout in (weight, weight.mT.contiguous().mT):
        out, low = project(x, source, layout, a, b, 0.5, bias, offsets, tiles)
        for row, (owner, position) in enumerate(zip(owners.tolist(), source.tolist(), strict=True)):
            expected_low = 0.5 * a[owner].double() @ x[position].double()
            expected = weight[owner].double() @ x[position].double() + b[owner].double() @ expected_low + bias[owner]
            assert low is not None and (low[row] - expected_low).norm() < 1e-4 * expected_low.norm()
            assert (out[row] - expected).norm() < 1e-4 * expected.norm()


@interpreted
@pytest.mark.parametrize("rank", [65, 96, 128, 200])
def test_high_ranks(rank: int) -> None:
    """Low-rank products by themselves, in several column tiles, and LoRA B in several steps."""
    torch.manual_seed(rank)
    check(plain_case(3, 9, 2, backend="triton", rank=rank))


@interpreted
@pytest.mark.parametrize("inner", [24, 40])
def test_a_graph_that_is_kept(inner: int) -> None:
    """The backward may write into what was saved: not where another one is to come."""
    from peft_moe.ops.activation import SILU_GATED
    from peft_moe.ops.experts import Projection, expert_mlp, pieces_of

    torch.manual_seed(inner)
    experts, tokens, width, rank = 3, 11, 32, 16
    up = [torch.randn(experts, *shape) for shape in ((2 * inner, width), (rank, width), (2 * inner, rank))]
    down = [torch.randn(experts, *shape) for shape in ((width, inner), (rank, inner), (width, rank))]
    leaves = [torch.randn(tokens, width), torch.rand(tokens, 2), *up[1:], *down[1:]]
    for leaf in leaves:
        leaf.requires_grad_()
    index = torch.rand(tokens, experts).topk(2).indices
    out = expert_mlp(
        leaves[0], leaves[1], pieces_of("triton").route(index, experts, False), Projection(up[0], None, *up[1:]),
        Projection(down[0], None, *down[1:]), SILU_GATED, "triton", torch.float32,
    )  # fmt: skip
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.square().sum(), leaves)


@interpreted
@slow
@given(st.data())
def test_route(data: st.DataObject) -> None:
    """The same as the sort, bit for bit: any number of experts, empty ones, rows of no expert, several blocks."""
    from peft_moe.ops.routing import route
    from peft_moe.ops.triton.routing import _counting_sort
    from peft_moe.ops.triton.routing import route as by_counting

    experts, top_k = data.draw(st.sampled_from([1, 3, 8, 100, 1000])), data.draw(st.integers(1, 4))
    sentinels = data.draw(st.booleans())
    tokens = data.draw(st.sampled_from([0, 1, 5, 40, 150]))
    programs = data.draw(st.sampled_from([1, 2, 128]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    index = torch.randint(0, experts + 3 * int(sentinels), (tokens, top_k))
    index = index.clamp(max=experts) if data.draw(st.booleans()) else index
    index = index.to(data.draw(st.sampled_from([torch.int64, torch.int32])))
    few = data.draw(st.sampled_from([0, 8192]))
    _counting_sort.cache_clear()
    with mock.patch.multiple("peft_moe.ops.triton.routing", _PROGRAMS=programs, _FEW=few):
        found, wanted = by_counting(index, experts, sentinels), route(index, experts, sentinels)
    for name, value in wanted._asdict().items():
        ours = getattr(found, name)
        if not isinstance(value, torch.Tensor):
            assert ours == value, name
        elif name in ("order", "source", "inverse", "experts") and sentinels:
            # Among rows of no expert any order will do.
            real = wanted.offsets[-1]
            keep = (value < real) if name == "inverse" else torch.arange(len(value)) < real
            assert torch.equal(ours[keep], value.to(ours.dtype)[keep]), name
        else:
            assert ours.shape == value.shape and torch.equal(ours, value.to(ours.dtype)), name
    flat = index.reshape(-1).to(torch.int64)
    assert torch.equal(found.order[found.inverse], torch.arange(flat.numel()))


@interpreted
@pytest.mark.parametrize("tokens", [40, 9000])
def test_route_of_a_view(tokens: int) -> None:
    """One column of several, and one number for all: flat views whose stride is not one."""
    from peft_moe.ops.routing import route
    from peft_moe.ops.triton.routing import route as by_counting

    for index in (torch.randint(0, 5, (tokens, 3))[:, 1:2], torch.tensor([[3]]).expand(tokens, 1)):
        found, wanted = by_counting(index, 5, False), route(index, 5, False)
        for name in ("order", "source", "inverse", "experts", "offsets"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (1, 64), (72, 64), (24, 16)])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_products_on_codes(rows: int, columns: int, kind: torch.dtype, transposed: bool) -> None:
    """Blocks, single rows and whole tensors, some of which end short, against the weights in float64."""
    from peft_moe.ops.scaled import ScaledStack
    from peft_moe.ops.triton.project import project

    torch.manual_seed(rows + columns)
    experts, n, k, rank = 3, 72, 64, 16
    codes = torch.randn(experts, n, k).to(kind)
    scales = torch.rand(experts, -(-n // rows), -(-k // columns)) + 0.5
    dense = codes.double() * scales.double().repeat_interleave(rows, 1)[:, :n].repeat_interleave(columns, 2)[..., :k]
    stack = ScaledStack(codes, scales, rows, columns)
    if transposed:
        stack, dense = stack.mT, dense.mT
    step = 8 if transposed and rows == 24 else 16
    if transposed and rows == 1:
        pytest.skip("a step along K would have several scales: it is dequantized")
    offsets = torch.tensor([5, 5, 45], dtype=torch.int32)
    x = torch.randn(45, stack.shape[2])
    a, b = torch.randn(experts, rank, stack.shape[2]), torch.randn(experts, stack.shape[1], rank)
    tiles = {"ROWS": 32, "COLUMNS": 64, "STEP": step, "num_warps": 4, "num_stages": 1}
    out, _ = project(x, None, stack, a, b, 2.0, None, offsets, tiles)  # type: ignore[arg-type]
    for expert, (start, end) in enumerate([(0, 5), (5, 5), (5, 45)]):
        one = x[start:end].double()
        expected = one @ dense[expert].mT + 2 * (one @ a[expert].double().mT) @ b[expert].double().mT
        assert (out[start:end].double() - expected).norm() <= 1e-5 * expected.norm()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "nested", "exponents"])
@pytest.mark.parametrize("size", [32, 128, 4096])
def test_four_bits(size: int, kind: str, dtype: torch.dtype) -> None:
    """Element by element in float64: all blocks, those from one on, and runs that an index picks."""
    from peft_moe.ops.triton.four_bit import Nested, dequantize_4bit

    generator = torch.Generator().manual_seed(size)
    runs, blocks = 4, 6  # of four experts
    codes = torch.randint(0, 256, (runs * blocks * size // 2,), generator=generator, dtype=torch.uint8)
    table = torch.randn(16, generator=generator)
    low_first = kind == "exponents"
    nested = None
    if kind == "plain":
        scales = torch.rand(runs * blocks, generator=generator) + 0.5
        factor = scales
    elif kind == "exponents":
        scales = torch.randint(110, 140, (runs * blocks,), generator=generator, dtype=torch.uint8)
        factor = torch.exp2(scales.double() - 127)
    else:
        scales = torch.randint(0, 256, (runs * blocks,), generator=generator, dtype=torch.uint8)
        outer = torch.rand(runs * blocks // 3, generator=generator) + 0.5
        nested = Nested(torch.randn(256, generator=generator), outer, 3, torch.randn(2, generator=generator), 12)
        factor = nested.table[scales.long()] * outer.repeat_interleave(3) + nested.offsets.repeat_interleave(12)
    halves = (codes & 15, codes >> 4) if low_first else (codes >> 4, codes & 15)
    numbers = table.double()[torch.stack(halves, dim=-1).view(-1).long()]
    expected = numbers * factor.double().repeat_interleave(size)

    def check_part(picked: torch.Tensor, first: int = 0, chosen: torch.Tensor | None = None) -> None:
        out = torch.full((picked.numel(),), float("nan"), dtype=dtype)
        dequantize_4bit(codes, scales, table, size, out, first, chosen, nested, low_first)
        assert ((out.double() - picked).abs() <= 1.1 * torch.finfo(dtype).eps * picked.abs() + 1e-6).all()

    check_part(expected)
    check_part(expected[5 * size : 12 * size], first=5)
    chosen = torch.tensor([2, 0, 2])
    check_part(expected.view(runs, -1)[chosen].reshape(-1), chosen=chosen)
