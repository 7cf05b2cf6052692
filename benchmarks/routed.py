"""Decoding on packed experts: dequantizing a whole layer against the routed experts alone, by number of tokens.

    python benchmarks/routed.py                   # Qwen3-30B-A3B's block, on the GPU (tiny sizes on a CPU)
    python benchmarks/routed.py --tokens 1 4 16   --repeats 200

One block with adapters, without gradients. `rule` says which of the two `peft_moe.routed` takes for that many tokens;
where another choice is faster, its constant `MARGIN` is wrong for this device. Times are medians; ratios count.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from common import heading, measure, output, positive, save
from contenders import SHAPES, Shape, contender

from peft_moe import routed

TINY = Shape(16, 2, 128, 128)
WAYS = {"whole": math.inf, "routed": 0}  # as MARGIN: never, always


@torch.no_grad()
def run(
    base: str, shape: Shape, tokens: list[int], rank: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row for every number of tokens. Raises `RuntimeError` if the two ways differ in more than rounding."""
    rows = []
    model = contender(f"peft-moe@{base}", shape, rank, device, dtype).eval()
    margin: Any = routed.MARGIN
    for count in tokens:
        generator = torch.Generator().manual_seed(count)
        scores = torch.rand(count, shape.experts, generator=generator)
        weights, index = (value.to(device) for value in scores.softmax(dim=-1).topk(shape.top_k, dim=-1))
        x, weights = torch.randn(count, shape.hidden, generator=generator).to(device, dtype), weights.to(dtype)
        found, times = {}, {}
        for way, value in WAYS.items():
            routed.MARGIN = value  # type: ignore[assignment]
            found[way] = model(x, index, weights).float()
            times[way] = measure(lambda x=x, i=index, w=weights: model(x, i, w), device, repeats)[0]
        routed.MARGIN = margin
        error = float((found["routed"] - found["whole"]).norm() / found["whole"].norm())
        if not error < 1e-2:
            raise RuntimeError(f"{base}, T={count}: the two ways differ by {error:.1e}")
        rows.append({
            "base": base, "tokens": count, "experts": int(index.unique().numel()),
            "built": min(index.numel(), shape.experts), "whole_ms": times["whole"], "routed_ms": times["routed"],
            "ratio": times["whole"] / times["routed"],
            "rule": "routed" if routed.pays(index.numel(), shape.experts) else "whole",
        })  # fmt: skip
        print("| {base} | {tokens} | {built} | {experts} | {whole_ms:.3f} | {routed_ms:.3f} | {ratio:.2f} | {rule} |"
              .format(**rows[-1]), flush=True)  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; with --out write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["nf4", "fp8"], choices=["nf4", "fp8"])
    parser.add_argument("--tokens", nargs="+", type=positive, default=[1, 2, 4, 8, 12, 16, 32, 64, 128, 256])
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--repeats", type=positive, default=50)
    parser.add_argument("--out", type=output)
    given = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device, shape = torch.device("cuda" if on_gpu else "cpu"), SHAPES["qwen3-30b"] if on_gpu else TINY
    print(f"{heading()}; {shape}, r={given.rank}, MARGIN={routed.MARGIN}")
    print("| base | tokens | experts built | experts with rows | whole, ms | routed, ms | whole/routed | rule |")
    print("|---|---|---|---|---|---|---|---|")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = [
        row
        for base in given.bases
        for row in run(base, shape, given.tokens, given.rank, given.repeats, device, dtype)
    ]  # fmt: skip
    if given.out is not None:
        save(given.out, settings={"rank": given.rank, "repeats": given.repeats}, rows=rows)
    return rows


if __name__ == "__main__":
    main()
