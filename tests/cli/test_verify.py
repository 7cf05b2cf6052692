"""`peft-moe verify`: right adapters pass, on every storage; wrong merges and broken values do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import peft_moe
from tests.checkpoint.merge.cases import case, write_adapter
from tests.cli.calls import COMMANDS, call, folder, result  # noqa: F401  # a fixture
from tests.weights.checkpoints import write_fp8
from tests.zoo import ENTRIES


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_verify(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    case(name, tmp_path, **options)
    found = result("verify", tmp_path / "adapter", "--base", tmp_path / "base")
    assert found["ok"]
    assert ("`use_dora`" if options else "bit for bit") in found["export"]
    checked = {one["parameter"] for one in found["slices"]}
    assert any(".experts." in one for one in checked) and any("attn" in one for one in checked)
    assert all(0 <= one["merge"] <= 1e-5 and 0 < one["forward"] <= 1e-4 for one in found["slices"])
    assert "FAILED" not in call("verify", tmp_path / "adapter", "--base", tmp_path / "base").output


def test_verify_on_fp8(tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    write_fp8(base, tmp_path / "base")
    write_adapter(base, tmp_path / "adapter")
    assert result("verify", tmp_path / "adapter", "--base", tmp_path / "base")["ok"]


def test_verify_finds_a_wrong_merge(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_moe.checkpoint.merge.edits import Merging

    honest = Merging._make

    def scrambled(self: Any, *args: Any) -> Any:
        made = honest(self, *args)
        return None if made is None else {key: value.flip(-1) for key, value in made.items()}

    monkeypatch.setattr(Merging, "_make", scrambled)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=1)
    assert not found["ok"] and not any(one["ok"] for one in found["slices"])
    shown = call("verify", folder / "adapter", "--base", folder / "base")
    assert shown.exit_code == 1 and "FAILED" in shown.output


def test_verify_finds_values_that_are_not_finite(folder: Path) -> None:  # noqa: F811
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(key for key in tensors if key.endswith("layers.0.mlp.experts.down_proj.lora_A"))][:] = float("nan")
    save_file(tensors, path)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=1)
    assert [one["ok"] for one in found["slices"] if "layers.0.mlp.experts" in one["parameter"]].count(False) > 0
    assert result("inspect", folder / "adapter")["not_finite"] == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("damage", [False, True])
def test_verify_exports_and_imports_again(
    damage: bool,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The way there and back; one of the converters changes a value."""

    def damages(source: Any, target: Any, **options: Any) -> None:
        peft_moe.import_adapter(source, target, **options)
        tensors = load_file(Path(target) / "adapter_model.safetensors")
        tensors[min(tensors)].view(-1)[0] += 1
        save_file(tensors, Path(target) / "adapter_model.safetensors")

    if damage:
        monkeypatch.setattr("peft_moe.cli.checks.import_adapter", damages)
    found = result("verify", folder / "adapter", "--base", folder / "base", code=int(damage))
    assert ("tensors changed" in found["export"]) == damage
