"""What the GPU does in one step of an experts block: its kernels in order, their times, how long it waits (CUDA only).

    python benchmarks/timeline.py                                       # peft-moe on Qwen3-30B-A3B's block
    python benchmarks/timeline.py --contender plain --tokens 64 512     --least 20

The contenders and shapes are those of `block.py`. Busy is the time in which at least one kernel or copy runs, span goes
from the start of the first to the end of the last, idle is the rest of the span. They are measured under
torch.profiler, one step at a time on an idle GPU: medians over steps; the table is of the step with the median span.
Without the profiler: single steps and queued steps as `block.py` measures them, and the CPU's time for a step when
many are queued. Where that is near the time of queued steps, the CPU may have waited for room in the queue.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from block import checked, step_of
from common import REFUSALS, NotTimed, heading, measure, positive, warm_up
from contenders import SHAPES, contender_names, inputs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Event = tuple[str, float, float]  # name, start and length in microseconds

QUEUED = 50  # steps

PRODUCTS, FACTORS, ROUTING = "products", "factor gradients", "sorting and routing"
COPIES, ELEMENTWISE = "copies, gathers and index backward", "elementwise and swish"
WEIGHTS, OTHER = "dequantization", "other"
KINDS = (PRODUCTS, ROUTING, ELEMENTWISE, COPIES, FACTORS, WEIGHTS, OTHER)

# Kernels of this package begin with these; the others contain one of the words below, the first that is found.
OURS = {
    "_project_kernel": PRODUCTS, "_specialized_project_kernel": PRODUCTS,
    "_gated_kernel": ELEMENTWISE, "_gated_backward_kernel": ELEMENTWISE, "_combine_kernel": ELEMENTWISE,
    "_outer_kernel": FACTORS,
    "_count_kernel": ROUTING, "_place_kernel": ROUTING, "_compare_kernel": ROUTING,
    "_four_bit_kernel": WEIGHTS, "_dequantize_kernel": WEIGHTS, "_dequantize_rows_kernel": WEIGHTS,
}  # fmt: skip
WORDS = (
    (WEIGHTS, ("dequantize",)),
    (PRODUCTS, ("gemm", "gemv", "cutlass", "nvjet", "grouped", "splitk", "scatter2scatter")),
    (ROUTING, ("sort", "radix", "scan", "histogram")),
    (COPIES, ("index", "gather", "scatter", "copy", "memcpy", "memset", "catarray")),
    (ELEMENTWISE, ("elementwise", "vectorized", "reduce", "silu")),
)


def kind_of(name: str) -> str:
    """One of `KINDS`, by a kernel's name."""
    for prefix, kind in OURS.items():
        if name.startswith(prefix):
            return kind
    lower = name.lower()
    return next((kind for kind, words in WORDS if any(word in lower for word in words)), OTHER)


def extent(events: list[Event]) -> tuple[float, float]:
    """(busy, span) in microseconds; what runs at the same time counts once. Zeros without events."""
    if not events:
        return 0.0, 0.0
    busy, reached = 0.0, min(start for _, start, _ in events)
    first = reached
    for _, start, length in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, start + length - max(start, reached))
        reached = max(reached, start + length)
    return busy, reached - first


def shares(events: list[Event]) -> list[tuple[str, int, float, float]]:
    """(kind, number of kernels, microseconds, share of the sum) of the kinds that occur, in the order of `KINDS`."""
    total = sum(length for _, _, length in events)
    found = []
    for kind in KINDS:
        lengths = [length for name, _, length in events if kind_of(name) == kind]
        if lengths:
            found.append((kind, len(lengths), sum(lengths), sum(lengths) / total if total else 0.0))
    return found


