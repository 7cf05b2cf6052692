"""The private names of PEFT, transformers and accelerate that the package rests on are where and as it expects them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.hooks
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, mapping
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import hotswap, merge_utils, other, save_and_load
from torch import nn

import peft_moe
from peft_moe import compat
from tests.zoo import ENTRIES

PACKAGE = Path(peft_moe.__file__).parent
CHECKED = "peft 0.21.2, transformers 4.57.6 and 5.23.0"
INSTALLED = f"installed: peft {peft.__version__}, transformers {transformers.__version__}"
ON_V5 = int(transformers.__version__.split(".")[0]) >= 5


def moved(name: str, found: object, expected: object) -> str:
    return (
        f"{name} is not what peft_moe was checked against ({CHECKED}; {INSTALLED}): found {found}, expected {expected}."
        " Read what changed, then adapt peft_moe/compat.py."
    )


def test_the_versions_are_those_of_the_module():
    assert compat.__doc__ is not None and CHECKED in " ".join(compat.__doc__.split())


# --- signatures --------------------------------------------------------------------------------------------------

SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    # overridden or called by MoELoraModel
    (LoraModel.inject_adapter, "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict"),
    (LoraModel._check_target_module_exists, "peft_config key"),
    (LoraModel._prepare_adapter_config, "self peft_config model_config"),
    (
        LoraModel._create_and_replace,
        "self lora_config adapter_name target target_name parent current_key parameter_name",
    ),
    (LoraModel._enable_peft_forward_hooks, "self args kwargs"),
    (LoraModel._unload_and_optionally_merge, "self merge progressbar safe_merge adapter_names"),
    (LoraModel._get_adapter_state_dict, "model config adapter_name state_dict unwanted_adapter_names"),
    (LoraModel._remap_adapter_state_dict_for_load, "model config adapter_name state_dict"),
    (LoraModel.subtract_mutated_init, "self output_state_dict adapter_name kwargs"),
    (LoraModel.merge_adapter, "self adapter_names safe_merge"),
    (LoraModel.unmerge_adapter, "self"),
    (
        LoraModel.add_weighted_adapter,
        "self adapters weights adapter_name combination_type svd_rank svd_clamp svd_full_matrices svd_driver density "
        "majority_sign_method",
    ),
    # overridden or called by MoELoraLayer and its children
    (LoraLayer.update_layer, "self adapter_name r lora_alpha config kwargs"),
    (LoraLayer._move_adapter_to_device_of_base_layer, "self adapter_name device"),
    (LoraLayer.set_adapter, "self adapter_names inference_mode"),
    (LoraLayer.set_requires_grad, "self adapter_names requires_grad"),
    (LoraLayer.delete_adapter, "self adapter_name"),
    (LoraLayer.get_base_layer, "self"),
    # functions
    (tuners_utils.check_adapters_to_merge, "module adapter_names"),
    (tuners_utils.check_target_module_exists, "config key"),
    (other.get_pattern_key, "pattern_keys key_to_match"),
    (merge_utils.task_arithmetic, "task_tensors weights"),
    (merge_utils.magnitude_prune, "task_tensors weights density"),
    (merge_utils.ties, "task_tensors weights density majority_sign_method"),
    (merge_utils.dare_linear, "task_tensors weights density"),
    (merge_utils.dare_ties, "task_tensors weights density majority_sign_method"),
    (accelerate.hooks.ModelHook.pre_forward, "self module args kwargs"),
    (accelerate.hooks.ModelHook.post_forward, "self module output"),
    (PeftConfig.from_pretrained, "pretrained_model_name_or_path subfolder kwargs"),
    (PeftConfig.save_pretrained, "self save_directory kwargs"),
]


@pytest.mark.parametrize("function, expected", SIGNATURES, ids=lambda one: getattr(one, "__qualname__", ""))
def test_signature(function, expected):
    found = " ".join(inspect.signature(function).parameters)
    assert found == expected, moved(function.__qualname__, found, expected)


def test_kinds_of_methods():
    expected = {
        "_check_target_module_exists": staticmethod,
        "_get_adapter_state_dict": classmethod,
        "_remap_adapter_state_dict_for_load": classmethod,
    }
    for name, kind in expected.items():
        found = next(vars(cls)[name] for cls in LoraModel.__mro__ if name in vars(cls))
        assert isinstance(found, kind), moved(f"LoraModel.{name}", type(found).__name__, kind.__name__)


# --- attributes --------------------------------------------------------------------------------------------------


def test_class_attributes():
    found = (LoraModel.prefix, LoraModel.tuner_layer_cls, issubclass(LoraModel, BaseTuner))
    assert found == ("lora_", LoraLayer, True), moved("LoraModel", found, "prefix 'lora_' and LoraLayer")
    assert isinstance(LoraModel.target_module_mapping, dict), moved("target_module_mapping", None, "a dict")
    assert LoraModel.target_module_mapping.get("mixtral"), moved("target_module_mapping", None, "mixtral's attention")
    for cls in (BaseTunerLayer, LoraLayer):
        for name in ("adapter_layer_names", "other_param_names"):
            value = getattr(cls, name, None)
            assert isinstance(value, tuple), moved(f"{cls.__name__}.{name}", value, "a tuple of names")
    names = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
    assert names <= set(LoraLayer.adapter_layer_names), moved("LoraLayer", LoraLayer.adapter_layer_names, names)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)


def test_state_of_a_layer():
    """What `MoELoraLayer` sets in place of `LoraLayer.__init__`."""
    layer = get_peft_model(Block(), LoraConfig(target_modules=["linear"])).base_model.model.linear
    expected = {
        "r": {"default": 8},
        "lora_alpha": {"default": 8},
        "scaling": {"default": 1.0},
        "use_rslora": {"default": False},
        "use_dora": {"default": False},
        "lora_variant": {},
        "merged_adapters": [],
        "_disable_adapters": False,
        "active_adapters": ["default"],
        "merged": False,
        "disable_adapters": False,
    }
    found = {name: getattr(layer, name, "missing") for name in expected}
    assert found == expected, moved("the state of a LoraLayer", found, expected)


def test_model_holds_its_configs_and_model():
    model = get_peft_model(Block(), LoraConfig(target_modules=["linear"]))
    assert isinstance(model.base_model, LoraModel) and isinstance(model.base_model.model, Block)
    assert list(model.base_model.peft_config) == ["default"], moved("LoraModel.peft_config", None, "a dict by name")


def test_registry_tables():
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        table = getattr(mapping, name, None)
        assert isinstance(table, dict) and PeftType.LORA in table, moved(f"peft.mapping.{name}", table, "a dict")
    names = {one.name: one.table for one in compat.peft_tables(LoraConfig, LoraModel)}
    assert all(PeftType.LORA in table for table in names.values())
    known = {name for name in vars(mapping) if name.startswith("PEFT_TYPE_TO_")}
    expected = {"PEFT_TYPE_TO_MIXED_MODEL_MAPPING"}  # kinds of mixed models, which have no tuner of their own
    assert known - names.keys() == expected, moved("peft.mapping", sorted(known), f"{sorted(names)} and {expected}")
    # One list that may differ: what has to be equal for hot-swapping an adapter.
    assert set(hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]) <= set(hotswap.CONFIG_KEYS_TO_CHECK[PeftType.MOELORA])
    assert save_and_load.PEFT_TYPE_TO_TUNER_MAPPING is mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_enum_internals():
    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert hasattr(PeftType, name), moved(f"PeftType.{name}", "nothing", "an enum's table")
    lora, own = vars(PeftType.LORA), vars(PeftType.MOELORA)
    assert lora.keys() == own.keys(), moved("the attributes of a member of PeftType", sorted(lora), sorted(own))
    assert len({member._sort_order_ for member in PeftType}) == len(PeftType)


# --- behaviour ---------------------------------------------------------------------------------------------------


def test_check_target_module_exists():
    config = LoraConfig(target_modules=["b"], exclude_modules=["x.b"], layers_to_transform=[1])
    check = compat.check_target_module_exists
    assert check(config, "m.layers.1.b") and not check(config, "m.layers.0.b") and not check(config, "m.layers.1.c")
    excluded = check(config, "x.b")
    assert isinstance(excluded, compat.ExcludedModule) and not excluded, moved("_ExcludedModule", excluded, "false")
    saved = LoraConfig(target_modules=["b"], modules_to_save=["head"])
    assert isinstance(check(saved, "head.b"), compat.ExcludedModule)


def test_an_exact_name_goes_past_layers_to_transform():
    """Why the tuner asks with the last part of a name."""
    config = LoraConfig(target_modules=["m.layers.0.b"], layers_to_transform=[1])
    assert compat.check_target_module_exists(config, "m.layers.0.b") is True


def test_get_pattern_key():
    found = [other.get_pattern_key(["b.1", r"layers\.0.*"], key) for key in ("a.b.1", "x.layers.0.b", "c", "ab.1")]
    assert found == ["b.1", r"layers\.0.*", "c", "ab.1"], moved("get_pattern_key", found, "the first match of a suffix")


def test_check_adapters_to_merge():
    model = get_peft_model(Block(), LoraConfig(target_modules=["linear"]))
    model.add_adapter("second", LoraConfig(target_modules=["linear"]))
    layer = model.base_model.model.linear
    assert compat.check_adapters_to_merge(layer) == ["default"]
    layer.merge(adapter_names=["second"])
    found = compat.check_adapters_to_merge(layer, ["second", "default"])
    assert found == ["default"], moved("check_adapters_to_merge", found, "those not merged yet")


def test_onload_runs_the_hook_of_accelerate():
    class Hook(accelerate.hooks.ModelHook):
        calls: list[str] = []

        def pre_forward(self, module, *args, **kwargs):
            self.calls.append("before")
            return args, kwargs

        def post_forward(self, module, output):
            self.calls.append("after")
            return output

    module = nn.Linear(2, 2)
    with compat.onload(module):
        assert Hook.calls == []
    accelerate.hooks.add_hook_to_module(module, Hook())
    assert hasattr(module, "_hf_hook") and "_old_forward" in vars(module), moved("accelerate's hook", None, "_hf_hook")
    with pytest.raises(KeyError), compat.onload(module):
        assert Hook.calls == ["before"]
        raise KeyError
    assert Hook.calls == ["before", "after"]


def test_offloaded_weights_come_to_a_device():
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    assert module.weight.device.type == "meta"
    with compat.onload(module):
        assert torch.equal(module.weight, weight)
    assert module.weight.device.type == "meta"


def test_prefix_of_saved_keys():
    model = get_peft_model(Block(), LoraConfig(target_modules=["linear"]))
    keys = set(peft.get_peft_model_state_dict(model))
    expected = {f"base_model.model.linear.lora_{one}.weight" for one in "AB"}
    assert keys == expected, moved("get_peft_model_state_dict", keys, expected)


def test_peft_reads_the_config_with_the_class_of_the_table(tmp_path, monkeypatch):
    """`MoELoraConfig.from_pretrained` looks at the tensors beside it, so it has to be the one that is called."""
    entry = ENTRIES["qwen3_moe"]
    model = get_peft_model(entry.build(), peft_moe.MoELoraConfig(r=2, target_modules=[]))
    model.save_pretrained(tmp_path)
    paths = []
    original = peft_moe.MoELoraConfig.from_pretrained.__func__

    def spy(cls, path, *args, **kwargs):
        paths.append(str(path))
        return original(cls, path, *args, **kwargs)

    monkeypatch.setattr(peft_moe.MoELoraConfig, "from_pretrained", classmethod(spy))
    PeftModel.from_pretrained(entry.build(), tmp_path)
    model.load_adapter(tmp_path, "second")
    expected = [str(tmp_path)] * 2
    assert paths == expected, moved("PeftModel.from_pretrained and load_adapter", paths, expected)


# --- transformers ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_V5, reason="the experts interface is of transformers 5")
def test_experts_interface():
    experts = ENTRIES["qwen3_moe"].build().model.layers[0].mlp.experts
    assert hasattr(type(experts), "_apply_gate"), moved("Qwen3MoeExperts._apply_gate", None, "a method")
    home = type(experts)._apply_gate.__module__
    assert home == "transformers.integrations.moe", moved("_apply_gate", home, "transformers.integrations.moe")
    from transformers.integrations import moe

    source = inspect.getsource(moe)
    assert "is_transposed" in source and "has_gate" in source, moved("transformers.integrations.moe", "", "its flags")


@pytest.mark.skipif(ON_V5, reason="the block with a sparse mixer is of transformers 4")
def test_sparsemixer():
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    found = " ".join(inspect.signature(sparsemixer).parameters)
    assert found == "scores jitter_eps training top_k", moved("phimoe's sparsemixer", found, "its four arguments")


# --- quantizers ----------------------------------------------------------------------------------------------------


def test_bitsandbytes_quantizers():
    from peft_moe.compat import Bnb4BitHfQuantizer, Bnb8BitHfQuantizer, quantizer_registry

    hooks = ["param_needs_quantization", "get_modules_to_not_convert", "_process_model_before_weight_loading"]
    hooks += ["_process_model_after_weight_loading", "_convert_model_for_quantization", "is_serializable"]
    five, four = ["get_quantize_ops", "update_weight_conversions"], ["create_quantized_param", "get_param_name"]
    hooks += ["_dequantize", *(five if ON_V5 else four)]
    for quantizer in (Bnb4BitHfQuantizer, Bnb8BitHfQuantizer):
        missing = [name for name in hooks if not hasattr(quantizer, name)]
        assert not missing, moved(quantizer.__name__, str(missing), "the hooks that peft_moe.quantize overrides")
    for table in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        assert isinstance(getattr(quantizer_registry, table), dict)


@pytest.mark.skipif(not ON_V5, reason="transformers 4 converts no weights")
def test_weight_conversions():
    from peft_moe.compat import core_model_loading

    source = inspect.getsource(core_model_loading)
    names = ["_weight_conversions", "_original_source_patterns", "quantization_operation", "class PrefixChange"]
    names += ["def rename_source_key", "def dot_natural_key", "class MergeModulelist", "class WeightRenaming"]
    for name in [*names, "def reverse_op", "supports_many_to_many", "check_dims"]:
        assert name in source, moved("transformers.core_model_loading", "", name)


@pytest.mark.skipif(not ON_V5, reason="PEFT converts configs on transformers 5")
def test_linears_that_peft_takes_for_experts():
    from peft_moe.compat import targets_taken_for_experts

    model = ENTRIES["deepseek_v3"].build()
    plain = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    taken = LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj"], target_parameters=["experts.down_proj"])
    what = "convert_peft_config_for_transformers"
    assert targets_taken_for_experts(plain, model) == [], moved("peft.utils", what, "what it leaves alone")
    assert targets_taken_for_experts(taken, model) == ["gate_proj", "up_proj"], moved("peft.utils", what, "its targets")
    assert taken.target_modules == {"q_proj", "gate_proj", "up_proj"}, "the config itself was changed"


# --- nothing private elsewhere -------------------------------------------------------------------------------------

# Without an underscore and documented, or checked above.
PUBLIC = {
    "peft": None,
    "transformers": {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "PreTrainedModel"},
    "peft.tuners.tuners_utils": {"BaseTunerLayer"},
    "peft.utils": {"CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"},
    "peft.utils.merge_utils": {"dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties"},
    "peft.utils.peft_types": {"PeftType"},
    "transformers.models.phimoe.modeling_phimoe": {"sparsemixer"},
}


def test_private_names_are_imported_in_compat_alone():
    """Imports from within PEFT and transformers stand in compat.py, with the exceptions of PUBLIC."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found = [(node.module or "", alias.name) for alias in node.names]
            else:
                continue
            for module, name in found:
                if module.split(".")[0] not in ("peft", "transformers", "accelerate"):
                    continue
                allowed = PUBLIC.get(module, set())
                if allowed is not None and name not in allowed:
                    wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno} imports {name} from {module}")
    assert not wrong, f"{wrong}: move these to compat.py, which says what it was checked against"
