"""Whole models with FP8 experts: adapters on them against the dense twin with the deltas written in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe.weights import FP8Weight
from tests.model.tiny import config, experts_of, text
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.weights.quantized import E4M3, channel_linear, fp8_linear, fp8_list, fp8_stacked
from tests.zoo import first_floating, loss

V5 = int(transformers.__version__.split(".")[0]) >= 5
SCALING, CLOSE = 2.0, 2e-5

MODELS: dict[str, Any] = {
    "list": lambda: fp8_list(lambda linear: fp8_linear(linear, (32, 24))),
    "list by channel": lambda: fp8_list(channel_linear),
    "list by tensor": lambda: fp8_list(lambda linear: channel_linear(linear, per_tensor=True)),
}
if V5:
    MODELS |= {
        "stack": fp8_stacked,
        "stack, odd blocks": lambda: fp8_stacked(block=(24, 20)),
        "stack, halves": lambda: fp8_stacked(block=(64, 64), halves=True),
        "stack, ue8m0": lambda: fp8_stacked(power_of_two=True),
        "own gate": lambda: fp8_stacked("deepseek_v3"),
    }
else:
    MODELS["qwen3_moe"] = lambda: fp8_list(fp8_linear, "qwen3_moe")


def _bytes(model: nn.Module) -> dict[str, bytes]:
    return {
        key.replace("base_model.model.", "").replace(".base_layer", ""): value.contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for key, value in model.state_dict().items()
        if "lora_" not in key
    }


def _stores(model: nn.Module) -> list[FP8Weight]:
    return [store for layer in experts_of(model) for store in layer.stores.values()]  # type: ignore[misc]


def _compare(model: nn.Module, reference: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Output and gradients of the adapters against the reference, to which the deltas are added here. The output."""
    factors = adapter_factors(model, reference)
    write_deltas(factors, SCALING)
    reference.train()  # a list of experts infers without gradients; nothing in these models is random
    expected = first_floating(reference(**inputs))
    found = first_floating(model(**inputs))
    assert relative(found, expected) < CLOSE
    loss(reference, inputs).backward()
    loss(model, inputs).backward()
    gradients = expected_gradients(factors, dense_gradients(reference), SCALING)
    parameters = dict(model.named_parameters())
    assert factors
    for one, (d_a, d_b) in zip(factors, gradients, strict=True):
        for key, gradient in ((one.key, d_a), (one.key.replace("lora_A", "lora_B"), d_b)):
            assert relative(parameters[key].grad, gradient) < 1e-4, key
    return expected.detach()


@pytest.mark.parametrize("keep", ["recompute", "cache"])
@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, keep: str, tmp_path: Any) -> None:
    base, twin = MODELS[name]()
    inputs = text(base)
    before = first_floating(twin(**inputs)).detach()
    original = _bytes(base)
    fresh = copy.deepcopy(base)
    model = get_peft_model(base, config(dequantize=keep))
    assert all(isinstance(store, FP8Weight) and store.dtype == torch.float32 for store in _stores(model))
    assert {key for key, value in model.named_parameters() if value.requires_grad} == {
        key for key, _ in model.named_parameters() if "lora_" in key
    }
    expected = _compare(model, twin.requires_grad_(True), inputs)
    assert relative(expected, before) > 1e-3, "the adapter does nothing"
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(first_floating(PeftModel.from_pretrained(fresh, tmp_path)(**inputs)), expected) < CLOSE
        with model.disable_adapter():
            assert relative(first_floating(model(**inputs)), before) < CLOSE
        model.merge_adapter()
        # a float of 3 bits is all that the merge may lose: the output stays nearer to the merged than to the base
        merged = first_floating(model(**inputs))
        assert relative(merged, expected) < 0.5 * relative(before, expected)
        assert _bytes(model) != original
        model.unmerge_adapter()
    assert _bytes(model) == original
    assert all(piece.tensor.dtype == E4M3 for store in _stores(model) for piece in store.pieces)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("keep", ["recompute", "cache"])
