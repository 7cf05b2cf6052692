"""Stock PEFT, `target_parameters`: it loads our exports, and we load what it trained, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.formats.cases import (
    STACKED,
    V5,
    assert_close,
    bring,
    case,
    export,
    is_stock,
    loaded,
    out_of,
    same_files,
    stock_trained,
    without_note,
)
from tests.zoo import ENTRIES

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "split, some experts": {"split_gate_up": True, "expert_indices": [0, 2]},
    "ranks and alphas": {
        "expert_rank_pattern": {r"layers\.\d+\..*\.1": 1, r"layers\.\d+\..*\.2": 5},
        "expert_alpha_pattern": {r"layers\.\d+\..*\.2": 9},
        "expert_alpha": 5,
    },
    "shared, rslora": {"share_experts": "outer", "use_rslora": True, "expert_r": 4},
    "one layer, alpha": {"expert_indices": {0: [1, 3]}, "expert_alpha": 8, "split_gate_up": True},
    "dropout": {"lora_dropout": 0.1},
}
ONE = "qwen3_moe" if V5 else "gpt_oss"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", STACKED)
def test_stock_peft_loads_an_export(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, ours = case(name, tmp_path, **options)
    out = export(tmp_path, "peft")
    theirs = loaded(base, out)
    assert is_stock(theirs)
    with torch.no_grad():
        wanted, found, without = (out_of(one, name) for one in (ours, theirs, base))
    assert float((wanted - without).abs().max()) > 1e-2, "the adapter does nothing"
    assert_close(found, wanted)

    assert same_files(tmp_path / "native", bring(tmp_path))
    without_note(out)  # as another tool would write it: the same function, if not the same tensors
    again = loaded(base, bring(tmp_path, target="plain"))
    assert not is_stock(again)
    assert_close(out_of(again, name), wanted)


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", [ONE, "llama4_text"])
def test_one_projection(name: str, target: str, tmp_path: Path) -> None:
    base, ours = case(name, tmp_path, target_experts=[target], target_modules=[])
    theirs = loaded(base, export(tmp_path, "peft"))
    assert_close(out_of(theirs, name), out_of(ours, name))
    assert same_files(tmp_path / "native", bring(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    """Alphas that differ are folded in twice the width, so that the bits can be had back."""
    _, ours = case(ONE, tmp_path, target_modules=[], **OPTIONS["ranks and alphas"])
    ours.to(dtype).save_pretrained(tmp_path / "native")
    out = export(tmp_path, "peft")
    found = {key: value.dtype for key, value in load_file(out / "adapter_model.safetensors").items()}
    assert {found[key] for key in found if ".lora_A." in key} == {dtype}
    assert {found[key] for key in found if ".lora_B." in key} == {torch.float32}
    assert same_files(tmp_path / "native", bring(tmp_path))


def test_targets_and_patterns_are_no_wider_than_the_adapter(tmp_path: Path) -> None:
    case(ONE, tmp_path, target_modules=[])
    config = json.loads((export(tmp_path, "peft") / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["peft_type"] == "LORA" and config["target_modules"] == []
    case(ONE, tmp_path / "one", target_modules=[], expert_indices={1: [0]}, expert_r=7)
    config = json.loads((export(tmp_path / "one", "peft") / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 2
    assert all(".layers.1." in one for one in config["target_parameters"])
    assert set(config["rank_pattern"].values()) == {7}


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]])
@pytest.mark.parametrize("name", [one for one in STACKED if one not in ("granitemoe", "nemotron_h")])
def test_what_stock_peft_trained_is_imported(name: str, targets: list[str], tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    base.save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {
        "target_modules": ["q_proj"],
        "target_parameters": [f"experts.{one}" for one in targets],
        "rank_pattern": {r"experts\.down_proj": 5},
        "alpha_pattern": {r"layers\.1\..*\.experts\.gate_up_proj": 3, "q_proj": 2},
    }
    trained = stock_trained(base, tmp_path / "out", name, **options)
    assert is_stock(trained)
    wanted = out_of(trained, name)
    ours = loaded(base, bring(tmp_path))
    assert not is_stock(ours)
    assert_close(out_of(ours, name), wanted)
    assert float((wanted - out_of(base, name)).abs().max()) > 1e-2
    # and back: the tensors may be padded, the function is the same
    back = loaded(base, export(tmp_path, "peft", source="back", target="again"))
    assert is_stock(back)
    assert_close(out_of(back, name), wanted)


@pytest.mark.parametrize("name", [ONE, "llama4_text"])
def test_import_without_the_base(name: str, tmp_path: Path) -> None:
    """With both projections the shapes tell everything."""
    base = ENTRIES[name].build()
    trained = stock_trained(
        base, tmp_path / "out", name, target_parameters=["experts.gate_up_proj", "experts.down_proj"], use_rslora=True
    )
    ours = loaded(base, bring(tmp_path, base=None))
    assert_close(out_of(ours, name), out_of(trained, name))


def test_imported_unchanged_is_exported_unchanged(tmp_path: Path) -> None:
    """Stock -> native -> stock, byte for byte."""
    base = ENTRIES[ONE].build()
    base.save_pretrained(tmp_path / "base")
    stock_trained(base, tmp_path / "out", ONE, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    bring(tmp_path)
    again = load_file(export(tmp_path, "peft", source="back", target="again") / "adapter_model.safetensors")
    first = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_modules_to_save_pass_through(tmp_path: Path) -> None:
    base, ours = case(ONE, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs = loaded(base, export(tmp_path, "peft"))
    assert_close(out_of(theirs, ONE), out_of(ours, ONE))
    assert same_files(tmp_path / "native", bring(tmp_path))


def test_tensors_that_were_changed_after_the_export_are_not_restored(tmp_path: Path) -> None:
    """The note in the header says what the adapter was; who trains on has the last word."""
    base, _ = case(ONE, tmp_path, target_modules=[], expert_indices=[0, 2])
    out = export(tmp_path, "peft")
    path = out / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    entry = next(
        one for key, one in json.loads(raw[8 : 8 + length]).items() if key != "__metadata__" and "lora_B" in key
    )
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    raw[start:stop] = torch.full(((stop - start) // 4,), 0.05).numpy().tobytes()  # experts that were left out, too
    path.write_bytes(bytes(raw))
    theirs, ours = loaded(base, out), loaded(base, bring(tmp_path))
    assert ours.peft_config["default"].expert_indices is None
    assert_close(out_of(ours, ONE), out_of(theirs, ONE))
