"""The kernels compile for real GPUs, without one: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_moe.ops.activation import GatedSwish
from peft_moe.ops.experts import Projection, expert_mlp, pieces_of

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a device the kernels run: tests/gpu"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


# Ten times the compute capability, or AMD's name; and the bytes of shared memory that a program may hold.
A100, H100, B200, RTX_3090, RTX_5090 = 80, 90, 100, 86, 120
MI200, MI300, MI350, RX_7900 = "gfx90a", "gfx942", "gfx950", "gfx1100"
SHARED_MEMORY = {
    A100: 166912, H100: 232448, B200: 232448, RTX_3090: 101376, RTX_5090: 101376,
    MI200: 65536, MI300: 65536, MI350: 163840, RX_7900: 65536,
}  # fmt: skip


@pytest.fixture(params=[A100, H100, B200])
def architecture(request: pytest.FixtureRequest) -> int | str:
    return request.param


@pytest.fixture
def compiled(architecture: int | str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that are compiled while a test runs, in the place of being run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from peft_moe.ops.triton import project
    from peft_moe.ops.triton.descriptors import _GLUON
    from peft_moe.ops.triton.launch import TRITON, Launch

    names: list[str] = []

    def compile_only(self: Launch, key: tuple[Any, ...], tensors: tuple[Any, ...]) -> None:
        found = self.kernel.warmup(*tensors, *self.numbers, grid=self.grid, **self.constants)
        assert found.asm["cubin" if on_nvidia else "hsaco"]
        assert found.metadata.shared <= SHARED_MEMORY[architecture]
        names.append(self.kernel.fn.__name__)

    on_nvidia = isinstance(architecture, int)
    width = 32 if on_nvidia or architecture == RX_7900 else 64  # threads of a warp
    target = GPUTarget("cuda" if on_nvidia else "hip", architecture, width)
    has_copy_engine = isinstance(architecture, int) and architecture >= 90
    fake = SimpleNamespace(  # a kernel keeps the target of each device
        get_current_target=lambda: target,
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(Launch, "_version", compile_only)
    monkeypatch.setattr(project, "has_descriptors", lambda device: has_copy_engine)
    monkeypatch.setattr(project, "shared_memory", lambda device: SHARED_MEMORY[architecture])
    if architecture == H100 and _GLUON[0] <= TRITON <= _GLUON[1]:
        from peft_moe.ops.triton import warp_specialized

        monkeypatch.setattr(project, "has_warp_specialization", lambda device: True)
        monkeypatch.setattr(warp_specialized, "processors", lambda device: 132)
    before = dict(vars(driver))
    driver.set_active(fake)
    yield names
    vars(driver).update(before)


def step(tokens: int, form: GatedSwish, rank: int) -> None:
    """A small expert MLP, forward and backward."""
    experts, top_k, width, inner = 4, 2, 256, 192
    up = [torch.zeros(experts, *shape).bfloat16() for shape in ((2 * inner, width), (rank, width), (2 * inner, rank))]
    down = [torch.zeros(experts, *shape).bfloat16() for shape in ((width, inner), (rank, inner), (width, rank))]
    leaves = [torch.zeros(tokens, width).bfloat16(), torch.zeros(tokens, top_k), *up[1:], *down[1:]]
    for leaf in leaves:
        leaf.requires_grad_()
    index = torch.zeros(tokens, top_k, dtype=torch.int64)
    out = expert_mlp(
        leaves[0], leaves[1], pieces_of("triton").route(index, experts, False), Projection(up[0], None, *up[1:]),
        Projection(down[0], None, *down[1:]), form, "triton", torch.bfloat16,
    )  # fmt: skip
    out.sum().backward()


SWISH, GPT_OSS = GatedSwish(), GatedSwish(1.702, 1.0, 7.0, True)


@pytest.mark.parametrize(
    ("tokens", "form", "rank", "specialized"),
    [
        (8, SWISH, 16, 0),
        (8, SWISH, 5, 0),
        (300, GPT_OSS, 16, 2),
        (4000, SWISH, 16, 2),
        (4000, SWISH, 8, 1),
        (300, SWISH, 5, 0),
    ],
)
def test_whole_mlp(
    compiled: list[str], architecture: int | str, tokens: int, form: GatedSwish, rank: int, specialized: int
) -> None:
    """Few rows an expert, some, and many, forward and backward; how many products Hopper takes by specialized warps."""
    step(tokens, form, rank)
    passes = {name for name in compiled if "project" not in name}
    assert passes == {"_compare_kernel", "_gated_kernel", "_gated_backward_kernel", "_combine_kernel", "_outer_kernel"}
    assert sum("project" in name for name in compiled) == (4 if tokens == 8 else 6)
    # Products of rows that need no gather: the second projection, and the gradient of the input. There A's rank comes
    # first, so it has to fill a tile; rows of 5 numbers cannot be copied by tiles.
    assert compiled.count("_specialized_project_kernel") == (specialized if architecture == H100 else 0)


@pytest.mark.parametrize("architecture", [A100, H100, RTX_3090, RTX_5090, MI300], indirect=True)
@pytest.mark.parametrize(("tokens", "rank"), [(8, 64), (80, 64), (8, 200), (4000, 128)])
def test_fits_the_shared_memory(compiled: list[str], tokens: int, rank: int) -> None:
    """Whatever the GPU has: tiles take fewer stages and shorter steps where there is less. `compiled` checks it."""
    step(tokens, SWISH, rank)
    # Up to rank 64 the low-rank products ride along where rows are few, above each has a kernel of its own.
    assert sum("project" in name for name in compiled) == (4 if rank <= 64 else 8)


@pytest.mark.parametrize("architecture", [MI200, MI350, RX_7900], indirect=True)
def test_other_amd_gpus(compiled: list[str]) -> None:
    """They refuse what MI300 takes: products in TF32, for one."""
    step(80, GPT_OSS, 16)
    assert compiled


def test_low_rank_products_are_scaled(compiled: list[str]) -> None:
    """By the kernel that knows a scale, however wide they are."""
    from peft_moe.ops.triton.project import low_rank

    ends = torch.zeros(1, dtype=torch.int32)
    low_rank(torch.zeros(200, 64).bfloat16(), torch.zeros(1, 128, 64).bfloat16(), 2.0, ends)
    assert compiled == ["_project_kernel"]


def test_counting_sort(compiled: list[str]) -> None:
    for experts in (8, 128):
        pieces_of("triton").route(torch.zeros(5000, 2, dtype=torch.int64), experts, False)
    assert compiled == 2 * ["_count_kernel", "_place_kernel"]


def test_dequantization(compiled: list[str], architecture: int) -> None:
    """NF4 with double quantization, MXFP4's exponents, and FP8 in blocks; products on FP8 codes."""
    from peft_moe.ops.scaled import ScaledStack
    from peft_moe.ops.triton.dequantize import dequantize_blocks
    from peft_moe.ops.triton.four_bit import Nested, dequantize_4bit
    from peft_moe.ops.triton.project import project

    out, codes, table = torch.empty(4, 256, 128).bfloat16(), torch.zeros(2**16, dtype=torch.uint8), torch.zeros(16)
    scales = torch.zeros(2**11, dtype=torch.uint8)
    dequantize_4bit(codes, scales, table, 64, out, nested=Nested(torch.zeros(256), torch.zeros(8), 256, table, 2**11))
    dequantize_4bit(codes, scales, table, 32, out, low_first=True)
    fp8, per_block = torch.zeros(4, 256, 128).to(torch.float8_e4m3fn), torch.zeros(4, 2, 1)
    if architecture >= 89:  # GPUs that convert FP8
        rows = torch.zeros(256, dtype=torch.int32)
        dequantize_blocks(fp8, per_block, rows, 128, out)
        ends = torch.zeros(4, dtype=torch.int32)
        project(out[0], None, ScaledStack(fp8, per_block, 128, 128), None, None, 1.0, None, ends)
    assert len(compiled) == (4 if architecture >= 89 else 2)