@pytest.mark.parametrize("name", [name for name in MODELS if name in ("stack", "qwen3_moe")])
def test_checkpointing(name: str, reentrant: bool, keep: str) -> None:
    base, twin = MODELS[name]()
    inputs = text(base)
    model = get_peft_model(base, config(dequantize=keep))
    model.train()
    twin.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert base.is_gradient_checkpointing
    _compare(model, twin.requires_grad_(True), inputs)


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("stack", "list", "stack, odd blocks")])
def test_input_gradients(name: str) -> None:
    """dX through frozen FP8 experts and their adapter."""
    base, twin = MODELS[name]()
    model = get_peft_model(base, config())
    write_deltas(adapter_factors(model, twin), SCALING)
    grads = []
    for one in (model, twin):
        one.train()
        embeds = one.get_input_embeddings()(text(base)["input_ids"]).detach().requires_grad_(True)
        handle = one.get_input_embeddings().register_forward_hook(lambda *_, found=embeds: found)
        loss(one, text(base)).backward()
        handle.remove()
        grads.append(embeds.grad)
    assert relative(grads[0], grads[1]) < 1e-4


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("stack", "list")])
def test_dora_and_dropout_free_paths(name: str) -> None:
    """DoRA norms are those of the dequantized weights: with B = 0 the model is the base."""
    base, twin = MODELS[name]()
    inputs = text(base)
    model = get_peft_model(base, config(use_dora=True, init_lora_weights=True))
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < CLOSE
    loss(model, inputs).backward()
    magnitudes = [value.grad for key, value in model.named_parameters() if "magnitude" in key]
    assert magnitudes and all(grad is not None and grad.any() for grad in magnitudes)


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("stack", "list")])
def test_a_merge_that_fails_half_way_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = MODELS[name]()
    original = _bytes(base)
    model = get_peft_model(base, config())
    layer = experts_of(model)[0]

    def fails(deltas: Any) -> None:
        for _ in deltas:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(layer.stores["down_proj"], "add_", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.merge()
    assert not layer.merged_adapters
    assert _bytes(model) == original
    monkeypatch.undo()
    layer.merge()
    assert _bytes(model) != original
    layer.unmerge()
    assert _bytes(model) == original


@pytest.mark.skipif(not V5, reason="stacks are those of transformers 5")
def test_layers_in_16_bit_by_design() -> None:
    base, twin = fp8_stacked()
    path = "model.layers.1.mlp"
    base.get_submodule(path).experts = copy.deepcopy(twin.get_submodule(f"{path}.experts"))
    model = get_peft_model(base, config())
    assert [store.packed for store in _stores(model)] == [True, True, False, False]
    _compare(model, twin.requires_grad_(True), text(base))


@pytest.mark.skipif(not V5, reason="stacks are those of transformers 5")
def test_bfloat16_model_computes_in_bfloat16() -> None:
    base, twin = fp8_stacked()
    for parameter in base.parameters():
        if parameter.dtype == torch.float32 and parameter.dim() != 3:
            parameter.data = parameter.data.bfloat16()
    model = get_peft_model(base, config(), autocast_adapter_dtype=False)
    assert {store.dtype for store in _stores(model)} == {torch.bfloat16}
    inputs = text(base)
    write_deltas(adapter_factors(model, twin), SCALING)
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 0.05


@pytest.mark.skipif(not V5, reason="stacks are those of transformers 5")
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_merge_into_16_bits_gives_the_own_class_back(name: str) -> None:
    """`FP8Experts` is no 16-bit module: the model's own experts take its place, in all layers."""
    base, twin = fp8_stacked(name)
    inputs = text(base)
    kinds = [type(module).__name__ for module in twin.modules()]
    model = get_peft_model(base, config(layers_to_transform=[1], layers_pattern="layers"))
    write_deltas(adapter_factors(model, twin), SCALING)
    merged = model.merge_and_unload(dtype=torch.float32)
    assert [type(module).__name__ for module in merged.modules()] == kinds
    assert {key: value.shape for key, value in merged.named_parameters()} == {
        key: value.shape for key, value in twin.named_parameters()
    }
    with torch.no_grad():
        assert relative(first_floating(merged(**inputs)), first_floating(twin(**inputs))) < CLOSE


@pytest.mark.parametrize("name", [name for name in MODELS if name in ("stack", "list")])
def test_nothing_of_the_size_of_the_weights_is_kept_for_backward(name: str) -> None:
    base, _ = MODELS[name]()
    model = get_peft_model(base, config())
    stores = _stores(model)
    smallest = min(store.shape[0] * store.shape[1] * store.shape[2] for store in stores)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    layer = experts_of(model)[0]
    hidden = torch.randn(8, stores[0].shape[2], requires_grad=True)
    index = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], dim=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer.run_experts(hidden, index, torch.full((8, 2), 0.5))
    assert kept and max(kept) < smallest / 2
    out.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0
