"""The benchmarks in small: they run, refuse what does not exist, and what they print is what they measured."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

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


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("stacked experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where its neighbours are
    return script("block")


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


def refused(main: Callable[[list[str]], object], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What argparse says before it ends with 2; nothing may have been printed as measured."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    return printed.err


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


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return script("model")


def test_a_peer_takes_every_layer_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    if int(version("transformers").split(".")[0]) < 5:
        pytest.skip("stacked experts: transformers 5")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    model = script("model")
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    taken: list[set[str]] = []
    monkeypatch.setattr(model, "build", lambda layers: AutoModelForCausalLM.from_config(config))
    monkeypatch.setattr(model.torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setitem(
        model.peers.PEERS, "one", ("peft", lambda block: taken.append(set(model.peers.wrappers(block))))
    )
    model.contender("one", "bf16", 3, 4, False)
    assert taken == 3 * [{"gate_up_proj", "down_proj"}]


def test_model_refuses_before_it_needs_a_gpu(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(model.main, ["--contenders", "peft-moe@int8"], capsys)
    assert "invalid choice: 'peft-moe@int8'" in said and "grouped" in said.partition("choose from")[2]
    assert "peft runs on bf16 alone" in refused(model.main, ["--contenders", "peft"], capsys)
    assert "loop runs on nf4 alone" in refused(model.main, ["--base", "bf16", "--contenders", "loop"], capsys)
    assert "at least 1, not '0'" in refused(model.main, ["--layers", "0"], capsys)
    said = refused(model.main, [], capsys)
    assert "needs a CUDA device" in said and "80 GiB for 48 layers" in said and "fewer --layers need less" in said


def test_model_goes_on_and_writes_what_it_did(
    model: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and a clock in the place of a GPU's."""

    class Model(torch.nn.Module):
        def gradient_checkpointing_enable(self, how: dict[str, bool]) -> None:
            self.how = how

    def contender(name: str, *args: object) -> tuple[Model, int]:
        if name == "attention":
            raise ImportError("no such package")
        return Model(), 7

    def measure(found: Model, tokens: int, seconds: float, resident: int) -> dict[str, float]:
        assert found.training and found.how == {"use_reentrant": False} and resident == 7
        if tokens == 64:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return {"tokens_per_s": tokens + 0.12345}

    for name, value in {"is_available": True, "get_device_name": "a GPU", "empty_cache": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name, function in {"contender": contender, "measure": measure, "experts_hit": lambda *args: [3, 5]}.items():
        monkeypatch.setattr(model, name, function)
    out = tmp_path / "new" / "model.json"
    model.main(["--contenders", "attention", "peft-moe", "--tokens", "64", "32", "--out", str(out)])
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "3 to 5 of 128" in printed and printed.count(" not timed: ") == 2
    assert found["machine"] == "a GPU" and found["settings"]["layers"] == 48
    row = {"contender": "peft-moe", "base": "nf4", "tokens": 32}
    assert found["rows"] == [{**row, "tokens_per_s": 32.123}]
    assert found["not_timed"] == [
        {"contender": "attention", "base": "nf4", "not_timed": "no such package"},
        {**row, "tokens": 64, "not_timed": "out of memory"},
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_of_the_loop(dtype: torch.dtype, model: ModuleType) -> None:
    """In the dtype asked for, and what the expert computes is what its dequantized weights and factors say."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    experts = torch.nn.Module()
    experts.gate_up_proj = torch.nn.Parameter(torch.randn(2, 96, 64) * 0.1)
    experts.down_proj = torch.nn.Parameter(torch.randn(2, 64, 48) * 0.1)
    loop = model.LoopExperts(experts, 4, dtype)
    factors = [factor for expert in loop.experts for factor in (*expert.a, *expert.b)]
    assert len(factors) == 12 and {factor.dtype for factor in factors} == {dtype}
    for factor in factors:
        torch.nn.init.normal_(factor, std=0.1)
    x = torch.randn(5, 64).bfloat16()
    index, weights = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), torch.rand(5, 2).bfloat16()
    found, expected = loop(x, index, weights).double(), torch.zeros(5, 64, dtype=torch.float64)
    for number, expert in enumerate(loop.experts):
        stored = [bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
                  for linear in expert.linears]  # fmt: skip
        gate, up, down = (
            weight + 2 * b.double() @ a.double() for weight, a, b in zip(stored, expert.a, expert.b, strict=True)
        )
        rows = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T
        expected += rows * torch.where(index == number, weights.double(), 0.0).sum(1)[:, None]
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 0.03


@pytest.fixture
def plot() -> ModuleType:
    pytest.importorskip("matplotlib")
    return script("plot")


@pytest.mark.parametrize(
    "settings, peak, title, axes, floor",
    [
        (None, 12.5, "Forward and backward", 2, True),  # from before there were settings
        (None, float("nan"), "Forward and backward", 1, True),
        ({"forward_only": False, "queued": False, "zipf": False}, None, "Forward and backward", 1, True),
        ({"forward_only": True, "queued": False, "zipf": False}, 12.5, "Forward", 2, False),
        ({"forward_only": False, "queued": True, "zipf": False}, 12.5, "Forward and backward, queued", 2, True),
        ({"forward_only": True, "queued": True, "zipf": True}, None, "Forward, queued, zipf", 1, False),
    ],
)
def test_picture(
    settings: dict[str, bool] | None, peak: float | None, title: str, axes: int, floor: bool, plot: ModuleType,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = [
        {"shape": "qwen3-30b", "rank": 16, "contender": name, "tokens": tokens, "ms": 1.5, "peak_mib": peak}
        for name in ("peft", "peft-moe") for tokens in (64, 512)
    ]  # fmt: skip
    data = {"machine": "NVIDIA H200", "rows": rows} | ({} if settings is None else {"settings": settings})
    (tmp_path / "block.json").write_text(json.dumps(data))
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.main(tmp_path / "block.json", tmp_path / "block.png")
    (figure,) = figures
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG") and len(figure.axes) == axes
    assert figure.axes[0].get_title() == title
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert len(labels) == 2 + floor and ("floor" in labels) is floor


def test_picture_of_nothing(plot: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "block.json").write_text(json.dumps({"machine": "a GPU", "rows": []}))
    with pytest.raises(SystemExit, match="nothing was timed"):
        plot.main(tmp_path / "block.json", tmp_path / "block.png")


def test_make_draws_what_this_run_wrote(tmp_path: Path) -> None:
    """With scripts in the place of the benchmark and the picture: `--help` and another `--out` leave old ones alone."""
    if shutil.which("make") is None:
        pytest.skip("make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(BENCHMARKS.parent / name, tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "block.py").write_text(
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--out')\n"
        "parser.add_argument('--fail', action='store_true')\ngiven = parser.parse_args()\n"
        "assert not given.fail\nopen(given.out, 'w').write('measured')\n"
    )
    (tmp_path / "benchmarks" / "plot.py").write_text(
        "import sys\nopen(sys.argv[2], 'w').write('of ' + open(sys.argv[1]).read())\n"
    )
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / ".installed").touch()
    out = tmp_path / "benchmarks" / "out"

    def bench(options: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-C", str(tmp_path), "bench", f"VENV={environment}", f"BENCH={options}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for before in (False, True):
        for options in ("--help", f"--out {tmp_path}/elsewhere.json"):
            done = bench(options)
            assert done.returncode == 0 and "No picture" in done.stdout, done.stderr
            assert (out / "block.json").exists() is (out / "block.png").exists() is before
        assert bench("--fail").returncode != 0
        if not before:
            done = bench("")
            assert done.returncode == 0 and "No picture" not in done.stdout, done.stderr
            assert (out / "block.png").read_text() == "of measured"
            (out / "block.png").write_text("old")
    assert (out / "block.png").read_text() == "old" and (out / "block.json").read_text() == "measured"
    assert (tmp_path / "elsewhere.json").read_text() == "measured"


@pytest.fixture
def timeline(block: ModuleType) -> ModuleType:
    return script("timeline")


EVENTS = [  # name, start, length: in no order, two of them at the same time
    ("void at::native::radixSortKVInPlace<2, -1>", 130.0, 20.0),
    ("_project_kernel", 100.0, 30.0),
    ("Memset (Device)", 110.0, 4.0),
    ("_outer_kernel", 170.0, 40.0),
    ("never_heard_of", 160.0, 2.0),
]


@pytest.mark.parametrize(
    "kind, names",
    [
        ("products", ["_project_kernel", "_specialized_project_kernel", "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
                      "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GroupProblemShape>>(Gather)",
                      "sm90_xmma_gemm_bf16bf16_bf16f32", "cublasLt::splitKreduce_kernel", "prepare_grouped_data"]),
        ("sorting and routing", ["_count_kernel", "_place_kernel", "_compare_kernel", "at::native::bitonicSortKV",
                                 "at_cuda_detail::cub::DeviceRadixSortOnesweepKernel", "searchsorted_cuda_kernel",
                                 "at_cuda_detail::cub::DeviceScanKernel", "kernelHistogram1D"]),
        ("elementwise and swish", ["_gated_kernel", "_gated_backward_kernel", "_combine_kernel",
                                   "at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>",
                                   "at::native::reduce_kernel<512, 1>", "silu_and_mul"]),
        ("copies, gathers and index backward", [
            "at::native::vectorized_gather_kernel<16, long>", "at::native::indexing_backward_kernel<float>",
            "at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", "Memcpy DtoD (Device)",
            "Memset (Device)", "at::native::CatArrayBatchedCopy<float>", "at::native::_scatter_gather_elementwise"]),
        ("factor gradients", ["_outer_kernel"]),
        ("dequantization", ["_four_bit_kernel", "_dequantize_kernel", "_dequantize_rows_kernel",
                            "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>"]),
        ("other", ["never_heard_of", "at::native::cunn_SoftMaxForward"]),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kind: str, names: list[str], timeline: ModuleType) -> None:
    assert {name: timeline.kind_of(name) for name in names} == dict.fromkeys(names, kind)


def test_kernels_of_this_package_have_a_kind(timeline: ModuleType) -> None:
    """One that is new or renamed must not count as "other"."""
    found: set[str] = set()
    for path in (BENCHMARKS.parent / "peft_moe" / "ops" / "triton").glob("*.py"):
        found.update(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert found == set(timeline.OURS)


def test_timeline_of_events(timeline: ModuleType) -> None:
    # [100, 130) with a copy inside, [130, 150), [160, 162), [170, 210)
    assert timeline.extent(EVENTS) == (30 + 20 + 2 + 40, 110)
    assert timeline.extent([]) == (0, 0)
    assert timeline.shares(EVENTS) == [
        ("products", 1, 30.0, 30 / 96), ("sorting and routing", 1, 20.0, 20 / 96),
        ("copies, gathers and index backward", 1, 4.0, 4 / 96), ("factor gradients", 1, 40.0, 40 / 96),
        ("other", 1, 2.0, 2 / 96),
    ]  # fmt: skip
    header, *lines, rest = timeline.table(EVENTS, 5)
    assert header.split() == ["start,", "us", "us", "kernel"]
    assert [line.split() for line in lines] == [
        ["0.0", "30.0", "_project_kernel"], ["30.0", "20.0", "at::native::radixSortKVInPlace<2,", "-1>"],
        ["70.0", "40.0", "_outer_kernel"],
    ]  # fmt: skip
    assert rest.split() == ["6.0", "2", "shorter", "than", "5", "us"]
    assert len(timeline.table(EVENTS, 2)) == 6 and timeline.table([], 5) == [header]


def test_report_of_steps(timeline: ModuleType) -> None:
    """The numbers are medians over steps, the table is of the step whose span is the median."""
    steps = [EVENTS, [("_gated_kernel", 0.0, 500.0)], [("_outer_kernel", 7.0, 10.0), ("_place_kernel", 27.0, 10.0)]]
    first, *lines = timeline.report(steps, 5)
    assert first == "1 to 5 kernels a step, busy 0.092 ms, span 0.110 ms, idle inside 0.010 ms"
    assert lines[:-5] == timeline.table(EVENTS, 5)
    assert lines[-5] == " 31.2 %      30.0 us in   1  products"
    assert timeline.report(steps[1:2], 5)[0].startswith("1 kernels a step, busy 0.500 ms, span 0.500 ms")


def test_timeline_of_a_step(
    timeline: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the profiler's events of a CPU in the place of a GPU's."""
    seen: list[list[tuple[str, float, float]]] = []
    original = timeline.report
    monkeypatch.setattr(timeline, "report", lambda steps, least: seen.extend(steps) or original(steps, least))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("ProfilerActivity", "DeviceType"):
        monkeypatch.setattr(timeline, name, SimpleNamespace(CUDA=getattr(timeline, name).CPU))
    given = {"contender": "plain", "shape": "tiny", "tokens": [8, 16], "rank": 4, "zipf": True, "forward_only": True}
    timeline.run(SimpleNamespace(**given, steps=2, repeats=2, least=0.0), torch.device("cpu"), torch.float32)
    printed = capsys.readouterr().out
    assert len(seen) == 4 and all(length >= 0 for events in seen for _, _, length in events)
    assert all("aten::index" in {name for name, _, _ in events} for events in seen)
    assert "plain T=8, tiny, r=4, zipf, forward_only\nsingle steps " in printed and "plain T=16, tiny" in printed
    monkeypatch.setattr(timeline, "record", lambda step: [])
    with pytest.raises(timeline.NotTimed, match="saw no kernels"):
        timeline.recorded(lambda: None, torch.device("cpu"), 2)


def test_timeline_refuses(
    timeline: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in refused(timeline.main, [], capsys)
    assert "invalid choice: 'peft@nf4'" in refused(timeline.main, ["--contender", "peft@nf4"], capsys)
    assert "at least 1" in refused(timeline.main, ["--tokens", "0"], capsys)


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
