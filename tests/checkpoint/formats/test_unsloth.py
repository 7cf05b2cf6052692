"""Unsloth: PEFT's tensors in one of two orders of `lora_B`, told by a mark, by nothing, or by the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.cases import (
    NAME,
    STACKED,
    V5,
    assert_close,
    bring,
    case,
    change_config,
    export,
    loaded,
    out_of,
    same_files,
    without_note,
)

ONE = "qwen3_moe" if V5 else "gpt_oss"
EXPERTS = 4


def regrouped(folder: Path, rank: int) -> None:
    """Turn PEFT's order into that of the older Unsloth, column by column: j of expert j % E goes to expert's block."""
    tensors = load_file(folder / NAME)
    for key, value in tensors.items():
        if ".experts." in key and ".lora_B." in key:
            new = torch.empty_like(value)
            for column in range(value.shape[1]):
                expert, row = column % EXPERTS, column // EXPERTS
                new[:, expert * rank + row] = value[:, column]
            tensors[key] = new
    save_file(tensors, folder / NAME, metadata={"format": "pt"})


@pytest.mark.parametrize("name", STACKED)
def test_there_and_back_in_both_orders(name: str, tmp_path: Path) -> None:
    case(name, tmp_path, split_gate_up=True, expert_indices=[1, 2])
    for order, mark in (("expert_fastest", "rank_major"), ("contiguous_r", "grouped_by_expert")):
        out = export(tmp_path, "unsloth", target=order, layout=order)
        assert json.loads((out / "adapter_config.json").read_text())["lora_B_layout"] == mark
        assert same_files(tmp_path / "native", bring(tmp_path, order, f"back {order}"))


def test_the_newer_order_is_peft_s(tmp_path: Path) -> None:
    base, ours = case(ONE, tmp_path)
    out = export(tmp_path, "unsloth")
    assert_close(out_of(loaded(base, out), ONE), out_of(ours, ONE))


@pytest.mark.parametrize("name", STACKED)
def test_an_older_file(name: str, tmp_path: Path) -> None:
    base, ours = case(name, tmp_path)
    out = export(tmp_path, "peft")
    if "granitemoe" == name:  # its modules are not called experts
        pytest.skip("the helper above finds experts by name")
    regrouped(out, 3)
    with pytest.raises(ValueError, match="no `lora_B_layout`.*'contiguous_r'.*'expert_fastest'.*assume_layout"):
        bring(tmp_path, format="unsloth")
    right = loaded(base, bring(tmp_path, format="unsloth", assume_layout="contiguous_r"))
    assert_close(out_of(right, name), out_of(ours, name))
    wrong = loaded(base, bring(tmp_path, target="wrong", format="unsloth", assume_layout="expert_fastest"))
    assert float((out_of(wrong, name) - out_of(ours, name)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "mark",
    [{"auto_mapping": {"unsloth_fixed": True}}, {"lora_B_layout": "rank_major"}, {}],
    ids=["fixed", "order", "base"],
)
def test_auto_never_takes_unsloth_s_for_peft_s(mark: dict[str, Any], tmp_path: Path) -> None:
    case(ONE, tmp_path)
    out = export(tmp_path, "peft")
    without_note(out)
    change_config(out, **mark)
    if "lora_B_layout" in mark:
        bring(tmp_path)
    elif mark:
        with pytest.raises(ValueError, match="no `lora_B_layout`"):
            bring(tmp_path)
    else:
        change_config(out, base_model_name_or_path="unsloth/Some-MoE")
        with pytest.raises(ValueError, match=r"more than one format: peft .*; unsloth .*`format=`"):
            bring(tmp_path)
        bring(tmp_path, format="peft")


def test_with_rank_one_both_orders_are_the_same(tmp_path: Path) -> None:
    base, ours = case(ONE, tmp_path, expert_r=1)
    without_note(export(tmp_path, "peft"))
    assert_close(out_of(loaded(base, bring(tmp_path, format="unsloth")), ONE), out_of(ours, ONE))


def test_a_hint_from_experts_that_saw_no_token(tmp_path: Path) -> None:
    case(ONE, tmp_path, expert_indices=[0, 1, 3], target_modules=[])
    out = export(tmp_path, "peft")
    without_note(out)
    with pytest.raises(ValueError, match=r"A hint, no proof: in \d tensors .* read as 'expert_fastest'"):
        bring(tmp_path, format="unsloth")
    regrouped(out, 3)
    with pytest.raises(ValueError, match=r"A hint, no proof: in \d tensors .* read as 'contiguous_r'"):
        bring(tmp_path, format="unsloth")


def test_contradictions(tmp_path: Path) -> None:
    case(ONE, tmp_path)
    out = export(tmp_path, "unsloth")
    with pytest.raises(ValueError, match="assume_layout='contiguous_r' contradicts `lora_B_layout`"):
        bring(tmp_path, assume_layout="contiguous_r")
    with pytest.raises(ValueError, match="expected one of expert_fastest, contiguous_r"):
        bring(tmp_path, assume_layout="expert_slowest")
    change_config(out, lora_B_layout="mixed")
    with pytest.raises(ValueError, match="`lora_B_layout` is 'mixed'"):
        bring(tmp_path)
    with pytest.raises(ValueError, match="layout='new': expected one of"):
        export(tmp_path, "unsloth", target="never", layout="new")
    assert not (tmp_path / "back").exists() and not (tmp_path / "never").exists()
