"""One process of a run: it makes inputs, shows them to the readers, and prints what came of it, JSON line by line."""

from __future__ import annotations

import collections
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.inputs import Inputs
from tests.fuzz.readers import READERS, Setting, outcome
from tests.fuzz.seeds import CONFIG, SERVED, TENSORS, write_seeds

SECONDS = 10  # for one reader and one input; they take milliseconds, and the machine may be busy
MEMORY = 2**30  # bytes more than a process has after reading valid input
_REPORT = 100  # inputs
# What is valid, and may not be for this reader.
REFUSED = {("stock", "load"), ("stock", "convert"), ("dora", "convert"), *(("stock experts", one) for one in READERS)}
REFUSED |= {(name, one) for name in SERVED for one in READERS if one not in ("header", "tensors", "served")}


class TooLong(BaseException):
    """Past everything that catches errors."""


def main(seed: int, first: int, last: int, kept: str) -> None:
    """Show the inputs `first` to `last` to the readers. Args: kept: folder for inputs that a reader fails on."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    signal.signal(signal.SIGALRM, _too_long)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        folder = Path(temporary)
        model = write_seeds(folder)
        inputs = Inputs(folder, seed)
        setting = Setting(folder, model)
        _check_seeds(inputs, setting)
        _limit_memory()
        counts: collections.Counter[str] = collections.Counter()
        kinds: collections.Counter[str] = collections.Counter()
        slowest, start = 0.0, first
        for number in range(first, last):
            print(json.dumps({"at": number}), flush=True)
            kind, readers = inputs.prepare(number)
            kinds[kind] += 1
            for reader in readers:
                began = time.perf_counter()
                found = _timed(reader, setting)
                slowest = max(slowest, time.perf_counter() - began)
                counts[f"{reader}: {found.partition(':')[0]}"] += 1
                if found not in ("right", "refused"):
                    print(json.dumps({"failed": [number, kind, reader, found]}), flush=True)
                    _keep(setting, Path(kept) / f"{number}-{reader}")
            if number + 1 == last or number + 1 - start == _REPORT:
                report = {"done": number + 1 - start, "counts": counts, "kinds": kinds, "slowest": slowest}
                print(json.dumps(report), flush=True)
                start, slowest = number + 1, 0.0
                counts.clear()
                kinds.clear()


def _timed(reader: str, setting: Setting) -> str:
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return outcome(reader, setting)
    except TooLong:
        return f"hung: more than {SECONDS} s"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _check_seeds(inputs: Inputs, setting: Setting) -> None:
    """What is valid has to be read: a reader that refuses everything would pass otherwise."""
    for name in inputs.names:
        inputs.write({file: inputs.seed_of(name, file) for file in (CONFIG, TENSORS)}, {})
        for reader in READERS:
            if reader == ("convert" if name in SERVED else "served"):
                continue  # one is for what servers load, the other for the rest
            found = outcome(reader, setting)
            if found != "right" and (found != "refused" or (name, reader) not in REFUSED):
                raise SystemExit(f"{reader} of the seed {name}: {found}")


def _limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _keep(setting: Setting, folder: Path) -> None:
    for source in (setting.adapter, setting.base):
        shutil.copytree(source, folder / source.name, dirs_exist_ok=True)


def _too_long(*arguments: Any) -> None:
    raise TooLong


if __name__ == "__main__":
    main(*(int(one) for one in sys.argv[1:4]), kept=sys.argv[4])
