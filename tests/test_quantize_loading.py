"""Loading, saving and refusing models whose experts are quantized with bitsandbytes."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe import BnbExpertsConfig, MoELoraLayer, packed_config, quantize_experts
from peft_moe.quantize import packing
from tests.quantize_cases import (
    CONFIGS,
    LOAD,
    assert_same_bytes,
    attach,
    config,
    dequantized,
    inputs,
    output,
    raw,
    small,
)
from tests.reference import relative
from tests.zoo import first_floating, loss

bnb = pytest.importorskip("bitsandbytes")

# --- load and save -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_loading_quantizes_and_saving_keeps_the_bytes(name: str, kind: str, tmp_path: Path) -> None:
    base = small(name)
    base.save_pretrained(tmp_path / "dense")
    wanted = quantize_experts(copy.deepcopy(base), config(kind, experts_blocksize=64))
    options = config(kind, experts_blocksize=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options, **LOAD).train()
    assert_same_bytes(raw(model), raw(wanted))
    assert type(model.config.quantization_config).__name__ == "BnbExpertsConfig" and model.is_quantized
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "experts" in n and "bias" not in n]

    if kind == "nested" and isinstance(model.model.layers[0].mlp.experts, nn.ModuleList):
        # transformers 4 casts bytes in a floating storage unless the model has just that dtype: refused, not garbled
        model.save_pretrained(tmp_path / "packed")
        with pytest.raises(ValueError, match="cast its bytes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **LOAD)
        return
    for saved in (model, wanted):  # loaded, and quantized in memory
        saved.save_pretrained(tmp_path / "packed")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **LOAD).train()
        assert_same_bytes(raw(again), raw(wanted))
        assert relative(output(again), output(model)) < 1e-6
    adapted = attach(again)
    loss(adapted, inputs(adapted)).backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


def test_linears_follow_stock_behaviour(tmp_path: Path) -> None:
    base = small()
    base.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config("nf4", experts_only=False), **LOAD
    ).train()
    names = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert "model.layers.0.self_attn.q_proj" in names and "lm_head" not in names
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **LOAD).train()
    assert_same_bytes(raw(again), raw(model))
    assert relative(output(again), output(model)) < 1e-6
    adapted = attach(model, target_modules=["q_proj"])
    loss(adapted, inputs(adapted)).backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.experts", r"model\.layers\.1\.mlp", "layers.1"])
def test_skipped_modules_keep_16_bits(pattern: str, tmp_path: Path) -> None:
    base = small()
    base.save_pretrained(tmp_path / "dense")
    options = config("nf4", skip_modules=[pattern, "lm_head"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options, **LOAD)
    memory = quantize_experts(copy.deepcopy(base), options)
    for model in (memory, loaded):
        packed = set(dequantized(model))
        assert packed and all(".layers.0.mlp.experts" in path for path in packed)
    loaded.train().save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **LOAD).train()
    assert_same_bytes(raw(again), raw(loaded))
    assert relative(output(again), output(loaded)) < 1e-6


def test_lists_saved_elsewhere_are_refused_by_a_stack(tmp_path: Path) -> None:
    """What transformers 4 writes of a list of packed experts: transformers 5 would stack the bytes as weights."""
    base = small()
    if isinstance(base.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("this transformers holds the experts as a list")
    from safetensors.torch import load_file, save_file

    model = quantize_experts(base, config("nf4"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        value = tensors.pop(key)
        front, _, leaf = key.partition(".experts.")
        for expert in range(4):
            for linear in ("gate_proj", "up_proj") if "gate_up" in leaf else ("down_proj",):
                rest = leaf.replace("gate_up_proj", f"{linear}.weight").replace("down_proj", f"{linear}.weight")
                tensors[f"{front}.experts.{expert}.{rest.replace('.weight.weight', '.weight')}"] = value.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, **LOAD)


def test_a_checkpoint_without_statistics_is_refused(tmp_path: Path, caplog: Any) -> None:
    from safetensors.torch import load_file, save_file

    model = quantize_experts(small("gpt_oss"), config("nf4"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = [key for key in tensors if key.endswith("experts.down_proj.absmax")]
    assert lost
    save_file({k: v for k, v in tensors.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with caplog.at_level("WARNING"), pytest.raises((RuntimeError, ValueError)) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path, **LOAD)
    assert "The checkpoint is not complete" in caplog.text + str(raised.value)


def test_loading_holds_one_stack_in_16_bits_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stack is quantized, how many other large 16-bit tensors are alive."""
    base = small(num_hidden_layers=4, mlp_layer_types=["sparse"] * 4, num_experts=8)
    base.save_pretrained(tmp_path)
    experts = base.model.layers[0].mlp.experts
    layer_bytes = sum(p.numel() * 4 for p in experts.parameters())
    del base, experts
    gc.collect()
    alive: list[int] = []
    original = packing.pack

    def stacks() -> dict[int, int]:
        gc.collect()
        real = (Tensor, nn.Parameter)  # other tests may have left fake ones behind
        return {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if type(one) in real and one.device.type == "cpu" and one.dtype == torch.float32 and one.dim() > 1
        }

    before = stacks()

    def measure(values: Tensor, *args: Any) -> Any:
        storages = {place: size for place, size in stacks().items() if place not in before}
        floor = 8 * 64 * 128 * 4  # of one projection's experts: what is smaller is no stack
        alive.append(sum(size for size in storages.values() if size >= floor))
        return original(values, *args)

    monkeypatch.setattr("peft_moe.quantize.loader.pack", measure)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config("nf4"), **LOAD)
    if isinstance(model.model.layers[0].mlp.experts, nn.ModuleList):
        assert not alive  # stock: one linear after the other
        return
    assert len(alive) == 8 and max(alive) <= 1.1 * layer_bytes


