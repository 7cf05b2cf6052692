"""Packed checkpoints: what they stand for plus the deltas, in 16 or 32 bits, or requantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_moe import BnbExpertsConfig
from tests.checkpoint.merge.cases import ATTENTION, assert_same_weights, files_of, merge, write_adapter
from tests.weights.checkpoints import dense_twin, read, save_shards, set_quantization, write_fp8
from tests.weights.quantized import encode, encode_stack
from tests.weights.test_mxfp4 import write_gpt_oss
from tests.zoo import ENTRIES

FP8 = torch.float8_e4m3fn


def packed_case(name: str, folder: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """An FP8 base and an adapter on disk. Returns the merged dense twin, and the float64 weights of the base."""
    base = ENTRIES[name].build()
    _, exact = write_fp8(base, folder / "base", **options)
    twin = dense_twin(base, exact, folder / "dense")
    return write_adapter(twin, folder / "adapter").merge_and_unload(), exact


def scattered(folder: Path) -> None:
    """Rewrite a checkpoint so that every scale lies in another file than its weight, and one file has scales alone."""
    tensors = read(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    scales = {key for key in tensors if "scale" in key}
    index = {}
    for number, keys in enumerate((sorted(set(tensors) - scales), sorted(scales))):
        name = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_to_plain_weights(name: str, kind: str, tmp_path: Path) -> None:
    merged, exact = packed_case(name, tmp_path, kind=kind, shards=2)
    result = merge(tmp_path, dtype=torch.float32)
    found = read(tmp_path / "out")
    assert set(found) == set(exact) and result.rounding == 0
    again = type(merged).from_pretrained(tmp_path / "out").eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_same_weights(again, merged, 1e-6)


def test_scales_in_another_file(tmp_path: Path) -> None:
    merged, exact = packed_case("qwen3_moe", tmp_path)
    scattered(tmp_path / "base")
    result = merge(tmp_path, dtype=torch.float32)
    assert result.files == 1, "a file that held scales alone is left out"
    assert_same_weights(type(merged).from_pretrained(tmp_path / "out"), merged, 1e-6)


def test_sixteen_bits_by_default(tmp_path: Path) -> None:
    merged, _ = packed_case("qwen3_moe", tmp_path)
    merge(tmp_path)
    packed = {key.removesuffix("_scale_inv") for key in read(tmp_path / "base") if key.endswith("_scale_inv")}
    assert packed and {value.dtype for key, value in read(tmp_path / "out").items() if key in packed} == {
        torch.bfloat16
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and "quantization_config" not in config
    again = type(merged).from_pretrained(tmp_path / "out", dtype=torch.float32)
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_fp8_stays_fp8(kind: str, apart: bool, tmp_path: Path) -> None:
    merged, _ = packed_case("qwen3_moe", tmp_path, kind=kind)
    if apart:
        scattered(tmp_path / "base")
    result = merge(tmp_path, requantize=True)
    before, after = read(tmp_path / "base"), read(tmp_path / "out")
    assert {key: value.dtype for key, value in before.items()} == {key: value.dtype for key, value in after.items()}
    assert 0 < result.rounding < 0.3
    plain = {key: value for key, value in merged.named_parameters()}
    changed = 0
    for key, codes in after.items():
        if codes.dtype != FP8:
            continue
        scale = after.get(f"{key}_scale_inv", after.get(f"{key}_scale"))
        assert scale is not None
        if key not in plain:  # experts, which version 5 stacks: found by position
            continue
        if scale.dim() == 2:
            rows, cols = (-(-codes.shape[axis] // scale.shape[axis]) for axis in (0, 1))
            rows, cols = (32, 32) if kind == "block" else (rows, cols)
            scale = scale.repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(cols, 1)[:, : codes.shape[1]]
        wanted = plain[key].detach().double()
        error = (codes.double() * scale.double() - wanted).abs()
        assert (error <= wanted.abs() * 2**-4 + scale.double() * 2**-9).all(), key
        adapted = any(part in key for part in [*ATTENTION, ".experts."])
        same = torch.equal(codes.view(torch.uint8), before[key].view(torch.uint8))
        assert same != adapted, key
        changed += adapted
    assert changed
    blocks = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out")]
    assert blocks[0]["quantization_config"] == blocks[1]["quantization_config"]


def _stacked(folder: Path, scales: str) -> Any:
    """Llama 4 with the experts of a stack in FP8. Returns the dense twin. `scales`: how many scales a stack has."""
    twin: Any = ENTRIES["llama4_text"].build()
    twin.save_pretrained(folder)
    tensors = read(folder)
    (folder / "model.safetensors").unlink()
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        stack = tensors[key]
        block = (32, 32) if scales == "block" else tuple(stack.shape[1:])
        if scales == "one":
            codes, scale, exact = encode(stack.flatten(0, 1), (stack.shape[0] * stack.shape[1], stack.shape[2]))
            tensors[key], scale, exact = codes.view(stack.shape), scale.reshape(()), exact.view(stack.shape)
        else:
            tensors[key], scale, exact = encode_stack(stack, block)
            scale = scale.flatten() if scales == "expert" else scale
        tensors[f"{key}_scale_inv"] = scale.float()
        twin.get_parameter(key).data.copy_(exact)
    save_shards(tensors, folder)
    set_quantization(folder, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    return twin


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("scales", ["block", "expert", "one"])
def test_stacks_in_fp8(scales: str, requantize: bool, tmp_path: Path) -> None:
    twin = _stacked(tmp_path / "base", scales)
    options = {"expert_indices": [1, 3], "target_experts": ["gate_up_proj"]}
    merged = write_adapter(twin, tmp_path / "adapter", **options).merge_and_unload()
    if not requantize:
        merge(tmp_path, dtype=torch.float32)
        assert_same_weights(type(twin).from_pretrained(tmp_path / "out"), merged, 1e-6)
        return
    merge(tmp_path, requantize=True)
    before, after = read(tmp_path / "base"), read(tmp_path / "out")
    for key in (key for key in after if after[key].dtype == FP8):
        scale, wanted = after[f"{key}_scale_inv"].double(), merged.get_parameter(key).detach().double()
        for expert in range(4):
            of_expert = scale if scale.dim() == 0 else scale[expert]
            if of_expert.dim() == 2:
                rows, cols = wanted.shape[1:]
                of_expert = of_expert.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :cols]
            error = (after[key][expert].double() * of_expert - wanted[expert]).abs()
            assert (error <= wanted[expert].abs() * 2**-4 + of_expert * 2**-9).all(), (key, expert)
            same = torch.equal(after[key][expert].view(torch.uint8), before[key][expert].view(torch.uint8))
            adapted = "gate_up" in key and (expert in (1, 3) or scales == "one")
            assert same != adapted, (key, expert)


def test_requantized_experts_load_packed(tmp_path: Path) -> None:
    """What the codes stand for, by this package's own loader of packed checkpoints."""
    from peft_moe import packed_config
    from tests.model.deltas import logits

    merged, _ = packed_case("qwen3_moe", tmp_path)
    merge(tmp_path, requantize=True)
    path = tmp_path / "out"
    again = AutoModelForCausalLM.from_pretrained(path, config=packed_config(str(path)), dtype=torch.float32).eval()
    inputs = ENTRIES["qwen3_moe"].inputs(merged)
    before = logits(type(merged).from_pretrained(tmp_path / "dense"), inputs)
    wanted, found = logits(merged, inputs), logits(again, inputs)
    assert (found - wanted).norm() < 0.3 * (wanted - before).norm()


