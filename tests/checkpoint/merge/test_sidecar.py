"""The config of the result, as readers of either version of transformers need it; and models in the hub's cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from peft_moe import merge_checkpoint
from peft_moe.checkpoint.merge.sidecar import config_of
from tests.checkpoint.merge.cases import case, files_of, merge


class Base:
    """What `config_of` reads of a base."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config


def made(config: dict[str, Any], dtype: torch.dtype | None = None, keep: bool = False, **aliases: str) -> Any:
    base: Any = Base(config)
    return json.loads(config_of(base, dtype, keep, aliases))


def test_names_of_both_versions() -> None:
    config = {
        "num_local_experts": 6,
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0},
    }
    found = made(config, num_experts="num_local_experts", n_layers="num_hidden_layers")
    assert found == config | {
        "num_experts": 6,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }


def test_what_is_there_stays() -> None:
    config = {
        "num_local_experts": 6,
        "num_experts": 6,
        "rope_theta": 1.0,
        "rope_parameters": {"rope_theta": 1.0, "rope_type": "default"},
    }
    assert made(config, num_experts="num_local_experts") == config


def test_dtype_and_quantization() -> None:
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"torch_dtype": "float32", "quantization_config": packed, "text_config": {"torch_dtype": "float32"}}
    plain = made(config, torch.bfloat16)
    both = {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert plain == both | {"text_config": both}
    assert made(config, None, keep=True)["quantization_config"] == packed


def test_the_config_reads_as_that_of_the_base(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    merge(tmp_path)
    base, out = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("base", "out"))
    assert {key: value for key, value in out.items() if base.get(key) != value and "name_or_path" not in key} == {}
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_experts"] == 4 and written["rope_theta"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the hub with a base and an adapter in it, as links to blobs."""
    case("qwen3_moe", tmp_path)
    home = tmp_path / "cache"
    for kind in ("base", "adapter"):
        repository = home / f"models--someone--{kind}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        for path in (tmp_path / kind).iterdir():
            shutil.copy(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        try:
            monkeypatch.setattr(module, str(home))
        except AttributeError:  # of one version only
            continue
    return home


def test_models_in_the_cache_of_the_hub(cache: Path, tmp_path: Path) -> None:
    merge(tmp_path)
    merge_checkpoint("someone/base", "someone/adapter", tmp_path / "other", progress=False)
    assert files_of(tmp_path / "other") == files_of(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "other").rglob("*"))


@pytest.mark.parametrize("name", ["no/such-model", "not a name"])
def test_what_is_nowhere(name: str, tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match="no checkpoint found"):
        merge_checkpoint(name, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(ValueError, match="no adapter found"):
        merge_checkpoint(tmp_path / "base", name, tmp_path / "out")