# --- the config ----------------------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    import json

    from transformers.quantizers.auto import AutoQuantizationConfig

    for options in (
        {"load_in_4bit": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "experts_blocksize": 256},
        {"load_in_8bit": True, "skip_modules": ["lm_head"], "experts_only": True},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16", "experts_compute_dtype": "float16"},
    ):
        config = BnbExpertsConfig(**options)
        saved = json.loads(json.dumps(config.to_dict()))
        assert "load_in_4bit" not in saved and "load_in_8bit" not in saved
        again = AutoQuantizationConfig.from_dict(saved)
        assert type(again) is BnbExpertsConfig and again.to_dict() == config.to_dict()
        assert again.compute_dtype == config.compute_dtype and again.load_in_8bit == config.load_in_8bit
        assert AutoQuantizationConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()
        assert "BnbExpertsConfig" in repr(config)
    assert BnbExpertsConfig(load_in_4bit=True).compute_dtype is None  # not float32, which is stock for linears
    assert BnbExpertsConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16").compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "load_in_4bit"),
        ({"load_in_4bit": True, "experts_blocksize": 100}, "experts_blocksize"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
        ({"load_in_4bit": True, "skip_modules": ["a"], "llm_int8_skip_modules": ["b"]}, "skip_modules"),
        ({"load_in_4bit": True, "experts_compute_dtype": "int8_t"}, "experts_compute_dtype"),
    ],
)
def test_config_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BnbExpertsConfig(**options)


