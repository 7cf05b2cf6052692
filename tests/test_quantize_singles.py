"""Checkpoints that bitsandbytes quantized linear by linear, as transformers 4 writes them, on both versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe import packed_config
from tests.quantize_cases import assert_same_bytes, attach, decoded, dequantized, inputs, output, raw, small
from tests.reference import relative
from tests.weights.checkpoints import read, save_shards
from tests.zoo import loss

bnb = pytest.importorskip("bitsandbytes")

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "storage": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "float32",
    },
    "int8": {"load_in_8bit": True},
}
EXPERTS = 4


def quantized(value: Tensor, kind: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """What a linear of bitsandbytes saves, by suffix of the linear's path, and the weight that it stands for."""
    if "load_in_8bit" in kind:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(value.half())
        facts = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return facts, bnb.functional.int8_vectorwise_dequant(codes, scales)
    packed, state = bnb.functional.quantize_4bit(
        value, quant_type=kind["bnb_4bit_quant_type"], compress_statistics="bnb_4bit_use_double_quant" in kind,
        quant_storage=getattr(torch, kind.get("bnb_4bit_quant_storage", "uint8")),
    )  # fmt: skip
    exact = decoded(packed, state) if value.numel() % state.blocksize == 0 else value
    return {"weight": packed, **{f"weight.{key}": one for key, one in state.as_dict(packed=True).items()}}, exact


def write(model: nn.Module, folder: Path, name: str, skip: str = "lm_head", shards: int = 1) -> dict[str, Tensor]:
    """Write a model with its linears quantized, routers too. Returns the weights that the checkpoint stands for."""
    model.save_pretrained(folder)  # type: ignore[operator]
    plain, written, exact = read(folder), {}, {}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    for key, value in plain.items():
        written[key] = exact[key] = value
        if value.dim() == 2 and ("_proj" in key or "mlp.gate" in key) and skip not in key:
            found, exact[key] = quantized(value, KINDS[name])
            del written[key]
            written |= {f"{key.removesuffix('weight')}{suffix}": one for suffix, one in found.items()}
    save_shards(written, folder, shards)
    config = json.loads((folder / "config.json").read_text())
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False, **KINDS[name]}
    config["quantization_config"] = {**stated, "llm_int8_skip_modules": [skip, "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def load(folder: Path) -> Any:
    """In the dtype of the storage: transformers 4 casts bytes that are stored as numbers."""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, config=packed_config(str(folder)), **options).train()


def stacked(exact: dict[str, Tensor], name: str) -> Tensor:
    """What the parameter of this name should decode to."""
    if name in exact:
        return exact[name]
    front, _, leaf = name.rpartition(".")
    linears = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    rows = [torch.cat([exact[f"{front}.{expert}.{one}.weight"] for one in linears]) for expert in range(EXPERTS)]
    return torch.stack(rows)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_stay_and_scales_come_along(kind: str, shards: int, tmp_path: Path) -> None:
    base = small()
    exact = write(base, tmp_path / "singles", kind, shards=shards)
    model = load(tmp_path / "singles")
    found = dequantized(model)
    assert sum(".experts." in name for name in found) in (2 * 2, 2 * 3 * EXPERTS)  # layers x projections, or linears
    for name, value in found.items():
        assert torch.equal(value, stacked(exact, name)), name
    for name, value in model.named_parameters():
        if name.endswith("mlp.gate.weight") and value.is_floating_point() and value.dim() == 2 and value.shape[1] > 1:
            assert torch.equal(value, exact[name])  # a router that this version holds plainly

    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.copy_(stacked(exact, name))
    # Linear8bitLt quantizes the activations of attention as well
    assert relative(output(model), output(base)) < (3e-2 if kind == "int8" else 1e-5)

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", dtype=torch.float32
    ).train()
    assert_same_bytes(raw(again), raw(model))
    adapted = attach(again)
    loss(adapted, inputs(adapted)).backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


def test_layers_in_16_bits(tmp_path: Path) -> None:
    exact = write(small(), tmp_path, "nf4", skip="layers.1.mlp.experts")
    model = load(tmp_path)
    packed = dequantized(model)
    assert packed and not [name for name in packed if "layers.1.mlp.experts" in name]
    for name, value in {**dict(model.named_parameters()), **packed}.items():
        if ".experts." in name:
            assert torch.equal(value, stacked(exact, name)), name


def refused(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_shards(tensors, folder)
    with pytest.raises((RuntimeError, ValueError)):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("nf4", "experts.2.gate_proj.weight.absmax", "3 experts have"),
        ("nested", "experts.0.up_proj.weight.nested_absmax", "3 experts have"),
        ("int8", "experts.1.down_proj.SCB", "3 experts have"),
        ("nf4", "experts.3.down_proj.weight", "3 experts have"),
    ],
)
def test_what_is_missing_is_refused(kind: str, key: str, words: str, tmp_path: Path, caplog: Any) -> None:
    if not hasattr(small().model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this transformers holds the experts as a list")
    write(small(), tmp_path, kind)
    refused(tmp_path, lambda tensors: tensors.pop(f"model.layers.0.mlp.{key}"))
    assert words in caplog.text


def test_scales_of_another_kind_are_refused(tmp_path: Path, caplog: Any) -> None:
    """All experts lack their scales, or one was quantized in other blocks."""
    if not hasattr(small().model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this transformers holds the experts as a list")
    write(small(), tmp_path / "a", "int8")
    refused(tmp_path / "a", lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("SCB")])
    assert "expected 4-bit statistics" in caplog.text

    base = small()
    write(base, tmp_path / "b", "nf4")

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.experts.1.down_proj.weight"
        packed, state = bnb.functional.quantize_4bit(torch.randn(64, 128), blocksize=128, quant_type="nf4")
        tensors[name] = packed
        tensors.update({f"{name}.{key}": one for key, one in state.as_dict(packed=True).items()})

    refused(tmp_path / "b", change)
    assert "quantized in different ways: nf4 in blocks of 128, nf4 in blocks of 64" in caplog.text


def test_blocks_that_end_inside_a_linear_are_refused(tmp_path: Path, caplog: Any) -> None:
    base = small(hidden_size=24, moe_intermediate_size=12)
    if not hasattr(base.model.layers[0].mlp.experts, "gate_up_proj"):
        pytest.skip("this transformers holds the experts as a list")
    write(base, tmp_path, "nf4")
    refused(tmp_path, lambda tensors: None)
    assert "no whole number of blocks of 64" in caplog.text


def test_codes_that_stock_transformers_loaded_without_scales_are_refused(tmp_path: Path) -> None:
    """transformers 5 stacks int8 codes as if they were weights, and drops their scales."""
    write(small(), tmp_path, "int8")
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    except (RuntimeError, ValueError):
        return
    if hasattr(model.model.layers[0].mlp.experts, "gate_up_proj"):
        with pytest.raises(ValueError, match=r"experts.*int8 codes without their scales.*packed_config"):
            attach(model)
