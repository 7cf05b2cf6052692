"""The result is complete or absent; what it is stands in its card; what cannot be converted is said before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_moe import export_adapter, import_adapter
from peft_moe.checkpoint.formats import folder as writing
from peft_moe.checkpoint.formats.native import NativeAdapter
from peft_moe.checkpoint.formats.plan import Planned, planned
from peft_moe.checkpoint.tensor_file import TensorFile
from tests.checkpoint.formats.cases import (
    NAME,
    V5,
    assert_close,
    bring,
    case,
    change_config,
    export,
    out_of,
    same_files,
    without_note,
)
from tests.checkpoint.merge.cases import files_of, write_adapter
from tests.zoo import ENTRIES

ONE = "qwen3_moe" if V5 else "gpt_oss"


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["make", "fsync", "rename"])
def test_a_failure_leaves_nothing(
    place: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case(ONE, tmp_path)
    before = files_of(tmp_path)
    calls = 0

    def fails(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (3 if place == "make" else 0):
            raise error
        return honest(*args, **options)

    owner, name = {"make": (Planned, "parts"), "fsync": (writing.os, "fsync"), "rename": (writing.os, "rename")}[place]
    honest = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(type(error)):
            export(tmp_path, "peft")
    assert calls and files_of(tmp_path) == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "native"]
    export(tmp_path, "peft")


def test_a_result_takes_the_place_of_nothing(tmp_path: Path) -> None:
    case(ONE, tmp_path)
    (tmp_path / "out").mkdir()
    export(tmp_path, "peft")  # an empty folder is as good as none
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):
        export(tmp_path, "peft")
    with pytest.raises(ValueError, match="cannot take the place of what it is made of"):
        export(tmp_path, "peft", target="native")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file exists"):
        bring(tmp_path, target="file")
    (tmp_path / "file").unlink()
    assert files_of(tmp_path) == before


def test_not_enough_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case(ONE, tmp_path)
    monkeypatch.setattr(writing, "free_space", lambda path: 0)
    for target in ("out", "new/er/out"):
        with pytest.raises(ValueError, match="0.00 GB are free. Nothing was written"):
            export(tmp_path, "peft", target=target)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base", "native"]


def test_a_tensor_that_is_not_as_planned(tmp_path: Path) -> None:
    one = planned("key", (2, 3), torch.float32, lambda: torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match=r"key: made \(3, 2\) torch.float32, planned \(2, 3\) F32"):
        list(one.parts(torch.device("cpu")))


def test_tensors_are_made_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is exported, and of one that is imported, one tensor is read for each that is written."""
    case(ONE, tmp_path)
    events: list[str] = []
    read, parts = TensorFile.read, Planned.parts
    monkeypatch.setattr(TensorFile, "read", lambda self, *args: (events.append("read"), read(self, *args))[1])
    monkeypatch.setattr(Planned, "parts", lambda self, *args: (events.append("write"), parts(self, *args))[1])
    export(tmp_path, "peft")
    assert events == ["write", "read"] * (len(events) // 2) and events
    events.clear()
    without_note(tmp_path / "out")
    bring(tmp_path)
    assert events == ["write", "read"] * (len(events) // 2) and events


def test_the_base_is_found_where_the_config_says(tmp_path: Path) -> None:
    _, ours = case(ONE, tmp_path)
    with pytest.raises(ValueError, match=r"states the base None.*`base=`"):
        export_adapter(tmp_path / "native", tmp_path / "out", "peft")
    with pytest.raises(ValueError, match="base='nowhere/model': no config.json"):
        export_adapter(tmp_path / "native", tmp_path / "out", "peft", base="nowhere/model")
    change_config(tmp_path / "native", base_model_name_or_path=str(tmp_path / "base"))
    for one in (tmp_path / "base").iterdir():
        if one.name != "config.json":
            one.unlink()  # weights are not needed
    export_adapter(tmp_path / "native", tmp_path / "out", format="peft")
    import_adapter(tmp_path / "out", tmp_path / "back")
    assert same_files(tmp_path / "native", tmp_path / "back")


def test_another_base(tmp_path: Path) -> None:
    """Sizes or names that do not fit are an error, not another adapter."""
    case(ONE, tmp_path)
    change = {"hidden_size": 32}
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="found shape"):
        export(tmp_path, "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_only_merging_keeps_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    base = ENTRIES[ONE].build()
    base.save_pretrained(tmp_path / "base")
    write_adapter(base, tmp_path / "native", target_modules=[], **options)
    for name in ("peft", "unsloth", "peft-per-expert"):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}.*Merge it instead"):
            export(tmp_path, name)


def test_names_of_formats_and_options(tmp_path: Path) -> None:
    case(ONE, tmp_path)
    with pytest.raises(ValueError, match="format='gguf': adapters are exported to .*peft, peft-per-expert"):
        export(tmp_path, "gguf")
    with pytest.raises(ValueError, match="format='native': adapters are imported from"):
        bring(tmp_path, source="native", format="native")
    with pytest.raises(ValueError, match="`layout`: the format 'peft' takes no options"):
        export(tmp_path, "peft", layout="contiguous_r")
    with pytest.raises(ValueError, match="native format of peft-moe already"):
        bring(tmp_path, source="native")
    export(tmp_path, "peft")
    with pytest.raises(ValueError, match="not in the native format.*import_adapter"):
        export(tmp_path, "peft", source="out", target="again")


def test_what_is_no_adapter_of_experts(tmp_path: Path) -> None:
    base = ENTRIES[ONE].build()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "linears")
    with pytest.raises(ValueError, match="no format of experts recognises.*LoRA of linears alone needs no conversion"):
        bring(tmp_path, source="linears", base=None)
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing|no adapter found"):
        bring(tmp_path, source="nowhere", base=None)
    (tmp_path / "linears" / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="not an object in braces but a list"):
        bring(tmp_path, source="linears", base=None)


