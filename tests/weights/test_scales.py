"""Scales that a loader dropped: found again in the checkpoint, or refused by name."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe.checkpoint.packed import packed_config
from peft_moe.checkpoint.scales import recover_scales
from tests.model.tiny import config
from tests.reference import adapter_factors, relative, write_deltas
from tests.weights.checkpoints import dense_twin, read, save_shards, write_fp8
from tests.weights.quantized import E4M3
from tests.zoo import ENTRIES, first_floating

V5 = int(transformers.__version__.split(".")[0]) >= 5
NAME = "qwen3_moe"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=packed_config(str(folder)), dtype=torch.float32).eval()


def rewrite(folder: Path, change: Any, shards: int = 1) -> None:
    """Write the tensors of a folder anew, changed."""
    tensors = read(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_shards(change(tensors), folder, shards)


def drop(model: nn.Module) -> dict[str, Tensor]:
    """Take every scale out of a model, as a loader that does not know them."""
    dropped = {}
    for name, value in list(model.named_parameters()):
        if name.endswith(("_scale_inv", "_scale")):
            owner, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(owner), leaf)
            dropped[name] = value.data
    return dropped


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
@pytest.mark.parametrize("shards", [1, 3])
def test_found_again(kind: str, shards: int, tmp_path: Path) -> None:
    write_fp8(ENTRIES[NAME].build(), tmp_path, kind=kind, shards=shards)
    model = load(tmp_path)
    expected = drop(model)
    assert expected
    paths = recover_scales(model, str(tmp_path))
    assert len(paths) == len(expected)
    parameters = dict(model.named_parameters())
    for name, value in expected.items():
        assert parameters[name].numel() == value.numel()
        assert torch.equal(parameters[name].reshape(-1), value.reshape(-1)), name
        assert not parameters[name].requires_grad
    assert recover_scales(model, str(tmp_path)) == []


def test_attaching_an_adapter_finds_them(tmp_path: Path) -> None:
    base = ENTRIES[NAME].build()
    inputs = ENTRIES[NAME].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8")
    model = load(tmp_path / "fp8")
    drop(model)
    assert model.config._name_or_path == str(tmp_path / "fp8")
    twin = dense_twin(base, exact, tmp_path / "dense")
    adapted = get_peft_model(model, config())
    write_deltas(adapter_factors(adapted, twin), 2.0)
    with torch.no_grad():
        assert relative(first_floating(adapted(**inputs)), first_floating(twin(**inputs))) < 2e-5


def test_nowhere(tmp_path: Path) -> None:
    write_fp8(ENTRIES[NAME].build(), tmp_path)
    model = load(tmp_path)
    drop(model)
    other = copy.deepcopy(model)
    other.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"experts.*FP8 without a scale: looked for .*_scale_inv.*does not say"):
        get_peft_model(other, config())
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "experts.2.up" not in key})
    before = set(dict(model.named_parameters()))
    with pytest.raises(ValueError, match=r"experts\.2\.up_proj\.weight_scale_inv|some of the 4 experts"):
        recover_scales(model, str(tmp_path))
    assert set(dict(model.named_parameters())) == before
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if "scale" not in key})
    with pytest.raises(ValueError, match=r"has none for it either: looked for .*weight_scale_inv.*there: none"):
        recover_scales(model, str(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint found: looked for"):
        recover_scales(model, str(tmp_path / "not there"))


@pytest.mark.parametrize("wrong", ["shape", "dtype", "value"])
def test_keys_are_looked_at_before_they_are_trusted(wrong: str, tmp_path: Path) -> None:
    write_fp8(ENTRIES[NAME].build(), tmp_path)
    model = load(tmp_path)
    drop(model)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = "model.layers.1.mlp.experts.1.down_proj.weight_scale_inv"
        good = tensors[key]
        bad = {"shape": torch.ones(5, 7), "dtype": good.to(torch.int32), "value": good * torch.inf}
        tensors[key] = bad[wrong]
        return tensors

    rewrite(tmp_path, change)
    before = set(dict(model.named_parameters()))
    with pytest.raises(
        ValueError, match=r"does not fit|differ in shape|expected a scale in a floating dtype|not finite"
    ):
        recover_scales(model, str(tmp_path))
    assert set(dict(model.named_parameters())) == before


def test_names_with_another_prefix(tmp_path: Path) -> None:
    write_fp8(ENTRIES[NAME].build(), tmp_path)
    model = load(tmp_path)
    expected = drop(model)
    rewrite(tmp_path, lambda tensors: {f"language_{key}": value for key, value in tensors.items()})
    assert len(recover_scales(model, str(tmp_path))) == len(expected)


def test_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's client lays it out: blobs, snapshots and refs."""
    write_fp8(ENTRIES[NAME].build(), tmp_path / "made", shards=2)
    model = load(tmp_path / "made")
    expected = drop(model)
    root = tmp_path / "hub" / "models--someone--some-model"
    snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tmp_path / "made", snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    from transformers.utils import hub

    if hasattr(hub, "TRANSFORMERS_CACHE"):
        monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert len(recover_scales(model, "someone/some-model")) == len(expected)


def test_layers_in_16_bit_by_design(tmp_path: Path) -> None:
    """A checkpoint whose second layer is not quantized, and whose config does not say so."""
    base = ENTRIES[NAME].build()
    inputs = ENTRIES[NAME].inputs(base)
    _, exact = write_fp8(base, tmp_path / "fp8")
    plain = {key: value for key, value in base.state_dict().items()}

    base.save_pretrained(tmp_path / "plain")
    original = read(tmp_path / "plain")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key in list(tensors):
            if "layers.1." in key and key.endswith("_scale_inv"):
                del tensors[key]
                weight = key.removesuffix("_scale_inv")
                tensors[weight] = original[weight]
                exact[weight] = original[weight].double()
        return tensors

    assert plain
    rewrite(tmp_path / "fp8", change)
    model = load(tmp_path / "fp8")
    codes = {name for name, value in model.named_parameters() if value.dtype == E4M3}
    assert codes and all("layers.0." in name for name in codes)
    twin = dense_twin(base, exact, tmp_path / "dense")
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
        adapted = get_peft_model(model, config())
        write_deltas(adapter_factors(adapted, twin), 2.0)
        assert relative(first_floating(adapted(**inputs)), first_floating(twin(**inputs))) < 2e-5


def test_loading_a_checkpoint_without_its_scales_raises(tmp_path: Path) -> None:
    write_fp8(ENTRIES[NAME].build(), tmp_path)
    rewrite(
        tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj.weight_s" not in k}
    )
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is .*without a scale"):
        load(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "scale" not in k})
    with pytest.raises(ValueError, match="without a scale"):
        load(tmp_path)
