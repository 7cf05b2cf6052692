"""The model of a checkpoint without its weights: on the meta device, for its names, shapes and classes alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def skeletons(folder: Path, trust_remote_code: bool) -> Iterator[Any]:
    """Models that the checkpoint may have been loaded as: the class that its config names, and a causal LM.

    Raises `ValueError` if transformers does not know the architecture.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot read its config ({error}). Names of tensors are "
            "matched by the model's own classes; where they are code beside the checkpoint that you trust, pass "
            "`trust_remote_code=True`."
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of plain modules only names and shapes are asked
    seen: set[type] = set()
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            with torch.device("meta"):
                model = found(config)
            seen.add(type(model))
            yield model
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except ValueError as error:
        if not seen:
            raise ValueError(f"{folder}: {error}") from error
        return
    if type(model) not in seen:
        yield model


def kept_in_fp32(model: Any) -> tuple[str, ...]:
    """Parts of the names of parameters that a model wants in fp32, whatever the rest is in."""
    names: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            names.update(getattr(module, attribute, None) or ())
    return tuple(sorted(names))


def aliases_of(model: Any) -> dict[str, str]:
    """Second names of config values -> the names under which this version of transformers writes them."""
    found: dict[str, str] = {}
    for config in (model.config, model.config.get_text_config()):
        found |= getattr(config, "attribute_map", None) or {}
    return found
