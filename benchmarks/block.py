"""One experts block with per-expert LoRA: time and memory of forward and backward, all contenders in one run.

    python benchmarks/block.py                    # Qwen3-30B-A3B's block, on the GPU (tiny sizes on a CPU)
    python benchmarks/block.py --tokens 512 4096  --repeats 30
    python benchmarks/block.py --peers            # with every peer that is installed

Contenders: `frozen` (transformers' grouped experts, no adapter), `plain` (separate grouped products and autograd),
`peft` (stock PEFT, `target_parameters`), `peft-moe`, `peft-moe:BACKEND`, `peft-moe@nf4`, `peft-moe@fp8` on quantized
experts, and the peers `unsloth` and `axolotl` (see peers.py), which are timed once their result agrees with a loop over
experts. Times are medians of CUDA events; peak is the most memory allocated above the resident weights. A step starts
on an idle GPU, so the Python before its first kernel counts; with --queued the host runs ahead, as in training. Ratios
count: absolute times hold for one machine.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable

import peers
import torch
from common import REFUSALS, heading, measure, output, positive, save
from contenders import SHAPES, Shape, contender, contender_names, inputs
from torch import Tensor, nn


def step_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor], forward_only: bool) -> Callable[[], None]:
    """What is timed: a forward and a backward, or a forward without gradients."""
    x, index, weights, probe = batch
    leaves = [x, weights, *model.parameters()]

    def step() -> None:
        if forward_only:
            with torch.no_grad():
                model(x, index, weights)
            return
        model(x, index, weights).backward(probe)
        for tensor in leaves:
            tensor.grad = None

    return step


def checked(
    name: str, shape: Shape, tokens: int, rank: int, device: torch.device, dtype: torch.dtype, zipf: bool
) -> nn.Module:
    """The block of a contender; a peer's after its result has agreed with a loop. Raises one of `REFUSALS`."""
    model = contender(name, shape, rank, device, dtype)
    if name in peers.PEERS:
        error = peers.check(model, *inputs(tokens, shape, device, dtype, zipf))
        print(f"{name:10s} agrees with a float64 loop over experts: largest relative error {error:.1e}")
    return model


def run(
    names: list[str],
    shape: Shape,
    tokens: list[int],
    rank: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    zipf: bool = False,
    forward_only: bool = False,
    queued: bool = False,
) -> list[dict[str, float | str | int]]:
    """A row for every contender and number of tokens; of what cannot run, one that says why as "not_timed"."""
    rows: list[dict[str, float | str | int]] = []

    def refuse(row: dict[str, float | str | int], label: str, reason: Exception) -> None:
        if reason.__cause__ is not None:
            traceback.print_exception(reason)
        print(f"{label} not timed: {reason}", flush=True)
        rows.append({**row, "not_timed": str(reason)})

    for name in names:
        try:
            model = checked(name, shape, min(tokens), rank, device, dtype, zipf)
        except REFUSALS as reason:
            refuse({"contender": name}, f"{name:10s}", reason)
            continue
        for count in tokens:
            row: dict[str, float | str | int] = {"contender": name, "tokens": count}
            label = f"{name:10s} T={count:6d} "
            try:
                step = step_of(model, inputs(count, shape, device, dtype, zipf), forward_only)
                milliseconds, peak = measure(step, device, repeats, queued)
            except REFUSALS as reason:
                refuse(row, label, reason)
                model.zero_grad()
                continue
            rows.append({**row, "ms": round(milliseconds, 3), "peak_mib": round(peak, 1)})
            print(f"{label} {milliseconds:8.3f} ms  {peak:8.1f} MiB", flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main(given: list[str] | None = None) -> None:
    """Measure and print; with --out write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["frozen", "peft", "peft-moe"]
    parser.add_argument("--contenders", nargs="+", choices=contender_names(), default=default, metavar="NAME")
    parser.add_argument("--peers", action="store_true", help="add every peer that is installed (see peers.py)")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=positive)
    parser.add_argument("--ranks", nargs="+", type=positive, default=[16])
    parser.add_argument("--zipf", action="store_true", help="skewed routing")
    parser.add_argument("--forward-only", action="store_true", help="without gradients, as when decoding")
    parser.add_argument("--queued", action="store_true", help="the host does not wait for a step, as in training")
    parser.add_argument("--repeats", type=positive, default=20)
    parser.add_argument("--out", type=output, help="a JSON file, replaced when all is measured")
    arguments = parser.parse_args(given)
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    tokens = arguments.tokens or ([512, 4096, 16384] if on_gpu else [64])
    print(heading())
    names = arguments.contenders
    if arguments.peers:
        found = peers.installed()
        for name in peers.PEERS:
            print(f"{name} {found.get(name, 'is not installed')}")
        names = [*names, *(name for name in found if name not in names)]
    settings = {word: getattr(arguments, word) for word in ("zipf", "forward_only", "queued")}
    rows: list[dict[str, float | str | int]] = []
    for shape in arguments.shapes or ["qwen3-30b" if on_gpu else "tiny"]:
        for rank in arguments.ranks:
            print(", ".join([shape, f"r={rank}", *(word for word, wanted in settings.items() if wanted)]))
            measured = run(names, SHAPES[shape], tokens, rank, arguments.repeats, device, dtype, **settings)
            rows += [{"shape": shape, "rank": rank, **row} for row in measured]
    if arguments.out is not None:
        timed, not_timed = ([row for row in rows if ("not_timed" in row) is refused] for refused in (False, True))
        save(arguments.out, settings={**settings, "repeats": arguments.repeats}, rows=timed, not_timed=not_timed)


if __name__ == "__main__":
    main()
