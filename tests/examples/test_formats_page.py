"""Every example of docs/formats.md runs as it is written, in Python and on the command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_moe import MoELoraConfig, export_adapter
from tests.checkpoint.formats.cases import NAME, V5, change_config, same_files, without_note
from tests.cli.calls import call
from tests.examples.test_snippets import MODEL_OF_THE_PAGES, ROOT, folder  # noqa: F401

PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ peft-moe (.*)$", PAGE, re.MULTILINE)
#: What needs experts in stacks, and what needs them in lists.
STACKS = ("adapter-peft", "adapter-unsloth", "square-adapter", "unsloth-adapter")
LISTS = ("adapter-listed",)


def base() -> Any:
    found = AutoModelForCausalLM.from_pretrained(MODEL_OF_THE_PAGES)
    found.name_or_path = found.config._name_or_path = MODEL_OF_THE_PAGES
    return found


@pytest.fixture
def adapters(folder: Path) -> Path:  # noqa: F811
    """The adapters that the page names."""
    get_peft_model(base(), MoELoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(
        "adapter"
    )
    tensors = {}
    for expert in (1, 3):
        for linear, (size, out) in {"gate_proj": (32, 16), "up_proj": (32, 16), "down_proj": (16, 32)}.items():
            path = f"base_model.model.model.layers.0.mlp.experts.{expert}.{linear}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, size)
            tensors[f"{path}.lora_B.weight"] = torch.randn(out, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": MODEL_OF_THE_PAGES}
    Path("listed-adapter").mkdir()
    save_file(tensors, Path("listed-adapter", NAME))
    Path("listed-adapter", "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["gate_proj"]}))
    if V5:
        square = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"], init_lora_weights=False)
        get_peft_model(base(), square).save_pretrained("square-adapter")
        change_config(Path("square-adapter"), peft_version=None)
        export_adapter("adapter", "unsloth-adapter", "unsloth", layout="contiguous_r", progress=False)
        without_note(Path("unsloth-adapter"))
        change_config(Path("unsloth-adapter"), lora_B_layout=None)
    return folder


def check(folder: Path) -> None:  # noqa: F811
    """What was made of the adapter is the adapter."""
    native = load_file(folder / "adapter" / NAME)
    assert same_files(folder / "adapter", folder / "adapter-back")
    found = load_file(folder / "from-unsloth" / NAME)
    assert found.keys() == native.keys() and all(torch.equal(found[key], native[key]) for key in native)
    assert load_file(folder / "from-square" / NAME)


@pytest.mark.skipif(not V5, reason="the base has stacks in transformers 5")
def test_python(adapters: Path) -> None:
    names: dict[str, Any] = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, "docs/formats.md", "exec"), names)
    check(adapters)
    assert type(names["model"].peft_config["default"]) is LoraConfig and isinstance(names["model"], peft.PeftModel)
    assert (adapters / "adapter-unsloth").is_dir()


def test_commands(adapters: Path) -> None:
    ran = 0
    for line in COMMANDS:
        arguments = shlex.split(line)
        if not any(name in arguments for name in (LISTS if V5 else STACKS)):
            found = call(*arguments)
            assert found.exit_code == 0, (line, found.output)
            ran += 1
    assert ran == len(COMMANDS) - (len(LISTS) if V5 else 5)
    imported = json.loads((adapters / "from-listed" / "adapter_config.json").read_text())
    assert imported["expert_indices"] == {"0": [1, 3]} and imported["split_gate_up"]
    if V5:
        check(adapters)
