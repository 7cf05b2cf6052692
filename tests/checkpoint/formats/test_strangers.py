"""Adapters of other tools from strangers: what names, notes and configs ask for is not made unless it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_moe import import_adapter
from tests.checkpoint.formats.cases import NAME, V5, change_config, export, same_files
from tests.checkpoint.merge.cases import write_adapter
from tests.zoo import ENTRIES

FORMATS = (["peft"] if V5 else ["peft-per-expert"]) + ["vllm", "sglang"]
NOTE = "peft_moe_native"


def exported(folder: Path, format: str, **options: Any) -> Path:
    """An adapter of Qwen3-MoE with experts of several ranks and alphas, in another format."""
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(folder / "base")
    write_adapter(base, folder / "native", **options)
    return export(folder, format)


def bring(folder: Path, **options: Any) -> Path:
    return import_adapter(folder / "out", folder / "back", **({"base": folder / "base", "progress": False} | options))


def rename(adapter: Path, old: str, new: str) -> None:
    path = adapter / NAME
    save_file({key.replace(old, new): value for key, value in load_file(path).items()}, path, {"format": "pt"})


def change_note(adapter: Path, change: Callable[[Any], None]) -> None:
    path = adapter / NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    note = json.loads(metadata[NOTE])
    change(note)
    save_file(load_file(path), path, metadata | {NOTE: json.dumps(note)})


def _experts(count: Any) -> Callable[[Any], None]:
    def change(note: Any) -> None:
        note["modules"] = {name: [gate, count] for name, (gate, _) in note["modules"].items()}

    return change


def _huge_rank(note: Any) -> None:
    note["config"]["expert_rank_pattern"] = {r"experts\.0": 10**9}
    for key, one in note["tensors"].items():
        one[1] = [10**9 + 9, one[1][2 if key.endswith("A") else 1]]


def _first_of_many(note: Any) -> None:
    _experts(4096)(note)
    note["config"]["expert_indices"] = [0]


def _no_numbers(note: Any) -> None:
    for one in note["tensors"].values():
        one[1][1] = "3"


def _huge_shape(note: Any) -> None:
    for one in note["tensors"].values():
        one[1][1] = 2**64


def _other_shape(note: Any) -> None:
    for key, one in note["tensors"].items():
        if key.endswith("down_proj.lora_B"):
            one[1][-1] += 1


def _other_start(note: Any) -> None:
    note["config"]["init_lora_weights"] = "olora"


def _no_keys(note: Any) -> None:
    note["tensors"] = {"x": next(iter(note["tensors"].values()))}


NOTES = {
    "no end of experts": _experts(10**12), "infinitely many": _experts(float("inf")), "none": _experts(0),
    "no number of experts": _experts("4"), "a rank without end": _huge_rank, "one of many experts": _first_of_many,
    "shapes of text": _no_numbers, "shapes without end": _huge_shape, "another shape": _other_shape,
    "a start that changes the base": _other_start, "keys of nothing": _no_keys,
    "a list": lambda note: note.update(config=[]),
    "an unknown gate": lambda note: note.update(modules={one: ["x", 4] for one in note["modules"]}),
}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", NOTES)
def test_notes_are_not_believed(case: str, format: str, tmp_path: Path) -> None:
    """The adapter is what its tensors say."""
    out = exported(tmp_path, format, target_modules=["o_proj"])
    change_note(out, NOTES[case])
    start = time.perf_counter()
    bring(tmp_path)
    assert time.perf_counter() - start < 10
    change_note(out, dict.clear)
    import_adapter(out, tmp_path / "plain", base=tmp_path / "base", progress=False)
    assert same_files(tmp_path / "back", tmp_path / "plain")


@pytest.mark.parametrize("format", ["vllm", "sglang"])
@pytest.mark.parametrize("expert", [4096, 10**9 - 1])
def test_experts_of_large_numbers(expert: int, format: str, tmp_path: Path) -> None:
    out = exported(tmp_path, format, target_modules=[])
    rename(out, "experts.3.", f"experts.{expert}.")
    for base in (tmp_path / "base", None):
        with pytest.raises(ValueError, match=f"its last expert is {expert}, and most of those before it are missing"):
            bring(tmp_path, format=format, base=base)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_half_an_expert_of_a_server(factor: str, tmp_path: Path) -> None:
    out = exported(tmp_path, "vllm", target_modules=[])
    tensors = load_file(out / NAME)
    del tensors[next(key for key in tensors if f"experts.1.down_proj.{factor}" in key)]
    save_file(tensors, out / NAME)
    with pytest.raises(ValueError, match=r"experts\.1\.down_proj: found lora_[AB] and no lora_[AB]"):
        bring(tmp_path, format="vllm")


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_linears_of_an_export_fit_the_base(format: str, tmp_path: Path) -> None:
    """Also where everything else is as this package wrote it."""
    out = exported(tmp_path, format, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    with safe_open(out / NAME, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / NAME)
    q, k = (next(key for key in tensors if f"{name}.lora_B" in key) for name in ("q_proj", "k_proj"))
    assert tensors[q].shape != tensors[k].shape
    tensors[q], tensors[k] = tensors[k], tensors[q]
    save_file(tensors, out / NAME, metadata)
    with pytest.raises(ValueError, match=r"[qk]_proj.*found shape"):
        bring(tmp_path)
    assert not (tmp_path / "back").exists()


def test_a_small_file_does_not_become_a_huge_one(tmp_path: Path) -> None:
    """The rank of one linear of an expert is that of all, in a config that gives it to a tiny one."""
    adapter, size = tmp_path / "out", 2**15
    adapter.mkdir()
    path = "base_model.model.model.layers.0.mlp.experts"
    tensors = {
        f"{path}.0.gate_proj.lora_A.weight": torch.ones(1, size), f"{path}.0.gate_proj.lora_B.weight": torch.ones(2, 1),
        f"{path}.0.up_proj.lora_A.weight": torch.ones(1, size), f"{path}.0.up_proj.lora_B.weight": torch.ones(2, 1),
        f"{path}.0.down_proj.lora_A.weight": torch.ones(size, 2),
        f"{path}.0.down_proj.lora_B.weight": torch.ones(2, size),
    }  # fmt: skip
    save_file(tensors, adapter / NAME)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": {"down_proj": size}, "target_modules": []}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="most of it zeros"):
        bring(tmp_path, base=None, format="peft-per-expert")
    assert not (tmp_path / "back").exists()


def test_an_adapter_does_not_choose_whose_code_is_run(tmp_path: Path) -> None:
    out = exported(tmp_path, "vllm", target_modules=[])
    (out / "evil.py").write_text("raise SystemExit('this was run')")
    (out / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}))
    change_config(out, base_model_name_or_path=str(out))
    with pytest.raises(ValueError, match="`trust_remote_code=True` runs code of a base, and no adapter chooses which"):
        bring(tmp_path, base=None, trust_remote_code=True)
    assert not (tmp_path / "back").exists()
