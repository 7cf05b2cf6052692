"""`peft-moe inspect`: what it says of adapters, against dense products, and of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_moe.cli.contents import delta_norms
from tests.checkpoint.merge.cases import write_adapter
from tests.cli.calls import COMMANDS, call, folder, result  # noqa: F401  # a fixture
from tests.weights.checkpoints import write_fp8
from tests.zoo import ENTRIES


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
    listed = any(".experts.0." in key for key in of_experts)
    assert {one["in_files"] for one in found["experts"]} == {"one by one" if listed else "stacked"}
    assert {one["orientation"] for one in found["experts"]} == {orientation}
    assert {one["gate"] for one in found["experts"] if one["projection"] == "gate_up_proj"} == {gate}
    assert call("inspect", tmp_path / "base").exit_code == 0


def test_inspect_a_packed_model(tmp_path: Path) -> None:
    write_fp8(ENTRIES["qwen3_moe"].build(), tmp_path)
    found = result("inspect", tmp_path)
    assert found["quantization"] == "fp8"
    assert {code for one in found["experts"] for code in one["stored_as"]} == {"F8_E4M3"}


def test_texts_from_files_are_neither_markup_nor_codes(folder: Path) -> None:  # noqa: F811
    path = folder / "adapter" / "adapter_config.json"
    name = "[bold][/nothing] \x1b[2J\x1b]8;;http://x\x07[link=http://x]y"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}))
    found = call("inspect", folder / "adapter")
    assert found.exit_code == 0 and "\x1b[2J" not in found.output and "\x1b]8" not in found.output
    assert "[bold][/nothing] \ufffd[2J" in found.output and "[link=http://x]y" in found.output
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "\x1b[2J"}))
    found = call("inspect", folder / "adapter")
    assert found.exit_code == 3 and "\x1b[2J" not in found.output


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    """Factors whose Gram matrix would be larger than a machine, and whose product is one number."""
    a, b = torch.randn(1, 200_000, 1), torch.randn(1, 1, 200_000)
    found = delta_norms(a, b)
    torch.testing.assert_close(found, (b.double() @ a.double()).abs().view(1))


@pytest.mark.parametrize("damage", ["half", "three axes and two", "no expert named", "other rank"])
def test_tensors_that_are_no_adapter(damage: str, folder: Path) -> None:  # noqa: F811
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("down_proj.lora_A"))
    if damage == "half":
        del tensors[key]
    elif damage == "three axes and two":
        tensors[key] = tensors[key].flatten(0, 1)
    elif damage == "other rank":
        tensors[key] = tensors[key][:, :1].contiguous()
    else:
        config = folder / "adapter" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"expert_indices": []}))
    save_file(tensors, path)
    found = call("inspect", folder / "adapter")
    assert found.exit_code == 3 and "experts" in found.output
