"""Adapters on the linears of listed experts: exact, also for some experts, and with equal logits in stock PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe.checkpoint.tensor_file import TensorFile
from tests.checkpoint.formats.cases import (
    NAME,
    V5,
    assert_close,
    bring,
    case,
    change_config,
    export,
    is_stock,
    loaded,
    out_of,
    same_files,
    stock_trained,
    without_note,
)
from tests.checkpoint.formats.test_stock import OPTIONS
from tests.zoo import ENTRIES
from tests.zoo.views import weight_views

EXPERTS = 4
LISTED = pytest.mark.skipif(V5, reason="experts are lists in transformers 4")
#: name -> (path of a block's experts in transformers 4, names of gate, up and down there)
NAMES = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v3": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}


def write(
    folder: Path,
    name: str,
    base: nn.Module,
    chosen: dict[int, list[int]],
    linears: tuple[int, ...] = (0, 1, 2),
    **config: Any,
) -> nn.Module:
    """An adapter as transformers 4 and PEFT save it. Returns the base with the deltas added, in float64 sums.

    Args: chosen: layer -> experts. linears: of gate, up, down.
    """
    path, names = NAMES[name]
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = config.get("rank_pattern", {}), config.get("alpha_pattern", {})
    modules = {
        int(re.search(r"layers\.(\d+)\.", key).group(1)): module  # type: ignore[union-attr]
        for key, module in base.named_modules()
        if key.endswith(".experts")
    }
    for layer, experts in chosen.items():
        views = weight_views(modules[layer], base.config.hidden_size)
        for expert in experts:
            rows = [one.detach() for one in views["gate_up_proj"][expert]]
            half = rows[0].shape[0] // 2
            both = rows if len(rows) == 2 else [rows[0][:half], rows[0][half:]]
            weights = [*both, views["down_proj"][expert][0].detach()]
            for index in linears:
                linear = f"model.layers.{layer}.{path}.{expert}.{names[index]}"
                rank = next((value for end, value in ranks.items() if linear.endswith(end)), 3)
                alpha = next((value for end, value in alphas.items() if linear.endswith(end)), 6)
                out, size = weights[index].shape
                a = torch.randn(rank, size, generator=generator)
                b = 0.2 * torch.randn(out, rank, generator=generator)
                tensors[f"base_model.model.{linear}.lora_A.weight"] = a
                tensors[f"base_model.model.{linear}.lora_B.weight"] = b
                weights[index] += (alpha / rank * b.double() @ a.double()).float()
    folder.mkdir()
    save_file(tensors, folder / NAME)
    values = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "peft_version": "0.17.1", "task_type": "CAUSAL_LM"}
    values |= {"target_modules": [names[index] for index in linears]} | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return base


def prepared(name: str, folder: Path) -> tuple[nn.Module, nn.Module]:
    base, reference = ENTRIES[name].build(), ENTRIES[name].build()
    base.save_pretrained(folder / "base")
    return base, reference


ALL = {0: list(range(EXPERTS)), 1: list(range(EXPERTS))}


@pytest.mark.parametrize(
    "chosen",
    [ALL, {0: [0, 2], 1: [0, 2]}, {0: [3], 1: [0, 1, 2]}, {1: [1, 2]}],
    ids=["all", "some", "by layer", "one layer"],
)
@pytest.mark.parametrize("name", NAMES)
def test_import(name: str, chosen: dict[int, list[int]], tmp_path: Path) -> None:
    base, reference = prepared(name, tmp_path)
    write(tmp_path / "out", name, reference, chosen)
    ours = loaded(base, bring(tmp_path))
    config = ours.peft_config["default"]
    assert config.split_gate_up
    wanted = {0: None, 1: None} if chosen == ALL else chosen
    if config.expert_indices is None:
        assert wanted == {0: None, 1: None}
    elif isinstance(config.expert_indices, list):
        assert {layer: config.expert_indices for layer in (0, 1)} == chosen
    else:
        assert config.expert_indices == chosen
    assert float((out_of(reference, name) - out_of(base, name)).abs().max()) > 1e-2
    assert_close(out_of(ours, name), out_of(reference, name))
    files = [load_file(tmp_path / folder / NAME) for folder in ("out", "back")]
    assert sum(one.numel() for one in files[0].values()) == sum(one.numel() for one in files[1].values())


@pytest.mark.parametrize("linears", [(0, 1), (2,), (0,), (1, 2)], ids=["gate up", "down", "gate", "up down"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_some_linears(name: str, linears: tuple[int, ...], tmp_path: Path) -> None:
    """What is not adapted gets zeros, where the native format has to hold it."""
    base, reference = prepared(name, tmp_path)
    write(tmp_path / "out", name, reference, {0: [1, 2], 1: [0, 3]}, linears)
    assert_close(out_of(loaded(base, bring(tmp_path)), name), out_of(reference, name))


def test_ranks_and_alphas_by_pattern(tmp_path: Path) -> None:
    """Experts keep theirs; where the linears of one expert differ, B takes the difference of scalings."""
    patterns = {
        "rank_pattern": {
            "layers.0.mlp.experts.1.gate_proj": 5,
            "layers.0.mlp.experts.1.up_proj": 5,
            "experts.3.down_proj": 1,
        },
        "alpha_pattern": {"layers.1.mlp.experts.2.gate_proj": 9, "experts.0.up_proj": 7},
    }
    base, reference = prepared("qwen3_moe", tmp_path)
    write(tmp_path / "out", "qwen3_moe", reference, ALL, **patterns)
    assert_close(out_of(loaded(base, bring(tmp_path)), "qwen3_moe"), out_of(reference, "qwen3_moe"))


@pytest.mark.skipif(not V5, reason="PEFT converts these keys on transformers 5")
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_as_peft_s_own_conversion(name: str, tmp_path: Path) -> None:
    base, reference = prepared(name, tmp_path)
    write(tmp_path / "out", name, reference, ALL)
    theirs = loaded(base, tmp_path / "out")
    assert is_stock(theirs)
    assert_close(out_of(loaded(base, bring(tmp_path)), name), out_of(theirs, name))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_without_the_base(name: str, tmp_path: Path) -> None:
    base, reference = prepared(name, tmp_path)
    write(tmp_path / "out", name, reference, {0: [0, 2], 1: [0, 2]})
    assert_close(out_of(loaded(base, bring(tmp_path, base=None)), name), out_of(reference, name))


@LISTED
@pytest.mark.parametrize("name", NAMES)
def test_what_stock_peft_trained_is_imported(name: str, tmp_path: Path) -> None:
    base = ENTRIES[name].build()
    base.save_pretrained(tmp_path / "base")
    trained = stock_trained(
        base, tmp_path / "out", name, target_modules=["q_proj", "o_proj", *NAMES[name][1]], rank_pattern={r"o_proj": 2}
    )
    ours = loaded(base, bring(tmp_path))
    assert_close(out_of(ours, name), out_of(trained, name))
    assert not [key for key in load_file(tmp_path / "back" / NAME) if ".experts.0." in key]


@LISTED
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_stock_peft_loads_an_export(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, ours = case(name, tmp_path, **options)
    out = export(tmp_path, "peft-per-expert")
    theirs = loaded(base, out)
    assert is_stock(theirs)
    assert "where they are stacks (transformers 5) import it with `peft-moe`" in (out / "README.md").read_text()
    assert_close(out_of(theirs, name), out_of(ours, name))
    assert same_files(tmp_path / "native", bring(tmp_path))
    without_note(out)
    assert_close(out_of(loaded(base, bring(tmp_path, target="plain")), name), out_of(ours, name))


@LISTED
@pytest.mark.parametrize("variant", [{}, {"expert_rank_pattern": {r".*\.2": 5}}], ids=["one rank", "ranks"])
def test_an_export_reads_rows_of_single_experts(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the stack of a layer once for each of its experts."""
    case("qwen3_moe", tmp_path, target_modules=[], **variant)
    sizes: list[int] = []
    read = TensorFile.read

    def counting(self: TensorFile, *args: Any) -> Tensor:
        value = read(self, *args)
        sizes.append(value.numel())
        return value

    monkeypatch.setattr(TensorFile, "read", counting)
    out = export(tmp_path, "peft-per-expert")
    native = sum(value.numel() for value in load_file(tmp_path / "native" / NAME).values())
    assert len(sizes) == len(load_file(out / NAME)) and sum(sizes) < 2 * native  # gate and up share their A, and B


