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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_moe
from tests.checkpoint.merge.cases import assert_same_weights, case, files_of, write_adapter
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
    assert found["path"] == str(folder / "out") and found["merged"] > 0 and found["rounding"] == 0
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
        (["inspect", "nowhere"], "no adapter found"),
        (["inspect", "."], "neither adapter_config.json nor config.json"),
        (["inspect", "base", "--plot", "x.png"], "is a model"),
        (["verify", "adapter", "--base", "nowhere"], "no checkpoint found"),
        (["quantize", "base", "adapter"], "adapter exists"),
        (["quantize", "base", "new", "--type", "int3"], "none of nf4, fp4 and int8"),
        (["convert", "adapter", "new", "--to", "vllm", "--from", "unsloth"], "convert it to native first"),
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


# --- inspect ----------------------------------------------------------------------------------------------------------


def _dense_norms(adapter: Path, module: str, slot: str, scaling: float) -> list[float]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.{slot}.{factor}"].double() for factor in ("lora_A", "lora_B"))
    return [float((scaling * b[expert] @ a[expert]).norm()) for expert in range(len(a))]


def test_inspect_an_adapter(folder: Path) -> None:  # noqa: F811
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    dead = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_B"
    tensors[dead][1] = 0
    save_file(tensors, path)
    found = result("inspect", folder / "adapter")
    assert found["kind"] == "adapter" and found["type"] == "MOELORA" and found["layout"] == "contiguous_r"
    assert found["parameters"] == sum(one.numel() for one in tensors.values())
    assert [(one["module"], one["projection"]) for one in found["experts"]] == [
        (f"model.layers.{layer}.mlp.experts", name) for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    for one in found["experts"]:
        assert one["experts"] == [0, 2, 3] and one["ranks"] == [3, 3, 3]
        wanted = _dense_norms(folder / "adapter", one["module"], one["projection"], 2.0)
        assert one["norms"] == pytest.approx(wanted, rel=1e-5)
    assert found["dead"] == ["model.layers.1.mlp.experts.down_proj.2"]
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
    linear = next(one for one in found["linears"] if one["module"] == name)
    assert linear["norm"] == pytest.approx(float((2 * b @ a).norm()), rel=1e-5) and linear["rank"] == 3
    shown = call("inspect", folder / "adapter")
    assert shown.exit_code == 0 and "model.layers.1.mlp.experts.down_proj.2" in shown.output.replace("\n", "")


@pytest.mark.parametrize(
    "options",
    [
        {"expert_rank_pattern": {r"layers\.0\..*\.1": 5, r"layers\.1\..*\.3": 1}},
        {"expert_rank_pattern": {r".*\.1": 5}, "expert_indices": {0: [1, 2], 1: [0]}},
        {"split_gate_up": True, "target_experts": ["gate_up_proj"]},
        {"share_experts": "outer", "use_rslora": True, "expert_alpha": 5},
    ],
)
def test_norms_of_every_form(options: dict[str, Any], tmp_path: Path) -> None:
    """Against the change that the adapter makes to a stock model's weights."""
    base = ENTRIES["qwen3_moe"].build()
    merged = write_adapter(base, tmp_path, target_modules=[], **options).merge_and_unload().state_dict()
    found = {(one["module"], one["projection"]): one for one in result("inspect", tmp_path)["experts"]}
    before = base.state_dict()
    changes: dict[tuple[str, str], dict[int, float]] = {}
    for key, value in merged.items():
        module, _, rest = key.partition(".experts.")
        change = (value - before[key]).double()
        if not rest or not change.any():
            continue
        slot = "down_proj" if "down_proj" in rest else "gate_up_proj"
        squares = changes.setdefault((f"{module}.experts", slot), {})
        pieces = enumerate(change) if change.dim() == 3 else [(int(rest.split(".")[0]), change)]
        for expert, piece in pieces:
            squares[expert] = squares.get(expert, 0.0) + float(piece.square().sum())
    assert set(changes) == set(found)
    for where, squares in changes.items():
        norms = dict(zip(found[where]["experts"], found[where]["norms"], strict=True))
        for expert, square in squares.items():
            assert norms.get(expert, 0.0) == pytest.approx(square**0.5, rel=1e-4, abs=1e-7)


def test_plot(folder: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib")
    found = result("inspect", folder / "adapter", "--plot", folder / "norms.png")
    content = (folder / "norms.png").read_bytes()
    assert found["plot"] == str(folder / "norms.png") and content.startswith(b"\x89PNG") and len(content) > 5000


def test_inspect_an_adapter_of_stock_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(ENTRIES["gpt_oss"].build(), LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False,
    ))  # fmt: skip
    model.save_pretrained(tmp_path)
    found = result("inspect", tmp_path)
    assert found["layout"] == "PEFT target_parameters" and found["experts"] == []
    assert [one["module"] for one in found["linears"]] == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert "peft-moe convert" in call("inspect", tmp_path).output


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_inspect_a_model(name: str, tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    base.save_pretrained(tmp_path / "base")
    found = result("inspect", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert found["kind"] == "model" and found["tensors"] == len(tensors) and found["quantization"] is None
    of_experts = {key: one for key, one in tensors.items() if ".experts." in key and "bias" not in key}
    assert found["expert_bytes"] == sum(one.nbytes for one in of_experts.values())
    assert {one["experts"] for one in found["experts"]} == {4}
    orientation, gate = ("in x out", "interleaved") if name == "gpt_oss" else ("out x in", "concatenated")
    assert {one["orientation"] for one in found["experts"]} == {orientation}
    assert {one["gate"] for one in found["experts"] if one["projection"] == "gate_up_proj"} == {gate}
    assert call("inspect", tmp_path / "base").exit_code == 0


def test_inspect_a_packed_model(tmp_path: Path) -> None:
    write_fp8(ENTRIES["qwen3_moe"].build(), tmp_path)
    found = result("inspect", tmp_path)
    assert found["quantization"] == "fp8"
    assert {code for one in found["experts"] for code in one["stored_as"]} == {"F8_E4M3"}


# --- verify -----------------------------------------------------------------------------------------------------------


def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(source: Any, target: Any, **options: Any) -> None:
        raise ValueError("not what this test is about")

    monkeypatch.setattr(peft_moe, "export_adapter", refuses, raising=False)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_verify(name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_export(monkeypatch)
    case(name, tmp_path, **options)
    found = result("verify", tmp_path / "adapter", "--base", tmp_path / "base")
    assert found["ok"] and "not what this test is about" in found["export"]
    checked = {one["parameter"] for one in found["slices"]}
    assert any(".experts." in one for one in checked) and any("attn" in one for one in checked)
    assert all(0 <= one["merge"] <= 1e-5 and 0 < one["forward"] <= 1e-4 for one in found["slices"])
    assert "FAILED" not in call("verify", tmp_path / "adapter", "--base", tmp_path / "base").output


def test_verify_on_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _no_export(monkeypatch)
    base = ENTRIES["qwen3_moe"].build()
    write_fp8(base, tmp_path / "base")
    write_adapter(base, tmp_path / "adapter")
    assert result("verify", tmp_path / "adapter", "--base", tmp_path / "base")["ok"]


def test_verify_finds_a_wrong_merge(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_moe.checkpoint.merge.edits import Merging

    _no_export(monkeypatch)
    honest = Merging._make

    def scrambled(self: Any, *args: Any) -> Any:
        made = honest(self, *args)
        return None if made is None else {key: value.flip(-1) for key, value in made.items()}

    monkeypatch.setattr(Merging, "_make", scrambled)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=1)
    assert not found["ok"] and not any(one["ok"] for one in found["slices"])
    shown = call("verify", folder / "adapter", "--base", folder / "base")
    assert shown.exit_code == 1 and "FAILED" in shown.output


def test_verify_finds_values_that_are_not_finite(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _no_export(monkeypatch)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if key.endswith("layers.0.mlp.experts.down_proj.lora_A"))][:] = float("nan")
    save_file(tensors, path)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=1)
    assert [one["ok"] for one in found["slices"] if "layers.0.mlp.experts" in one["parameter"]].count(False) > 0
    assert result("inspect", folder / "adapter")["not_finite"] == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("damage", [False, True])
def test_verify_exports_and_imports_again(
    damage: bool,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way there and back, with converters that copy; one of them changes a value."""

    def copies(source: Any, target: Any, format: str) -> None:
        assert format == "peft"
        tensors = load_file(Path(source) / "adapter_model.safetensors")
        if damage:
            tensors[min(tensors)].view(-1)[0] += 1
        Path(target).mkdir()
        save_file(tensors, Path(target) / "adapter_model.safetensors")

    for name in ("export_adapter", "import_adapter"):
        monkeypatch.setattr(peft_moe, name, copies, raising=False)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=int(damage))
    assert ("tensors changed" in found["export"]) == damage


# --- convert, quantize, doctor ----------------------------------------------------------------------------------------


def test_convert_calls_the_converters(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    for name in ("export_adapter", "import_adapter"):
        monkeypatch.setattr(
            peft_moe, name, lambda *args, name=name, **options: calls.append((name, args, options)), raising=False
        )
    source, target = str(folder / "adapter"), str(folder / "new")
    assert result("convert", source, target, "--to", "vllm") == {"path": target, "format": "vllm"}
    result("convert", source, target)
    result("convert", source, target, "--from", "unsloth", "--assume-layout", "contiguous_r")
    assert calls == [
        ("export_adapter", (source, target), {"format": "vllm"}),
        ("import_adapter", (source, target), {"format": "auto"}),
        ("import_adapter", (source, target), {"format": "unsloth", "assume_layout": "contiguous_r"}),
    ]


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
