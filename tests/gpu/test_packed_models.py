"""Checkpoints that stay packed on a CUDA device, against the dense model that their codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_moe.checkpoint.packed import packed_config
from tests.model.tiny import config, experts_of
from tests.reference import relative
from tests.weights.checkpoints import dense_twin, write_fp8
from tests.weights.test_mxfp4 import write_gpt_oss
from tests.zoo import ENTRIES, first_floating, loss

pytestmark = pytest.mark.gpu
V5 = int(transformers.__version__.split(".")[0]) >= 5


def build(kind: str, folder: Path) -> tuple[Any, Any, str]:
    """(packed, dense, name of the zoo's entry), both on the device in bf16."""
    name = "gpt_oss" if kind == "mxfp4" else "qwen3_moe"
    if kind == "mxfp4":
        twin = write_gpt_oss(folder / "packed")
    else:
        base = ENTRIES[name].build()
        _, exact = write_fp8(base, folder / "packed", block=(128, 128), kind=kind)
        twin = dense_twin(base, exact, folder / "dense")
    packed = AutoModelForCausalLM.from_pretrained(
        folder / "packed", config=packed_config(str(folder / "packed")), dtype=torch.bfloat16,
        attn_implementation="eager", device_map={"": 0},
    )  # fmt: skip
    twin.config._attn_implementation = "eager"
    return packed.eval(), twin.to("cuda", torch.bfloat16).eval(), name


def typical(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median error of the rows (tokens, or experts): in bf16 a few tokens may be routed elsewhere."""
    found, expected = (one.detach().double().flatten(0, -2) for one in (found, expected))
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)).median())


@pytest.mark.parametrize("kind", ["block", "channel", "tensor", "mxfp4"])
def test_trains_merges_and_decodes(kind: str, tmp_path: Path) -> None:
    packed, dense, name = build(kind, tmp_path)
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in ENTRIES[name].inputs(dense).items()}
    models = []
    for model in (packed, dense):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config(target_modules=["q_proj"])))
    packed, dense = models
    stores = [store for layer in experts_of(packed) for store in layer.stores.values()]
    assert stores and all(store.packed and store.device.type == "cuda" for store in stores)
    held = {one.dtype.itemsize for key, one in packed.named_parameters() if key.endswith(("up_proj", "down_proj"))}
    assert held <= {1}, "experts are not held in codes"
    for model in models:
        loss(model, inputs).backward()
    expected = dict(dense.named_parameters())
    for key, parameter in packed.named_parameters():
        if parameter.requires_grad and "lora_" in key and "experts" in key:
            # A token that is routed elsewhere moves gradients of two of the few experts.
            assert typical(parameter.grad, expected[key].grad) < 1e-1, key
    with torch.no_grad():
        assert typical(first_floating(packed(**inputs)), first_floating(dense(**inputs))) < 2e-2
        one = {"input_ids": inputs["input_ids"][:1, :1]}
        assert typical(first_floating(packed(**one)), first_floating(dense(**one))) < 2e-2
        packed, dense = packed.merge_and_unload(dtype=torch.bfloat16), dense.merge_and_unload()
        assert typical(first_floating(packed(**inputs)), first_floating(dense(**inputs))) < 2e-2


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_compressed_tensors_by_stock_transformers(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    base = ENTRIES["qwen3_moe"].build()
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in ENTRIES["qwen3_moe"].inputs(base).items()}
    _, exact = write_fp8(base, tmp_path / "fp8", kind=kind)
    dense = dense_twin(base, exact, tmp_path / "dense").to("cuda").eval()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32, device_map={"": 0}).eval()
    models = []
    for model in (stock, dense):
        torch.manual_seed(0)
        models.append(get_peft_model(model, config(target_modules=[])))
    packed, dense = models
    assert all(store.packed != V5 for layer in experts_of(packed) for store in layer.stores.values())
    for model in models:
        loss(model, inputs).backward()
    expected = dict(dense.named_parameters())
    for key, parameter in packed.named_parameters():
        if "lora_" in key:
            assert relative(parameter.grad, expected[key].grad) < 1e-4, key
    with torch.no_grad():
        assert relative(first_floating(packed(**inputs)), first_floating(dense(**inputs))) < 1e-4