def test_on_another_form_of_base(tmp_path: Path) -> None:
    name = "qwen3_moe"
    case(name, tmp_path)
    if V5:
        with pytest.raises(ValueError, match="holds its experts in stacks.*'peft'"):
            export(tmp_path, "peft-per-expert")
    else:
        with pytest.raises(ValueError, match="holds its experts as a list.*'peft-per-expert'"):
            export(tmp_path, "peft")
    assert not (tmp_path / "out").exists()


def test_refused(tmp_path: Path) -> None:
    base, reference = prepared("qwen3_moe", tmp_path)
    write(tmp_path / "out", "qwen3_moe", reference, {0: [0], 1: [1]})
    whole = load_file(tmp_path / "out" / NAME)
    key = "base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_B.weight"

    def refuses(tensors: dict[str, Tensor], message: str, **config: Any) -> None:
        save_file(tensors, tmp_path / "out" / NAME)
        if config:
            change_config(tmp_path / "out", **config)
        with pytest.raises(ValueError, match=message):
            bring(tmp_path)
        assert not (tmp_path / "back").exists()

    refuses({one: value for one, value in whole.items() if one != key}, re.escape(f"{key} is missing"))
    refuses(whole | {key: whole[key][:, :2].contiguous()}, "found shapes .* expected \\(r, in\\) and \\(out, r\\)")
    refuses(whole | {key: whole[key][:8].contiguous()}, "shape")
    refuses(whole | {key.replace("experts.0.", "experts.7."): whole[key].clone()}, "7|missing")
    refuses({one.replace("up_proj", "odd_proj"): value for one, value in whole.items()}, "'odd_proj'.*gate_proj")
    magnitude = key.replace("lora_B.weight", "lora_magnitude_vector.weight")
    refuses(whole | {magnitude: torch.ones(40)}, "DoRA")
    refuses(whole, "expected 5 rows", rank_pattern={"up_proj": 5})
    refuses(whole, "`use_dora` is set", use_dora=True)
