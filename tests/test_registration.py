"""The tuner type: a real member of PEFT's enum, entered once, and nothing else changed by the import."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_model, mapping
from peft.utils import hotswap, peft_types

import peft_moe
from peft_moe import MoELoraConfig, MoELoraModel, registration
from tests.zoo import ENTRIES, first_floating

ROOT = Path(__file__).parents[1]
TABLES = (
    "CONFIG_KEYS_TO_CHECK",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
)


def tables() -> dict[str, dict]:
    return {name: getattr(hotswap if name.startswith("CONFIG") else mapping, name) for name in TABLES}


def run(script: str) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_member_is_real():
    member = PeftType.MOELORA
    assert member is PeftType("MOELORA") is PeftType["MOELORA"]
    assert member in PeftType and list(PeftType).count(member) == 1 and "MOELORA" in PeftType.__members__
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert (member.name, member.value, str.__str__(member)) == ("MOELORA", "MOELORA", "MOELORA")
    assert member == "MOELORA" and hash(member) == hash("MOELORA") and member != PeftType.LORA
    assert {member: 1}["MOELORA"] == 1
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "MOELORA")
    assert peft_types.PeftType.MOELORA is member
    with pytest.raises(ValueError):
        PeftType("MOELORA2")


def test_tables():
    assert tables()["PEFT_TYPE_TO_CONFIG_MAPPING"][PeftType.MOELORA] is MoELoraConfig
    assert tables()["PEFT_TYPE_TO_TUNER_MAPPING"]["MOELORA"] is MoELoraModel
    assert tables()["PEFT_TYPE_TO_PREFIX_MAPPING"]["MOELORA"] == MoELoraModel.prefix == "lora_"
    assert MoELoraConfig().peft_type is PeftType.MOELORA


def test_idempotent():
    before = {name: dict(table) for name, table in tables().items()}
    members = list(PeftType)
    registration.register(MoELoraConfig, MoELoraModel)
    importlib.reload(peft_moe)
    importlib.reload(registration)
    registration.register(MoELoraConfig, MoELoraModel)
    assert tables() == before and list(PeftType) == members
    assert MoELoraConfig is peft_moe.MoELoraConfig


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(copied):
    assert copied(PeftType.MOELORA) is PeftType.MOELORA
    config = MoELoraConfig(r=3, expert_indices={1: [0, 2]}, expert_rank_pattern={"x": 2}, target_modules=["q_proj"])
    other = copied(config)
    assert other == config and type(other) is MoELoraConfig and other.peft_type is PeftType.MOELORA


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_a_model(copied):
    entry = ENTRIES["qwen3_moe"]
    model = get_peft_model(entry.build(), MoELoraConfig(r=2, init_lora_weights=False)).eval()
    inputs = entry.inputs(model)
    other = copied(model)
    assert other.peft_config["default"].peft_type is PeftType.MOELORA
    with torch.no_grad():
        expected = first_floating(model(**inputs))
        assert torch.equal(first_floating(other(**inputs)), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(first_floating(model(**inputs)), expected), "the copy shares storage with the model"


def test_spawned_process():
    """The config carries what the child has to import: nothing else tells it of the tuner."""
    config = MoELoraConfig(r=2, target_modules=[], expert_indices={0: [1]})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        returned = pool.submit(copy.deepcopy, config).result(timeout=120)
        member = pool.submit(getattr, config, "peft_type").result(timeout=120)
    assert returned == config and type(returned) is MoELoraConfig
    assert member is PeftType.MOELORA is returned.peft_type


@pytest.mark.parametrize("table", TABLES)
def test_foreign_entry(table, monkeypatch):
    class Foreign:
        pass

    values = {"CONFIG_KEYS_TO_CHECK": ["foreign"], "PEFT_TYPE_TO_PREFIX_MAPPING": "foreign_"}
    monkeypatch.setitem(tables()[table], PeftType.MOELORA, values.get(table, Foreign))
    before = {name: dict(entries) for name, entries in tables().items()}
    with pytest.raises(RuntimeError) as error:
        importlib.reload(peft_moe)
    message = str(error.value)
    assert table in message and "MOELORA" in message and "another package" in message and "oreign" in message
    assert "Uninstall one" in message
    assert tables() == before, "some tables were changed before the error"


SNAPSHOT = """
import collections, sys, types
import peft, transformers, accelerate
import peft.mapping, peft.tuners.lora, peft.utils.hotswap, peft.utils.merge_utils, peft.tuners.tuners_utils
import transformers.modeling_utils, transformers.integrations.peft, transformers.activations

def watched():
    packages = ("peft", "transformers", "accelerate", "safetensors")
    found = [module for name, module in sorted(sys.modules.items()) if name.split(".")[0] in packages]
    return [module for module in found if type(module).__name__ != "_LazyModule"]

def contents(value):
    if type(value) in (dict, collections.OrderedDict, collections.defaultdict):
        return dict(value)
    return list(value) if type(value) in (list, set) else None

def snapshot(modules):
    found = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, types.ModuleType) or name.startswith("__"):
                continue
            found[module.__name__, name] = (value, contents(value))
            if isinstance(value, type) and value.__module__.split(".")[0] in ("peft", "transformers", "accelerate"):
                for key, attribute in list(vars(value).items()):
                    found[value.__module__ + "." + value.__qualname__, key] = (attribute, contents(attribute))
    return found

modules = watched()
assert len(modules) > 100
before = snapshot(modules)
import peft_moe
after = snapshot(modules)
changed = set()
for key in before.keys() | after.keys():
    if key not in before or key not in after:
        changed.add(".".join(key))
        continue
    (old, was), (new, now) = before[key], after[key]
    same = len(was) == len(now) and all(a is b for a, b in zip(was, now)) if isinstance(was, list) else was == now
    if old is not new or not same:
        changed.add(".".join(key))
enum_keys = {name for name in changed if name.startswith("peft.utils.peft_types.PeftType.")}
tables = {name.rpartition(".")[2] for name in changed - enum_keys}
print(sorted(name.rpartition(".")[2] for name in enum_keys))
print(sorted(tables))

# Everything of the package dropped and imported anew: new classes, the same member.
import importlib
member = peft.PeftType.MOELORA
for name in [name for name in sys.modules if name.split(".")[0] == "peft_moe"]:
    del sys.modules[name]
old = peft_moe.MoELoraConfig
import peft_moe
assert peft_moe.MoELoraConfig is not old and peft.PeftType.MOELORA is member
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["MOELORA"] is peft_moe.MoELoraConfig
assert type(peft.PeftConfig.from_peft_type(peft_type="MOELORA", task_type=None)) is peft_moe.MoELoraConfig
"""


def test_import_changes_the_tables_and_the_enum_alone():
    enum_keys, changed = (eval(line) for line in run(SNAPSHOT).splitlines())
    assert enum_keys == ["MOELORA", "_member_map_", "_member_names_", "_value2member_map_"]
    # The same objects, by whatever name PEFT's modules know them; and the names of `BnbExpertsConfig` in transformers,
    # without which nothing would know a checkpoint that was saved with it.
    assert changed == sorted([*TABLES, "AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"])


def test_config_is_read_by_peft(tmp_path):
    MoELoraConfig(r=5).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is MoELoraConfig and config.r == 5 and config.peft_type is PeftType.MOELORA
