"""What each command prints and writes, and the codes with which it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_moe
from tests.checkpoint.merge.cases import assert_same_weights, files_of, write_adapter
from tests.checkpoint.merge.test_architectures import _llama as see_and_read
from tests.cli.calls import COMMANDS, call, folder, result  # noqa: F401  # a fixture
from tests.weights.checkpoints import write_fp8
from tests.zoo import ENTRIES


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_exit_codes(name: str) -> None:
    found = call(name, "--help")
    assert found.exit_code == 0
    text = " ".join(found.output.split())
    assert f"$ peft-moe {name}" in text and "Exit codes: 0 success" in text and "--json" in text


def test_every_command_is_listed() -> None:
    found = call("--help")
    assert found.exit_code == 0 and all(name in found.output for name in COMMANDS)
    assert call().exit_code == 2 and call("nonsense").exit_code == 2 and call("merge", "one").exit_code == 2


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merge(folder: Path) -> None:  # noqa: F811
    found = result("merge", folder / "base", folder / "adapter", folder / "out")
    assert found["path"] == str(folder / "out") and found["rounding"] == 0
    # Of two layers three projections of three experts each, and q_proj and o_proj.
    assert found["merged"] == 2 * (3 * 3 + 2)
    peft_moe.merge_checkpoint(folder / "base", folder / "adapter", folder / "same", progress=False)
    assert files_of(folder / "out") == files_of(folder / "same")
    shown = call("merge", folder / "base", folder / "adapter", folder / "text", "--dtype", "float16")
    assert shown.exit_code == 0 and f"{found['tensors']} tensors" in shown.output
    tensors = load_file(folder / "text" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_merge_requantized(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    write_fp8(base, tmp_path / "base")
    write_adapter(base, tmp_path / "adapter")
    arguments = [tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--requantize"]
    found = call("merge", *arguments)
    assert found.exit_code == 0 and "of the adapter's own change" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "nowhere", "adapter", "out"], "no checkpoint found"),
        (["merge", "base", "nowhere", "out"], "no adapter found"),
        (["merge", "base", "adapter", "base"], "cannot take the place"),
        (["merge", "base", "adapter", "out", "--dtype", "int4"], "none of bfloat16"),
        (["merge", "base", "adapter", "out", "--device", "gpu"], "cannot be used here"),
        (["verify", "adapter", "--base", "base", "--device", "gpu"], "cannot be used here"),
        (["quantize", "base", "new", "--device", "gpu"], "cannot be used here"),
        (["quantize", "base", "new", "--dtype", "int4"], "none of bfloat16"),
        (["inspect", "nowhere"], "no adapter found"),
        (["inspect", "."], "neither adapter_config.json nor config.json"),
        (["inspect", "base", "--plot", "x.png"], "is a model"),
        (["verify", "adapter", "--base", "nowhere"], "no checkpoint found"),
        (["quantize", "base", "adapter"], "adapter exists"),
        (["quantize", "base", "new", "--type", "int3"], "none of nf4, fp4 and int8"),
        (["convert", "adapter", "new", "--to", "vllm", "--from", "unsloth"], "convert it to native first"),
        (["convert", "adapter", "new", "--to", "vllm", "--option", "rank"], "'rank': expected NAME=VALUE"),
        (["convert", "adapter", "new", "--to", "vllm", *["--option", "rank=8"] * 2], "each name once"),
        (["convert", "adapter", "new", "--to", "vllm", "--option", "base=x"], "none of the format's own options"),
        (["convert", "adapter", "new", "--option", "layout=stacked"], "of the format that --to names"),
        (
            ["convert", "adapter", "new", "--to", "vllm", "--base", "base", "--option", "layout=stacked"],
            "`layout`: the format 'vllm' takes moe_format, rank",
        ),
    ],
)
def test_errors_are_messages(
    arguments: list[str],
    message: str,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    before = files_of(folder)
    found = call(*arguments)
    assert found.exit_code == 3 and found.exception is not None and type(found.exception) is SystemExit
    assert found.stdout == "" and message in found.stderr and "Traceback" not in found.stderr
    as_json = result(*arguments, code=3)
    assert as_json["code"] == 3 and message in as_json["error"]
    assert files_of(folder) == before


def test_an_error_inside_is_no_traceback_either(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("peft_moe.checkpoint.merge.merge_checkpoint", broken)
    arguments = ("merge", folder / "base", folder / "adapter", folder / "out")
    found = call(*arguments)
    assert found.exit_code == 4 and found.stderr == "peft-moe: ZeroDivisionError: by zero\n"
    monkeypatch.setenv("PEFT_MOE_TRACEBACK", "1")
    assert isinstance(call(*arguments).exception, ZeroDivisionError)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_moe.checkpoint.merge.merge_checkpoint", interrupted)
    assert call(*arguments).exit_code == 130


# --- convert, quantize, doctor ----------------------------------------------------------------------------------------


def test_convert(folder: Path) -> None:  # noqa: F811
    """To another tool and back; what the options of the command say arrives."""
    stacked = ENTRIES["qwen3_moe"].kind == "stacked"
    source, target, back = folder / "adapter", folder / "new", folder / "back"
    base = ["--base", folder / "base"]
    format = "unsloth" if stacked else "peft-per-expert"
    found = result("convert", source, target, "--to", format, *base)
    assert found == {"path": str(target), "format": format}
    shown = call("convert", target, back, *base)
    assert shown.exit_code == 0 and str(back) in shown.output
    first, second = (load_file(one / "adapter_model.safetensors") for one in (source, back))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "exists" in result("convert", target, back, *base, code=3)["error"]
    options = ["--from", format, "--assume-layout", "contiguous_r"]
    found = result("convert", target, folder / "never", *options, *base, code=3)["error"]
    assert ("contradicts" if stacked else "`assume_layout`: the format 'peft-per-expert'") in found
    found = result("convert", target, folder / "never", "--to", "peft", "--from", format, code=3)["error"]
    assert "convert it to native first" in found
    assert "base='nowhere'" in result("convert", target, folder / "never", "--base", "nowhere", code=3)["error"]
    assert not (folder / "never").exists()


def test_convert_names_the_formats() -> None:
    shown = call("convert", "--help").output
    assert all(name in shown for name in ("peft", "unsloth", "vllm", "sglang"))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantize(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    options = ["--type", kind, "--dtype", "float32", "--device", "cpu", "--experts-only"]
    found = result("quantize", tmp_path / "base", tmp_path / "out", *options)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}" and found["copied"] == ["tokenizer.json"]
    assert found["type"] == kind and found["bytes"] < (tmp_path / "base" / "model.safetensors").stat().st_size
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    config = peft_moe.BnbExpertsConfig(
        **({"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        experts_only=True,
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    assert_same_weights(again, wanted)
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    """transformers would keep what is there, and the result would not be what its name says."""
    pytest.importorskip("bitsandbytes")
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    result("quantize", tmp_path / "base", tmp_path / "nf4", "--device", "cpu")
    found = result("quantize", tmp_path / "nf4", tmp_path / "int8", "--type", "int8", "--device", "cpu", code=3)
    assert "is quantized already" in found["error"] and not (tmp_path / "int8").exists()


def test_doctor_from_a_folder_of_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_moe.cli import doctor

    monkeypatch.setattr(doctor, "requires", lambda name: [])
    assert result("doctor")["compared"] is False
    shown = call("doctor").stdout
    assert (
        "versions were not compared" in shown and "everything that is needed" not in shown and "optional" not in shown
    )


def test_quantize_keeps_all_of_a_model_that_sees(tmp_path: Path) -> None:
    """transformers' causal LM of such a model is its text part alone."""
    pytest.importorskip("bitsandbytes")
    base = see_and_read()
    base.save_pretrained(tmp_path / "base")
    result("quantize", tmp_path / "base", tmp_path / "out", "--device", "cpu", "--experts-only", "--type", "int8")
    again = type(base).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    seen = {name: one for name, one in base.state_dict().items() if "vision" in name}
    assert seen and all(torch.equal(again.state_dict()[name], one.bfloat16()) for name, one in seen.items())


