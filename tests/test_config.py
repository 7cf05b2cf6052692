"""What a config refuses, that it is documented, and that it comes back from JSON as it was."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_moe import MoELoraConfig, MoELoraLayer
from tests.zoo import ENTRIES

OWN = dataclasses.fields(MoELoraConfig)[len(dataclasses.fields(LoraConfig)) :]


def build() -> nn.Module:
    """Two layers of four experts, at `model.layers.<n>.mlp.experts`."""
    return ENTRIES["qwen3_moe"].build()


def adapted(model: nn.Module) -> list[str]:
    """Names of the adapted experts modules in the base model."""
    prefix = "base_model.model."
    return [name.removeprefix(prefix) for name, one in model.named_modules() if isinstance(one, MoELoraLayer)]


# --- documentation -----------------------------------------------------------------------------------------------


def test_fields_are_those_of_the_design():
    assert [one.name for one in OWN] == [
        "target_experts",
        "expert_r",
        "expert_alpha",
        "expert_rank_pattern",
        "expert_alpha_pattern",
        "expert_indices",
        "split_gate_up",
        "share_experts",
        "experts_backend",
        "dequantize",
        "format_version",
        "layout",
    ]


@pytest.mark.parametrize("one", OWN, ids=lambda one: one.name)
def test_field_is_documented(one):
    assert len(one.metadata.get("help", "")) > 10, f"{one.name} has no help"
    arguments = re.split(r"\n\s*Args:\n", MoELoraConfig.__doc__ or "")[1]
    found = re.search(rf"^\s*(\w+, )*{one.name}(, \w+)*: \S", arguments, re.MULTILINE)
    assert found, f"{one.name} is not in the docstring"


# --- refusals ----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # options, name in the message, a part of the reason
    (
        {"target_experts": "gate_proj"},
        "target_experts",
        r"unknown projections \['gate_proj'\].*gate_up_proj, down_proj",
    ),
    ({"target_experts": ["down_proj", "w1"]}, "target_experts", r"unknown projections \['w1'\]"),
    ({"experts_backend": "cutlass"}, "experts_backend", "unknown; expected one of auto, .*grouped_mm.*loop"),
    ({"dequantize": "never"}, "dequantize", "unknown; expected 'recompute' or 'cache'"),
    ({"share_experts": "inner"}, "share_experts", "unknown; expected None or 'outer'"),
    ({"share_experts": "outer", "split_gate_up": True}, "share_experts", "split_gate_up"),
    ({"expert_r": 0}, "expert_r", "not a positive integer"),
    ({"expert_r": -3}, "expert_r", "not a positive integer"),
    ({"expert_r": 2.5}, "expert_r", "not a positive integer"),
    ({"expert_r": True}, "expert_r", "not a positive integer"),
    ({"expert_rank_pattern": {"x": 0}}, "expert_rank_pattern", "not a positive integer"),
    ({"expert_rank_pattern": {"(": 2}}, "expert_rank_pattern", "not a regular expression"),
    ({"expert_alpha_pattern": {"[": 2}}, "expert_alpha_pattern", "not a regular expression"),
    ({"expert_indices": [0, 1, 0]}, "expert_indices", "twice"),
    ({"expert_indices": {0: [2, 2]}}, "expert_indices", "twice"),
    ({"expert_indices": [-1]}, "expert_indices", "negative"),
    ({"format_version": 0}, "format_version", "not a version"),
    ({"format_version": "1"}, "format_version", "not a version"),
    ({"format_version": 2}, "format_version", r"newer.*\(up to 1\).*upgrade peft-moe"),
    ({"layout": "expert_fastest"}, "layout", "unknown; expected 'contiguous_r'"),
    ({"lora_bias": True}, "lora_bias", "no bias"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out", "orientation"),
    ({"layer_replication": [(0, 1), (0, 2)]}, "layer_replication", "share their experts"),
    ({"megatron_config": {"a": 1}}, "megatron_config", "parallel layers"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters", "`target_experts`"),
    ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens", "token position"),
    ({"use_qalora": True}, "use_qalora", "GPTQ"),
    ({"init_lora_weights": "eva"}, "eva_config", "inputs"),
    ({"init_lora_weights": "corda"}, "corda_config", "covariance"),
    ({"init_lora_weights": "nonsense"}, "init_lora_weights", "not implemented for experts; expected True, False, or"),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights", "not implemented for experts"),
    ({"init_lora_weights": "mica"}, "init_lora_weights", "not implemented for experts"),
    ({"init_lora_weights": "pissa", "share_experts": "outer"}, "init_lora_weights", "common factor"),
    ({"init_lora_weights": "olora", "share_experts": "outer"}, "init_lora_weights", "common factor"),
]


@pytest.mark.filterwarnings("ignore:.*config")
@pytest.mark.parametrize("options, name, reason", REFUSED, ids=str)
def test_refused(options, name, reason):
    with pytest.raises(ValueError) as error:
        MoELoraConfig(**options)
    message = str(error.value)
    assert message.startswith("MoELoraConfig: `") and f"`{name}" in message, message
    assert re.search(reason, message), message


def subconfigs() -> list[tuple[str, object]]:
    """(option, value) of LoRA's variants that are configured by an object."""
    import peft.tuners.lora.config as lora

    classes = {
        "velora_config": "VeloraConfig",
        "lora_ga_config": "LoraGAConfig",
        "monteclora_config": "MontecloraConfig",
        "use_bdlora": "BdLoraConfig",
        "arrow_config": "ArrowConfig",
        "kasa_config": "KasaConfig",
    }
    return [(option, getattr(lora, name)()) for option, name in classes.items()]


