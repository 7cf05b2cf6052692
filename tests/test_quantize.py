"""Models whose experts are quantized with bitsandbytes: run, train and merge, against dequantized twins."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe import MoELoraLayer, quantize_experts
from tests.quantize_cases import (
    CONFIGS,
    LOAD,
    SCALING,
    assert_same_bytes,
    attach,
    config,
    dequantized,
    inputs,
    output,
    raw,
    small,
    twin,
)
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.zoo import first_floating, loss

bnb = pytest.importorskip("bitsandbytes")

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
