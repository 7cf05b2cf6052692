"""Grouped frozen experts in a model that is adapted, trained, saved, compiled and asked to generate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from peft_moe import (
    BnbExpertsConfig,
    MoELoraConfig,
    disable_grouped_experts,
    enable_grouped_experts,
    quantize_experts,
)
from tests.grouped.cases import (
    FOUR,
    LIST,
    MODELS,
    blocks,
    build,
    calls_of,
    counted,
    expert_linear,
    first_block,
    gradient,
    inputs,
    lists_share_storage,
    output,
    pair,
    with_embeddings,
)
from tests.reference import relative

close = {"rtol": 1e-5, "atol": 1e-5}
ATTENTION = ["q_proj", "v_proj"]
#: A model of transformers, which saves, generates and has attention.
NATIVE = "qwen3_moe"


def lora(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(**{"r": 2, "target_modules": ATTENTION, "init_lora_weights": False, **options})
    )


def ours(model: nn.Module, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(
        model, MoELoraConfig(**{"r": 2, "target_modules": ATTENTION, "init_lora_weights": False, **options})
    )


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    result = output(model)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    (result * direction).mean().backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("training", [False, True])
def test_one_call_before_or_after_the_adapter(before: bool, training: bool) -> None:
    model, reference = pair(NATIVE)
    model.requires_grad_(True)  # as a model is loaded
    if before:
        enable_grouped_experts(model)
    adapted, expected = lora(model).train(training), lora(reference).train(training)
    if not before:
        assert len(enable_grouped_experts(adapted).grouped) == blocks(model)
    assert [n for n, _ in adapted.named_parameters()] == [n for n, _ in expected.named_parameters()]
    with counted() as calls:
        found = adapter_gradients(adapted)
    assert len(calls) == blocks(model)
    wanted = adapter_gradients(expected)
    assert found.keys() == wanted.keys() and found
    for key in wanted:
        assert relative(found[key], wanted[key]) < 1e-5, key


def test_adapters_save_and_load_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    adapted = lora(model)
    expected = output(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert_close(output(base), expected, **close)
    enable_grouped_experts(base)
    assert_close(output(PeftModel.from_pretrained(build(NATIVE), tmp_path / "adapter")), expected, **close)


def test_the_base_saves_and_loads_as_if_nothing_had_happened(tmp_path: Path) -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    expected = output(model)
    model.save_pretrained(tmp_path / "enabled")
    reference.save_pretrained(tmp_path / "plain")
    files = [sorted(p.name for p in (tmp_path / which).iterdir()) for which in ("enabled", "plain")]
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(tmp_path / "enabled", attn_implementation="eager")
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert_close(output(loaded), expected, **close)


@pytest.mark.parametrize("target", [None, []])
def test_by_itself_without_target_experts(target: Any) -> None:
    """On lists of experts, whose blocks would run a loop; stacked ones run grouped already."""
    model, reference = pair(NATIVE)
    adapted = ours(model, target_experts=target)
    found, calls = calls_of(adapted)
    assert calls == (blocks(model) if FOUR else 0)
    assert_close(found, output(lora(reference)), **close)
    unloaded = adapted.unload()
    assert calls_of(unloaded)[1] == 0 and not lists_share_storage(unloaded)


def test_by_itself_on_the_layers_without_an_adapter() -> None:
    model = build(LIST)
    adapted = ours(model, target_modules=[], exclude_modules=r".*layers\.0\.mlp\.experts")
    assert len(adapted.base_model.expert_layers) == blocks(model) - 1
    assert calls_of(adapted)[1] == 1
    report = enable_grouped_experts(adapted)
    assert len(report.grouped) == blocks(model) and not any(one.new for one in report.blocks)


@pytest.mark.parametrize("order", ["before", "after", "itself"])
def test_idle_adapters_run_the_frozen_experts_grouped(order: str) -> None:
    """The layer holds the weights then; when it is gone the block is as it was asked to be."""
    model, reference = pair(LIST)
    expected = output(reference)
    if order == "before":
        enable_grouped_experts(model)
        output(model)
    adapted = ours(model, target_modules=[])
    if order == "after":
        enable_grouped_experts(adapted)
    assert not torch.allclose(output(adapted), expected, **close)
    with adapted.disable_adapter():
        found, calls = calls_of(adapted)
        assert calls == blocks(model)
        assert_close(found, expected, **close)
        hook = expert_linear(adapted).register_forward_hook(lambda module, args, out: out * 2)
        assert calls_of(adapted)[1] == blocks(model) - 1, "the block itself calls the hook"
        hook.remove()
    assert not torch.allclose(output(adapted), expected, **close)
    unloaded = adapted.unload()
    found, calls = calls_of(unloaded)
    assert calls == (blocks(model) if order == "before" else 0)
    assert_close(found, expected, **close)
    disable_grouped_experts(unloaded)
    assert torch.equal(output(unloaded), expected) and not lists_share_storage(unloaded)


def test_disable_beneath_an_adapter() -> None:
    model, reference = pair(LIST)
    enable_grouped_experts(model)
    adapted = ours(model, target_modules=[])
    expected = output(adapted)
    assert len(disable_grouped_experts(adapted)) == blocks(model)
    assert_close(output(adapted), expected, **close)
    with adapted.disable_adapter():
        assert torch.equal(output(adapted), output(reference))
    assert torch.equal(output(adapted.unload()), output(reference))


def test_an_expert_adapter_that_is_loaded_later(tmp_path: Path) -> None:
    model, reference = pair(LIST)
    ours(build(LIST), target_modules=[]).save_pretrained(tmp_path / "adapter")
    enable_grouped_experts(model)
    output(model)
    found = output(PeftModel.from_pretrained(model, tmp_path / "adapter"))
    expected = output(PeftModel.from_pretrained(reference, tmp_path / "adapter"))
    assert_close(found, expected, **close)
    assert not torch.allclose(found, output(build(LIST)), **close)


@pytest.mark.skipif(FOUR, reason="stock PEFT adapts stacked experts, which transformers 5 has")
def test_stock_adapters_of_stacked_experts_are_not_ignored() -> None:
    model, reference = pair("qwen3_moe")
    enable_grouped_experts(model)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted, expected = (lora(one, target_parameters=parameters, target_modules=[]) for one in (model, reference))
    found, calls = calls_of(adapted)
    assert calls == 0
    assert_close(found, output(expected), **close)
    unloaded = adapted.unload()
    assert calls_of(unloaded)[1] == blocks(unloaded)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name: str, reentrant: bool) -> None:
    if name != "qwen3_moe":
        pytest.skip("the remote model has no checkpointing")
    model, reference = pair(name)
    enable_grouped_experts(model)
    for one in (model, reference):
        with_embeddings(one).train()
        one.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(gradient(model, found), gradient(reference, output(reference)), **close)


def test_generate_with_a_cache() -> None:
    model, reference = pair(NATIVE)
    enable_grouped_experts(model)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    ids = inputs(model)["input_ids"]
    with counted() as calls:
        found = model.generate(ids, **options)
    assert len(calls) == 6 * blocks(model)
    assert torch.equal(found, reference.generate(ids, **options))


@pytest.mark.parametrize("name", MODELS)
def test_compile(name: str) -> None:
    if name == "bailing":
        pytest.skip("the block of remote code does not compile whole")
    torch._dynamo.reset()
    model, reference = pair(name)
    enable_grouped_experts(with_embeddings(model))
    with_embeddings(reference)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs(model)).logits
    assert_close(found, output(reference), **close)
    assert_close(gradient(model, found), gradient(reference, output(reference)), **close)
    torch._dynamo.reset()


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if kind == "nested":
        options["bnb_4bit_use_double_quant"] = True
    return quantize_experts(build(LIST).to(dtype), BnbExpertsConfig(**options))


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_nothing_of_the_size_of_rows_or_weights_is_saved(kind: str) -> None:
    """In recompute mode: of the experts, the product before the activation and what came in."""
    model = build(LIST) if kind == "dense" else quantized(kind)
    enable_grouped_experts(model)
    block = first_block(model)
    spec = block.forward.experts.spec
    hidden, experts = spec.projections[0].in_features, spec.num_experts
    x = torch.randn(1, 96, hidden, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        result = block(x)
    result = result[0] if isinstance(result, tuple) else result
    gathered = 96 * 2 * hidden
    weights = experts * hidden * spec.projections[0].out_features
    own = {p.data_ptr() for p in model.parameters()}
    stack = block.forward.experts.stores[spec.projections[0].name]
    flat = stack.frozen().data_ptr() if kind == "dense" else None
    for tensor in saved:
        assert tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.shape[-1] != hidden or (
            tensor.numel() < gathered or tensor.data_ptr() in own | {flat} or kind == "dense" and tensor.dim() == 3
        )  # fmt: skip
        if kind != "dense":
            assert tensor.numel() < weights
    result.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_kept_weights_follow_dtype(kind: str) -> None:
    model, plain = quantized(kind), quantized(kind)
    enable_grouped_experts(model, dequantize="cache")
    enable_grouped_experts(plain)
    forward = first_block(model).forward
    assert_close(output(model), output(plain), **close)
    store = next(iter(forward.experts.stores.values()))
    kept = store.frozen()()
    assert kept.dtype == torch.float32 and store.frozen()().data_ptr() == kept.data_ptr()
    for one in (model, plain):
        nn.Module.to(one, torch.bfloat16)  # the model's own refuses
    found, calls = calls_of(model)
    assert calls == blocks(model)
    assert_close(found, output(plain), **close)
    assert store.frozen()().dtype == torch.bfloat16


def test_compute_dtype_is_honoured() -> None:
    """Activations are cast to it, and the result back."""
    model = quantize_experts(
        build(LIST),
        BnbExpertsConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    )
    exact = output(enable(quantized("nf4")))
    enable_grouped_experts(model)
    found, calls = calls_of(model)
    assert calls == blocks(model) and found.dtype == torch.float32
    assert 1e-4 < relative(found, exact) < 3e-2


def enable(model: nn.Module) -> nn.Module:
    enable_grouped_experts(model)
    return model


def test_linears_that_compute_in_several_dtypes_are_left_alone() -> None:
    model = quantized("nf4")
    linears = [m for m in first_block(model).experts.modules() if type(m).__name__ == "Linear4bit"]
    linears[0].compute_dtype, linears[-1].compute_dtype = torch.float32, torch.bfloat16
    report = enable_grouped_experts(model)
    assert "compute in several dtypes" in next(iter(report.left_alone.values()))
    assert len(report.grouped) == blocks(model) - 1


def test_a_compute_dtype_that_is_set_later() -> None:
    """On all linears it is honoured; on one of them the block itself has to run."""
    model = quantized("nf4").train()
    enable_grouped_experts(model)
    exact = output(model)
    linears = [m for m in first_block(model).experts.modules() if type(m).__name__ == "Linear4bit"]
    for linear in linears:
        linear.compute_dtype = torch.bfloat16
    found, calls = calls_of(model)
    assert calls == blocks(model) and 1e-6 < relative(found, exact) < 3e-2
    linears[-1].compute_dtype = torch.float32
    assert first_block(model).forward.ready(torch.zeros(1, 1, 64)) is None
    assert "compute in several dtypes" in first_block(model).forward.reason


@pytest.mark.skipif(FOUR, reason="PEFT refuses lists of modules to save")
@pytest.mark.parametrize("order", ["before", "after"])
def test_experts_among_the_modules_to_save(order: str) -> None:
    """PEFT's wrapper shows the tensors of what it wraps; the copy that trains is what runs."""
    model, reference = pair(NATIVE)
    if order == "before":
        enable_grouped_experts(model)
        output(model)
    adapted, expected = (lora(one, modules_to_save=["experts"]) for one in (model, reference))
    if order == "after":
        assert len(enable_grouped_experts(adapted).grouped) == blocks(reference)
    for one in (adapted, expected):
        with torch.no_grad():
            trained = [p for key, p in one.named_parameters() if "modules_to_save" in key]
            assert trained and all(p.requires_grad for p in trained)
            for p in trained:
                p.mul_(2)
    found, wanted = adapter_gradients(adapted), adapter_gradients(expected)
    assert any("modules_to_save" in key for key in wanted)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert relative(found[key], wanted[key]) < 1e-5, key
    with adapted.disable_adapter(), expected.disable_adapter():
        assert_close(output(adapted), output(expected), **close)


def test_merging_beneath_it() -> None:
    """An adapter merged into the experts and unloaded: what runs grouped is the merged weights."""
    model = build(LIST)
    enable_grouped_experts(model)
    output(model)
    adapted = ours(copy.deepcopy(model), target_modules=[])
    expected = output(adapted)
    merged = adapted.merge_and_unload()
    found, calls = calls_of(merged)
    assert calls == blocks(merged)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)
