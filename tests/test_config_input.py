"""Configs from strangers: what is refused before PEFT or transformers builds anything, and that nothing is run."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_moe import MoELoraConfig, export_adapter, merge_checkpoint
from peft_moe.checkpoint import json_input
from peft_moe.cli.contents import describe_adapter
from peft_moe.config_input import read_config
from tests.zoo import ENTRIES


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A valid adapter of Qwen3-MoE."""
    model = get_peft_model(ENTRIES["qwen3_moe"].build(), MoELoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter: Path, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


KINDS: dict[str, list[Any]] = {
    "r": ["8", 2.5, None, [], True],
    "lora_alpha": ["8", None, {}],
    "lora_dropout": ["0", None, 7, -1],
    "target_modules": [3, {"a": 1}, [3], [["q_proj"]]],
    "exclude_modules": [3, [None]],
    "modules_to_save": ["lm_head", [3], {"a": "b"}],
    "layers_to_transform": ["0", [0.5]],
    "rank_pattern": [[], {"a": "b"}, {"a": 0}, {"a": True}, {"a": 1.5}],
    "alpha_pattern": [["x"], {"a": "b"}, {"a": None}],
    "bias": ["some", None, 3],
    "use_dora": ["yes", 1],
    "task_type": [3],
    "peft_type": [3, None, "NONSENSE", "XLORA", ["MOELORA"]],
    "base_model_name_or_path": [["a"], 3],
    "expert_r": ["2", 0],
    "expert_indices": ["0", [0.5], {"0": 1}],
    "expert_rank_pattern": [[["a"]], [["a", "b"]], [[["a"], 2]]],
    "target_experts": [[["down_proj"]], 3],
    "monteclora_config": [{"x": 1}],  # PEFT takes the name for one of its own and asks itself without end
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", KINDS)
def test_values_of_the_wrong_kind(option: str, adapter: Path) -> None:
    for value in KINDS[option]:
        change(adapter, **{option: value})
        for read in (MoELoraConfig.from_pretrained, read_config):
            with pytest.raises(ValueError, match="adapter_config.json") as error:
                read(str(adapter))
            assert option in str(error.value) or option in ("peft_type", "monteclora_config"), str(error.value)


@pytest.mark.parametrize("option", ["rank_pattern", "target_modules", "modules_to_save", "exclude_modules"])
def test_patterns_of_stock_adapters(option: str, tmp_path: Path) -> None:
    """A LORA adapter does not pass through this package's own config."""
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    slow = r"(\w+\.?)+x"
    change(tmp_path / "adapter", **{option: {slow: 2} if option == "rank_pattern" else slow})
    if option == "modules_to_save":
        change(tmp_path / "adapter", modules_to_save=[slow])
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"adapter_config.json: LoraConfig: `{option}`.*repeat inside a repeat"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", progress=False)
    assert time.perf_counter() - start < 10 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, value", [("r", 10**12), ("expert_r", 10**9), ("rank_pattern", {"q_proj": 10**12})])
def test_huge_ranks_are_refused_before_memory_is_asked_for(option: str, value: Any, adapter: Path) -> None:
    change(adapter, **{option: value})
    with pytest.raises(ValueError, match="asks for rank|found shape|found factors of rank"):
        PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), adapter)
    config = PeftConfig.from_pretrained(str(adapter))  # as transformers reads it: without looking at the tensors
    with pytest.raises(ValueError, match=f"asks for rank {10**12 if option != 'expert_r' else 10**9}"):
        get_peft_model(ENTRIES["qwen3_moe"].build(), config)