def test_quantize_experts_refuses() -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        quantize_experts(nn.Sequential(nn.Linear(4, 4)), config("nf4"))
    model = quantize_experts(small("gpt_oss"), config("nf4"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts.*quantized already"):
        quantize_experts(model, config("nf4"))
    with pytest.raises(ValueError, match="adapters already"):
        quantize_experts(attach(small("gpt_oss")), config("nf4"))


def test_quantize_experts_checks_all_before_it_changes_any() -> None:
    model = small("gpt_oss")
    last = model.model.layers[-1].mlp.experts.down_proj
    before = output(model)
    with torch.no_grad():
        saved = last[0, 0, 0].item()
        last[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj: the weights hold values that are not"):
        quantize_experts(model, config("nf4"))
    with torch.no_grad():
        last[0, 0, 0] = saved
    assert torch.equal(output(model), before)
    codes = nn.Parameter(last.data.to(torch.float8_e4m3fn), requires_grad=False)
    model.model.layers[-1].mlp.experts.down_proj = codes
    for kind in ("nf4", "int8"):
        with pytest.raises(ValueError, match=r"down_proj: expected weights in 16 or 32 bits .*float8_e4m3fn"):
            quantize_experts(model, config(kind))
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_floating_point()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_experts_of_a_model_whose_linears_stock_transformers_quantized(kind: str, tmp_path: Path) -> None:
    """It leaves stacks in 16 bits; once they are quantized, the saved config has to name the linears, too."""
    from transformers import BitsAndBytesConfig

    small("gpt_oss").save_pretrained(tmp_path / "dense")
    same = {key: value for key, value in CONFIGS[kind].items() if not key.startswith("experts")}
    stock = BitsAndBytesConfig(**same)
    stock.llm_int8_skip_modules = ["lm_head", "q_proj"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=stock, **LOAD).train()
    classes = {name: type(module) for name, module in model.named_modules()}
    assert classes["model.layers.0.self_attn.k_proj"].__name__ in ("Linear4bit", "Linear8bitLt")
    for other in set(CONFIGS) - {kind}:
        with pytest.raises(ValueError, match=r"k_proj is in \w+, and the experts were to be in \w+"):
            quantize_experts(model, config(other))
    quantize_experts(model, config(kind, experts_blocksize=64))
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", **LOAD).train()
    assert {name: type(module) for name, module in again.named_modules()} == classes
    assert_same_bytes(raw(again), raw(model))
    assert relative(output(again), output(model)) < 1e-6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_a_checkpoint_whose_experts_are_in_16_bits_says_so(name: str, kind: str, tmp_path: Path, caplog: Any) -> None:
    """As stock transformers writes it where experts are stacked. They are quantized once it was loaded without us."""
    from transformers import BitsAndBytesConfig

    small(name).save_pretrained(tmp_path / "dense")
    stock = BitsAndBytesConfig(**CONFIGS[kind])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=stock, **LOAD).train()
    if isinstance(model.model.layers[0].mlp.experts, nn.ModuleList):
        pytest.skip("this transformers holds the experts as a list of linears")
    model.save_pretrained(tmp_path / "stock")
    with caplog.at_level("WARNING"), pytest.raises((RuntimeError, ValueError)) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock", config=packed_config(str(tmp_path / "stock")), **LOAD)
    assert "experts in 16 bits. Load it with plain" in caplog.text + str(raised.value)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", **LOAD).train()
    assert_same_bytes(raw(quantize_experts(plain, config(kind))), raw(quantize_experts(model, config(kind))))


def test_experts_of_a_model_whose_linears_are_fp8_stay() -> None:
    model = small("gpt_oss")
    linear = model.model.layers[0].self_attn.k_proj
    linear.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"k_proj holds .*torch\.float8_e4m3fn, so this model is quantized in another"):
        quantize_experts(model, config("nf4"))


def test_compute_dtype_casts_there_and_back() -> None:
    model = quantize_experts(small("gpt_oss"), config("nf4", bnb_4bit_compute_dtype="bfloat16"))
    exact = quantize_experts(small("gpt_oss"), config("nf4"))
    seen = []
    hook = model.model.layers[0].mlp.experts.register_forward_hook(lambda m, a, out: seen.append(first_floating(out)))
    difference = relative(output(model), output(exact))
    hook.remove()
    assert seen[0].dtype == torch.float32 and 1e-5 < difference < 0.2
    layer = next(m for m in attach(model).modules() if isinstance(m, MoELoraLayer))
    assert {store.dtype for store in layer.stores.values()} == {torch.bfloat16}


def test_bitsandbytes_stays_optional() -> None:
    """Without it the package imports, the config can be made, and quantizing says what is missing."""
    code = (
        "import sys, torch; sys.modules['bitsandbytes'] = None\n"
        "import peft_moe\n"
        "from peft_moe.quantize.packing import pack\n"
        "config = peft_moe.BnbExpertsConfig(load_in_4bit=True)\n"
        "try:\n    pack(torch.ones(2, 4, 64), config.settings())\n"
        "except ImportError as error:\n    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout and "bitsandbytes" in done.stdout
