"""Merging and unmerging experts and linears: exact, and all or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.model.merge_cases import (
    DTYPES,
    LINEARS,
    NAMES,
    adapted,
    add,
    assert_same_bits,
    base_weights,
    build,
    changed,
    output,
)
from tests.reference import adapter_factors, relative, write_deltas

# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_unmerge_is_exact(name, dtype):
    model = adapted(name, dtype)
    before = base_weights(model)
    expected = output(model, name)
    for _ in range(2):  # a second time, so that nothing of the first round stays behind
        model.merge_adapter()
        found = changed(model, before)
        assert any("q_proj" in key for key in found) and any(
            "q_proj" not in key and "o_proj" not in key for key in found
        )
        if dtype == torch.float32:  # in 16 bit a token on the edge may go to another expert
            assert relative(output(model, name), expected) < 1e-5
        model.unmerge_adapter()
        assert_same_bits(base_weights(model), before)
        assert torch.equal(output(model, name), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_experts_are_summed_in_fp32_and_rounded_once(name, dtype):
    """Two adapters of very different size: rounding after each would show in the last bit."""
    model = adapted(name, dtype, target_modules=[])
    add(model, "small", target_modules=[], lora_alpha=0.01)
    reference = build(name, dtype).float()
    for adapter, scaling in (("default", 2.0), ("small", 0.005)):
        write_deltas(adapter_factors(model, reference, adapter), scaling)
    model.merge_adapter(["default", "small"])
    expected = {key: value.to(dtype) for key, value in reference.state_dict().items()}
    found = base_weights(model)
    for key, value in expected.items():
        apart = (found[key].double() - value.double()).abs()
        if dtype == torch.float32:
            assert apart.max() < 1e-6, key
        else:  # fp32 sums in another order may fall on the other side of a tie
            assert float((apart > 0).double().mean()) < 2e-3, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters(name, dtype):
    together, one_by_one = adapted(name, dtype), adapted(name, dtype)
    for model in (together, one_by_one):
        add(model, "second")
        add(model, "third", seed=8, r=5, target_experts=["down_proj"])
    before = base_weights(together)
    together.merge_adapter(["default", "third", "second"])
    for adapter in ("default", "third", "second"):
        one_by_one.merge_adapter([adapter])
    found, expected = base_weights(one_by_one), base_weights(together)
    experts = {key for key in found if "experts" in key or "linear" in key}
    assert experts
    assert_same_bits({key: found[key] for key in experts}, {key: expected[key] for key in experts})
    if dtype == torch.float32:
        assert relative(output(one_by_one, name), output(together, name)) < 1e-6
    for model in (together, one_by_one):
        model.unmerge_adapter()
        assert_same_bits(base_weights(model), before)
    together.base_model.set_adapter(["default", "second", "third"])
    expected_output = output(together, name)
    together.merge_adapter()
    assert dtype != torch.float32 or relative(output(together, name), expected_output) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"expert_indices": {1: [3, 0]}},
        {"expert_indices": [2]},
        {"target_experts": ["down_proj"]},
        {"expert_rank_pattern": {r".*\.0\.mlp\.experts\.[13]": 1}, "expert_alpha_pattern": {r".*\.2": 11.0}},
        {"split_gate_up": True},
        {"share_experts": "outer"},
        {"use_dora": True},
        {"use_rslora": True, "expert_r": 4},
        {"layers_to_transform": [1]},
    ],
    ids=lambda one: next(iter(one)),
)
def test_subsets_and_patterns(options):
    model = adapted(**options)
    before, expected = base_weights(model), output(model)
    model.merge_adapter(safe_merge=True)
    assert relative(output(model), expected) < 1e-5
    found = {key for key in changed(model, before) if "experts" in key}
    assert found
    if "expert_indices" in options:
        assert_experts_outside_are_untouched(model, before, options["expert_indices"])
    if options.get("target_experts"):
        assert all("down_proj" in key for key in found)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
    merged = model.merge_and_unload()
    assert relative(output(merged), expected) < 1e-5


def assert_experts_outside_are_untouched(model: nn.Module, before: dict[str, Tensor], chosen: Any) -> None:
    for key, value in base_weights(model).items():
        if "experts" not in key:
            continue
        layer = int(key.split("layers.")[1].split(".")[0])
        experts = chosen.get(layer, []) if isinstance(chosen, dict) else chosen
        if "experts.gate_up_proj" in key or "experts.down_proj" in key:
            found = [index for index in range(len(value)) if not torch.equal(value[index], before[key][index])]
            assert found == sorted(experts), key
        else:
            index = int(key.split("experts.")[1].split(".")[0])
            assert torch.equal(value, before[key]) == (index not in experts), key


def test_adapters_that_are_not_active_are_not_merged():
    model = adapted()
    before, expected = base_weights(model), output(model)
    add(model, "second")
    model.merge_adapter()
    assert relative(output(model), expected) < 1e-5
    assert model.base_model.expert_layers[0].merged_adapters == ["default"]
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)


def test_merged_and_disabled():
    """A merged model unmerges itself where adapters are disabled, as PEFT's layers do, but to the bit."""
    model = adapted(dtype=torch.bfloat16)
    before, plain, expected = base_weights(model), output(build(dtype=torch.bfloat16)), output(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model), plain)
        assert_same_bits(base_weights(model), before)
    assert torch.equal(output(model), expected)


