"""Adapters for vLLM: taken whole by its rules, and doing there what they do here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_moe import export_adapter, import_adapter
from peft_moe.checkpoint.formats import vllm

from . import vllm_server
from .served import Dropped, Refused, Served
from .served_cases import (
    CONFIG,
    FILE,
    MODELS,
    VARIANTS,
    difference,
    drop,
    expert_deltas,
    facts_of,
    linear_deltas,
    native_logits,
    parts,
    rename,
    same_files,
    save_adapter,
    save_base,
    served_logits,
    swap,
    write,
)

CLOSE = 1e-6  # relative: float32 files


def export(adapter: Path, target: Path, **options: Any) -> Path:
    return export_adapter(adapter, target, "vllm", progress=False, **options)


def back(folder: Path, target: Path, **options: Any) -> Path:
    return import_adapter(folder, target, progress=False, **options)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            made[name] = save_base(name, tmp_path_factory.mktemp("base") / name)
        return made[name]

    return base


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_served_as_trained_and_back(name, variant, bases, tmp_path):
    base, case = bases(name), VARIANTS[variant]
    facts = facts_of(base)
    adapter = save_adapter(name, tmp_path / "adapter", base, **case.options)
    folder = export(adapter, tmp_path / "served")
    served = vllm_server.serve(folder, facts, max_lora_rank=16)
    assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, case.linears)) < CLOSE
    again = back(folder, tmp_path / "back")
    assert same_files(adapter, again)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name, bases, tmp_path):
    base = bases(name)
    options = {"expert_r": 3, "expert_alpha": 9, "expert_indices": [0, 2, 3], "rank_pattern": {"o_proj": 2}}
    adapter = save_adapter(name, tmp_path / "adapter", base, **options)
    served = vllm_server.serve(export(adapter, tmp_path / "served"), facts_of(base))
    expected = native_logits(name, adapter)
    torch.testing.assert_close(served_logits(name, served), expected, rtol=0, atol=1e-5)
    assert (served_logits(name, Served()) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_bits_come_back_bit_for_bit(name, variant, bases, tmp_path):
    """What 16 bits would round is folded in float32, and lost nothing."""
    base, case = bases(name), VARIANTS[variant]
    adapter = save_adapter(name, tmp_path / "adapter", base, torch.bfloat16, **case.options)
    folder = export(adapter, tmp_path / "served")
    served = vllm_server.serve(folder, facts_of(base))
    expected = expert_deltas(adapter, case, facts_of(base)), linear_deltas(adapter, case.linears)
    assert difference(served, *expected) < CLOSE
    assert same_files(adapter, back(folder, tmp_path / "back"))


@pytest.mark.parametrize("name, moe_format", [("gpt_oss", "2d"), ("qwen3_vl_moe", "2d"), ("qwen3_moe", "3d")])
def test_the_other_form(name, moe_format, bases, tmp_path):
    base, case = bases(name), VARIANTS["split_ragged"]
    adapter = save_adapter(name, tmp_path / "adapter", base, **case.options)
    folder = export(adapter, tmp_path / "served", moe_format=moe_format)
    facts = facts_of(base)
    if moe_format == "2d":
        served = vllm_server.serve(folder, facts, force_2d=True)
        assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, 2.0)) < CLOSE
    else:
        with pytest.raises(Refused, match="experts"):
            vllm_server.serve(folder, facts)
    card = (folder / "README.md").read_text()
    assert "--enable-mixed-moe-lora-format" in card
    assert f'"is_3d_lora_weight": {"true" if moe_format == "3d" else "false"}' in card
    assert same_files(adapter, back(folder, tmp_path / "back"))


def test_config_and_card(bases, tmp_path):
    base = bases("qwen3_moe")
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", base, r=5, lora_alpha=10, use_rslora=True)
    folder = export(adapter, tmp_path / "served")
    assert {path.name for path in folder.iterdir()} == {FILE, CONFIG, "README.md"}
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["bias"]) == ("LORA", 8, "none")
    assert config["lora_alpha"] / 8 == pytest.approx(10 / 5**0.5, rel=1e-15)
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == targets and config["base_model_name_or_path"] == str(base)
    assert not any(config.get(key) for key in ("modules_to_save", "use_dora", "target_parameters"))
    card = (folder / "README.md").read_text()
    assert "vllm serve" in card and "--max-lora-rank 8" in card and str(base) in card
    assert config["lora_dropout"] == 0


def test_one_scale_is_kept_and_others_are_folded(bases, tmp_path):
    """B is as trained where all scales are one, and where it is folded, with the ratio to the one that is kept."""
    base = bases("qwen3_moe")
    one = export(save_adapter("qwen3_moe", tmp_path / "a", base, r=8, lora_alpha=5), tmp_path / "one")
    assert json.loads((one / CONFIG).read_text())["lora_alpha"] == 5
    native, served = load_file(tmp_path / "a" / FILE), load_file(one / FILE)
    key = "base_model.model.model.layers.0.mlp.experts.{}.lora_B"
    assert torch.equal(served[key.format("3.down_proj") + ".weight"], native[key.format("down_proj")][3])
    options = {"r": 8, "lora_alpha": 5, "expert_alpha": 20, "target_modules": ["o_proj"]}
    two = export(save_adapter("qwen3_moe", tmp_path / "b", base, **options), tmp_path / "two")
    assert json.loads((two / CONFIG).read_text())["lora_alpha"] == 20
    native, served = load_file(tmp_path / "b" / FILE), load_file(two / FILE)
    key = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
    assert torch.equal(served[key], native[key] / 4)


@pytest.mark.parametrize("rank, expected", [(1, 1), (2, 8), (8, 8), (17, 32), (129, 256), (257, 320), (512, 512)])
def test_ranks_are_those_that_the_server_has_buffers_for(rank, expected, bases, tmp_path):
    base = bases("qwen3_moe")
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", base, r=rank, target_modules=[])
    folder = export(adapter, tmp_path / "served")
    assert json.loads((folder / CONFIG).read_text())["r"] == expected
    vllm_server.serve(folder, facts_of(base), max_lora_rank=expected)
    given = export(adapter, tmp_path / "given", rank=rank)
    assert json.loads((given / CONFIG).read_text())["r"] == rank


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "dora": ({"use_dora": True}, {}, "magnitudes"),
    "dora_of_linears": ({"use_dora": True, "target_experts": []}, {}, "magnitudes"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "bias": ({"bias": "lora_only"}, {}, "bias"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights"),
    "rank": ({"r": 513}, {}, "ranks up to 512"),
    "rank_of_both": ({"expert_r": 260, "split_gate_up": True}, {"moe_format": "3d"}, "ranks up to 512"),
    "too_low": ({}, {"rank": 3}, "rank=3"),
    "head": ({"target_modules": ["lm_head"]}, {}, "head"),
    "option": ({}, {"moe_format": "4d"}, "moe_format"),
    "unknown_option": ({}, {"layout": "stacked"}, "layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case, bases, tmp_path):
    options, given, message = REFUSED[case]
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", bases("qwen3_moe"), **options)
    with pytest.raises(ValueError, match=message):
        export(adapter, tmp_path / "served", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "something was left behind"


def test_a_linear_that_is_split_when_the_model_loads_is_refused(bases, tmp_path):
    adapter = save_adapter("deepseek_v3", tmp_path / "adapter", bases("deepseek_v3"), target_modules=["kv_b_proj"])
    with pytest.raises(ValueError, match="kv_b_proj is adapted.*decodes"):
        export(adapter, tmp_path / "served")


def test_an_architecture_that_is_not_known_is_asked_for(bases, tmp_path, monkeypatch):
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", bases("qwen3_moe"))
    monkeypatch.delitem(vllm.ARCHITECTURES, "qwen3_moe")
    with pytest.raises(ValueError, match=r"'qwen3_moe' is not known.*moe_format"):
        export(adapter, tmp_path / "served")
    vllm_server.serve(export(adapter, tmp_path / "served", moe_format="2d"), facts_of(bases("qwen3_moe")))


def test_without_the_base_it_is_asked_for(tmp_path):
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"names and orders experts.*base="):
        export(adapter, tmp_path / "served")


def test_names_of_either_version_of_transformers(bases, tmp_path):
    """The block of a layer's experts has other names in transformers 4 and 5: vLLM's is written in any case."""
    adapter = save_adapter("mixtral", tmp_path / "adapter", bases("mixtral"))
    served = load_file(export(adapter, tmp_path / "served") / FILE)
    tensors, config = parts(adapter)
    for old, new in (("mlp", "block_sparse_moe"), ("block_sparse_moe", "mlp")):
        rename(tensors, rf"\.{old}\.", f".{new}.")
        other = load_file(export(write(tmp_path / new, tensors, config), tmp_path / f"served-{new}") / FILE)
        assert other.keys() == served.keys() and all(torch.equal(other[key], served[key]) for key in other)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_shared_experts_are_linears(name, bases, tmp_path):
    base, case = bases(name), VARIANTS["plain"]
    linears = [f"shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    adapter = save_adapter(name, tmp_path / "adapter", base, target_modules=linears)
    folder, facts = export(adapter, tmp_path / "served"), facts_of(base)
    served = vllm_server.serve(folder, facts)
    assert len(served.linears) == 6
    assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, 2.0)) < CLOSE
    assert same_files(adapter, back(folder, tmp_path / "back"))


# --- adapters that others wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe"])
@pytest.mark.parametrize("variant", ["plain", "some_experts", "listed", "down", "gate_up", "split_ragged", "alphas"])
def test_without_a_note_the_same_function_is_read(name, variant, bases, tmp_path):
    base, case = bases(name), VARIANTS[variant]
    adapter = save_adapter(name, tmp_path / "adapter", base, **case.options)
    folder = write(tmp_path / "stripped", *parts(export(adapter, tmp_path / "served")))
    again = back(folder, tmp_path / "back", format="vllm", base=base)
    torch.testing.assert_close(native_logits(name, again), native_logits(name, adapter), rtol=0, atol=1e-5)
    config = json.loads((again / CONFIG).read_text())
    expected = json.loads((adapter / CONFIG).read_text())
    assert (config["target_experts"] == expected["target_experts"]) or expected["target_experts"] == "all"
    assert config["expert_indices"] == expected["expert_indices"]


def test_changed_since_it_was_written(bases, tmp_path):
    """The note is not believed then, and the tensors are read as they are."""
    base = bases("qwen3_moe")
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", base)
    folder = export(adapter, tmp_path / "served")
    with safe_open(folder / FILE, framework="pt") as file:
        note = file.metadata()
    tensors = load_file(folder / FILE)
    key = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_A.weight"
    tensors[key][7] = 1.0  # a rank that was padding: another A than the gate's
    tensors[key.replace("lora_A", "lora_B")][:, 7] = 0.5
    save_file(tensors, folder / FILE, metadata=note)
    again = back(folder, tmp_path / "back")
    served = vllm_server.serve(folder, facts_of(base))
    assert json.loads((again / CONFIG).read_text())["split_gate_up"] is True
    torch.testing.assert_close(native_logits("qwen3_moe", again), served_logits("qwen3_moe", served), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors, config: tensors.pop(next(key for key in tensors if ".lora_B." in key and ".experts" in key)),
         "other half|no lora_B|lora_A and no lora_B|expected|shape"),
        (lambda tensors, config: config.update(r=3), "rank"),
        (lambda tensors, config: config.update(rank_pattern={"x": 3}), "rank_pattern"),
        (lambda tensors, config: config.update(r="8"), "`r='8'`"),
        (lambda tensors, config: config.update(peft_type="IA3"), "LORA"),
        (lambda tensors, config: config.update(use_dora=True), "DoRA"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt_oss"])
def test_damaged_files_are_refused(name, change, message, bases, tmp_path):
    adapter = save_adapter(name, tmp_path / "adapter", bases(name))
    folder = export(adapter, tmp_path / "served")
    tensors, config = parts(folder)
    change(tensors, config)
    damaged = write(tmp_path / "damaged", tensors, config)
    with pytest.raises(ValueError, match=message):
        back(damaged, tmp_path / "back", format="vllm")
    assert not (tmp_path / "back").exists()


# --- the check itself: planted faults must be seen -----------------------------------------------------------------


def expert_slowest(tensors: dict[str, Tensor], experts: int = 4) -> None:
    for key, value in tensors.items():
        if ".experts" in key and "lora_B" in key:
            blocks = value.view(value.shape[0], -1, experts)
            tensors[key] = blocks.transpose(1, 2).flatten(1).contiguous()


def in_halves(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if "base_layer.lora_B" in key:
            tensors[key] = torch.cat([value[::2], value[1::2]]).contiguous()


Fault = Callable[[dict[str, Tensor], dict[str, Any]], Any]
FAULTS: dict[str, tuple[str, Fault]] = {
    "gate and up swapped": ("qwen3_moe", lambda t, c: swap(t, ".gate_proj.", ".up_proj.")),
    "w1 and w3 swapped": ("mixtral", lambda t, c: swap(t, ".w1.", ".w3.")),
    "two experts swapped": ("qwen3_moe", lambda t, c: swap(t, "layers.0.mlp.experts.1.", "layers.0.mlp.experts.2.")),
    "scale lost": ("qwen3_moe", lambda t, c: c.update(lora_alpha=c["r"])),
    "scale of rsLoRA": ("qwen3_moe", lambda t, c: c.update(use_rslora=True)),
    "rank not that of the tensors": ("qwen3_moe", lambda t, c: c.update(r=4, lora_alpha=8)),
    "a factor missing": ("qwen3_moe", lambda t, c: t.pop(next(key for key in t if ".experts.3.up_proj" in key))),
    "other block": ("mixtral", lambda t, c: rename(t, "block_sparse_moe", "mlp")),
    "other leaves": ("mixtral", lambda t, c: rename(t, r"\.w1\.", ".gate_proj.")),
    "a linear elsewhere": ("qwen3_moe", lambda t, c: rename(t, r"self_attn\.o_proj", "attention.o_proj")),
    "q and o swapped": ("gpt_oss", lambda t, c: swap(t, ".q_proj.", ".o_proj.")),
    "expert slowest": ("gpt_oss", lambda t, c: expert_slowest(t)),
    "expert slowest, no gate order": ("qwen3_vl_moe", lambda t, c: expert_slowest(t)),
    "gates before ups": ("gpt_oss", lambda t, c: in_halves(t)),
    "gates between ups": ("qwen3_vl_moe", lambda t, c: in_halves(t)),
    "inner and outer swapped": ("gpt_oss", lambda t, c: swap(t, "experts.base_layer.lora", "experts.lora")),
    "inner missing": ("gpt_oss", lambda t, c: drop(t, "base_layer")),
    "inner under another name": ("gpt_oss", lambda t, c: rename(t, r"experts\.base_layer", "experts.gate_up_proj")),
    "something called base_layer": ("gpt_oss", lambda t, c: rename(t, r"o_proj", "o_proj.base_layer")),
    "singles for stacks": ("qwen3_vl_moe", lambda t, c: rename(t, r"experts\.lora", "experts.0.down_proj.lora")),
    "DoRA": ("qwen3_moe", lambda t, c: c.update(use_dora=True)),
    "a start that changed the base": ("qwen3_moe", lambda t, c: c.update(init_lora_weights="pissa")),
    "rank of no buffer": ("qwen3_moe", lambda t, c: c.update(r=32, lora_alpha=64)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, bases, tmp_path):
    name, plant = FAULTS[fault]
    base, case = bases(name), VARIANTS["plain"]
    facts = facts_of(base)
    adapter = save_adapter(name, tmp_path / "adapter", base)
    folder = export(adapter, tmp_path / "served")
    expected = expert_deltas(adapter, case, facts), linear_deltas(adapter, case.linears)
    assert difference(vllm_server.serve(folder, facts), *expected) < CLOSE
    tensors, config = parts(folder)
    plant(tensors, config)
    try:
        served = vllm_server.serve(write(tmp_path / "faulty", tensors, config), facts, max_lora_rank=16)
    except (Refused, Dropped):
        return
    assert difference(served, *expected) > 0.01