@pytest.mark.parametrize("value", ["pissa_niter_1000000000", "pissa_niter_" + "9" * 5000])
def test_initialisations_that_never_end(value: str) -> None:
    with pytest.raises(ValueError, match="more than 1000 iterations"):
        MoELoraConfig(init_lora_weights=value, target_experts=[])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"megatron_core": "this_was_imported", "megatron_config": {"a": 1}, "target_experts": []},
        {"auto_mapping": {"parent_library": "this_was_imported", "base_model_class": "x"}},
        {"auto_map": {"AutoConfig": "this_was_imported.Config"}},
        {"runtime_config": {"x": "this_was_imported"}},
        {"_custom_modules": {"torch.nn.Linear": "this_was_imported.Linear"}},
        {"corda_config": {"cache_file": "this_was_imported.py"}, "init_lora_weights": "corda", "target_experts": []},
        {"base_model_name_or_path": "this_was_imported.py"},
        {"custom_modules": "this_was_imported", "import": "this_was_imported"},
    ],
)
def test_nothing_is_imported(options: dict[str, Any], adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter / "this_was_imported.py").write_text("raise SystemExit('this was run')")
    monkeypatch.syspath_prepend(str(adapter))
    monkeypatch.chdir(adapter)
    change(adapter, **options)
    try:
        PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), adapter)
    except (ValueError, AttributeError):
        assert "megatron_core" in options or "corda_config" in options
    assert "this_was_imported" not in sys.modules


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"r": NaN}', '{"r": 1, "r": 2}', "[]", "\xff", ""])
def test_json_that_is_none(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text, encoding="latin-1")
    for read in (MoELoraConfig.from_pretrained, read_config):
        with pytest.raises(ValueError, match="adapter_config.json cannot be read"):
            read(str(adapter))


def test_json_without_end(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_input, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes of JSON"):
        read_config(adapter)


def test_constants_where_models_have_them(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert json_input.read_object(path, constants=True) == {"time_step_limit": [0.0, float("inf")]}
    with pytest.raises(ValueError, match="Infinity is not a JSON number"):
        json_input.read_object(path)


# --- pickles -----------------------------------------------------------------------------------------------------


class Bomb:
    """Runs when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return print, ("this was run",)


def pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": Bomb()}, adapter / "adapter_model.bin")


def test_pickles_are_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled(adapter)
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="adapter_model.bin, a pickle.*PEFT_MOE_ALLOW_PICKLE=1"):
        PeftModel.from_pretrained(base, adapter)
    model = get_peft_model(base, MoELoraConfig(target_modules=[]))
    with pytest.raises(ValueError, match="adapter_model.bin, a pickle"):
        model.load_adapter(str(adapter), "other")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle, which is not read"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", progress=False)
    assert "this was run" not in capsys.readouterr().out


def test_a_pickle_runs_nothing_where_it_is_allowed(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled(adapter)
    monkeypatch.setenv("PEFT_MOE_ALLOW_PICKLE", "1")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), adapter)
    assert "this was run" not in capsys.readouterr().out


def test_adapters_in_the_cache_of_the_hub(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at as local ones are: config, header, pickles."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    home = tmp_path / "cache" / "models--someone--adapter"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    adapter.rename(home / "snapshots" / ("0" * 40))
    adapter = home / "snapshots" / ("0" * 40)
    options = {"cache_dir": str(tmp_path / "cache")}
    found = MoELoraConfig.from_pretrained("someone/adapter", **options)
    assert found.r == 2 and found.file_shapes
    change(adapter, r="2")
    with pytest.raises(ValueError, match="`r='2'` is of the wrong kind"):
        MoELoraConfig.from_pretrained("someone/adapter", **options)
    change(adapter, r=2)
    pickled(adapter)
    with pytest.raises(ValueError, match="a pickle"):
        MoELoraConfig.from_pretrained("someone/adapter", **options)
    with pytest.raises(ValueError, match="Can't find"):
        MoELoraConfig.from_pretrained("someone/nothing", **options)


@pytest.mark.parametrize(
    "option, value", [("lora_alpha", 10**400), ("alpha_pattern", {"q_proj": 10**400}), ("expert_alpha", 10**400),
                      ("r", 10**400), ("rank_pattern", {"q_proj": 2**63}), ("expert_r", 2**63)],
    ids=["alpha", "alpha by pattern", "alpha of experts", "rank", "rank by pattern", "rank of experts"],
)  # fmt: skip
def test_integers_that_no_number_of_a_machine_holds(option: str, value: Any, adapter: Path) -> None:
    change(adapter, **{option: value})
    for read in (MoELoraConfig.from_pretrained, read_config):
        with pytest.raises(ValueError, match=f"adapter_config.json: .*`{option}="):
            read(str(adapter))


@pytest.mark.parametrize("value", [0, -1])
def test_ranks_of_stock_adapters(value: int, tmp_path: Path) -> None:
    """A LORA adapter does not pass through this package's own config."""
    base = ENTRIES["qwen3_moe"].build()
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", r=value)
    for read in (read_config, describe_adapter):
        with pytest.raises(ValueError, match=f"`r={value}` is not a positive integer"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize(
    "option, value",
    [("layer_replication", [[0, 2]] * 10_000), ("layer_replication", [[0, -9], [0, 10**9]]),
     ("trainable_token_indices", [0] * 20_000), ("trainable_token_indices", {"embed_tokens": [0] * 20_000})],
)  # fmt: skip
def test_copies_without_number(option: str, value: Any, adapter: Path) -> None:
    change(adapter, target_experts=[], **{option: value})
    with pytest.raises(ValueError, match=f"`{option}=.* more than 10000"):
        PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), adapter)


@pytest.mark.parametrize("targets", [[], "all"])
def test_tokens_without_values(targets: Any, tmp_path: Path) -> None:
    model = get_peft_model(
        ENTRIES["qwen3_moe"].build(), MoELoraConfig(target_modules=["q_proj"], target_experts=targets)
    )
    model.save_pretrained(tmp_path)
    change(tmp_path, trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="`trainable_token_indices`.*missing"):
        PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), tmp_path)
    change(tmp_path, trainable_token_indices=[])
    PeftModel.from_pretrained(ENTRIES["qwen3_moe"].build(), tmp_path)


