"""block.py and its contenders: what is refused, what is not timed, what is written; peers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch

from tests.benchmarks.scripts import refused
from tests.oracle import experts_oracle


@pytest.mark.parametrize(
    "name",
    ["nonsense", "nonsense@nf4", "peft-moe@int8", "plain@nf4", "peft@nf4", "unsloth@nf4", "peft-moe:nonsense",
     "peft:loop", "peft-moe:", "peft-moe@", "peft-moe@nf4:loop", ""],
)  # fmt: skip
def test_block_refuses_unknown_names(
    name: str, block: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(block, "run", lambda *args: pytest.fail("it was measured"))
    said = refused(block.main, ["--contenders", "peft-moe", name], capsys)
    assert f"invalid choice: {name!r}" in said
    for known in ("frozen", "plain", "peft", "peft-moe", "peft-moe:grouped_mm", "peft-moe:loop@nf4", "unsloth"):
        assert f"{known}," in said or f"'{known}'," in said  # quoted by Python before 3.12
    with pytest.raises(ValueError, match="unknown contender .* expected one of frozen, "):
        block.contender(name, block.SHAPES["tiny"], 2, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("option", ["--repeats", "--tokens", "--ranks"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_block_refuses_numbers(option: str, value: str, block: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(block.main, [f"{option}={value}"], capsys)
    assert f"argument {option}: expected a whole number of at least 1, not {value!r}" in said


def test_block_refuses_an_output_before_it_measures(
    tmp_path: Path, block: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("kept")
    assert "cannot write" in refused(block.main, ["--out", str(tmp_path / "file" / "block.json")], capsys)
    assert "is a folder" in refused(block.main, ["--out", str(tmp_path)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_block_goes_on_and_writes_what_it_did(
    tmp_path: Path, block: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folders" / "block.json"
    measure = block.measure

    def scarce(step: Callable[[], None], device: torch.device, repeats: int, queued: bool) -> tuple[float, float]:
        assert out.parent.is_dir() and not out.exists()  # made before anything runs, written after
        if len(inspect.getclosurevars(step).nonlocals["x"]) == 12:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return measure(step, device, repeats, queued)

    monkeypatch.setattr(block, "measure", scarce)
    names = ["peft-moe@fp8", "peft-moe:triton", "peft-moe"]
    arguments = ["--contenders", *names, "--tokens", "8", "12", "16", "--ranks", "2", "--repeats", "3", "--zipf"]
    block.main([*arguments, "--queued", "--out", str(out)])
    printed = capsys.readouterr().out
    reasons = {"peft-moe@fp8": "blocks of 128 x 128 do not divide", "peft-moe:triton": "expected a GPU"}
    for name, reason in reasons.items():
        assert f"{name} not timed: " in printed and reason in printed

    def strictly(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(out.read_text(), parse_constant=strictly)
    assert [(row["contender"], row["tokens"]) for row in found["rows"]] == [("peft-moe", 8), ("peft-moe", 16)]
    assert all(row["ms"] > 0 and row["peak_mib"] is None and row["rank"] == 2 for row in found["rows"])
    assert [row["contender"] for row in found["not_timed"]] == names
    assert found["not_timed"][2] == {
        "shape": "tiny", "rank": 2, "contender": "peft-moe", "tokens": 12, "not_timed": "out of memory",
    }  # fmt: skip
    assert found["settings"] == {"zipf": True, "forward_only": False, "queued": True, "repeats": 3}
    versions = found["versions"]
    assert set(versions) == {"torch", "triton", "transformers", "peft", "peft-moe"}
    assert versions["torch"] == torch.__version__ and versions["peft"] == version("peft")
    assert datetime.fromisoformat(found["date"]).tzinfo is not None
    assert found["cpu"] and found["cpu"] in printed.splitlines()[0]
    assert [path.name for path in out.parent.iterdir()] == ["block.json"]


def test_a_backend_that_is_turned_off_is_not_timed(block: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MOE_GROUPED", "0")
    with pytest.raises(block.peers.NotTimed, match="runs 'loop' in the place of 'grouped_mm'"):
        block.contender("peft-moe:grouped_mm", block.SHAPES["tiny"], 2, torch.device("cpu"), torch.float32)


def test_peers(block: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
    block.main(["--contenders", "peft", "absent", "--peers", "--tokens", "16", "24", "--repeats", "1"])
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
    }.items():
        assert f"{name:10s} not timed: {reason}" in printed, printed


@pytest.mark.parametrize("gpt_oss", [False, True])
def test_loop_of_peers(gpt_oss: bool, block: ModuleType) -> None:
    """The loop the peers are held to, against the other oracle: its output; its gradients against PEFT's own."""
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