def test_merged_and_disabled_by_transformers():
    """Its `disable_adapters` goes to each layer by itself."""
    model = build()
    model.add_adapter(MoELoraConfig(r=3, init_lora_weights=False, target_modules=[]))
    plain = output(build())
    for layer in model.modules():
        if isinstance(layer, MoELoraLayer):
            layer.merge()
    assert relative(output(model), plain) > 1e-2
    model.disable_adapters()
    assert relative(output(model), plain) < 1e-6  # a list of experts runs grouped, its block in a loop


# --- safe merge ----------------------------------------------------------------------------------------------------


def spoil(model: PeftModel, part: str, value: float) -> str:
    """Put a value that is not finite into one parameter of the last layer, so that others come before it."""
    name = [key for key, _ in model.named_parameters() if part in key][-1]
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name]
        parameter.view(-1)[3] = value
        if "lora_A" in name:  # without a zero in the other factor that would hide it
            assert dict(model.named_parameters())[name.replace("lora_A", "lora_B")].ne(0).any()
    return name.removeprefix("base_model.model.").split(".lora_")[0]


@pytest.mark.parametrize("unload", [False, True], ids=["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["experts.gate_up_proj.lora_A", "experts.down_proj.lora_B", "o_proj.lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_safe_merge_changes_nothing(part, value, unload, dtype):
    model = adapted(dtype=dtype)
    module = spoil(model, part, value)
    refuse(model, module, unload)


def refuse(model: PeftModel, module: str, unload: bool = False, adapter_names: list[str] | None = None) -> None:
    """A safe merge names the module, and leaves weights, modules and merged adapters as they were."""
    before = base_weights(model)
    modules = [(name, id(one)) for name, one in model.named_modules()]
    merged = [list(one.merged_adapters) for one in model.modules() if hasattr(one, "merged_adapters")]
    merge = model.merge_and_unload if unload else model.merge_adapter
    with pytest.raises(ValueError) as error:
        merge(safe_merge=True, adapter_names=adapter_names)
    assert module in str(error.value) and "Nothing was changed" in str(error.value), str(error.value)
    assert_same_bits(base_weights(model), before)
    assert [(name, id(one)) for name, one in model.named_modules()] == modules
    assert [list(one.merged_adapters) for one in model.modules() if hasattr(one, "merged_adapters")] == merged


@pytest.mark.parametrize("part", ["experts.down_proj.lora_B", "o_proj.lora_B"])
def test_safe_merge_sees_what_overflows_in_fp16(part):
    model = adapted(dtype=torch.float16)
    refuse(model, spoil(model, part, 3e6))


@pytest.mark.parametrize("part", ["experts.down_proj.lora_magnitude_vector", "o_proj.lora_magnitude_vector"])
def test_safe_merge_sees_magnitudes(part):
    model = adapted(use_dora=True)
    refuse(model, spoil(model, part, float("nan")))


@pytest.mark.parametrize("part", ["experts.down_proj.lora_B", "o_proj.lora_B"])
def test_safe_merge_of_a_broken_second_adapter(part):
    """The first is merged already and stays so."""
    model = adapted()
    original = base_weights(model)
    add(model, "broken", target_modules=LINEARS)
    model.merge_adapter(["default"])
    module = spoil(model, f"{part}.broken", float("nan"))
    refuse(model, module, adapter_names=["broken"])
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), original)
    refuse(model, module, adapter_names=["default", "broken"])
    model.merge_adapter(["default"], safe_merge=True)
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), original)


def test_two_adapters_that_overflow_only_together():
    model = adapted(dtype=torch.float16, r=1, lora_alpha=1)
    add(model, "second", target_modules=LINEARS, r=1, lora_alpha=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.self_attn.o_proj.lora_" in name:
                parameter.fill_(200.0)  # 40000 each, 80000 together, and 65504 is the largest
    model.merge_adapter(["second"], safe_merge=True)
    model.unmerge_adapter()
    refuse(model, "layers.1.self_attn.o_proj", adapter_names=["default", "second"])


def test_unmerge_after_a_merge_and_unload_that_failed():
    model = adapted()
    before = base_weights(model)
    module = spoil(model, "experts.down_proj.lora_B", float("nan"))
    refuse(model, module, unload=True)
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_bits(base_weights(model), before)