def test_damaged_foreign_files(tmp_path: Path) -> None:
    case(ONE, tmp_path, target_modules=[])
    out = export(tmp_path, "peft")
    without_note(out)
    whole, config = load_file(out / NAME), (out / "adapter_config.json").read_text()
    key = min(key for key in whole if "layers.0" in key and ".base_layer.lora_A" in key)

    def refuses(message: str, tensors: dict[str, torch.Tensor] = whole, **values: Any) -> None:
        save_file(tensors, out / NAME)
        (out / "adapter_config.json").write_text(json.dumps(json.loads(config) | values))
        for base in (tmp_path / "base", None):
            with pytest.raises(ValueError, match=message):
                bring(tmp_path, base=base, format="peft")
        assert not (tmp_path / "back").exists()

    refuses(re.escape(f"{key} is missing"), {one: value for one, value in whole.items() if one != key})
    refuses("found shapes", whole | {key: whole[key][:-1].contiguous()})
    refuses("is I64 .*expected a tensor of floating values", whole | {key: whole[key].long()})
    refuses("`r='x'` is of the wrong kind", r="x")
    refuses("`lora_alpha=None` is of the wrong kind", lora_alpha=None)
    refuses("`use_dora` is set", use_dora=True)
    refuses("peft_type is 'MISS'|its type is 'MISS'", peft_type="MISS")
    refuses("found shapes", r=5)
    refuses("could take (very )?long|has a repeat", rank_pattern={"(a+)+": 2})
    refuses("`target_parameters='experts.down_proj'` is of the wrong kind", target_parameters="experts.down_proj")
    refuses("nested pairs of factors", target_parameters=["experts.down_proj"])
    refuses(
        "no projection of experts", target_parameters=["experts.down_proj", "experts.gate_up_proj", "router.weight"]
    )


def test_cards(tmp_path: Path) -> None:
    """How to load it, the base, ranks and experts: on save, on export, on import."""
    case(ONE, tmp_path, expert_indices=[0, 2], expert_r=5, target_modules=[])
    change_config(tmp_path / "native", base_model_name_or_path=str(tmp_path / "base"))
    export(tmp_path, "peft")
    bring(tmp_path)
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("native", "out", "back")}
    for name, card in cards.items():
        assert "How to load this adapter" in card and "PeftModel.from_pretrained" in card
        assert "rank and alpha of the experts: 5, 6" in card and "experts: [0, 2] of every layer" in card
        assert ("import peft_moe" in card) == (name != "out")
    for name in ("out", "back"):
        assert cards[name].startswith("---\nbase_model: ") and str(tmp_path / "base") in cards[name]
    assert "stock PEFT (`peft`)" in cards["out"]
    major = transformers.__version__.partition(".")[0]  # another may hold these experts in another way
    assert f"import AutoModelForCausalLM  # {major}, under which it was exported" in cards["out"]
    assert "converted from the format `peft`" in cards["back"]


def test_the_result_is_loaded_as_the_card_says(tmp_path: Path) -> None:
    base, ours = case(ONE, tmp_path)
    export(tmp_path, "peft")
    wanted = out_of(ours, ONE)
    assert_close(out_of(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval(), ONE), wanted)


def test_without_a_base_names_and_shapes_are_known(tmp_path: Path) -> None:
    """What a format that needs no base can read of a native adapter."""
    _, ours = case(ONE, tmp_path, expert_rank_pattern={r"layers\.\d+\..*\.2": 5}, expert_alpha=9)
    one = NativeAdapter(tmp_path / "native", None)
    parameters = dict(ours.named_parameters())
    assert [module.name for module in one.modules] == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    for module in one.modules:
        assert module.ranks == (3, 3, 5, 3) and list(module.experts) == [0, 1, 2, 3]
        assert [module.scaling(position) for position in range(4)] == pytest.approx([3, 3, 9 / 5, 3])
        for _, slot in module.slots():
            packed = parameters[f"base_model.model.{module.name}.{slot}.lora_B.default"]
            found = module.factor(slot, "lora_B")
            assert found.shape[2] == 5 and torch.equal(found[1, :, :3], packed[3:6].T) and not found[1, :, 3:].any()
    assert any("q_proj" in key for key in one.others)


def test_only_pages_of_adapters_change(tmp_path: Path) -> None:
    """Linears pass through as they are."""
    case(ONE, tmp_path)
    native, out = (load_file(folder / NAME) for folder in (tmp_path / "native", export(tmp_path, "peft")))
    linears = [key for key in native if ".experts." not in key]
    assert linears and all(torch.equal(native[key], out[key]) for key in linears)


def test_a_scale_of_zero_keeps_what_it_scales(tmp_path: Path) -> None:
    case(ONE, tmp_path)
    out = export(tmp_path, "peft")
    without_note(out)
    change_config(out, lora_alpha=0)
    bring(tmp_path, format="peft")
    native, back = (load_file(tmp_path / name / NAME) for name in ("native", "back"))
    assert native.keys() == back.keys() and all(torch.equal(native[key], back[key]) for key in native)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_alpha"] == 0
