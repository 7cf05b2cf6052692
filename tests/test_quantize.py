"""Models whose experts are quantized with bitsandbytes: run, train, merge, save and load, against dequantized twins."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe import BnbExpertsConfig, MoELoraConfig, MoELoraLayer, quantize_experts
from peft_moe.quantize import packing
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.zoo import ENTRIES, first_floating, loss
from tests.zoo.entry import token_ids

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

SCALING = 2.0
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "experts_blocksize": 128},
    "nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
}
#: Square weights an expert and sides that a CPU's 4-bit kernels can multiply with. A list of experts on transformers 4.
SIZES = {"moe_intermediate_size": 128}


def small(name: str = "qwen3_moe", **overrides: Any) -> nn.Module:
    """A model in training mode: in eval mode a CPU repacks `Linear4bit`, which has rules of its own about sizes."""
    if name == "qwen3_moe":
        from tests.zoo.entry import entry

        return entry(name, "Qwen3MoeForCausalLM", "", **{**SIZES, **overrides}).build().train()
    return ENTRIES[name].build().train()


def config(kind: str, **options: Any) -> BnbExpertsConfig:
    return BnbExpertsConfig(**{**CONFIGS[kind], "experts_only": True, **options})


def inputs(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": token_ids(), "use_cache": False}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return first_floating(model(**inputs(model)))


def decoded(packed: Tensor, state: Any) -> Tensor:
    """As rows of one block: a CPU kernel of bitsandbytes is wrong about rows that are no whole blocks."""
    flat = copy.copy(state)
    flat.shape = torch.Size((state.shape.numel() // state.blocksize, state.blocksize))
    return F.dequantize_4bit(packed, flat).view(state.shape)


def dequantized(module: nn.Module) -> dict[str, Tensor]:
    """Path below a model -> weights of everything that is packed there, by bitsandbytes' own functions."""
    found = {}
    for path, child in module.named_modules():
        for name, record in vars(child).get("packed_weights", {}).items():
            parameter = getattr(child, name)
            if parameter.dtype == torch.int8:
                value = F.int8_vectorwise_dequant(parameter.data, record.state.SCB)
            else:
                value = decoded(parameter.data, record.state)
            found[f"{path}.{name}"] = value.reshape(record.shape)
        if type(child).__name__ == "Linear4bit":
            found[f"{path}.weight"] = decoded(child.weight.data, child.weight.quant_state)
        if type(child).__name__ == "Linear8bitLt":
            scales = child.state.SCB if child.weight.SCB is None else child.weight.SCB
            found[f"{path}.weight"] = F.int8_vectorwise_dequant(child.weight.data, scales)
    assert found
    return found


def twin(base: nn.Module, quantized: nn.Module) -> nn.Module:
    """A 16-bit copy of `base` with the weights that the quantized model stands for."""
    reference = copy.deepcopy(base).requires_grad_(True)
    with torch.no_grad():
        for path, value in dequantized(quantized).items():
            reference.get_parameter(path).copy_(value)
    return reference


def attach(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    values = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False}
    return get_peft_model(model, MoELoraConfig(**(values | options)))


def raw(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.replace(".base_layer", "").removeprefix("base_model.model."): value.contiguous()
        .reshape(-1)
        .view(torch.uint8)
        for key, value in copy.deepcopy(model).state_dict().items()
        if "lora_" not in key
    }


def assert_same_bytes(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


# --- run and train -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])  # gpt_oss: held (in, out), interleaved, with biases
def test_outputs_and_gradients(name: str, kind: str) -> None:
    base = small(name)
    model = quantize_experts(copy.deepcopy(base), config(kind))
    reference = twin(base, model)
    assert relative(output(model), output(base)) > 1e-4, "nothing was quantized"
    if kind != "int8" or name == "gpt_oss" or not hasattr(model.model.layers[0].mlp.experts, "__len__"):
        assert relative(output(model), output(reference)) < 2e-5  # Linear8bitLt quantizes activations, too

    model = attach(model)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    factors = adapter_factors(model, reference)
    assert factors
    write_deltas(factors, SCALING)
    # The embeddings get the gradient of the layers' input: it goes through every frozen matrix.
    model.get_input_embeddings().weight.requires_grad_(True)
    loss(reference, inputs(base)).backward()
    loss(model, inputs(base)).backward()
    with torch.no_grad():
        assert relative(first_floating(model(**inputs(base))), first_floating(reference(**inputs(base)))) < 2e-5
    assert relative(model.get_input_embeddings().weight.grad, reference.get_input_embeddings().weight.grad) < 1e-4
    parameters = dict(model.named_parameters())
    for one, (d_a, d_b) in zip(factors, expected_gradients(factors, dense_gradients(reference), SCALING), strict=True):
        assert relative(parameters[one.key].grad, d_a) < 1e-3, one.key
        assert relative(parameters[one.key.replace("lora_A", "lora_B")].grad, d_b) < 1e-3, one.key


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_gradient_checkpointing_and_kept_weights(kind: str, reentrant: bool) -> None:
    def gradients(dequantize: str, checkpointing: bool) -> dict[str, Tensor]:
        model = attach(quantize_experts(small(), config(kind)), dequantize=dequantize)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss(model, inputs(model)).backward()
        return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}

    plain = gradients("recompute", False)
    assert plain and all(value.any() for value in plain.values())
    for options in (("recompute", True), ("cache", False), ("cache", True)):
        found = gradients(*options)
        assert all(relative(found[name], value) < 1e-6 for name, value in plain.items()), options