@pytest.mark.parametrize("option, value", subconfigs(), ids=lambda one: one if isinstance(one, str) else "")
def test_variants_are_refused(option, value):
    with pytest.raises(ValueError, match=f"`{option}` cannot hold on experts: .*target_experts=\\[\\]"):
        MoELoraConfig(**{option: value})


def test_every_option_of_lora_is_either_known_or_refused():
    """An option that a new version of PEFT brings must not slip through unread."""
    holds = {
        "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora", "modules_to_save",
        "init_lora_weights", "layers_to_transform", "layers_pattern", "use_dora", "runtime_config",
        "trainable_token_indices", "ensure_weight_tying",
    }  # fmt: skip
    linears_alone = {"rank_pattern", "alpha_pattern"}  # experts have patterns of their own
    without_effect = {"loftq_config", "megatron_core", "qalora_group_size"}  # parameters of options that are refused
    general = {one.name for one in dataclasses.fields(PeftConfig)}
    from peft_moe.config import _REFUSED

    unread = {one.name for one in dataclasses.fields(LoraConfig)} - holds - linears_alone - without_effect - general
    assert unread == set(_REFUSED)


def test_without_experts_the_options_of_lora_hold():
    for options in ({"lora_bias": True}, {"fan_in_fan_out": True}, {"use_qalora": True}):
        assert MoELoraConfig(target_experts=[], **options).expert_targets == ()
    assert MoELoraConfig(target_experts=None).target_experts == []


@pytest.mark.parametrize(
    "given_, kept, targets",
    [
        ("all", "all", ("gate_up_proj", "down_proj")),
        ("down_proj", ["down_proj"], ("down_proj",)),
        (["down_proj", "gate_up_proj"], ["gate_up_proj", "down_proj"], ("gate_up_proj", "down_proj")),
        (["down_proj", "down_proj"], ["down_proj"], ("down_proj",)),
        ([], [], ()),
        (None, [], ()),
    ],
)
def test_targets(given_, kept, targets):
    config = MoELoraConfig(target_experts=given_)
    assert (config.target_experts, config.expert_targets) == (kept, targets)


# --- refusals that need the model --------------------------------------------------------------------------------


def refuse(model: nn.Module, options: dict[str, Any], *parts: str) -> None:
    """The config is refused with a message that has these parts, and the model is as it was."""
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    flags = [one.requires_grad for one in model.parameters()]
    with pytest.raises(ValueError) as error:
        get_peft_model(model, MoELoraConfig(**options))
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {error.value}"
    assert [name for name, _ in model.named_modules()] == names and list(model.state_dict()) == keys
    assert [one.requires_grad for one in model.parameters()] == flags


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.dense_mlp = nn.Linear(8, 8)


def test_model_without_experts():
    looked_for = ("Plain has no routed experts", "Looked for", "gate_up_proj", "down_proj", "`experts`")
    refuse(Plain(), {"target_modules": ["q_proj"]}, *looked_for, "dense_mlp", "target_experts=[]")
    model = get_peft_model(Plain(), MoELoraConfig(target_modules=["q_proj"], target_experts=[]))
    assert model.get_nb_trainable_parameters()[0] == 2 * 8 * 8


