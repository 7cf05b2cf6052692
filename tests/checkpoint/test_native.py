"""What is written, and what is refused: every refusal leaves the model in memory as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe import MoELoraConfig
from peft_moe.checkpoint import native
from tests.zoo import ENTRIES, first_floating

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = "base_model.model.model.layers.{}.mlp.experts.{}.lora_{}"


def build() -> nn.Module:
    """Two layers of four experts: H = 64, I = 40."""
    return ENTRIES["qwen3_moe"].build()


def adapted(**options: Any) -> PeftModel:
    options = {"r": 3, "target_modules": ["q_proj"], **options}
    return get_peft_model(build(), MoELoraConfig(init_lora_weights=False, **options)).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return first_floating(model(**ENTRIES["qwen3_moe"].inputs(model)))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path / FILE, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


# --- what is written ---------------------------------------------------------------------------------------------


def test_files_and_keys(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FILE, CONFIG, "README.md"}
    found = shapes(tmp_path)
    expected = {}
    for layer in (0, 1):
        expected[EXPERTS.format(layer, "gate_up_proj", "A")] = (4, 3, 64)
        expected[EXPERTS.format(layer, "gate_up_proj", "B")] = (4, 80, 3)
        expected[EXPERTS.format(layer, "down_proj", "A")] = (4, 3, 40)
        expected[EXPERTS.format(layer, "down_proj", "B")] = (4, 64, 3)
        attention = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        expected |= {attention + "A.weight": (3, 64), attention + "B.weight": (64, 3)}
    assert found == expected
    trainable = {name.replace(".default", ""): one for name, one in model.named_parameters() if one.requires_grad}
    assert trainable.keys() == found.keys()
    tensors = load_file(tmp_path / FILE)
    assert all(torch.equal(tensors[key], trainable[key]) for key in tensors)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (written["peft_type"], written["format_version"], written["layout"]) == ("MOELORA", 1, "contiguous_r")
    size = sum(one.numel() * 4 for one in tensors.values())
    assert (tmp_path / FILE).stat().st_size < size + 4096, "more than the trained tensors was written"


def test_the_model_card_says_what_to_import(tmp_path):
    adapted().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import peft_moe" in card and "pip install peft-moe" in card


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"split_gate_up": True}, {"gate_proj.A": (4, 3, 64), "gate_proj.B": (4, 40, 3), "up_proj.B": (4, 40, 3)}),
        (
            {"share_experts": "outer"},
            {"gate_up_proj.A": (1, 3, 64), "gate_up_proj.B": (4, 80, 3), "down_proj.B": (1, 64, 3)},
        ),
        ({"expert_indices": [2, 0]}, {"gate_up_proj.A": (2, 3, 64), "down_proj.B": (2, 64, 3)}),
        ({"expert_r": 5}, {"gate_up_proj.A": (4, 5, 64), "down_proj.B": (4, 64, 5)}),
        ({"target_experts": ["down_proj"]}, {"down_proj.A": (4, 3, 40), "gate_up_proj.A": None}),
        (
            {"expert_rank_pattern": {r".*\.0\.mlp\.experts\.2": 6, r".*\.0\.mlp\.experts\.0": 1}},
            {"gate_up_proj.A": (13, 64), "gate_up_proj.B": (13, 80), "down_proj.A": (13, 40), "down_proj.B": (13, 64)},
        ),
    ],
    ids=lambda one: next(iter(one)),
)
def test_shapes_and_reload(options, expected, tmp_path):
    model = adapted(**options)
    model.save_pretrained(tmp_path)
    found = shapes(tmp_path)
    for name, shape in expected.items():
        assert found.get(EXPERTS.format(0, *name.split("."))) == shape, name
    again = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(output(again), output(model))


def test_ragged_rows_follow_each_other(tmp_path):
    """Expert e's rows of A, then those of expert e + 1, and the same for the columns of B: written out here by hand."""
    model = adapted(target_modules=[], expert_rank_pattern={r".*\.1": 1, r".*\.3": 2}, lora_alpha=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    ranks, scaling = [3, 1, 3, 2], [1.0, 3.0, 1.0, 1.5]
    base = build()
    merged = model.merge_and_unload()
    views = {"gate_up_proj": expert_weights(base, merged, "gate_up"), "down_proj": expert_weights(base, merged, "down")}
    for slot, pairs in views.items():
        a, b = (tensors[EXPERTS.format(1, slot, factor)].split(ranks) for factor in "AB")
        for expert, (before, after) in enumerate(pairs):
            delta = scaling[expert] * b[expert].T @ a[expert]
            torch.testing.assert_close(after - before, delta, rtol=1e-4, atol=1e-5)


def expert_weights(base: nn.Module, merged: nn.Module, which: str) -> list[tuple[Tensor, Tensor]]:
    """(before, after) of every expert of the second layer, `(out, in)`."""
    found = []
    for model in (base, merged):
        experts = model.model.layers[1].mlp.experts
        if hasattr(experts, "gate_up_proj"):
            found.append(list(experts.gate_up_proj if which == "gate_up" else experts.down_proj))
        elif which == "gate_up":
            found.append([torch.cat([one.gate_proj.weight, one.up_proj.weight]) for one in experts])
        else:
            found.append([one.down_proj.weight for one in experts])
    return list(zip(*found, strict=True))


def test_pickled_weights_are_read_where_that_is_allowed(tmp_path, monkeypatch):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / FILE).exists()
    monkeypatch.setenv("PEFT_MOE_ALLOW_PICKLE", "1")
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path)), output(model))


