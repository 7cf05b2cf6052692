"""The scripts that run on a CPU in little time: curves, loading, merging, frozen, routed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, SIZES, STACKED, script


def test_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    (tmp_path / "text").mkdir()
    source = "\n".join(
        f'def double_{i}(x):\n    """Return twice {i} times x."""\n    return 2 * {i} * x' for i in range(40)
    )
    (tmp_path / "text" / "some.py").write_text(source)
    picture, losses = tmp_path / "curves.png", tmp_path / "losses.json"
    arguments = [
        "--steps",
        "4",
        "--base-steps",
        "4",
        "--batch-size",
        "2",
        "--width",
        "2",
        "--text",
        str(tmp_path / "text"),
    ]
    rows = script("curves").main([*arguments, "--picture", str(picture), "--out", str(losses)])
    torch.set_num_threads(threads)

    found = {row["base"]: row for row in rows}
    curves = json.loads(losses.read_text())
    assert set(found) == set(curves) == {"bf16", "fp8", "int8", "nf4", "bf16, other seed"}
    assert all(len(curve) == 4 for curve in curves.values())
    assert found["bf16"]["largest"] == 0 and found["bf16, other seed"]["first"] == found["bf16"]["first"]
    for name in ("fp8", "int8", "nf4"):
        assert found[name]["final"] == pytest.approx(sum(curves[name][-2:]) / 2)
        first = abs(curves[name][0] - curves["bf16"][0])  # before any update: the error of the storage alone
        assert 0 < first <= found[name]["largest_step"] < 0.5, name
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"| {name} | {row['final']:.4f} |" in printed for name, row in found.items())


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_loading_in_this_process(kind: str, tmp_path: Path) -> None:
    loading = script("loading")
    for name in ("folder", "small"):
        loading.write(tmp_path / name, SIZES if name == "folder" else loading.SMALL, fp8=kind == "fp8")
    found = loading.load("fp8-packed" if kind == "fp8" else "bf16", tmp_path / "folder", tmp_path / "small")
    assert found["experts_stored_as"] == ("float8_e4m3fn" if kind == "fp8" else "bfloat16")
    linears = SIZES["layers"] * (4 + 3 * SIZES["experts"]) * 128 * 128
    other = 2 * (2 * 1024 * 128 + 128) + SIZES["layers"] * 2 * (2 * 128 + 2 * 64 + SIZES["experts"] * 128)
    scales = 4 * linears // 128**2 if kind == "fp8" else 0
    assert found["weights"] == pytest.approx((linears * (1 if kind == "fp8" else 2) + other + scales) / 2**20)


def test_loading_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))  # found also where the package is not installed
    flags = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    (row,) = script("loading").main([*flags, "--ways", "nf4"])
    assert row["way"] == "nf4" and row["experts_stored_as"] == "uint8" and row["seconds"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert "bitsandbytes" in printed[0] and "2 layers of 4 experts" in printed[0]
    assert printed[-1].startswith("| BnbExpertsConfig, nf4 | uint8 |") and f"| {row['weights']:.0f} |" in printed[-1]


def test_merging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where its neighbour is
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    rows = script("merging").main([*sizes, "--rank=2", "--folder", str(tmp_path)])
    found = {row["way"]: row for row in rows}
    assert set(found) == {"bf16", "fp8", "fp8-requantized", "memory"} and list(tmp_path.iterdir()) == []
    assert found["bf16"]["base"] == pytest.approx(found["bf16"]["result"], rel=0.01)
    assert 1.2 < found["fp8"]["result"] / found["fp8-requantized"]["result"] < 2.1
    assert all(row["seconds"] > 0 for row in rows)


def test_frozen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = script("frozen").main(["--repeats", "2", "--tokens", "32"])
    assert [(row["base"], row["forward"]) for row in rows] == [
        (base, name) for base in ("bf16", "nf4") for name in ("itself", "grouped")
    ]
    assert all(row["cosine_output"] > 0.9999 and row["cosine_gradient"] > 0.9999 for row in rows[1::2])
    assert "grouped" in capsys.readouterr().out


def test_routed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not STACKED:
        pytest.skip("FP8Experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = script("routed").main(["--tokens", "1", "3", "20", "--repeats", "2"])
    assert [(row["base"], row["tokens"]) for row in rows] == [(base, n) for base in ("nf4", "fp8") for n in (1, 3, 20)]
    assert [row["built"] for row in rows[:3]] == [2, 6, 16] and [row["rule"] for row in rows[:3]] == [
        "routed", "routed", "whole",
    ]  # fmt: skip
    assert all(row["experts"] <= row["built"] and row["ratio"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| nf4 |") == 3