def test_expert_out_of_range():
    refuse(build(), {"expert_indices": [0, 4]}, "`expert_indices`", "expert 4", "layers.0.mlp.experts", "has 4 experts")
    refuse(build(), {"expert_indices": {1: [7]}}, "expert 7", "layers.1.mlp.experts", "has 4 experts", "from 0 to 3")


def test_unknown_layer():
    refuse(build(), {"expert_indices": {0: [1], 9: [0]}}, "`expert_indices`", "layers [9]", "no experts", "[0, 1]")


@pytest.mark.parametrize("option", ["expert_rank_pattern", "expert_alpha_pattern"])
def test_pattern_without_match(option):
    options = {option: {r"layers\.0\.mlp\.experts\.\d": 2, r"layers\.7\..*": 3}}
    refuse(build(), options, f"`{option}`", repr(r"layers\.7\..*"), "no expert", "model.layers.0.mlp.experts.0")


@pytest.mark.parametrize("option", ["expert_rank_pattern", "expert_indices"])
def test_shared_factors_need_one_rank(option):
    value = {r"layers\.0\.mlp\.experts\.1": 2} if option == "expert_rank_pattern" else [0, 1]
    refuse(build(), {"share_experts": "outer", option: value}, "`share_experts='outer'`", f"`{option}`", "layers.0")


def test_nothing_to_adapt():
    """All experts excluded and no linear asked for: PEFT says so."""
    refuse(build(), {"target_modules": [], "exclude_modules": ["experts"]}, "exclude")


# --- what selects modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0, 1]),
        ({"exclude_modules": ["model.layers.0.mlp.experts"]}, [1]),
        ({"exclude_modules": r".*layers\.1\.mlp\.experts"}, [0]),
        ({"layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 0}, [0]),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, [1]),
        ({"expert_indices": {1: [0, 2]}}, [1]),
        ({"expert_indices": {0: [], 1: [3]}}, [1]),
        ({"expert_indices": [2]}, [0, 1]),
    ],
)
def test_selection(options, expected):
    model = get_peft_model(build(), MoELoraConfig(r=2, target_modules=["q_proj"], **options))
    assert adapted(model) == [f"model.layers.{number}.mlp.experts" for number in expected]
    linears = {name for name, _ in model.named_parameters() if "q_proj.lora_A" in name}
    layers = options.get("layers_to_transform")
    wanted = [0, 1] if layers is None else ([layers] if isinstance(layers, int) else layers)
    assert {int(name.split("layers.")[1][0]) for name in linears} == set(wanted)


def test_excluded_experts_and_their_children_stay():
    """The children of a list of experts match `target_modules` here, and must not become adapters by themselves."""
    options = {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["experts"]}
    model = get_peft_model(build(), MoELoraConfig(r=2, **options))
    assert adapted(model) == []
    assert not any("experts" in name for name, one in model.named_parameters() if one.requires_grad)


def test_expert_indices_of_layers_give_the_number_of_adapters():
    model = get_peft_model(build(), MoELoraConfig(r=2, target_modules=[], expert_indices={0: [1], 1: [3, 0, 2]}))
    shapes = [tuple(one.shape)[0] for name, one in model.named_parameters() if "gate_up_proj.lora_A" in name]
    assert shapes == [1, 3]


@pytest.mark.parametrize(
    "name, target_modules, expected",
    [
        ("mixtral", None, {"q_proj", "v_proj"}),  # as PEFT's table says
        ("phimoe", None, set()),  # not in PEFT's table
        ("mixtral", [], set()),
        ("mixtral", ["k_proj"], {"k_proj"}),
    ],
)
def test_target_modules(name, target_modules, expected):
    model = get_peft_model(ENTRIES[name].build(), MoELoraConfig(r=2, target_modules=target_modules))
    found = {key.split(".lora_A")[0].rpartition(".")[2] for key, _ in model.named_parameters() if ".lora_A" in key}
    assert found - {"gate_up_proj", "down_proj"} == expected
    assert len(adapted(model)) == 2


def test_all_linear():
    model = get_peft_model(build(), MoELoraConfig(r=2, target_modules="all-linear"))
    assert len(adapted(model)) == 2
    names = [name for name, _ in model.named_parameters() if ".lora_A" in name]
    found = {name.split(".lora_A")[0].rpartition(".")[2] for name in names}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"} <= found
    assert "lm_head" not in found
    assert not any(re.search(r"experts\.\d", name) or "experts.base_layer" in name for name in names)