def test_texts_that_are_none(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "\\ud800"'))
    with pytest.raises(ValueError, match="adapter_config.json cannot be read: a text in it is none"):
        read_config(adapter)
    path.write_text(path.read_text().replace("\\ud800", "\\ud83d\\ude00"))  # both halves
    assert read_config(adapter).base_model_name_or_path == "\U0001f600"


def test_names_of_tensors_have_a_length(adapter: Path, tmp_path: Path) -> None:
    """Patterns that are harmless on names of models are not on longer ones."""
    path = adapter / "adapter_model.safetensors"
    save_file({key.replace("layers.0", "layers.0" + ".a" * 150): one for key, one in load_file(path).items()}, path)
    change(adapter, rank_pattern={".*.*.*x": 3}, expert_rank_pattern={".*.*.*x": 3})
    start = time.perf_counter()
    for read in (MoELoraConfig.from_pretrained, describe_adapter, lambda folder: export_adapter(folder, "x", "vllm")):
        with pytest.raises(ValueError, match=r"has a name of \d+ characters, expected at most 250"):
            read(adapter)
    assert time.perf_counter() - start < 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipes_are_no_files(adapter: Path, tmp_path: Path) -> None:
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    os.mkfifo(tmp_path / "base" / "more.safetensors")
    merge_checkpoint(tmp_path / "base", adapter, tmp_path / "out", progress=False)  # the other file holds all of it
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_model.safetensors is no file"):
        PeftModel.from_pretrained(base, adapter)
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        merge_checkpoint(tmp_path / "base", adapter, tmp_path / "other", progress=False)


def test_cards_hold_no_code_of_a_stranger(adapter: Path, tmp_path: Path) -> None:
    """What is to be copied from a card stays one line, and the name of the base a string in it."""
    name = 'x")\nimport os; os.system("echo this was run")\n("`'
    change(adapter, base_model_name_or_path=name)
    ENTRIES["qwen3_moe"].build().save_pretrained(tmp_path / "base")
    stacked = transformers.__version__.startswith("5")
    export_adapter(
        adapter, tmp_path / "out", "peft" if stacked else "peft-per-expert", base=tmp_path / "base", progress=False
    )
    MoELoraConfig.from_pretrained(str(adapter)).save_pretrained(str(tmp_path / "config"))
    for card in (tmp_path / "out" / "README.md", tmp_path / "config" / "README.md"):
        code = card.read_text().split("```python\n")[1].split("```")[0]
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        assert {ast.unparse(call.func) for call in calls} == {
            "AutoModelForCausalLM.from_pretrained", "PeftModel.from_pretrained"
        }  # fmt: skip
