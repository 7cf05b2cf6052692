"""FP8 and MXFP4 checkpoints that stay packed: loaded, run, trained, merged, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moe.checkpoint.packed import packed_config
from peft_moe.linears import FP8LoraLinear
from peft_moe.weights import FP8Weight
from tests.model.tiny import config, experts_of
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.weights.checkpoints import dense_twin, read, write_fp8
from tests.weights.quantized import E4M3, E5M2
from tests.zoo import ENTRIES, first_floating, loss

V5 = int(transformers.__version__.split(".")[0]) >= 5
NAMES = ["qwen3_moe", "deepseek_v3"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=packed_config(str(folder)), dtype=dtype).eval()


def packed(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in model.named_parameters() if value.element_size() == 1}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_stays_fp8_and_saves_byte_for_byte(name: str, shards: int, tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    inputs = ENTRIES[name].inputs(base)
    written, exact = write_fp8(base, tmp_path / "fp8", shards=shards)
    model = load(tmp_path / "fp8")
    assert len(packed(model)) >= 2 * 2 + 2 * 2 and set(packed(model).values()) == {E4M3}
    assert not any(
        "scale" in key or value.element_size() > 1 for key, value in model.named_parameters() if key in packed(model)
    )
    twin = dense_twin(base, exact, tmp_path / "dense")
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert set(again) == set(written)
    for key, value in written.items():
        assert again[key].dtype == value.dtype, key
        assert torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)), key
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8", kind=kind)
    model = load(tmp_path / "fp8")
    assert set(packed(model).values()) == {E4M3}
    twin = dense_twin(base, exact, tmp_path / "dense")
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
    adapted = get_peft_model(model, config())
    assert all(isinstance(store, FP8Weight) for layer in experts_of(adapted) for store in layer.stores.values())
    write_deltas(adapter_factors(adapted, twin), 2.0)
    with torch.no_grad():
        assert relative(first_floating(adapted(**inputs)), first_floating(twin(**inputs))) < 2e-5


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_compressed_tensors_by_stock_transformers(kind: str, tmp_path: Path) -> None:
    """Loaded by compressed-tensors: version 4 decompresses the model in its first forward, in place."""
    pytest.importorskip("compressed_tensors")
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8", kind=kind)
    twin = dense_twin(base, exact, tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32).eval()
    model = get_peft_model(stock, config(target_modules=["q_proj"], init_lora_weights=True))
    stores = [store for layer in experts_of(model) for store in layer.stores.values()]
    assert all(store.packed for store in stores) == (not V5)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(std=0.1)
        plain = first_floating(twin(**inputs))
        for module in twin.modules():  # attention: the deltas by PEFT's own account of them
            if hasattr(module, "q_proj"):
                name = next(key for key, one in twin.named_modules() if one is module.q_proj)
                delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
                module.q_proj.weight += delta
        write_deltas(adapter_factors(model, twin), 2.0)
        expected = first_floating(twin(**inputs))
        model.merge_adapter()  # into FP8 on version 4, and decompressed by the next forward
        merged = first_floating(model(**inputs))
        assert relative(merged, expected) < 0.5 * relative(plain, expected)
        model.unmerge_adapter()
        assert relative(first_floating(model(**inputs)), expected) < 2e-5
        with model.disable_adapter():
            assert relative(first_floating(model(**inputs)), plain) < 2e-5
    assert not any(store.packed for store in stores)


def test_e5m2_is_not_cast(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8", dtype=E5M2)
    model = load(tmp_path / "fp8", torch.bfloat16)
    assert set(packed(model).values()) == {E5M2}
    scales = {key: value.dtype for key, value in model.named_parameters() if "scale" in key}
    assert scales and set(scales.values()) == {torch.float32}
    others = {value.dtype for key, value in model.named_parameters() if key not in packed(model) and key not in scales}
    assert others == {torch.bfloat16}
    twin = dense_twin(base, exact, tmp_path / "dense")
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 0.05


def test_trains_with_attention_adapters(tmp_path: Path) -> None:
    """Output and gradients of the experts' adapters behind FP8 attention, which has adapters too."""
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8")
    twin = dense_twin(base, exact, tmp_path / "dense")
    model = get_peft_model(load(tmp_path / "fp8"), config(target_modules=["q_proj", "v_proj"]))
    linears = {name: one for name, one in model.named_modules() if isinstance(one, FP8LoraLinear)}
    assert len(linears) == 4
    for name, one in linears.items():
        weight = twin.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.data += one.get_delta_weight("default").to(weight.dtype)
    factors = adapter_factors(model, twin)
    write_deltas(factors, 2.0)
    twin.requires_grad_(True)
    assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
    loss(model, inputs).backward()
    loss(twin, inputs).backward()
    gradients = expected_gradients(factors, dense_gradients(twin), 2.0)
    parameters = dict(model.named_parameters())
    for one, (d_a, d_b) in zip(factors, gradients, strict=True):
        assert relative(parameters[one.key].grad, d_a) < 1e-4
        assert relative(parameters[one.key.replace("lora_A", "lora_B")].grad, d_b) < 1e-4
    for name, one in linears.items():
        dense = twin.get_submodule(name.removeprefix("base_model.model.")).weight.grad.double()
        expected = 2.0 * dense @ one.lora_A["default"].weight.double().T
        assert relative(one.lora_B["default"].weight.grad, expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_merge_unmerge_and_save(name: str, tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    inputs = ENTRIES[name].inputs(base)
    write_fp8(base, tmp_path / "fp8", (8, 8))
    model = get_peft_model(load(tmp_path / "fp8"), config(target_modules=["o_proj"]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        adapted = first_floating(model(**inputs))
        with model.disable_adapter():
            plain = first_floating(model(**inputs))
        model.merge_adapter()
        merged = first_floating(model(**inputs))
    assert relative(merged, adapted) < 0.5 * relative(plain, adapted)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key
    unloaded = model.merge_and_unload()
    with torch.no_grad():
        assert relative(first_floating(unloaded(**inputs)), merged) < 1e-6
    unloaded.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert relative(first_floating(load(tmp_path / "merged")(**inputs)), merged) < 1e-6
        if V5:  # stock transformers dequantizes it on a CPU; those of version 4 refuse to load it there
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
            assert relative(first_floating(stock(**inputs)), merged) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_merge_into_16_bits(name: str, tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    inputs = ENTRIES[name].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8")
    twin = dense_twin(base, exact, tmp_path / "dense")
    model = get_peft_model(load(tmp_path / "fp8"), config(layers_to_transform=[0], layers_pattern="layers"))
    write_deltas(adapter_factors(model, twin), 2.0)
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not packed(merged) and not any("scale" in key for key, _ in merged.named_parameters())
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in twin.named_parameters()}
    assert [type(one).__name__ for one in merged.modules()] == [type(one).__name__ for one in twin.modules()]
    with torch.no_grad():
        expected = first_floating(twin(**inputs))
        assert relative(first_floating(merged(**inputs)), expected) < 2e-5
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert relative(first_floating(stock(**inputs)), expected) < 2e-5


def test_rounded_once_into_16_bits(tmp_path: Path) -> None:
    """Summed in fp32: not the bf16 of a bf16."""
    base = ENTRIES["qwen3_moe"].build()
    _, exact = write_fp8(base, tmp_path / "fp8")
    twin = dense_twin(base, exact, tmp_path / "dense")
    model = get_peft_model(load(tmp_path / "fp8", torch.bfloat16), config())
    write_deltas(adapter_factors(model, twin.double()), 2.0)
    merged = model.merge_and_unload(dtype=torch.bfloat16)
    ours, theirs = dict(merged.named_parameters()), dict(twin.named_parameters())
    for key in (key for key in theirs if ".experts." in key):
        assert ours[key].dtype == torch.bfloat16
        assert (ours[key] != theirs[key].to(torch.bfloat16)).float().mean() < 1e-3, key


def test_adapter_on_a_reloaded_base(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    inputs = ENTRIES["qwen3_moe"].inputs(base)
    write_fp8(base, tmp_path / "fp8")
    model = get_peft_model(load(tmp_path / "fp8"), config(target_modules=["q_proj"]))
    with torch.no_grad():
        expected = first_floating(model(**inputs))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "fp8"), tmp_path / "adapter")
    with torch.no_grad():
        assert relative(first_floating(again(**inputs)), expected) < 1e-6


def test_the_trainer_accepts_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = ENTRIES["qwen3_moe"].build()
    write_fp8(base, tmp_path / "fp8")
    bare = load(tmp_path / "fp8")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate=1e-2,
        save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(4)]
    with pytest.raises(ValueError, match="purely quantized"):  # the guard of models without adapters stands
        Trainer(bare, arguments, train_dataset=rows)
    model = get_peft_model(bare, config(init_lora_weights=True, target_modules=["q_proj"]))
    before = {key: value.clone() for key, value in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    for key, value in model.named_parameters():
        changed = not torch.equal(value.view(torch.uint8), before[key].view(torch.uint8))
        assert changed == ("lora_B" in key) or ("lora_A" in key and value.requires_grad), key


def test_a_stock_quantizer_is_marked_for_adapted_models_alone() -> None:
    """transformers 4 says that FP8 models cannot be trained; with adapters and differentiable linears they can."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    from peft_moe.checkpoint.packed_modules import PackedLinear
    from tests.weights.quantized import fp8_linear, fp8_list

    class FP8Linear(nn.Linear):
        """As that of transformers: a class of this name whose kernels need a GPU."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("needs a GPU")

    def convert(linear: nn.Linear) -> nn.Module:
        new = fp8_linear(linear)
        new.__class__ = FP8Linear
        return new

    model, _ = fp8_list(convert)
    quantizer = FineGrainedFP8HfQuantizer(transformers.FineGrainedFP8Config(weight_block_size=(32, 32)))
    other = FineGrainedFP8HfQuantizer(transformers.FineGrainedFP8Config(weight_block_size=(32, 32)))
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    get_peft_model(model, config())
    assert quantizer.is_trainable and isinstance(quantizer, FineGrainedFP8HfQuantizer)
    assert other.is_trainable == V5
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    assert not any(type(module) is FP8Linear for module in model.modules())


def test_options_that_cannot_hold(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    write_fp8(base, tmp_path / "fp8")
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: `use_dora`"):
        get_peft_model(load(tmp_path / "fp8"), config(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj: `init_lora_weights='pissa'`"):
        get_peft_model(
            load(tmp_path / "fp8"), config(target_modules=["q_proj"], init_lora_weights="pissa", target_experts=[])
        )


def test_what_is_not_packed_is_refused(tmp_path: Path) -> None:
    ENTRIES["qwen3_moe"].build().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="its quantization is 'None', expected one of bitsandbytes, compressed-tensors, fp8"
    ):
        packed_config(str(tmp_path))


def test_linears_are_merged_once_and_a_failing_merge_changes_nothing(tmp_path: Path) -> None:
    """One adapter after the other gives the bytes of both at once: each sum is requantized from the base's own."""
    write_fp8(ENTRIES["qwen3_moe"].build(), tmp_path / "fp8")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "target_experts": []}
    model = get_peft_model(load(tmp_path / "fp8"), config(**options), adapter_name="a")
    model.add_adapter("b", config(**options))
    linear = next(module for module in model.modules() if isinstance(module, FP8LoraLinear))

    def stored() -> list[torch.Tensor]:
        base: Any = linear.get_base_layer()
        return [base.weight.view(torch.uint8).clone(), base.weight_scale_inv.clone()]

    def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))

    base = stored()
    linear.merge(adapter_names=["a", "b"])
    both = stored()
    assert not same(both, base)
    linear.unmerge()
    linear.merge(adapter_names=["a"])
    only_a = stored()
    linear.merge(adapter_names=["b"])
    assert linear.merged_adapters == ["a", "b"] and same(stored(), both)
    linear.unmerge()
    assert same(stored(), base)

    with torch.no_grad():
        linear.lora_B["b"].weight.fill_(torch.nan)
    for merged, expected in (([], base), (["a"], only_a)):
        if merged:
            linear.merge(adapter_names=merged)
        for safe in (True, False):
            with pytest.raises(ValueError, match=r"NaNs detected|not finite"):
                linear.merge(safe_merge=safe, adapter_names=["a", "b"])
            assert linear.merged_adapters == merged and same(stored(), expected)
    linear.unmerge()
    assert same(stored(), base)
