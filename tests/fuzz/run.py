"""Fuzz all readers of adapters and checkpoints, and record what came of it.

    python -m tests.fuzz.run --inputs 100000 --record docs/safety.md

Inputs are numbered: the same seed and number make the same files. Each process reads some thousand of them with a limit
on its memory and on the time of each; one that crashes or stops is ended, counted, and the run goes on after it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from tests.fuzz.inputs import KINDS
from tests.fuzz.readers import READERS
from tests.fuzz.worker import MEMORY, SECONDS

_SHARE = 2500  # inputs of a process
_SILENT = 120  # seconds without a sign of life


@dataclasses.dataclass
class Report:
    """Attributes: counts: "reader: outcome" -> inputs. failures: (number, kind, reader, what happened)."""

    seed: int
    inputs: int = 0
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[tuple[int, str, str, str]] = dataclasses.field(default_factory=list)
    slowest: float = 0.0
    seconds: float = 0.0


def fuzz(seed: int, inputs: int, kept: Path, first: int = 0, workers: int = 1, progress: bool = True) -> Report:
    """Run `inputs` inputs from number `first` on. Args: kept: folder for inputs that a reader fails on."""
    report, began = Report(seed), time.perf_counter()
    shares: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for start in range(first, first + inputs, _SHARE):
        shares.put((start, min(start + _SHARE, first + inputs)))
    lock = threading.Lock()
    with tqdm(total=inputs, unit="input", smoothing=0.05, disable=not progress) as bar:

        def take(said: dict[str, object]) -> None:
            with lock:
                _take(report, said)
                bar.update(int(said.get("done", 0)))  # type: ignore[call-overload]
                bar.set_postfix(failed=len(report.failures), refresh=False)

        def work() -> None:
            while True:
                try:
                    start, stop = shares.get_nowait()
                except queue.Empty:
                    return
                while start < stop:
                    start = _process(seed, start, stop, kept, take)

        with ThreadPoolExecutor(workers) as pool:
            for one in [pool.submit(work) for _ in range(workers)]:
                one.result()
    report.seconds = time.perf_counter() - began
    return report


def _process(seed: int, start: int, stop: int, kept: Path, take: Callable[[dict[str, object]], None]) -> int:
    """One process. Returns the number from which to go on."""
    at, since = start - 1, start
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "tests.fuzz.worker", *map(str, (seed, start, stop, kept))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_forward, args=(process, lines))
        reader.start()
        problem = ""
        while not problem:
            try:
                line = lines.get(timeout=_SILENT)
            except queue.Empty:
                problem = f"hung: silent for {_SILENT} s"
                break
            if not line:
                break
            said = json.loads(line)
            at = said.get("at", at)
            if "at" not in said:
                take(said)
                since += said.get("done", 0)
        if problem:
            process.kill()
        code = process.wait()
        reader.join()
        if code == 0 and not problem:
            return stop
        errors.seek(0)
        text = errors.read()
    if at < start:
        raise RuntimeError(f"no input could be read at all (exit code {code}):\n{text[-3000:]}")
    take(
        {"failed": [at, "", "process", problem or f"crashed: exit code {code}: {text[-500:]}"], "done": at + 1 - since}
    )
    return at + 1


def _forward(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put("")


def _take(report: Report, said: dict[str, object]) -> None:
    found: dict[str, object] = {"counts": {}, "kinds": {}, "slowest": 0.0, "done": 0} | said
    report.counts.update(found["counts"])  # type: ignore[arg-type]
    report.kinds.update(found["kinds"])  # type: ignore[arg-type]
    report.inputs += int(found["done"])  # type: ignore[call-overload]
    report.slowest = max(report.slowest, float(found["slowest"]))  # type: ignore[arg-type]
    if "failed" in found:
        report.failures.append(tuple(found["failed"]))  # type: ignore[arg-type]


def as_table(report: Report) -> str:
    """The record, in Markdown."""
    words = sorted({name.partition(": ")[2] for name in report.counts} | {"right", "refused"}, reverse=True)
    versions = ", ".join(f"{one} {version(one)}" for one in ("torch", "transformers", "peft", "safetensors"))
    lines = [
        f"{date.today()}, Python {platform.python_version()}, {versions}: {report.inputs:,} inputs of seed "
        f"{report.seed} in {report.seconds / 60:.0f} minutes, the slowest reader took {report.slowest:.2f} s for one.",
        f"Limits: {SECONDS} s and {MEMORY // 2**20} MiB above what a process holds after reading valid input. "
        f"Inputs that a reader failed on: {len(report.failures)}.",
        "",
        "| reader | what it is | " + " | ".join(words) + " |",
        "|---|---|" + "---|" * len(words),
    ]
    for reader, function in READERS.items():
        text = " ".join((function.__doc__ or "").split())
        cells = [f"{report.counts[f'{reader}: {word}']:,}" for word in words]
        lines.append(f"| {reader} | {text} | " + " | ".join(cells) + " |")
    lines += ["", "| mutated | inputs |", "|---|---|"]
    lines += [f"| {kind} | {report.kinds[kind]:,} |" for kind in KINDS]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--kept", type=Path, default=Path("fuzz_out"), help="folder for inputs that a reader fails on")
    parser.add_argument("--record", type=Path, help="a page whose last section is made anew with the result")
    options = parser.parse_args()
    report = fuzz(options.seed, options.inputs, options.kept, options.first, options.workers)
    table = as_table(report)
    print(table)
    for failure in report.failures:
        print(*failure, sep=" | ", file=sys.stderr)
    if options.record:
        before = options.record.read_text().partition("## Record\n")[0]
        options.record.write_text(f"{before}## Record\n\n{table}")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
