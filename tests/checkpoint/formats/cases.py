"""Adapters on disk, ours and stock PEFT's, and what is asked of them in more than one test."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe import export_adapter, import_adapter
from tests.checkpoint.merge.cases import write_adapter
from tests.model.deltas import logits
from tests.zoo import ENTRIES

V5 = int(transformers.__version__.partition(".")[0]) >= 5
#: Architectures whose experts stock PEFT can target in the installed transformers.
STACKED = (
    ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "aria_text", "nemotron_h"]
    if V5
    else ["llama4_text", "gpt_oss", "qwen3_vl_moe_text", "granitemoe"]
)
ATTENTION = {"granitemoe": ["q_proj"], "nemotron_h": ["q_proj"]}

NAME = "adapter_model.safetensors"


def case(name: str, folder: Path, **options: Any) -> tuple[nn.Module, PeftModel]:
    """Write `folder/base` and the native `folder/native`. Returns the base and the adapted model."""
    base = ENTRIES[name].build()
    base.save_pretrained(folder / "base")
    return base, write_adapter(base, folder / "native", **options)


def export(folder: Path, format: str, source: str = "native", target: str = "out", **options: Any) -> Path:
    return export_adapter(folder / source, folder / target, format, base=folder / "base", progress=False, **options)


def bring(folder: Path, source: str = "out", target: str = "back", **options: Any) -> Path:
    options = {"base": folder / "base", "progress": False} | options
    return import_adapter(folder / source, folder / target, **options)


def out_of(model: Any, name: str) -> Tensor:
    return logits(model, ENTRIES[name].inputs(model))


def loaded(base: nn.Module, folder: Path) -> PeftModel:
    """A copy of a base with the adapter of a folder."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def is_stock(model: PeftModel) -> bool:
    """Whether nothing of this package runs in a model."""
    ours = [type(one).__module__ for one in model.modules() if type(one).__module__.startswith("peft_moe")]
    return not ours and type(model.peft_config["default"]) is LoraConfig


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of fp32 sums."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def same_files(one: Path, other: Path) -> bool:
    """Whether two adapters have the same tensors, byte for byte."""
    return (one / NAME).read_bytes() == (other / NAME).read_bytes()


def without_note(folder: Path) -> None:
    """Write the tensors again as another tool would, without what this package noted in the header."""
    save_file(load_file(folder / NAME), folder / NAME, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    """Set options of an adapter's config; `None` removes them."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def stock_trained(base: nn.Module, folder: Path, name: str, **options: Any) -> PeftModel:
    """Train stock PEFT on the experts for a step and save it. Returns the trained model."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": [], "init_lora_weights": False} | options))
    model = get_peft_model(copy.deepcopy(base), config)
    trained = [one for one in model.parameters() if one.requires_grad]
    assert trained
    optimizer = torch.optim.SGD(trained, lr=0.5)
    inputs = ENTRIES[name].inputs(model)
    found = next(one for one in model(**inputs).values() if torch.is_tensor(one) and one.is_floating_point())
    found.square().mean().backward()
    optimizer.step()
    model.eval().save_pretrained(folder)
    return model