def test_codes_without_a_scale(tmp_path: Path) -> None:
    packed_case("qwen3_moe", tmp_path)
    tensors = read(tmp_path / "base")
    lost = next(key for key in tensors if key.endswith("_scale_inv"))
    del tensors[lost]
    save_shards(tensors, tmp_path / "base")
    with pytest.raises(ValueError, match=f"{lost.removesuffix('_scale_inv')}.*no scale"):
        merge(tmp_path)
    assert not (tmp_path / "out").exists()


def test_mxfp4(tmp_path: Path) -> None:
    twin = write_gpt_oss(tmp_path / "base")
    merged = write_adapter(twin, tmp_path / "adapter").merge_and_unload()
    merge(tmp_path, dtype=torch.float32)
    assert set(read(tmp_path / "out")) == set(twin.state_dict())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_same_weights(type(twin).from_pretrained(tmp_path / "out"), merged, 1e-6)


def test_mxfp4_is_not_requantized(tmp_path: Path) -> None:
    write_adapter(write_gpt_oss(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="requantize=True. is for FP8"):
        merge(tmp_path, requantize=True)


def _dequantized(module: Any, name: str) -> Tensor:
    import bitsandbytes

    parameter = module._parameters[name]
    return bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes(kind: str, nested: bool, tmp_path: Path) -> None:
    """Linears and experts, written by `BnbExpertsConfig`; the twin is what the package reads of it in memory."""
    pytest.importorskip("bitsandbytes")
    from tests.quantize_cases import twin

    if kind == "int8" and nested:
        pytest.skip("int8 has no nested scales")
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "plain")
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_use_double_quant": nested}
    options: dict[str, Any] = {"quantization_config": BnbExpertsConfig(**bits), "dtype": torch.float32}
    if kind == "nf4":
        options["quantization_config"].bnb_4bit_quant_type = "nf4"
    quantized = type(base).from_pretrained(tmp_path / "plain", **options)
    dense = twin(base, quantized).float()
    quantized.save_pretrained(tmp_path / "base")
    merged = write_adapter(dense, tmp_path / "adapter").merge_and_unload()
    merge(tmp_path, dtype=torch.float32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    again = type(base).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_weights(again, merged, 1e-6)


def test_stock_bitsandbytes_leaves_experts_plain(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from tests.quantize_cases import twin

    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = type(base).from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    dense = twin(base, quantized).float()
    quantized.save_pretrained(tmp_path / "base")
    merged = write_adapter(dense, tmp_path / "adapter").merge_and_unload()
    merge(tmp_path, dtype=torch.float32)
    assert_same_weights(type(base).from_pretrained(tmp_path / "out", dtype=torch.float32), merged, 1e-6)


def test_another_quantization_is_refused_by_name(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    write_adapter(base, tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    before = files_of(tmp_path / "base")
    with pytest.raises(ValueError, match="gptq"):
        merge(tmp_path)
    assert files_of(tmp_path / "base") == before and not (tmp_path / "out").exists()
