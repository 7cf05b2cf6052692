"""A base and an adapter on disk, and what `merge_and_unload` makes of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from peft_moe import MoELoraConfig, merge_checkpoint
from tests.model.deltas import logits, randomise
from tests.zoo import ENTRIES

#: Linears outside the experts as most architectures call them.
ATTENTION = ["q_proj", "o_proj", "q_a_proj", "kv_b_proj"]


def write_adapter(base: Any, folder: Path, **options: Any) -> Any:
    """Save a random adapter for a copy of a base. Returns the model that it sits on."""
    values: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION}
    model = get_peft_model(copy.deepcopy(base), MoELoraConfig(**(values | options)))
    randomise(model, "default", 0, 0.2)
    model.eval().save_pretrained(folder)
    return model


def case(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Write `folder/base` and `folder/adapter`. Returns the base and the merged model."""
    base = ENTRIES[name].build()
    base.save_pretrained(folder / "base")
    return base, write_adapter(base, folder / "adapter", **options).merge_and_unload()


def merge(folder: Path, **options: Any) -> Any:
    """Merge `folder/base` and `folder/adapter` into `folder/out`."""
    return merge_checkpoint(folder / "base", folder / "adapter", folder / "out", progress=False, **options)


def output(model: Any, name: str) -> Tensor:
    """What a model says to the inputs of an architecture."""
    return logits(model, ENTRIES[name].inputs(model))


def files_of(folder: Path) -> dict[str, bytes]:
    """Name -> content of everything in a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(found: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """The state dicts of two models agree."""
    one, other = found.state_dict(), wanted.state_dict()
    assert set(one) == set(other)
    for key, value in other.items():
        found_value = one[key].to(value.dtype)  # a model may load some parameters in fp32 whatever is asked for
        torch.testing.assert_close(found_value, value, rtol=0, atol=tolerance, msg=lambda t, key=key: f"{key}: {t}")
