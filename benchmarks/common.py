"""What the scripts have in common: how a step is measured, what is said of the machine, where results are written."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import peft_moe
from peft_moe import BnbExpertsConfig
from peft_moe.checkpoint.durable import write_file


class NotTimed(RuntimeError):
    """What is asked for exists, but cannot run here."""


# What a contender that cannot run here raises: it is not timed, the others are.
REFUSALS = (NotTimed, ImportError, torch.cuda.OutOfMemoryError)


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def output(text: str) -> Path:
    """A file to write, as argparse's `type`: its folder is made, and refused, before anything is measured."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder, expected the name of a file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error}; name a file that can be written") from None
    return path


def cpu_name() -> str:
    """The model of the CPU."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text().splitlines() if listed.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def surroundings() -> dict[str, Any]:
    """What stands beside results: the GPU ("machine"), the CPU, versions (`None` where absent), and the date."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (times mean nothing here)",
        "cpu": cpu_name(),
        "versions": {
            "torch": str(torch.__version__), "triton": triton, "transformers": transformers.__version__,
            "peft": peft.__version__, "peft-moe": peft_moe.__version__,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def heading() -> str:
    """The machine and the versions, in a line."""
    found = surroundings()
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items() if value is not None)
    return f"{found['machine']}, {found['cpu']}; {versions}"


def _finite(value: Any) -> Any:
    """The value with `None` for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: Path, **results: Any) -> None:
    """Write `surroundings` and the results as JSON, complete or not at all; null stands for what was not measured."""
    content = json.dumps(_finite({**surroundings(), **results}), indent=1, allow_nan=False)
    write_file(path, content.encode())


def nf4() -> BnbExpertsConfig:
    """NF4 with double quantization, computed in bf16."""
    return BnbExpertsConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def warm_up(step: Callable[[], None], device: torch.device) -> None:
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
    warm_up(step, device)
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
