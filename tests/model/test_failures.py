"""What goes wrong is said before anything is changed, and what was begun is taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.zoo import ENTRIES, first_floating


def adapted(name: str = "qwen3_moe", **options: Any) -> tuple[PeftModel, dict[str, Any]]:
    entry = ENTRIES[name]
    base = entry.build()
    inputs = entry.inputs(base)
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": [], "init_lora_weights": False, **options}
    return get_peft_model(base, MoELoraConfig(**config)), inputs


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def fail_in_last_projection(monkeypatch: pytest.MonkeyPatch, model: PeftModel) -> None:
    """The last expert projection of the model cannot be merged."""
    last = [module for module in model.modules() if isinstance(module, MoELoraLayer)][-1]
    store = last.stores["down_proj"]

    def fail(deltas: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(store, "add_", fail, raising=False)


def test_failed_merge_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(target_modules=["q_proj"])
    before = state(model)
    fail_in_last_projection(monkeypatch, model)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert_same(state(model), before)
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_failed_unloading_leaves_layers_that_can_be_unmerged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    last = [module for module in model.modules() if isinstance(module, MoELoraLayer)][-1]
    before = state(last)
    fail_in_last_projection(monkeypatch, model)
    with pytest.raises(MemoryError):
        model.merge_and_unload()
    assert_same(state(last), before)
    monkeypatch.undo()
    last.merge()
    last.unmerge()
    assert_same(state(last), before)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa", "r": 60}, {"init_lora_weights": "orthogonal", "r": 3}]
)
def test_a_start_that_cannot_be_is_refused_before_anything_changes(options: dict[str, Any]) -> None:
    model, _ = adapted()
    before = state(model)
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa' needs a rank of at most|needs even ranks"):
        model.add_adapter("other", MoELoraConfig(target_modules=[], **options))
    assert_same(state(model), before)


@pytest.mark.parametrize(
    "call", [{"weights": [1.0]}, {"weights": [1.0, 1.0], "combination_type": "ties"}, {"weights": []}]
)
def test_failed_combination_leaves_no_adapter(call: dict[str, Any]) -> None:
    model, inputs = adapted()
    model.add_adapter("b", MoELoraConfig(r=4, target_modules=[], init_lora_weights=False))
    with pytest.raises(ValueError, match="one weight each|density"):
        model.add_weighted_adapter(["default", "b"], adapter_name="c", **call)
    assert "c" not in model.peft_config
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", combination_type="cat")
    with torch.no_grad():
        model.base_model.set_adapter(["default", "b"])
        both = first_floating(model(**inputs))
        model.set_adapter("c")
        assert (first_floating(model(**inputs)) - both).norm() < 1e-4 * both.norm()


def test_bias_of_linears_trains(recwarn: pytest.WarningsRecorder) -> None:
    model, _ = adapted("gpt_oss", target_modules=["q_proj"], bias="lora_only")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.endswith("q_proj.base_layer.bias") for name in trainable)
    assert not any("proj_bias" in name for name in trainable)


@pytest.mark.parametrize("targets", [["q_porj"], "nope"])
def test_target_modules_that_match_nothing(targets: Any) -> None:
    with pytest.raises(ValueError, match="`target_modules` matches no module outside the experts"):
        adapted(target_modules=targets)


def test_patterns_of_linears_do_not_hold_on_experts() -> None:
    with pytest.raises(ValueError, match="`rank_pattern` has the pattern 'experts'.*expert_rank_pattern"):
        adapted(target_modules=["q_proj"], rank_pattern={"experts": 2})


def test_no_expert_left() -> None:
    with pytest.raises(ValueError, match=r"`expert_indices=\[\]` leaves no expert to adapt"):
        adapted(expert_indices=[])


def test_triton_where_it_cannot_run() -> None:
    pytest.importorskip("triton")
    model, inputs = adapted(experts_backend="triton")
    with pytest.raises(ValueError, match="experts_backend='triton' cannot run on cpu"):
        model(**inputs)


@pytest.mark.parametrize(
    ("option", "value"),
    [("r", 0), ("expert_alpha", "x"), ("expert_indices", 3), ("expert_indices", "all"), ("expert_indices", [1.7]),
     ("expert_indices", {"a": [1]}), ("expert_rank_pattern", ["x"]), ("split_gate_up", "yes")],
)  # fmt: skip
def test_values_of_the_wrong_kind(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        MoELoraConfig(**{option: value})


@pytest.mark.parametrize("damage", ["half a linear", "a saved module", "an unknown tensor"])
def test_adapter_files_that_are_not_whole(damage: str, tmp_path: Path) -> None:
    model, _ = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if damage == "half a linear":
        wanted = next(key for key in tensors if "q_proj.lora_A" in key)
        del tensors[wanted]
    elif damage == "a saved module":
        wanted = "lm_head"
        tensors = {key: value for key, value in tensors.items() if "lm_head" not in key}
    else:
        wanted = "base_model.model.foo"
        tensors[wanted] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layout"] == "contiguous_r"
    base = ENTRIES["qwen3_moe"].build()
    before = state(base)
    with pytest.raises(ValueError, match=wanted.replace(".", r"\.")):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same(state(base), before)
