"""Several adapters on one model, and everything that PEFT lets a user do with them."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.model.deltas import add, deltas, logits, randomise, with_deltas
from tests.model.tiny import (
    BUILDERS,
    CLOSE,
    EXPERTS,
    MODELS,
    adapter_parameters,
    config,
    experts_of,
    stock_layers,
    text,
    three_adapters,
    trainable,
)
from tests.reference import relative
from tests.zoo import ENTRIES


@pytest.mark.parametrize("name", MODELS)
def test_several_adapters_active_together(name: str) -> None:
    base, model, expected = three_adapters(name)
    inputs = text(base)
    plain = logits(base, inputs)
    for active in ("x", "y", "z", ["x", "y"], ["z", "x", "y"]):
        model.base_model.set_adapter(active)
        names = [active] if isinstance(active, str) else active
        reference = logits(with_deltas(base, add(*(expected[one] for one in names))), inputs)
        assert relative(plain, reference) > 1e-3, f"{active} does nothing"
        assert relative(logits(model, inputs), reference) < CLOSE, active
        assert trainable(model) == {key for one in names for key in adapter_parameters(model, one)}
    with model.disable_adapter():
        assert relative(logits(model, inputs), plain) < 1e-6
    model.merge_adapter()
    assert relative(logits(model, inputs), reference) < CLOSE
    model.unmerge_adapter()
    assert relative(logits(model, inputs), reference) < CLOSE


@pytest.mark.parametrize("name", MODELS)
def test_every_active_adapter_gets_gradients(name: str) -> None:
    base, model, _ = three_adapters(name)
    inputs = text(base)
    model.base_model.set_adapter(["x", "y", "z"])
    model(**inputs).logits.float().square().mean().backward()
    for adapter in "xyz":
        grads = {key: parameter.grad for key, parameter in adapter_parameters(model, adapter).items()}
        assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values()), adapter
    model.zero_grad()
    model.set_adapter("y")
    model(**inputs).logits.float().square().mean().backward()
    assert all(parameter.grad is None for parameter in adapter_parameters(model, "x").values())


@pytest.mark.parametrize("name", MODELS)
def test_delete_adapter(name: str) -> None:
    base, model, expected = three_adapters(name)
    inputs = text(base)
    model.base_model.set_adapter(["x", "y"])
    model.delete_adapter("z")  # not active
    reference = logits(with_deltas(base, add(expected["x"], expected["y"])), inputs)
    assert relative(logits(model, inputs), reference) < CLOSE
    assert not adapter_parameters(model, "z") and "z" not in model.peft_config
    model.delete_adapter("y")  # one of two active
    assert relative(logits(model, inputs), logits(with_deltas(base, expected["x"]), inputs)) < CLOSE
    assert model.active_adapters == ["x"]
    model.delete_adapter("x")  # the last: PEFT's outer model then has none to ask, the inner one still runs
    assert relative(logits(model.base_model, inputs), logits(base, inputs)) < 1e-6
    assert not [key for key in model.state_dict() if "lora_" in key]
    model.add_adapter("new", config(r=2, lora_alpha=2))
    model.set_adapter("new")
    randomise(model, "new", 5, scale=0.2)
    reference = logits(with_deltas(base, deltas(model, "new", 1.0, num_experts=EXPERTS[name])), inputs)
    assert relative(logits(model, inputs), reference) < CLOSE
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("x")


def test_deleting_the_active_adapter_activates_another() -> None:
    base = BUILDERS["qwen3_moe"]()
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj"]), adapter_name="x")
    model.add_adapter("y", config(r=5, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="Setting active adapter to y"):
        model.delete_adapter("x")
    assert model.active_adapters == ["y"]
    assert all(layer.active == ["y"] for layer in experts_of(model))
    assert trainable(model) == set(adapter_parameters(model, "y"))


@pytest.mark.parametrize("inference_mode", [False, True])
def test_add_adapter_after_training_leaves_the_others_as_they_are(inference_mode: bool) -> None:
    base = BUILDERS["qwen3_moe"]()
    inputs = text(base)
    model = get_peft_model(base, config(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    frozen = next(iter(adapter_parameters(model, "default").values()))
    frozen.requires_grad_(False)
    before, values = trainable(model), {key: value.clone() for key, value in model.state_dict().items()}
    found = logits(model, inputs)
    identities = {key: id(parameter) for key, parameter in model.named_parameters()}
    model.add_adapter("later", config(r=5, target_modules=["q_proj"], inference_mode=inference_mode))
    assert trainable(model) == before
    assert model.active_adapters == ["default"]
    assert all(layer.active == ["default"] for layer in experts_of(model))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in values.items())
    after = {key: id(parameter) for key, parameter in model.named_parameters()}
    assert all(after[key] == identity for key, identity in identities.items()), "an optimizer would lose its parameters"
    assert torch.equal(logits(model, inputs), found)


ATTENTION = {"qwen3_moe": ("q_proj", "v_proj"), "gpt_oss": ("q_proj", "v_proj"), "remote_list": ("q_proj", "o_proj")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["none", "list", "all-linear", "usual"])
def test_target_modules(name: str, target: str) -> None:
    base = BUILDERS[name]()
    linears = {
        key for key, module in base.named_modules() if isinstance(module, nn.Linear) and ".experts." not in key
    } - {"lm_head"}
    listed = list(ATTENTION[name])
    value = {"none": [], "list": listed, "all-linear": "all-linear", "usual": None}[target]
    model = get_peft_model(base, config(target_modules=value))
    adapted = {key.removeprefix("base_model.model.") for key in stock_layers(model)}
    assert len(experts_of(model)) == 2
    assert not [key for key in adapted if ".experts." in key], "an expert's own linear was adapted as a linear"
    if target == "none":
        assert not adapted
    elif target == "list":
        assert adapted == {key for key in linears if key.endswith(tuple(listed))}
    elif target == "all-linear":
        assert adapted == linears
    else:
        assert not adapted, "PEFT lists no usual modules for this architecture"
    inputs = text(base)
    model(**inputs).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_usual_target_modules() -> None:
    model = get_peft_model(ENTRIES["mixtral"].build(), config(target_modules=None))
    assert {key.rpartition(".")[2] for key in stock_layers(model)} == {"q_proj", "v_proj"}
    assert len(experts_of(model)) == 2


def test_without_target_experts_it_is_stock_lora() -> None:
    torch.manual_seed(3)
    ours = get_peft_model(BUILDERS["qwen3_moe"](), config(target_experts=[], target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(3)
    stock = get_peft_model(
        BUILDERS["qwen3_moe"](),
        LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    assert not experts_of(ours)
    assert list(ours.state_dict()) == list(stock.state_dict())
    inputs = text(ours.get_base_model())
    assert relative(logits(ours, inputs), logits(stock, inputs)) < 1e-6  # frozen lists run grouped


def router(base: nn.Module) -> str:
    return next(key for key, _ in base.named_modules() if re.search(r"layers\.0\.mlp\.(gate|router)$", key))


@pytest.mark.parametrize("name", MODELS)
def test_modules_to_save(name: str, tmp_path: Any) -> None:
    base = BUILDERS[name]()
    inputs = text(base)
    gate = router(base).rpartition(".")[2]
    model = get_peft_model(copy.deepcopy(base), config(modules_to_save=["lm_head", gate]))
    saved = {key for key in trainable(model) if "modules_to_save" in key}
    assert any(".lm_head." in key for key in saved) and sum(f".{gate}." in key for key in saved) >= 2
    assert trainable(model) == saved | set(adapter_parameters(model, "default"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    weights = [parameter for key, parameter in model.named_parameters() if key in saved and key.endswith("weight")]
    assert weights and all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights)
    found = logits(model, inputs)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative(logits(reloaded, inputs), found) < 1e-6
    merged = model.merge_and_unload()
    assert relative(logits(merged, inputs), found) < CLOSE
    assert list(merged.state_dict()) == list(base.state_dict())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [{"exclude_modules": r".*layers\.0\..*"}, {"layers_to_transform": [1]}, {"layers_to_transform": 1}],
    ids=["exclude", "layers", "layer"],
)
def test_some_layers_only(name: str, options: dict[str, Any]) -> None:
    base = BUILDERS[name]()
    inputs = text(base)
    if name == "remote_list" and "layers_to_transform" in options:
        options = options | {"layers_pattern": "layers"}  # PEFT's guess wants something before `layers`
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj"], **options))
    assert [layer.name for layer in experts_of(model)] == [
        key for key, module in base.named_modules() if key.endswith("layers.1.mlp.experts")
    ]
    assert len(stock_layers(model)) == 1
    reference = with_deltas(base, deltas(model, "default", 2.0, num_experts=EXPERTS[name]))
    with torch.no_grad():
        for key, module in model.named_modules():
            if key in stock_layers(model):
                weight = reference.get_submodule(key.removeprefix("base_model.model.")).weight
                weight += module.get_delta_weight("default")
    assert relative(logits(model, inputs), logits(reference, inputs)) < CLOSE


def test_excluding_all_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match="(?i)exclude"):
        get_peft_model(BUILDERS["qwen3_moe"](), config(exclude_modules=r".*\.experts"))


@pytest.mark.parametrize("name", MODELS)
def test_low_cpu_mem_usage(name: str, tmp_path: Any) -> None:
    base = BUILDERS[name]()
    inputs = text(base)
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj"], expert_rank_pattern={r".*\.1": 2}))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    options = config(target_modules=["q_proj"])
    empty = get_peft_model(copy.deepcopy(base), options, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in adapter_parameters(empty, "default").values()} == {"meta"}
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    assert not [key for key, parameter in reloaded.named_parameters() if parameter.is_meta]
    assert relative(logits(reloaded, inputs), expected) < 1e-6
    reloaded.load_adapter(tmp_path, adapter_name="second", low_cpu_mem_usage=True)
    reloaded.set_adapter("second")
    assert relative(logits(reloaded, inputs), expected) < 1e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_adapter_dtype(name: str, autocast: bool, tmp_path: Any) -> None:
    base = BUILDERS[name]().bfloat16()
    inputs = text(base)
    options = config(target_modules=["q_proj"])
    model = get_peft_model(copy.deepcopy(base), options, autocast_adapter_dtype=autocast)
    model.add_adapter("second", config(target_modules=["q_proj"]), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else torch.bfloat16
    for adapter in ("default", "second"):
        assert {p.dtype for p in adapter_parameters(model, adapter).values()} == {expected}
    found = logits(model, inputs)
    assert found.dtype == torch.bfloat16
    reference = with_deltas(
        base.float(), deltas(model, "default", 2.0, num_experts=EXPERTS[name])
    )  # in fp32: what bf16 rounds
    with torch.no_grad():
        for key in stock_layers(model):
            weight = reference.get_submodule(key.removeprefix("base_model.model.")).weight
            weight += model.get_submodule(key).get_delta_weight("default").float()
    expected_logits = logits(reference, inputs)
    errors = (found - expected_logits).norm(dim=-1) / expected_logits.norm(dim=-1)
    assert float(errors.median()) < 3e-2  # the median: rounding sends a few tokens to another expert
    model(**inputs).logits.float().square().mean().backward()
    assert {p.grad.dtype for p in adapter_parameters(model, "default").values()} == {expected}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    reloaded = PeftModel.from_pretrained(base.bfloat16(), tmp_path, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in adapter_parameters(reloaded, "default").values()} == {expected}
    assert torch.equal(logits(reloaded, inputs), found)


@pytest.mark.parametrize("name", MODELS)
def test_inference_mode(name: str, tmp_path: Any) -> None:
    base = BUILDERS[name]().requires_grad_(True)
    inputs = text(base)
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj"], inference_mode=True))
    assert not trainable(model)
    model.save_pretrained(tmp_path)
    assert not trainable(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert trainable(again) == set(adapter_parameters(again, "default"))
    assert relative(logits(again, inputs), logits(model, inputs)) < 1e-6
    with torch.inference_mode():
        assert relative(first(model, inputs), logits(model, inputs)) < 1e-6
    again(**inputs).logits.square().mean().backward()  # after inference mode: no tensor of it may have been kept


def first(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs).logits.clone()


@pytest.mark.parametrize("name", MODELS)
def test_inference_mode_before_training(name: str) -> None:
    pattern = {"expert_rank_pattern": {r".*\.2": 1}}
    model = get_peft_model(BUILDERS[name](), config(expert_indices=[0, 2], **pattern)).double().float()
    inputs = text(model.get_base_model())
    with torch.inference_mode():
        model(**inputs)
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapter_parameters(model, "default").values())


@pytest.mark.parametrize("name", MODELS)
def test_unload_gives_the_base_back(name: str) -> None:
    base, model, _ = three_adapters(name)
    inputs = text(base)
    model.set_adapter("x")
    unloaded = model.unload()
    assert not experts_of(unloaded) and list(unloaded.state_dict()) == list(base.state_dict())
    assert all(torch.equal(unloaded.state_dict()[key], value) for key, value in base.state_dict().items())
    assert relative(logits(unloaded, inputs), logits(base, inputs)) < 1e-6
    again = get_peft_model(unloaded, config())
    expected = deltas(again, "default", 2.0, num_experts=EXPERTS[name])
    assert relative(logits(again, inputs), logits(with_deltas(base, expected), inputs)) < CLOSE
