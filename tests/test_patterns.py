"""Regexes from a config: what is refused, and that what is accepted matches in bounded time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from peft_moe import MoELoraConfig, patterns
from peft_moe.patterns import check_patterns, matches, value_of

NAME = "base_model.model.model.layers.47.mlp.experts.127"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.(0|1|2)\..*(q_proj|v_proj)",
        r"layers\.0\.mlp\.experts\.\d+",
        r"model\.layers\.(?:1[0-9]|2[0-3])\.mlp\.experts\.\d{1,3}",
        "experts",
        rf".*\.layers\.({'|'.join(map(str, range(48)))})\..*(q|k|v|o)_proj",
        "|".join(f"layers.{layer}.mlp.experts.{expert}" for layer in range(4) for expert in range(8)),
    ],
)
def test_usual_patterns_are_accepted(pattern: str) -> None:
    check_patterns([pattern], "option")


@pytest.mark.parametrize(
    "pattern, reason",
    [
        (r"(a+)+$", "repeat inside a repeat"),
        (r"(a|aa)+", "alternatives inside a repeat"),
        (r"(a?){40}a{40}", "repeat inside a repeat"),
        ("a?" * 30 + "a" * 30, "very long"),
        ("(a|a)" * 30, "very long"),
        (r".*.*.*.*.*x", "very long"),
        ("(.|.|.|.|.|.|.|.|.|.)" * 8, "very long"),
        ("(?:.?)" * 20, "very long"),
        (r"(a)\1", "refers to one of its groups"),
        (r"(", "not a regular expression"),
        (r"a{99999999999999999999}", "not a regular expression"),
        ("(" * 1500, "not a regular expression"),
        ("a" * 2001, "2001 characters"),
        (7, "not a regular expression"),
    ],
)
def test_refused(pattern: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_patterns([pattern], "option")


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern", "expert_rank_pattern", "expert_alpha_pattern"])
def test_every_pattern_of_a_config_is_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"`{option}`.*repeat inside a repeat"):
        MoELoraConfig(**{option: {r"(\w+\.?)+x": 4}})


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "layers_pattern"])
def test_every_regex_of_a_config_is_checked(option: str) -> None:
    extra = {"layers_to_transform": [0], "target_modules": ["q_proj"]} if option == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"`{option}`.*repeat inside a repeat"):
        MoELoraConfig(**{**extra, option: r"(\w+\.?)+x"})


def test_a_config_names_no_module_to_import() -> None:
    with pytest.raises(ValueError, match="megatron_core"):
        MoELoraConfig(megatron_core="antigravity")
    config = MoELoraConfig(auto_mapping={"parent_library": "antigravity", "base_model_class": "x"})
    assert config.auto_mapping is None
    known = {"parent_library": "torch.nn", "base_model_class": "Linear"}
    assert MoELoraConfig(auto_mapping=known).auto_mapping == known


def test_many_patterns_share_the_bound() -> None:
    with pytest.raises(ValueError, match="very long"):
        check_patterns([rf".*a{n}.*b.*" for n in range(100)], "option")
    check_patterns([rf"layers\.{n}\.mlp\.experts\.\d+" for n in range(2000)], "option")


@given(st.text(alphabet=r"ab.*+?|()[]{}\d19,^$-", max_size=24))
@settings(max_examples=400, deadline=None)
def test_what_is_accepted_is_quick(pattern: str) -> None:
    try:
        check_patterns([pattern], "option")
    except ValueError:
        return
    start = time.perf_counter()
    matches(pattern, "ab1." * 20 + "9")
    assert time.perf_counter() - start < 2


def test_matching_is_that_of_the_end_of_a_name() -> None:
    assert matches(r"experts\.\d+", NAME) and not matches(r"xperts\.\d+", NAME) and not matches("experts", NAME)
    values = {"a": 1, r"experts\.127": 2, r".*127": 3}
    assert value_of(values, NAME, 4) == 2 and value_of(values, "b", 4) == 4 and value_of(None, NAME, 5) == 5
    for wanted in ({".*9": 1, "127": 2}, {r"\d+": 3, "127": 4}, {"x": 5}, {NAME: 6, "127": 7}):
        assert value_of(wanted, NAME, 0) == wanted.get(get_pattern_key(wanted, NAME), 0)


def test_many_patterns_on_many_names_are_quick() -> None:
    """More than Python's own cache of patterns holds."""
    patterns = {rf"layers\.{n}\.mlp\.experts\.7": n for n in range(2000)}
    check_patterns(patterns, "option")
    value_of(patterns, NAME, 0)  # compiled once
    start = time.perf_counter()
    for expert in range(20):
        assert value_of(patterns, f"model.layers.3.mlp.experts.{expert}", -1) == (3 if expert == 7 else -1)
    assert time.perf_counter() - start < 2


def test_slow_matches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One match of what is accepted is bounded; so are many, and an honest pattern is no part of them."""
    slow, long = r".*.*.*x", "model.layers.0" + ".abc" * 20
    check_patterns([slow], "option")
    monkeypatch.setattr(patterns, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(patterns, "_SLOW", 1e-5)
    monkeypatch.setattr(patterns, "_spent", 0.0)
    with pytest.raises(ValueError, match=r"the pattern .* of adapter_config.json takes .* and there are many"):
        for number in range(100_000):
            matches(slow, f"{long}.{number}")
    assert patterns._spent == 0  # who reads another adapter afterwards begins anew
    monkeypatch.setattr(patterns, "_SLOW", 0.002)
    for number in range(20_000):
        assert matches(r".*\.layers\.\d+\.mlp\.experts\.\d+", f"{NAME}{number}")