def test_nothing_of_the_size_of_a_stack_is_kept_for_backward() -> None:
    model = attach(quantize_experts(small(), config("nf4")))
    layer = next(module for module in model.modules() if isinstance(module, MoELoraLayer))
    smallest = min(store.shape[0] * store.shape[1] * store.shape[2] for store in layer.stores.values())
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.run_experts(torch.randn(4, 64, requires_grad=True), torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert sizes and max(sizes) < smallest


def test_dora_takes_the_norms_of_the_dequantized_weights() -> None:
    base = small()
    model = quantize_experts(copy.deepcopy(base), config("nf4"))
    reference = attach(twin(base, model), use_dora=True)
    model = attach(model, use_dora=True)
    magnitudes = {n: p for n, p in reference.named_parameters() if "magnitude" in n}
    assert magnitudes
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            assert relative(parameter, magnitudes[name]) < 1e-6
            parameter.data.mul_(1.1)
            magnitudes[name].data.mul_(1.1)
    assert relative(output(model), output(reference)) < 2e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_decomposing_starts_requantize_the_residual(kind: str, init: str) -> None:
    base = small()
    model = quantize_experts(copy.deepcopy(base), config(kind))
    before = dequantized(model)
    first = output(model)
    model = attach(model, r=8, lora_alpha=8, init_lora_weights=init)
    residual = dequantized(model.base_model.model)
    assert any(
        relative(residual[path.replace(".experts", ".experts.base_layer")], v) > 0.05 for path, v in before.items()
    )
    # A and B stand for what was taken out; the rest is off by its quantization.
    with torch.no_grad():
        assert relative(first_floating(model(**inputs(base))), first) < (0.01 if kind == "int8" else 0.1)


# --- merge ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_merge_requantizes_and_unmerge_restores_the_bytes(kind: str) -> None:
    base = small()
    model = quantize_experts(copy.deepcopy(base), config(kind))
    reference = twin(base, model)
    model = attach(model)
    write_deltas(adapter_factors(model, reference), SCALING)
    before, adapted = raw(model.base_model.model), output(model)
    for _ in range(2):
        model.merge_adapter()
        assert not all(torch.equal(value, before[key]) for key, value in raw(model.base_model.model).items())
        model.unmerge_adapter()
        assert_same_bytes(raw(model.base_model.model), before)
        assert torch.equal(output(model), adapted)
    merged = model.merge_and_unload()
    exact = dict(reference.named_parameters())
    for path, value in dequantized(merged).items():
        assert relative(value, exact[path]) < (0.01 if kind == "int8" else 0.2), path
    if not any(type(module).__name__ == "Linear8bitLt" for module in merged.modules()):
        assert relative(output(merged), output(twin(base, merged))) < 2e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_linears_come_back_bit_for_bit_too(kind: str) -> None:
    """PEFT's own layers on `Linear4bit` and `Linear8bitLt` requantize there and back."""
    base = small()
    model = quantize_experts(base, config(kind))
    from peft_moe.quantize.experts import pack_linear

    for layer in model.model.layers:
        layer.self_attn.q_proj = pack_linear(layer.self_attn.q_proj, config(kind))
    setattr(model, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    model = attach(model, target_modules=["q_proj"])
    before = raw(model.base_model.model)
    model.merge_adapter(safe_merge=True)
    after = raw(model.base_model.model)
    assert any("q_proj" in key and not torch.equal(value, before[key]) for key, value in after.items())
    model.unmerge_adapter()
    assert_same_bytes(raw(model.base_model.model), before)


@pytest.mark.parametrize("kind", CONFIGS)
def test_merging_into_plain_weights_loses_nothing(kind: str, tmp_path: Path) -> None:
    base = small()
    model = quantize_experts(copy.deepcopy(base), config(kind))
    reference = twin(base, model)
    model = attach(model)
    write_deltas(adapter_factors(model, reference), SCALING)
    merged = model.merge_and_unload(dtype=torch.float32)
    assert relative(output(merged), output(reference)) < 2e-5
    exact = dict(reference.named_parameters())
    assert {name: p.dtype for name, p in merged.named_parameters()} == {name: p.dtype for name, p in exact.items()}
    assert max(relative(p, exact[name]) for name, p in merged.named_parameters()) < 1e-6
    assert not getattr(merged, "is_quantized", False)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **LOAD).train()
    assert relative(output(again), output(reference)) < 2e-5


@pytest.mark.parametrize("kind", ["nested", "int8"])
def test_merging_everything_into_plain_weights(kind: str, tmp_path: Path) -> None:
    """Attention too, adapted and not."""
    base = small()
    base.save_pretrained(tmp_path / "dense")
    options = config(kind, experts_only=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=options, **LOAD).train()
    reference = attach(twin(base, model), target_modules=["q_proj"])
    merged = attach(model, target_modules=["q_proj"]).merge_and_unload(dtype=torch.float32)
    wanted = reference.merge_and_unload()
    assert not [
        name
        for name, module in merged.named_modules()
        if type(module).__name__.startswith("Linear") and type(module) is not nn.Linear
    ]
    assert relative(output(merged), output(wanted)) < 2e-5
    merged.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **LOAD).train()
    assert relative(output(again), output(wanted)) < 2e-5


# --- load and save -------------------------------------------------------------------------------------------------

LOAD = {"attn_implementation": "eager", "dtype": torch.float32}


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


def test_a_checkpoint_without_statistics_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = quantize_experts(small("gpt_oss"), config("nf4"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = [key for key in tensors if key.endswith("experts.down_proj.absmax")]
    assert lost
    save_file({k: v for k, v in tensors.items() if k not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, **LOAD)


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

    def measure(values: Tensor, *args: Any) -> Any:
        gc.collect()
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if isinstance(one, Tensor) and one.device.type == "cpu" and one.dtype == torch.float32 and one.dim() > 1
        }
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