def table(events: list[Event], least: float) -> list[str]:
    """The kernels of at least `least` microseconds in order of start, counted from the first; a line for the rest."""
    begin = min((start for _, start, _ in events), default=0.0)
    shown = [event for event in events if event[2] >= least]
    lines = [f"{'start, us':>10} {'us':>8}  kernel"]
    for name, start, length in sorted(shown, key=lambda event: event[1]):
        lines.append(f"{start - begin:10.1f} {length:8.1f}  {name.removeprefix('void ')[:100]}")
    if len(shown) < len(events):
        rest = sum(length for _, _, length in events) - sum(length for _, _, length in shown)
        lines.append(f"{'':10} {rest:8.1f}  {len(events) - len(shown)} shorter than {least:g} us")
    return lines


def record(step: Callable[[], None]) -> list[Event]:
    """What the GPU does in a step that starts when it is idle."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in found.events()
        if event.device_type == DeviceType.CUDA
    ]


def recorded(step: Callable[[], None], device: torch.device, steps: int) -> list[list[Event]]:
    """The events of some steps, after warm-up. Raises `NotTimed` if the profiler sees none."""
    record(step)  # the profiler's own start is slow the first time
    warm_up(step, device)
    found = [record(step) for _ in range(steps)]
    if not all(found):
        raise NotTimed("torch.profiler saw no kernels; it needs CUPTI and the right to read the GPU's counters")
    return found


def queueing_ms(step: Callable[[], None]) -> float:
    """The CPU's milliseconds a step, when it queues many and waits for none."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(QUEUED):
        step()
    took = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e3 * took / QUEUED


def report(steps: list[list[Event]], least: float) -> list[str]:
    """What is printed of the recorded steps."""
    extents = [extent(events) for events in steps]
    counts = sorted({len(events) for events in steps})
    busy, span, idle = (
        statistics.median(values) / 1e3
        for values in ([b for b, _ in extents], [s for _, s in extents], [s - b for b, s in extents])
    )
    median = sorted(range(len(steps)), key=lambda number: extents[number][1])[len(steps) // 2]
    kernels = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    lines = [f"{kernels} kernels a step, busy {busy:.3f} ms, span {span:.3f} ms, idle inside {idle:.3f} ms"]
    lines += table(steps[median], least)
    for kind, number, microseconds, share in shares(steps[median]):
        lines.append(f"{100 * share:5.1f} % {microseconds:9.1f} us in {number:3d}  {kind}")
    return lines


def run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Print what a contender does at each number of tokens. Raises one of `REFUSALS`."""
    name, shape, rank, zipf = arguments.contender, SHAPES[arguments.shape], arguments.rank, arguments.zipf
    model = checked(name, shape, min(arguments.tokens), rank, device, dtype, zipf)
    said = [arguments.shape, f"r={rank}", *(word for word in ("zipf", "forward_only") if getattr(arguments, word))]
    for tokens in arguments.tokens:
        step = step_of(model, inputs(tokens, shape, device, dtype, zipf), arguments.forward_only)
        single, queued = (measure(step, device, arguments.repeats, queued)[0] for queued in (False, True))
        print(f"\n{name} T={tokens}, {', '.join(said)}")
        print(f"single steps {single:.3f} ms, queued {queued:.3f} ms, the CPU's part {queueing_ms(step):.3f} ms")
        print("\n".join(report(recorded(step, device, arguments.steps), arguments.least)), flush=True)


def main(given: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=contender_names(), default="peft-moe", metavar="NAME")
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-30b")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[512, 4096])
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument("--zipf", action="store_true", help="skewed routing")
    parser.add_argument("--forward-only", action="store_true", help="without gradients, as when decoding")
    parser.add_argument("--steps", type=positive, default=5, help="how many are profiled")
    parser.add_argument("--repeats", type=positive, default=20, help="how many are timed without the profiler")
    parser.add_argument("--least", type=float, default=5.0, help="shorter kernels are summed up, in microseconds")
    arguments = parser.parse_args(given)
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks/timeline.py needs a CUDA device: on a CPU there are no kernels to see\n")
    print(heading())
    try:
        run(arguments, torch.device("cuda"), torch.bfloat16)
    except REFUSALS as reason:
        parser.exit(1, f"{arguments.contender} not timed: {reason}\n")


if __name__ == "__main__":
    main()
