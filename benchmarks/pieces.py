"""The kernels of `ops/triton` one by one against torch's pieces, with a sweep of tile sizes (CUDA only).

python benchmarks/pieces.py                      # Qwen3-30B-A3B's block
python benchmarks/pieces.py --rank 128 --sweep   # and the fastest tiles of products, low-rank products, gradients
"""

# ruff: noqa: B023, E741  every closure is timed before the loop moves on
from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from triton.errors import TritonError
from triton.testing import do_bench

from peft_moe.ops.activation import SILU_GATED
from peft_moe.ops.routing import route
from peft_moe.ops.triton.outer import Factor, outer
from peft_moe.ops.triton.project import low_rank, project
from peft_moe.ops.triton.routing import route as sort_rows
from peft_moe.ops.triton.rowwise import combine, gated, gated_backward
from peft_moe.ops.triton.tiles import rank_width


def time_of(function: Callable[[], object]) -> float:
    """Median milliseconds."""
    return do_bench(function, warmup=10, rep=40, return_mode="median")


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def main() -> None:
    """Check against torch, then time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 4096, 16384])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sweep", action="store_true", help="time other tile sizes, too; compiling takes minutes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/pieces.py needs a CUDA device")
    experts, top_k, width, inner, rank = 128, 8, 2048, 768, arguments.rank
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    up, down = normal(experts, 2 * inner, width) * width**-0.5, normal(experts, width, inner) * inner**-0.5
    up_a, up_b = normal(experts, rank, width) * width**-0.5, normal(experts, 2 * inner, rank)
    down_a, down_b = normal(experts, rank, inner) * inner**-0.5, normal(experts, width, rank)
    for tokens in arguments.tokens:
        index = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=-1).indices
        routing = route(index, experts, sentinels=False)
        source, offsets = routing.order // top_k, routing.offsets
        x, grad = normal(tokens, width), normal(tokens, width)
        rows, pre, d_pre = (
            normal(tokens * top_k, inner),
            normal(tokens * top_k, 2 * inner),
            normal(tokens * top_k, 2 * inner),
        )
        low = normal(tokens * top_k, rank)
        weights = torch.rand(tokens, top_k, device="cuda")
        calls = {
            "gate_up": (x, source, up, up_a, up_b),
            "down": (rows, None, down, down_a, down_b),
            "d_hidden": (grad, source, down.mT, down_b.mT, down_a.mT),
            "d_x": (d_pre, None, up.mT, up_b.mT, up_a.mT),
        }
        for name, (left, index_, w, a, b) in calls.items():

            def plain(left: Tensor = left, index_: Tensor | None = index_, w: Tensor = w) -> Tensor:
                return grouped_mm(left if index_ is None else left[index_], w.mT, offs=offsets)

            gathered = left if index_ is None else left[index_]
            a_c, b_c = a.contiguous(), b.contiguous()
            low_e = grouped_mm(gathered, a_c.mT, offs=offsets)
            expected = plain() + grouped_mm(low_e, b_c.mT, offs=offsets)
            found, found_low = project(left, index_, w, a, b, 1.0, None, offsets)
            error = max(relative(found, expected), relative(found_low, low_e))
            gemm = time_of(lambda w=w, g=gathered: grouped_mm(g, w.mT, offs=offsets))
            ours = time_of(lambda l=left, i=index_, w=w, a=a, b=b: project(l, i, w, a, b, 1.0, None, offsets))
            bare = time_of(lambda l=left, i=index_, w=w: project(l, i, w, None, None, 1.0, None, offsets))
            print(f"T={tokens:6d} {name:9s} error {error:.1e}  torch gemm {gemm:.3f}  torch gather+gemm "
                  f"{time_of(plain):.3f}  "
                  f"fused {ours:.3f}  fused without LoRA {bare:.3f}", flush=True)  # fmt: skip
            if arguments.sweep:
                sweep("product", LARGE, lambda tiles: project(left, index_, w, a, b, 1.0, None, offsets, tiles))
                sweep("low rank", narrow(rank), lambda tiles: low_rank(left, a, 1.0, offsets, index_, tiles))
        order = routing.order
        up_factors = (Factor(x, source, low, True), Factor(d_pre, None, low, False))
        down_factors = (Factor(rows, None, low, True), Factor(grad, source, low, False))
        print(f"T={tokens:6d} outer     up {time_of(lambda f=up_factors: outer(*f, None, order, offsets)):.3f}  "
              f"down {time_of(lambda f=down_factors: outer(*f, weights, order, offsets)):.3f}  "
              f"torch d_pre {time_of(lambda: grouped_mm(d_pre.t(), low, offs=offsets)):.3f}")  # fmt: skip
        if arguments.sweep:
            sweep("up", FACTORS, lambda tiles: outer(*up_factors, None, order, offsets, tiles))
            sweep("down", FACTORS, lambda tiles: outer(*down_factors, weights, order, offsets, tiles))
        full = normal(tokens * top_k, width)
        silu, up_b_t, dtype = SILU_GATED, up_b.mT, torch.float32

        def backward() -> object:
            return gated_backward(silu, pre, rows, weights, order, offsets, d_pre, up_b_t, 1.0, dtype)

        print(f"T={tokens:6d} rowwise   with LoRA: silu {time_of(lambda: gated(silu, pre, down_a, 1.0, offsets)):.3f}  "
              f"silu backward {time_of(backward):.3f}  "
              f"combine {time_of(lambda: combine(full, routing.inverse, weights, offsets, top_k, grad)):.3f}  "
              f"route {time_of(lambda: sort_rows(index, experts, False)):.3f}  "
              f"torch route {time_of(lambda: route(index, experts, False)):.3f}", flush=True)  # fmt: skip


Tiles = dict[str, int]


def tiles_of(names: str, *sizes: tuple[int, ...]) -> list[Tiles]:
    """All combinations whose accumulator takes at most 256 registers of a thread."""
    keys = names.split()
    found = [dict(zip(keys, one, strict=True)) for one in itertools.product(*sizes)]
    return [one for one in found if one.get("ROWS", 1) * one["COLUMNS"] <= 256 * 32 * one["num_warps"]]


PRODUCT = "ROWS COLUMNS STEP num_warps num_stages"
LARGE = tiles_of(PRODUCT, (64, 128), (128, 256), (64,), (4, 8), (3, 4))
FACTORS = tiles_of("COLUMNS STEP num_warps num_stages", (64, 128), (32, 64), (4, 8), (2, 3))


def narrow(rank: int) -> list[Tiles]:
    """Tiles of a low-rank product."""
    return tiles_of(PRODUCT, (32, 64, 128), (min(rank_width(rank), 128),), (64,), (2, 4, 8), (3, 4))


def sweep(name: str, candidates: list[Tiles], call: Callable[[Tiles], object]) -> None:
    """Print the four fastest tiles."""
    found = []
    for tiles in candidates:
        try:
            found.append((time_of(lambda t=tiles: call(t)), tiles))
        except TritonError as error:  # out of shared memory or registers: not a candidate
            print(f"    {tiles}: {type(error).__name__}")
    for milliseconds, tiles in sorted(found, key=lambda pair: pair[0])[:4]:
        print(f"    {name} {milliseconds:.3f} {tiles}", flush=True)


if __name__ == "__main__":
    main()