def test_doctor() -> None:
    found = result("doctor")
    packages = {one["name"]: one["version"] for one in found["packages"]}
    assert found["ok"] and packages["torch"] == torch.__version__ and found["problems"] == []
    rows = {(one["device"], one["dtype"]): one for one in found["backends"]}
    assert rows["cpu", "float32"]["backend"] in ("grouped_mm", "loop") and "no GPU" in rows["cpu", "float32"]["why"]
    assert call("doctor").exit_code == 0


def test_doctor_says_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_moe.cli import doctor

    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", 'typer>=0.12; extra == "cli"'])
    found = result("doctor", code=1)
    assert not found["ok"] and found["problems"] == [f"torch {torch.__version__}: >=99 is needed; pip install -U torch"]


# --- as a process -----------------------------------------------------------------------------------------------------


def _process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(peft_moe.__file__).parents[1]), "COLUMNS": "200"}
    start = ["-m", "peft_moe"] if code is None else ["-c", code]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_python_m(folder: Path) -> None:  # noqa: F811
    found = _process("inspect", str(folder / "adapter"), "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["kind"] == "adapter"
    lost = _process("inspect", str(folder / "nowhere"))
    assert lost.returncode == 3 and "no adapter found" in lost.stderr and "Traceback" not in lost.stderr
    merged = _process("merge", *(str(folder / name) for name in ("base", "adapter", "out")), "--json")
    assert merged.returncode == 0 and json.loads(merged.stdout)["merged"] > 0, "a bar does not mix with what is printed"
    assert "Merging: 100%" in merged.stderr


def test_without_typer() -> None:
    hide = (
        "import importlib.util as u; honest = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else honest(name, *a)\n"
        "from peft_moe.cli import main; main()"
    )
    found = _process(code=hide)
    assert found.returncode == 3 and 'pip install "peft-moe[cli]"' in found.stderr and "Traceback" not in found.stderr


def test_the_entry_point_is_declared() -> None:
    text = (Path(peft_moe.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\npeft-moe = "peft_moe.cli:main"' in text
