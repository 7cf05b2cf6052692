"""The benchmarks about quantized bases, in small: they run, and what they print is what they measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch

from tests.oracle import experts_oracle

pytest.importorskip("bitsandbytes")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZES = {"layers": 2, "hidden": 128, "inner": 128, "experts": 4}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


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
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("FP8Experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = script("routed").main(["--tokens", "1", "3", "20", "--repeats", "2"])
    assert [(row["base"], row["tokens"]) for row in rows] == [(base, n) for base in ("nf4", "fp8") for n in (1, 3, 20)]
    assert [row["built"] for row in rows[:3]] == [2, 6, 16] and [row["rule"] for row in rows[:3]] == [
        "routed", "routed", "whole",
    ]  # fmt: skip
    assert all(row["experts"] <= row["built"] and row["ratio"] > 0 for row in rows)
    assert capsys.readouterr().out.count("| nf4 |") == 3


def test_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("stacked experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    block = script("block")
    peers = block.peers

    def scaled(model: peft.PeftModel) -> None:
        model.get_base_model().register_forward_hook(lambda module, inputs, output: 1.01 * output)

    def without_adapter(model: torch.nn.Module) -> None:
        for wrapper in peers.wrappers(model).values():
            wrapper.enable_adapters(False)
            wrapper.lora_A.requires_grad_(True), wrapper.lora_B.requires_grad_(True)

    def handing_back(model: torch.nn.Module) -> None:
        wrapper = peers.wrappers(model)["down_proj"]
        wrapper.forward = peers._handed_back.__get__(wrapper)

    def changed(model: torch.nn.Module) -> None:
        torch.no_such_function()  # type: ignore[attr-defined]

    puts = {"right": lambda model: None, "scaled": scaled, "without": without_adapter, "back": handing_back}
    puts |= {"changed": changed}
    monkeypatch.setattr(
        peers,
        "PEERS",
        {name: ("peft", put) for name, put in puts.items()} | {"absent": ("a_package_nobody_has", lambda model: None)},
    )
    arguments = ["--contenders", "peft", "absent", "right@nf4", "--peers", "--tokens", "16", "24", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["block.py", *arguments])
    block.main()
    printed = capsys.readouterr().out
    assert f"right {version('peft')}\n" in printed and "absent is not installed\n" in printed
    assert "right      agrees with a float64 loop over experts" in printed
    timed = [line.split()[0] for line in printed.splitlines() if " ms " in line]
    assert timed == ["peft", "peft", "right", "right"]
    for name, reason in {
        "scaled": "differs from a float64 loop over experts: relative errors output 1.0e-02, x 1.0e-02",
        "without": "expected gradients of x, the weights and the factors alone; it differs in ['experts.",
        "back": "handed down_proj back to PEFT's own forward",
        "changed": f"peft {version('peft')} has changed or lacks a dependency",
        "absent": "a_package_nobody_has is not installed: pip install",
        "right@nf4": "measured on 16-bit experts alone",
    }.items():
        assert f"{name:10s} not timed: {reason}" in printed, printed


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_loop_of_peers(gpt_oss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop the peers are held to, against the other oracle: its output; its gradients against PEFT's own."""
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("stacked experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    block = script("block")
    shape, cpu = block.Shape(6, 2, 16, 24, gpt_oss=gpt_oss), torch.device("cpu")
    model = block.contender("peft", shape, 4, cpu, torch.float32)
    x, index, weights, probe = block.inputs(20, shape, cpu, torch.float32, zipf=True)
    deltas = {
        name: wrapper.get_delta_weight("default").detach() for name, wrapper in block.peers.wrappers(model).items()
    }
    deltas = {name: (delta.mT if gpt_oss else delta).double() for name, delta in deltas.items()}
    experts = block.peers.wrappers(model)["down_proj"].get_base_layer()
    expected = experts_oracle(experts, (x.detach(), index, weights.detach()), deltas)
    found = block.peers.loop(model, x, index, weights, probe)
    torch.testing.assert_close(found["output"], expected, rtol=1e-6, atol=1e-6)
    assert block.peers.check(model, x, index, weights, probe) < 1e-5