# --- JSON ----------------------------------------------------------------------------------------------------------

patterns = st.dictionaries(st.sampled_from([r"layers\.\d+\..*", "a", r"x\.(1|2)", "é"]), st.integers(1, 64), max_size=3)
indices = st.lists(st.integers(0, 200), unique=True, max_size=5)
configs = st.builds(
    MoELoraConfig,
    r=st.integers(1, 512),
    lora_alpha=st.integers(1, 512),
    lora_dropout=st.floats(0, 0.9),
    use_rslora=st.booleans(),
    use_dora=st.booleans(),
    init_lora_weights=st.sampled_from([True, False, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]),
    target_modules=st.none() | st.just("all-linear") | st.just([]) | st.just(["q_proj", "v_proj"]),
    exclude_modules=st.none() | st.just(["experts"]) | st.just(r".*\.0\..*"),
    task_type=st.sampled_from([None, "CAUSAL_LM"]),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    modules_to_save=st.none() | st.just(["lm_head"]),
    target_experts=st.sampled_from(["all", "down_proj", ["gate_up_proj"], ["down_proj", "gate_up_proj"], [], None]),
    expert_r=st.none() | st.integers(1, 512),
    expert_alpha=st.none() | st.floats(0.01, 1e4) | st.integers(1, 99),
    expert_rank_pattern=patterns,
    expert_alpha_pattern=st.dictionaries(st.sampled_from(["a", r"b\.\d"]), st.floats(0.1, 99)) | st.none(),
    expert_indices=st.none() | indices | st.dictionaries(st.integers(0, 99), indices, max_size=3),
    split_gate_up=st.booleans(),
    experts_backend=st.sampled_from(["auto", "grouped_mm", "loop"]),
    dequantize=st.sampled_from(["recompute", "cache"]),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_json_round_trip(config):
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        for cls in (PeftConfig, LoraConfig, MoELoraConfig):
            back = cls.from_pretrained(directory)
            assert type(back) is MoELoraConfig and back == config
            assert json.dumps(comparable(back)) == json.dumps(comparable(config))


def comparable(config: MoELoraConfig) -> dict[str, Any]:
    """The fields as JSON has them, where neither types (`1 == 1.0`) nor the order of patterns are lost."""
    return {key: sorted(one) if isinstance(one, set) else one for key, one in config.to_dict().items()}


def test_order_of_patterns_survives(tmp_path):
    """The first match counts: PEFT's sorted JSON would give expert 1 the rank of its layer."""
    ranks = {r"layers\.0\.mlp\.experts\.1": 2, r"layers\.0\..*": 4}
    assert list(ranks) != sorted(ranks)
    config = MoELoraConfig(r=3, target_modules=[], expert_rank_pattern=ranks, expert_alpha_pattern=ranks)
    config.save_pretrained(tmp_path)
    back = PeftConfig.from_pretrained(tmp_path)
    assert list(back.expert_rank_pattern.items()) == list(back.expert_alpha_pattern.items()) == list(ranks.items())
    layer = get_peft_model(build(), back).base_model.model.model.layers[0].mlp.experts
    assert layer.adapters["default"].ranks == (4, 2, 4, 4)


def test_json_of_share_experts_and_layout(tmp_path):
    config = MoELoraConfig(share_experts="outer")
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOELORA" and written["share_experts"] == "outer"
    assert (written["format_version"], written["layout"]) == (1, "contiguous_r")
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_keys_of_layers_are_integers_again(tmp_path):
    MoELoraConfig(expert_indices={3: [2, 1]}).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).expert_indices == {3: [1, 2]}


@pytest.mark.parametrize("cls", [PeftConfig, MoELoraConfig])
def test_newer_format_is_refused(cls, tmp_path):
    MoELoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7, "of_the_future": 1}))
    with pytest.warns(UserWarning, match="of_the_future"), pytest.raises(ValueError, match="format_version=7.*upgrade"):
        cls.from_pretrained(tmp_path)


def test_the_saved_config_builds_the_same_adapter(tmp_path):
    options = {"r": 4, "expert_r": 2, "expert_indices": {1: [0, 3]}, "expert_rank_pattern": {r"layers\.1\..*\.3": 5}}
    model = get_peft_model(build(), MoELoraConfig(init_lora_weights=False, **options))
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    found, expected = (
        {name: one for name, one in each.named_parameters() if one.requires_grad} for each in (back, model)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert back.peft_config["default"].expert_indices == {1: [0, 3]}
