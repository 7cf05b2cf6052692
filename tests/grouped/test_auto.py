"""The opt-in hook: every model that is loaded or adapted from then on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_moe import auto_enable_grouped_experts
from tests.grouped.cases import blocks, build, calls_of
from tests.reference import relative

NAME = "qwen3_moe"


def entry_points() -> list[Any]:
    return [PreTrainedModel.__dict__["from_pretrained"], PeftModel.__init__, PeftMixedModel.__init__]


ORIGINAL = entry_points()


@pytest.fixture(autouse=True)
def taken_out() -> Iterator[None]:
    assert entry_points() == ORIGINAL, "importing hooks nothing"
    yield
    auto_enable_grouped_experts().remove()
    assert entry_points() == ORIGINAL


def attention() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"])


def test_from_pretrained(tmp_path: Path) -> None:
    model = build(NAME)
    model.save_pretrained(tmp_path)
    handle = auto_enable_grouped_experts()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").requires_grad_(False).eval()
    found, calls = calls_of(loaded)
    assert calls == blocks(model)
    both, info = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert calls_of(both.requires_grad_(False))[1] == blocks(model) and "missing_keys" in info
    handle.remove()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").requires_grad_(False).eval()
    expected, calls = calls_of(plain)
    assert calls == 0 and relative(found, expected) < 1e-6


def test_get_peft_model_and_from_pretrained_of_peft(tmp_path: Path) -> None:
    get_peft_model(build(NAME), attention()).save_pretrained(tmp_path)
    with auto_enable_grouped_experts():
        for adapted in (
            get_peft_model(build(NAME), attention()),  # imported before the hook came
            peft.get_peft_model(build(NAME), attention()),
            PeftModel.from_pretrained(build(NAME), tmp_path),
            get_peft_model(build(NAME), attention(), mixed=True),
        ):
            assert calls_of(adapted)[1] == blocks(adapted)
    assert entry_points() == ORIGINAL
    assert calls_of(get_peft_model(build(NAME), attention()))[1] == 0


def test_idempotent_and_later_options_hold() -> None:
    handle = auto_enable_grouped_experts()
    once = entry_points()
    assert auto_enable_grouped_experts(dequantize="cache") is handle
    assert entry_points() == once and handle.options["dequantize"] == "cache"
    handle.remove()
    handle.remove()
    assert entry_points() == ORIGINAL
    assert auto_enable_grouped_experts() is not handle


def test_what_someone_wrapped_since_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = auto_enable_grouped_experts()
    ours = PeftModel.__init__

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    PeftModel.__init__ = theirs  # type: ignore[method-assign]
    handle.remove()
    assert PeftModel.__init__ is theirs
    assert calls_of(get_peft_model(build(NAME), attention()))[1] == 0, "theirs calls ours, which does nothing more"
    PeftModel.__init__ = ORIGINAL[1]  # type: ignore[method-assign]


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_MOE_GROUPED", "0")
    with auto_enable_grouped_experts():
        adapted = get_peft_model(build(NAME), attention())
    assert calls_of(adapted)[1] == 0
