"""What PEFT's tools see and do on adapted experts: status, counting, rescaling, hot-swapping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from tests.model.deltas import add, deltas, logits, randomise, with_deltas
from tests.model.tiny import (
    BUILDERS,
    CLOSE,
    EXPERTS,
    MODELS,
    adapter_parameters,
    config,
    text,
    three_adapters,
    trainable,
)
from tests.reference import relative


def test_mixed_tuners_are_refused() -> None:
    with pytest.raises(ValueError, match="MOELORA.*not compatible"):
        get_peft_model(BUILDERS["qwen3_moe"](), config(), mixed=True)
    stock = LoraConfig(r=3, target_modules=["q_proj"])
    model = get_peft_model(BUILDERS["qwen3_moe"](), stock, adapter_name="stock", mixed=True)
    with pytest.raises(ValueError, match="MOELORA.*not compatible"):
        model.add_adapter("ours", config())


@pytest.mark.parametrize("name", MODELS)
def test_status(name: str) -> None:
    _, model, _ = three_adapters(name)
    model.set_adapter("x")
    status = get_model_status(model)
    assert status.peft_types == {"x": "MOELORA", "y": "MOELORA", "z": "MOELORA"}
    assert status.enabled is True
    assert status.active_adapters == ["x"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"x": True, "y": False, "z": False}
    assert status.available_adapters == ["x", "y", "z"]
    assert status.devices == {"x": ["cpu"], "y": ["cpu"], "z": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for p in adapter_parameters(model, "x").values())
    assert status.total_params == sum(p.numel() for p in model.parameters())
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["x"]
    model.unmerge_adapter()
    with model.disable_adapter():
        assert get_model_status(model).enabled is False
    layers = {one.name: one for one in get_layer_status(model)}
    experts = [key for key in layers if key.endswith("layers.1.mlp.experts")]
    assert len(experts) == 1 and layers[experts[0]].module_type == "MoELoraLayer"
    assert layers[experts[0]].available_adapters == ["x", "y", "z"]
    assert layers[f"{experts[0]}.gate_up_proj"].requires_grad == {"x": True, "z": False}
    assert layers[f"{experts[0]}.down_proj"].available_adapters == ["y", "z"]


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(BUILDERS["qwen3_moe"](), config())
    model.print_trainable_parameters()
    # two layers of four experts: A (3, 64) and B (80, 3), then A (3, 40) and B (64, 3)
    count = 2 * 4 * 3 * (64 + 80 + 40 + 64)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"trainable params: {count:,} || all params: {total:,}" in capsys.readouterr().out
    assert model.get_nb_trainable_parameters() == (count, total)


def test_set_requires_grad() -> None:
    _, model, _ = three_adapters("qwen3_moe")
    model.set_adapter("x")
    model.set_requires_grad(["y", "z"])
    assert trainable(model) == {key for one in "xyz" for key in adapter_parameters(model, one)}
    model.set_requires_grad("x", requires_grad=False)
    assert trainable(model) == {key for one in "yz" for key in adapter_parameters(model, one)}
    assert model.active_adapters == ["x"]


@pytest.mark.parametrize("name", MODELS)
def test_rescale_adapter_scale(name: str) -> None:
    base, model, _ = three_adapters(name)
    inputs = text(base)
    model.base_model.set_adapter(["x", "y"])
    before = logits(model, inputs)
    count = EXPERTS[name]
    halved = add(deltas(model, "x", 1.0, num_experts=count), deltas(model, "y", 0.2, [0, 2], num_experts=count))
    with rescale_adapter_scale(model, 0.5):
        assert relative(logits(model, inputs), logits(with_deltas(base, halved), inputs)) < CLOSE
        model.merge_adapter()
        assert relative(logits(model, inputs), logits(with_deltas(base, halved), inputs)) < CLOSE
        model.unmerge_adapter()
    assert torch.equal(logits(model, inputs), before)
    with rescale_adapter_scale(model, 0):
        assert relative(logits(model, inputs), logits(base, inputs)) < 1e-6


def test_rescaling_keeps_the_proportions_of_a_pattern() -> None:
    base = BUILDERS["qwen3_moe"]()
    inputs = text(base)
    options = config(expert_alpha_pattern={r".*\.1": 12}, expert_rank_pattern={r".*\.2": 1})
    model = get_peft_model(copy.deepcopy(base), options)
    for multiplier in (1.0, 0.5):
        scaling = [2 * multiplier, 4 * multiplier, 6 * multiplier, 2 * multiplier]
        expected = deltas(model, "default", scaling, ranks=[3, 3, 1, 3])
        with rescale_adapter_scale(model, multiplier):
            assert relative(logits(model, inputs), logits(with_deltas(base, expected), inputs)) < CLOSE


def saved(name: str, path: Any, seed: int, **options: Any) -> torch.Tensor:
    """Save an adapter with random values; returns what the model with it answers."""
    model = get_peft_model(BUILDERS[name](), config(target_modules=["q_proj"], **options))
    randomise(model, "default", seed, scale=0.2)
    model.save_pretrained(path)
    return logits(model, text(model.get_base_model()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expert_rank_pattern": {r".*\.0": 2}, "expert_indices": [0, 2, 3]},
        {"expert_r": 2, "split_gate_up": True},
        {"expert_alpha": 3, "expert_r": 2, "target_experts": ["down_proj"]},
    ],
    ids=["plain", "ragged", "split", "expert_alpha"],
)
def test_hotswap(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    first, second = saved(name, tmp_path / "1", 1, **options), saved(name, tmp_path / "2", 2, **options)
    model = PeftModel.from_pretrained(BUILDERS[name](), tmp_path / "1")
    inputs = text(model.get_base_model())
    assert relative(first, second) > 1e-2
    assert relative(logits(model, inputs), first) < 1e-6
    hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default", torch_device="cpu")
    assert relative(logits(model, inputs), second) < 1e-6


@pytest.mark.parametrize(
    "both",
    [{}, {"expert_r": 5}, {"expert_alpha": 3}, {"expert_alpha_pattern": {r".*\.1": 2}}, {"use_rslora": True}],
    ids=["plain", "expert_r", "expert_alpha", "pattern", "rslora"],
)
def test_hotswap_with_another_alpha_is_right_or_refused(both: dict[str, Any], tmp_path: Any) -> None:
    first = saved("qwen3_moe", tmp_path / "1", 1, **both)
    second = saved("qwen3_moe", tmp_path / "2", 2, lora_alpha=3, **both)
    model = PeftModel.from_pretrained(BUILDERS["qwen3_moe"](), tmp_path / "1")
    inputs = text(model.get_base_model())
    expected = second
    try:
        hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default", torch_device="cpu")
    except ValueError as error:
        assert "incompatible" in str(error) and "alpha" in str(error)
        expected = first
    assert relative(logits(model, inputs), expected) < 1e-6


@pytest.mark.parametrize(
    "other", [{"r": 6}, {"expert_r": 2}, {"target_experts": ["down_proj"]}, {"expert_indices": [1]}], ids=str
)
def test_hotswap_of_other_shapes_is_refused(other: dict[str, Any], tmp_path: Any) -> None:
    first = saved("qwen3_moe", tmp_path / "1", 1)
    saved("qwen3_moe", tmp_path / "2", 2, **other)
    model = PeftModel.from_pretrained(BUILDERS["qwen3_moe"](), tmp_path / "1")
    with pytest.raises(ValueError, match=f"incompatible: for {next(iter(other))}"):
        hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default", torch_device="cpu")
    assert relative(logits(model, text(model.get_base_model())), first) < 1e-6


def test_hotswap_while_merged_is_refused(tmp_path: Any) -> None:
    saved("qwen3_moe", tmp_path / "1", 1)
    model = PeftModel.from_pretrained(BUILDERS["qwen3_moe"](), tmp_path / "1")
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(model, str(tmp_path / "1"), adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("name", ["qwen3_moe", "remote_list"])
def test_compiled_hotswap(name: str, tmp_path: Any) -> None:
    first, second = saved(name, tmp_path / "1", 1), saved(name, tmp_path / "2", 2)
    model = PeftModel.from_pretrained(BUILDERS[name](), tmp_path / "1")
    inputs = text(model.get_base_model())
    prepare_model_for_compiled_hotswap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert relative(logits(compiled, inputs), first) < CLOSE
    hotswap_adapter(compiled, str(tmp_path / "2"), adapter_name="default", torch_device="cpu")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert relative(logits(compiled, inputs), second) < CLOSE
    torch._dynamo.reset()
