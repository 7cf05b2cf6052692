"""What the scripts have in common: how a step is measured, and the settings of NF4."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from peft_moe import BnbExpertsConfig


def nf4() -> BnbExpertsConfig:
    """NF4 with double quantization, computed in bf16."""
    return BnbExpertsConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def _warm_up(step: Callable[[], None], device: torch.device) -> None:
    """Three steps; on a GPU for 0.3 s, until its clocks have risen and the interpreter has settled."""
    start, done = time.perf_counter(), 0
    while done < 3 or (device.type == "cuda" and time.perf_counter() - start < 0.3):
        step()
        done += 1
        if device.type == "cuda":
            torch.cuda.synchronize()


def measure(step: Callable[[], None], device: torch.device, repeats: int, queued: bool = False) -> tuple[float, float]:
    """(median milliseconds, peak MiB above what is resident) of a step.

    Each step starts on an idle GPU, and waits for the first launch, unless they are `queued`: then the host runs ahead
    of the GPU, as in training.
    """
    _warm_up(step, device)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), float("nan")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        if not queued:
            end.synchronize()
        steps.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in steps]
    return statistics.median(times), (torch.cuda.max_memory_allocated() - resident) / 2**20
