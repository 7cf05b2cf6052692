"""`peft-moe convert` to the formats of servers and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.merge.cases import case
from tests.cli.calls import call, folder, result  # noqa: F401


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path, expert_indices=[0, 2, 3], target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    source, served, again = (str(tmp_path / name) for name in ("adapter", "served", "again"))
    base = str(tmp_path / "base")
    assert result("convert", source, served, "--to", kind, "--base", base) == {"path": served, "format": kind}
    config = json.loads((Path(served) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] in (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert result("convert", served, again) == {"path": again, "format": "native"}
    first, second = (load_file(Path(one) / "adapter_model.safetensors") for one in (source, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_options_of_a_format(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path, target_modules=[])
    options = ["--base", tmp_path / "base", "--option", "layout=stacked", "--option", "rank=32"]
    result("convert", tmp_path / "adapter", tmp_path / "served", "--to", "sglang", *options)
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {value.shape[1] for key, value in tensors.items() if key.endswith("experts.down_proj.lora_A.weight")} == {32}


def test_a_reason_without_a_traceback(folder: Path) -> None:  # noqa: F811
    found = call("convert", folder / "adapter", folder / "served", "--to", "vllm", "--base", folder / "nowhere")
    assert found.exit_code == 3 and "config.json" in found.output and "Traceback" not in found.output
