"""A small share of the fuzzing, always the same; and that what goes wrong in a reader is seen."""

from __future__ import annotations

import collections
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz import readers, worker
from tests.fuzz.inputs import KINDS, Inputs
from tests.fuzz.run import as_table, fuzz
from tests.fuzz.seeds import write_seeds


def test_a_few_hundred_inputs(tmp_path: Path) -> None:
    report = fuzz(seed=1, inputs=400, kept=tmp_path / "kept", progress=False)
    assert report.failures == [] and report.inputs == 400
    assert set(report.kinds) == set(KINDS)
    for reader in readers.READERS:
        assert report.counts[f"{reader}: right"] > 10 and report.counts[f"{reader}: refused"] > 10, reader
    assert "| header |" in as_table(report)


def test_inputs_are_the_same_each_time(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        folder = tmp_path / name
        write_seeds(folder)
        inputs = Inputs(folder, seed=3)
        again = []
        for number in range(60):
            kind, shown = inputs.prepare(number)
            files = {
                str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"")
                for part in ("adapter", "changed")
                for path in sorted((folder / part).iterdir())
            }
            again.append((kind, shown, files))
        made.append(again)
    assert made[0] == made[1]
    assert len({str(one) for one in made[0]}) > 50


def _leak(setting: Any) -> None:
    {}["nothing"]


def _vague(setting: Any) -> None:
    raise ValueError("something is wrong")


def _wait(setting: Any) -> None:
    time.sleep(60)


def _allocate(setting: Any) -> None:
    torch.empty(2**45)


def _wrong(setting: Any) -> None:
    raise readers.Wrong("other values")


@pytest.mark.parametrize(
    "plant, word",
    [(_leak, "leaked: KeyError"), (_vague, "unclear"), (_wait, "hung"), (_allocate, "leaked"), (_wrong, "wrong")],
)
def test_what_goes_wrong_is_seen(plant: Any, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_seeds(tmp_path)
    setting = readers.Setting(tmp_path, model)
    monkeypatch.setitem(readers.READERS, "header", plant)
    monkeypatch.setattr(worker, "SECONDS", 1)
    before = signal.signal(signal.SIGALRM, worker._too_long)
    try:
        assert worker._timed("header", setting).startswith(word)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_tensor_that_is_read_wrongly_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one factor, on each way in that reads values."""
    model = write_seeds(tmp_path)
    inputs, setting = Inputs(tmp_path, 0), readers.Setting(tmp_path, model)
    inputs.write({name: inputs.seed_of("plain", name) for name in ("adapter_config.json", readers.TENSORS)}, {})
    original = readers.TensorFile.read

    def broken(self: Any, key: str, *rows: Any) -> torch.Tensor:
        value = original(self, key, *rows)
        if key.endswith("down_proj.lora_B") and value.numel():
            value.view(-1)[0] += 1
        return value

    monkeypatch.setattr(readers.TensorFile, "read", broken)
    found = {reader: readers.outcome(reader, setting).partition(":")[0] for reader in ("tensors", "merge")}
    assert collections.Counter(found.values()) == {"wrong": 2}, found