def test_modules_to_save_and_bias_travel_along(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path)), output(model))


# --- what is refused -----------------------------------------------------------------------------------------------


class State:
    """Everything of a model that a failed load might change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        self.tensors = {key: value.clone() for key, value in model.state_dict().items()}
        self.flags = {name: (id(one), one.requires_grad) for name, one in model.named_parameters()}
        self.forwards = [vars(module).get("forward") for module in model.modules()]
        self.hooks = [len(module._forward_hooks) for module in model.modules()]
        self.output = output(model)

    def check(self) -> None:
        model = self.model
        assert [(name, id(module), module.training) for name, module in model.named_modules()] == self.modules
        found = model.state_dict()
        assert list(found) == list(self.tensors)
        assert all(torch.equal(found[key], value) for key, value in self.tensors.items())
        assert {name: (id(one), one.requires_grad) for name, one in model.named_parameters()} == self.flags
        assert [vars(module).get("forward") for module in model.modules()] == self.forwards
        assert [len(module._forward_hooks) for module in model.modules()] == self.hooks
        assert torch.equal(output(model), self.output)


def refused(path: Path, *parts: str, error: type[Exception] = ValueError) -> None:
    """Every way of reading the adapter fails with this error and leaves the model in memory as it was."""
    base = build()
    state = State(base)
    with pytest.raises(error) as caught:
        PeftModel.from_pretrained(base, path)
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    state.check()
    assert not hasattr(base, "peft_config") or not base.peft_config

    model = adapted(r=2, lora_alpha=5)
    state = State(model)
    with pytest.raises(error):
        model.load_adapter(path, "second")
    state.check()
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    model.save_pretrained(path / "works_still")
    PeftModel.from_pretrained(build(), path / "works_still")


def edit(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / FILE)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / FILE, metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


KEY = EXPERTS.format(1, "down_proj", "B")  # (4, 64, 3)


@pytest.mark.parametrize(
    "change, shape",
    [
        (lambda one: one[:3], (3, 64, 3)),  # an expert less
        (lambda one: torch.cat([one, one]), (8, 64, 3)),
        (lambda one: one[:, :, :2], (4, 64, 2)),  # another rank
        (lambda one: one[:, :32], (4, 32, 3)),  # another width
        (lambda one: one.transpose(1, 2), (4, 3, 64)),
        (lambda one: one.reshape(64, 12), (64, 12)),  # as PEFT's own expert adapters are held
    ],
)
def test_wrong_shape(change, shape, saved):
    edit(saved, lambda tensors: tensors.update({KEY: change(tensors[KEY])}))
    refused(saved, KEY, f"found shape {shape}", "expected (4, 64, 3)", "Nothing was loaded")


def test_missing_key(saved):
    edit(saved, lambda tensors: tensors.pop(KEY))
    refused(saved, f"missing {KEY}", "Nothing was loaded")


def test_extra_key(saved):
    extra = KEY.replace("layers.1", "layers.7")
    edit(saved, lambda tensors: tensors.update({extra: tensors[KEY].clone()}))
    refused(saved, f"not used by this model {extra}", "Nothing was loaded")


def test_renamed_key(saved):
    other = KEY.replace("lora_B", "lora_C")
    edit(saved, lambda tensors: tensors.update({other: tensors.pop(KEY)}))
    refused(saved, f"missing {KEY}")


def test_many_missing_keys_are_counted(saved):
    edit(saved, lambda tensors: [tensors.pop(key) for key in list(tensors) if "experts" in key])
    refused(saved, "missing", EXPERTS.format(0, "down_proj", "A"), "and 4 more")


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"r": 4}, ["found shape (4, 3, ", "expected (4, 4, "]),
        ({"target_experts": ["down_proj"]}, ["not used by this model", "gate_up_proj"]),
        ({"expert_indices": [0, 1]}, ["found shape (4, ", "expected (2, "]),
        ({"split_gate_up": True}, ["missing", "gate_proj.lora_A", "not used", "gate_up_proj.lora_A"]),
        ({"expert_rank_pattern": {r".*\.3": 1}}, ["found shape (4, 3, ", "expected (10, "]),
        ({"expert_indices": [4]}, ["expert 4", "has 4 experts"]),
        ({"format_version": 2}, ["`format_version=2` is newer", "upgrade peft-moe"]),
        ({"layout": "expert_fastest"}, ["`layout='expert_fastest'` is unknown"]),
    ],
    ids=str,
)
def test_config_that_does_not_fit(changes, parts, saved):
    written = json.loads((saved / CONFIG).read_text()) | changes
    (saved / CONFIG).write_text(json.dumps(written))
    refused(saved, *parts)


def test_another_architecture(saved):
    base = ENTRIES["gpt_oss"].build()
    keys = list(base.state_dict())
    with pytest.raises(ValueError, match="found shape|missing"):
        PeftModel.from_pretrained(base, saved)
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("length", [0, 5, 300, 2000, -1, -1000])
def test_truncated_file(length, saved):
    data = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(data[:length])
    refused(saved, FILE, "truncated or corrupted", "Nothing was loaded")


@pytest.mark.parametrize("position", [0, 6, 8, 9])
def test_corrupted_header(position, saved):
    """The length of the header, or its first characters."""
    data = bytearray((saved / FILE).read_bytes())
    data[position] ^= 0x44
    (saved / FILE).write_bytes(bytes(data))
    refused(saved, FILE, "truncated or corrupted")


@pytest.mark.parametrize("word, other", [(b"F32", b"F99"), (b"lora_A", b"lora_Q"), (b"[4,3,64]", b"[4,64,3]")])
def test_bits_that_flip_in_the_header(word, other, saved):
    data = (saved / FILE).read_bytes()
    assert word in data
    (saved / FILE).write_bytes(data.replace(word, other, 1))
    refused(saved)


def test_no_safetensors_at_all(saved):
    (saved / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(saved, FILE, "truncated or corrupted")


LINEAR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_wrong_shape_of_a_linear(saved):
    edit(saved, lambda tensors: tensors.update({LINEAR: tensors[LINEAR][:2]}))
    refused(saved, LINEAR, "found shape (2, 64)", "expected (3, 64)", "Nothing was loaded")


def test_linear_of_another_model(saved):
    """PEFT by itself passes over it without a word."""
    other = LINEAR.replace("q_proj", "query")
    edit(saved, lambda tensors: tensors.update({other: tensors[LINEAR].clone()}))
    refused(saved, other, "no module model.layers.0.self_attn.query", "Nothing was loaded")


def test_rank_pattern_of_linears_is_known(tmp_path):
    model = adapted(target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 7})
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(build(), tmp_path)), output(model))


@pytest.mark.parametrize("key", [KEY, LINEAR])
def test_reload_over_an_adapter_in_memory_is_all_or_nothing(key, saved):
    """The adapter exists, so nothing is injected; the check comes with the tensors."""
    model = adapted()
    state = State(model)
    tensors = {name: one[:2] if name == key else one * 2 for name, one in load_file(saved / FILE).items()}
    edit(saved, lambda found: found.update(tensors))
    with pytest.raises(ValueError, match="found shape \\(2, 64"):
        model.load_adapter(saved, "default")
    state.check()


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second",
    [
        (
            "model.layers.0.block_sparse_moe.experts.gate_up_proj.lora_A",
            "model.layers.0.mlp.experts.gate_up_proj.lora_A",
        ),
        ("model.layers.3.feed_forward.experts.down_proj.lora_B", "model.layers.3.mlp.experts.down_proj.lora_B"),
        (
            "model.layers.0.block_sparse_moe.input_linear.gate_up_proj.lora_A",
            "model.layers.0.block_sparse_moe.experts.gate_up_proj.lora_A",
        ),
        ("model.layers.0.mlp.experts.fc2.down_proj.lora_A", "model.layers.0.mlp.experts.down_proj.lora_A"),
    ],
)
def test_names_of_both_versions_meet(first, second):
    prefix = "base_model.model."
    assert native.canonical(prefix + first) == native.canonical(prefix + second)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.sampled_from(["mlp", "self_attn"]),
            st.sampled_from(["gate_up_proj", "down_proj", "gate_proj", "up_proj"]),
            st.sampled_from(["lora_A", "lora_B", "lora_magnitude_vector"]),
        ),
        unique=True,
    )
)
def test_canonical_names_stay_apart(parts):
    keys = [f"base_model.model.model.layers.{n}.{block}.experts.{slot}.{factor}" for n, block, slot, factor in parts]
    assert len({native.canonical(key) for key in keys}) == len(keys)
