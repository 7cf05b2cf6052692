"""Checkpoints and adapters from strangers, merged: nothing is run, nothing leaves the folders, nothing is left out."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from peft_moe import export_adapter, merge_checkpoint
from peft_moe.checkpoint.merge import skeleton
from peft_moe.compat import model_class
from tests.checkpoint.merge.cases import case, files_of, merge


def change(path: Path, **options: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def refused(folder: Path, message: str) -> None:
    before = files_of(folder)
    with pytest.raises(ValueError, match=message):
        merge(folder)
    assert files_of(folder) == before


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    refused(tmp_path, "notes.txt is a link to .*secret, outside of the folder")
    (tmp_path / "base" / "notes.txt").unlink()
    (tmp_path / "base" / "here.txt").write_text("here")
    (tmp_path / "base" / "notes.txt").symlink_to("here.txt")
    (tmp_path / "base" / "away").symlink_to(tmp_path, target_is_directory=True)  # is not followed
    merge(tmp_path)
    assert (tmp_path / "out" / "notes.txt").read_text() == "here" and not (tmp_path / "out" / "away").exists()


def test_links_of_the_cache_of_the_hub_are_its_files(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    home = tmp_path / "models--someone--model"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "0").mkdir(parents=True)
    (tmp_path / "base" / "notes.txt").write_text("notes")
    for number, path in enumerate(sorted((tmp_path / "base").iterdir())):
        path.rename(home / "blobs" / str(number))
        (home / "snapshots" / "0" / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    merge_checkpoint(home / "snapshots" / "0", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "notes.txt").read_text() == "notes"
    (home / "snapshots" / "0" / "away.txt").symlink_to(tmp_path / "adapter" / "README.md")
    with pytest.raises(ValueError, match="away.txt is a link"):
        merge_checkpoint(home / "snapshots" / "0", tmp_path / "adapter", tmp_path / "other", progress=False)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}',
                                   '{"weight_map": {"a": "b.bin"}}', "{"])  # fmt: skip
def test_an_index_that_is_none(index: str, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    (tmp_path / "base" / "model.safetensors.index.json").write_text(index)
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` is 1000000000, and its files hold"),
        ({"num_experts": 10**9}, "`num_experts` is 1000000000, and its files hold"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "`num_hidden_layers` is 1000000000"),
        ({"hidden_size": 10**12}, "."),
        ({"hidden_size": "big"}, "."),
        ({"architectures": 2.5}, None),
        ({"architectures": ["Trainer", "pipeline", 3, "set_seed"]}, None),
        ({"quantization_config": "x"}, "`quantization_config` is 'x', expected an object"),
        ({"quantization_config": {"quant_method": "exec"}}, "its quantization is 'exec'"),
        ({"model_type": 3}, "."),
        ({"model_type": "../../x"}, "trust_remote_code"),
    ],
    ids=str,
)
def test_configs_of_models(options: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    change(tmp_path / "base" / "config.json", **options)
    if message is None:
        merge(tmp_path)
    else:
        refused(tmp_path, message)


def test_layers_without_number_where_no_file_counts_them(tmp_path: Path) -> None:
    """A conversion looks at the config of the base alone."""
    case("qwen3_moe", tmp_path)
    change(tmp_path / "base" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ValueError, match="config.json: `num_hidden_layers` is 1000000000: no model has so many"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "vllm", base=tmp_path / "base", progress=False)


def test_modules_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever name a config asks for them."""
    case("qwen3_moe", tmp_path)
    monkeypatch.setattr(skeleton, "MAX_MODULES", 30)
    refused(tmp_path, "its config.json asks for a model of more than 30 modules")


@pytest.mark.parametrize("option", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_is_fetched(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a model whose config names a kernel of the hub runs what is there."""
    case("qwen3_moe", tmp_path)
    change(tmp_path / "base" / "config.json", **{option: "someone/kernel"})
    asked = []
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_check_and_adjust_attn_implementation",
        lambda self, name, *_, **__: asked.append(name) or name,
    )  # fmt: skip
    merge(tmp_path)
    assert asked and "someone/kernel" not in asked


def test_only_models_are_built() -> None:
    assert model_class("Qwen3MoeForCausalLM") is transformers.Qwen3MoeForCausalLM
    for name in ("Trainer", "pipeline", "set_seed", "AutoModel", "logging", "__doc__", "nothing", 3, None, ["a"]):
        assert model_class(name) is None, name


@pytest.mark.parametrize(
    "damage", ["rank", "magnitudes missing", "magnitudes too many", "one magnitude", "empty", "int"]
)
def test_linears_that_are_not_what_the_config_says(damage: str, tmp_path: Path) -> None:
    dora = damage in ("magnitudes missing", "one magnitude")
    case("qwen3_moe", tmp_path, target_modules=["q_proj", "embed_tokens"][: 1 + (damage == "rank")], use_dora=dora)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    size = key.replace("lora_A.weight", "lora_magnitude_vector")
    if damage == "rank":
        for one in [one for one in tensors if "lora_embedding" in one]:
            tensors[one] = tensors[one][:2] if one.endswith("A") else tensors[one][:, :2].contiguous()
    elif damage == "magnitudes missing":
        del tensors[size]
    elif damage == "magnitudes too many":
        tensors[size] = torch.ones(8)
    elif damage == "one magnitude":
        tensors[size] = tensors[size][:1].clone()
    elif damage == "empty":
        tensors[key] = torch.zeros(0, tensors[key].shape[1])
    else:
        tensors[key] = tensors[key].to(torch.int32)
    save_file(tensors, path, metadata={"format": "pt"})
    said = {
        "rank": "found factors of rank 2, adapter_config.json says 3",
        "magnitudes missing": "magnitudes of DoRA are missing",
        "magnitudes too many": "magnitudes of DoRA found",
        "one magnitude": r"found shape \(1,\), expected",
        "empty": "expected a tensor of floating values",
        "int": "is I32 .* expected a tensor of floating values",
    }
    refused(tmp_path, said[damage])


@pytest.mark.parametrize("old, new", [("experts.", "experts<"), ("up_proj.weight", "up_projnweight")])
def test_experts_that_only_look_like_the_expected_ones(old: str, new: str, tmp_path: Path) -> None:
    """Names are matched by regexes in which a dot stands for anything."""
    case("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if re.search(r"experts\.0\.up_proj", key))
    tensors[key.replace(old, new)] = tensors.pop(key)
    save_file(tensors, path, metadata={"format": "pt"})
    refused(tmp_path, "experts")


@pytest.mark.parametrize("damage", ["a linear less", "a linear more"])
def test_linears_that_the_config_does_not_target(damage: str, tmp_path: Path) -> None:
    """A whole pair too few is an adapter that does less, one too many is of another adapter."""
    case("qwen3_moe", tmp_path, target_modules=["q_proj", "o_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {key: value for key, value in tensors.items() if key.startswith(start)}
    assert len(pair) == 2
    if damage == "a linear less":
        tensors = {key: value for key, value in tensors.items() if key not in pair}
        said = "missing tensors of model.layers.0.self_attn.q_proj, which it targets"
    else:
        config = json.loads(path.with_name("adapter_config.json").read_text()) | {"exclude_modules": ["q_proj"]}
        path.with_name("adapter_config.json").write_text(json.dumps(config))
        said = "found tensors of model.layers.0.self_attn.q_proj, .*which it does not target"
    save_file(tensors, path, metadata={"format": "pt"})
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_linears_whose_change_is_not_that_of_lora(option: str, value: Any, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path, target_experts=[])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LORA", option: value}))
    refused(tmp_path, f"`{option}` is not merged on disk")
