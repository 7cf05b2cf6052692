"""Adapters for SGLang: taken whole by its rules, and doing there what they do here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_moe import export_adapter, import_adapter

from . import sglang_server
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
PATH = "base_model.model.model.layers.{}.mlp.experts.{}.weight"


def export(adapter: Path, target: Path, **options: Any) -> Path:
    return export_adapter(adapter, target, "sglang", progress=False, **options)


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


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in load_file(folder / FILE).items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_served_as_trained_and_back(name, variant, layout, bases, tmp_path):
    base, case = bases(name), VARIANTS[variant]
    facts = facts_of(base)
    adapter = save_adapter(name, tmp_path / "adapter", base, **case.options)
    folder = export(adapter, tmp_path / "served", layout=layout)
    served = sglang_server.serve(folder, facts)
    assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, case.linears)) < CLOSE
    again = back(folder, tmp_path / "back")
    assert same_files(adapter, again)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["all", ["gate_up_proj"], ["down_proj"]], ids=str)
def test_outer_factors_are_held_once(name, targets, bases, tmp_path):
    base, case = bases(name), VARIANTS["outer"]
    facts = facts_of(base)
    adapter = save_adapter(name, tmp_path / "adapter", base, share_experts="outer", target_experts=targets)
    folder = export(adapter, tmp_path / "served", layout="shared-outer")
    served = sglang_server.serve(folder, facts)
    assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, 2.0)) < CLOSE
    found = {key.split("experts.")[1]: shape for key, shape in shapes(folder).items() if ".experts." in key}
    inner = facts.inner
    assert found == {
        "gate_up_proj.lora_A.weight": (1, 8, 64), "gate_up_proj.lora_B.weight": (4, 2 * inner, 8),
        "down_proj.lora_A.weight": (4, 8, inner), "down_proj.lora_B.weight": (1, 64, 8),
    }  # fmt: skip
    assert same_files(adapter, back(folder, tmp_path / "back"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_logits(name, layout, bases, tmp_path):
    base = bases(name)
    adapter = save_adapter(name, tmp_path / "adapter", base, expert_r=3, expert_alpha=9, expert_indices=[0, 2, 3])
    served = sglang_server.serve(export(adapter, tmp_path / "served", layout=layout), facts_of(base))
    expected = native_logits(name, adapter)
    torch.testing.assert_close(served_logits(name, served), expected, rtol=0, atol=1e-5)
    assert (served_logits(name, Served()) - expected).abs().max() > 0.1


@pytest.mark.parametrize("variant", ["alphas", "some_experts", "down", "ragged"])
@pytest.mark.parametrize("layout", ["per-expert", "stacked"])
def test_sixteen_bits_come_back_bit_for_bit(variant, layout, bases, tmp_path):
    base, case = bases("gpt_oss"), VARIANTS[variant]
    adapter = save_adapter("gpt_oss", tmp_path / "adapter", base, torch.bfloat16, **case.options)
    folder = export(adapter, tmp_path / "served", layout=layout)
    expected = expert_deltas(adapter, case, facts_of(base)), linear_deltas(adapter, case.linears)
    assert difference(sglang_server.serve(folder, facts_of(base)), *expected) < CLOSE
    assert same_files(adapter, back(folder, tmp_path / "back"))


def test_files_config_and_card(bases, tmp_path):
    base = bases("mixtral")
    adapter = save_adapter("mixtral", tmp_path / "adapter", base, r=3, lora_alpha=6, use_rslora=True)
    folder = export(adapter, tmp_path / "served")
    assert {path.name for path in folder.iterdir()} == {FILE, CONFIG, "README.md"}
    found = shapes(folder)
    for leaf, a, b in (("gate_proj", (8, 64), (48, 8)), ("up_proj", (8, 64), (48, 8)), ("down_proj", (8, 48), (64, 8))):
        keys = [key for key in found if f".experts.3.{leaf}." in key]
        assert sorted(found[key] for key in keys) == sorted([a, b, a, b])
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    assert config["lora_alpha"] / 8 == pytest.approx(6 / 3**0.5, rel=1e-15)  # rsLoRA is not known there
    targets = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == targets and not config["use_rslora"]
    card = (folder / "README.md").read_text()
    assert "sglang.launch_server" in card and "--max-lora-rank 8" in card and str(base) in card


def test_stacks_share_an_a_as_the_adapter_does(bases, tmp_path):
    base = bases("qwen3_moe")
    for split, leaves in ((False, {"gate_up_proj", "down_proj"}), (True, {"gate_proj", "up_proj", "down_proj"})):
        adapter = save_adapter("qwen3_moe", tmp_path / f"adapter{split}", base, split_gate_up=split, target_modules=[])
        found = shapes(export(adapter, tmp_path / f"served{split}", layout="stacked"))
        assert {key.split("experts.")[1].split(".")[0] for key in found} == leaves
        assert all(len(shape) == 3 and shape[0] == 4 for shape in found.values())


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_shared_experts_are_linears(name, bases, tmp_path):
    base, case = bases(name), VARIANTS["plain"]
    linears = [f"shared_experts.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")]
    adapter = save_adapter(name, tmp_path / "adapter", base, target_modules=linears)
    folder, facts = export(adapter, tmp_path / "served"), facts_of(base)
    served = sglang_server.serve(folder, facts)
    assert len(served.linears) == 6
    assert difference(served, expert_deltas(adapter, case, facts), linear_deltas(adapter, 2.0)) < CLOSE
    assert same_files(adapter, back(folder, tmp_path / "back"))


def test_latent_attention(bases, tmp_path):
    base, case = bases("deepseek_v3"), VARIANTS["plain"]
    linears = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    adapter = save_adapter("deepseek_v3", tmp_path / "adapter", base, target_modules=linears)
    served = sglang_server.serve(export(adapter, tmp_path / "served"), facts_of(base))
    assert len(served.linears) == 10
    expected = expert_deltas(adapter, case, facts_of(base)), linear_deltas(adapter, 2.0)
    assert difference(served, *expected) < CLOSE


def test_k_may_be_left_out(bases, tmp_path):
    """SGLang makes zeros of it itself."""
    base = bases("qwen3_moe")
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    served = sglang_server.serve(export(adapter, tmp_path / "served"), facts_of(base))
    linears = {path: delta for path, delta in served.linears.items() if not path.endswith("k_proj")}
    expected = linear_deltas(adapter, 2.0)
    assert linears.keys() == expected.keys()
    assert difference(Served({}, linears), {}, expected) < CLOSE
    assert all(not delta.any() for path, delta in served.linears.items() if path.endswith("k_proj"))


# --- what is refused ---------------------------------------------------------------------------------------------

REFUSED = {
    "dora": ({"use_dora": True}, {}, "magnitudes"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "bias": ({"bias": "lora_only"}, {}, "bias"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights"),
    "rank": ({"r": 513}, {}, "ranks up to 512"),
    "q_alone": ({"target_modules": ["q_proj"]}, {}, "v_proj beside it is not"),
    "v_alone": ({"target_modules": ["v_proj"]}, {}, "q_proj beside it is not"),
    "head": ({"target_modules": ["lm_head"]}, {}, "head"),
    "nothing_shared": ({}, {"layout": "shared-outer"}, "share_experts=None"),
    "alphas": (
        {"share_experts": "outer", "expert_alpha_pattern": {r".*\.1": 3}}, {"layout": "shared-outer"}, "differ in alpha"
    ),
    "option": ({}, {"layout": "flat"}, "layout='flat'"),
    "unknown_option": ({}, {"moe_format": "2d"}, "moe_format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case, bases, tmp_path):
    options, given, message = REFUSED[case]
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", bases("qwen3_moe"), **options)
    with pytest.raises(ValueError, match=message):
        export(adapter, tmp_path / "served", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "something was left behind"


def test_half_of_mla_is_refused(bases, tmp_path):
    adapter = save_adapter("deepseek_v3", tmp_path / "a", bases("deepseek_v3"), target_modules=["kv_a_proj_with_mqa"])
    with pytest.raises(ValueError, match="q_a_proj beside it is not"):
        export(adapter, tmp_path / "served")


# --- adapters that others wrote ----------------------------------------------------------------------------------


READ = ("plain", "some_experts", "gate_up", "split_ragged", "alphas", "outer")


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "variant, layout",
    [(variant, layout) for variant in READ for layout in ("per-expert", "stacked")] + [("outer", "shared-outer")],
)
def test_without_a_note_the_same_function_is_read(name, layout, variant, bases, tmp_path):
    base, case = bases(name), VARIANTS[variant]
    adapter = save_adapter(name, tmp_path / "adapter", base, **case.options)
    folder = write(tmp_path / "stripped", *parts(export(adapter, tmp_path / "served", layout=layout)))
    given = {"format": "sglang"} if layout == "per-expert" else {}
    again = back(folder, tmp_path / "back", **given)
    torch.testing.assert_close(native_logits(name, again), native_logits(name, adapter), rtol=0, atol=1e-5)


def test_other_spellings(bases, tmp_path):
    """`w1`, `w3`, `w2`; A of gate and up one under the other; experts that are not in the file."""
    base = bases("qwen3_moe")
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", base, expert_indices=[1, 2], split_gate_up=True)
    expected = native_logits("qwen3_moe", adapter)
    tensors, config = parts(export(adapter, tmp_path / "served"))
    for leaf, short in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        rename(tensors, rf"experts\.(\d)\.{leaf}", rf"experts.\1.{short}")
    tensors = {key: value for key, value in tensors.items() if ".experts.3." not in key and ".experts.0." not in key}
    again = back(write(tmp_path / "w", tensors, config), tmp_path / "w-back", format="sglang")
    assert json.loads((again / CONFIG).read_text())["expert_indices"] == [1, 2]
    torch.testing.assert_close(native_logits("qwen3_moe", again), expected, rtol=0, atol=1e-5)
    tensors, config = parts(export(adapter, tmp_path / "stacked", layout="stacked"))
    for layer in (0, 1):
        for factor in ("lora_A", "lora_B"):
            pair = [tensors.pop(PATH.format(layer, f"{leaf}.{factor}")) for leaf in ("gate_proj", "up_proj")]
            tensors[PATH.format(layer, f"gate_up_proj.{factor}")] = torch.cat(pair, dim=1)
    again = back(write(tmp_path / "both", tensors, config), tmp_path / "both-back")
    torch.testing.assert_close(native_logits("qwen3_moe", again), expected, rtol=0, atol=1e-5)


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
DAMAGE: dict[str, tuple[Change, str]] = {
    "half a pair": (lambda t, c: t.pop(PATH.format(0, "down_proj.lora_B")), "no lora_B"),
    "another rank": (lambda t, c: c.update(r=3), "rank 3"),
    "no alpha": (lambda t, c: c.pop("lora_alpha"), "lora_alpha"),
    "a pattern": (lambda t, c: c.update(alpha_pattern={"x": 1}), "alpha_pattern"),
    "another leaf": (lambda t, c: rename(t, "experts.down_proj", "experts.wo"), "'wo' is no projection"),
    "fewer experts": (lambda t, c: t.update({PATH.format(0, "down_proj.lora_A"): torch.ones(3, 8, 40)}), "3 experts"),
    "integers": (lambda t, c: t.update({PATH.format(0, "down_proj.lora_A"): torch.ones(4, 8, 40).int()}), "is I32"),
    "odd rows": (lambda t, c: t.update({PATH.format(0, "gate_up_proj.lora_B"): torch.ones(4, 79, 8)}), "79"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(damage, bases, tmp_path):
    change, message = DAMAGE[damage]
    adapter = save_adapter("qwen3_moe", tmp_path / "adapter", bases("qwen3_moe"))
    tensors, config = parts(export(adapter, tmp_path / "served", layout="stacked"))
    change(tensors, config)
    folder = write(tmp_path / "damaged", tensors, config)
    with pytest.raises(ValueError, match=message):
        back(folder, tmp_path / "back", format="sglang")
    assert not (tmp_path / "back").exists()


# --- the check itself: planted faults must be seen -----------------------------------------------------------------


def interleave(tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if "gate_up_proj.lora_B" in key:
            tensors[key] = torch.stack(value.chunk(2, dim=1), dim=2).flatten(1, 2)


def edit(tensors: dict[str, Tensor], part: str, change: Callable[[Tensor], Tensor]) -> None:
    for key in [key for key in tensors if part in key]:
        tensors[key] = change(tensors[key]).contiguous()


def down_alone(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    drop(tensors, "gate_proj")
    drop(tensors, "up_proj")
    config["target_modules"] = [one for one in config["target_modules"] if one not in ("gate_proj", "up_proj")]


def head(stack: Tensor) -> Tensor:
    return stack[:1]


FAULTS: dict[str, tuple[str, str, Change]] = {
    "gate and up swapped": ("qwen3_moe", "per-expert", lambda t, c: swap(t, ".gate_proj.", ".up_proj.")),
    "two experts swapped": ("qwen3_moe", "per-expert", lambda t, c: swap(t, "1.mlp.experts.0.", "1.mlp.experts.3.")),
    "experts reversed": ("qwen3_moe", "stacked", lambda t, c: edit(t, "down_proj.lora_B", lambda b: b.flip(0))),
    "scale lost": ("qwen3_moe", "per-expert", lambda t, c: c.update(lora_alpha=c["r"])),
    "scale of rsLoRA": ("qwen3_moe", "per-expert", lambda t, c: c.update(use_rslora=True, lora_alpha=2 * 8**0.5)),
    "ranks that differ": ("qwen3_moe", "per-expert", lambda t, c: edit(t, "o_proj.lora_A", lambda a: a[:4])),
    "an expert of a stack missing": ("qwen3_moe", "stacked", lambda t, c: edit(t, "down_proj.lora_A", lambda a: a[:3])),
    "ups between gates": ("qwen3_moe", "stacked", lambda t, c: interleave(t)),
    "rows as in the base": ("gpt_oss", "stacked", lambda t, c: interleave(t)),
    "ups before gates": ("qwen3_moe", "stacked", lambda t, c: edit(t, "gate_up_proj.lora_B", lambda b: b.roll(40, 1))),
    "experts not targeted": ("qwen3_moe", "per-expert", lambda t, c: c.update(target_modules=["q_proj", "o_proj"])),
    "down alone targeted": ("qwen3_moe", "per-expert", down_alone),
    "targets as a regex": ("qwen3_moe", "per-expert", lambda t, c: c.update(target_modules=".*proj")),
    "another type": ("qwen3_moe", "per-expert", lambda t, c: c.update(peft_type="MOELORA")),
    "a path without a layer": ("qwen3_moe", "per-expert", lambda t, c: rename(t, r"layers\.", "blocks.")),
    "an expert that is not there": ("qwen3_moe", "per-expert", lambda t, c: rename(t, r"experts\.3\.", "experts.4.")),
    "v missing": ("qwen3_moe", "per-expert", lambda t, c: drop(t, "v_proj")),
    "q and k swapped": ("gpt_oss", "per-expert", lambda t, c: swap(t, ".q_proj.", ".k_proj.")),
    "matrices of all": ("qwen3_moe", "stacked", lambda t, c: edit(t, "down_proj.lora_A", lambda a: a.flatten(0, 1))),
    "one layer shared": ("qwen3_moe", "stacked", lambda t, c: edit(t, "0.mlp.experts.gate_up_proj.lora_A", head)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, bases, tmp_path):
    name, layout, plant = FAULTS[fault]
    base, case = bases(name), VARIANTS["plain"]
    facts = facts_of(base)
    adapter = save_adapter(name, tmp_path / "adapter", base)
    folder = export(adapter, tmp_path / "served", layout=layout)
    expected = expert_deltas(adapter, case, facts), linear_deltas(adapter, case.linears)
    assert difference(sglang_server.serve(folder, facts), *expected) < CLOSE
    tensors, config = parts(folder)
    plant(tensors, config)
    try:
        served = sglang_server.serve(write(tmp_path / "faulty", tensors, config), facts)
    except (Refused, Dropped):
        return
    assert difference(served, *expected) > 0.01
