"""The model of a checkpoint without its weights: on the meta device, for its names, shapes and classes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM

from ...compat import model_class
from ..json_input import read_object

MAX_MODULES = 400_000  # of a model; those of a thousand billion parameters have a quarter of that


def skeletons(folder: Path, trust_remote_code: bool) -> Iterator[Any]:
    """Models that the checkpoint may have been loaded as: the class that its config names, and a causal LM.

    Raises `ValueError` if transformers does not know the architecture.
    """
    _check_counts(read_object(folder / "config.json", constants=True), folder / "config.json")
    try:
        with _building(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{folder}: transformers cannot read its config ({error}). Names of tensors are matched by the model's own "
            "classes; where they are code beside the checkpoint that you trust, pass `trust_remote_code=True`."
        ) from error
    text = config.get_text_config()
    for one in (config, text):
        if hasattr(one, "quantization_config"):
            del one.quantization_config  # of plain modules only names and shapes are asked
        one._attn_implementation = "eager"  # what a config names may be code on the hub, which building would fetch
    seen: set[type] = set()
    own_code = not type(config).__module__.startswith("transformers.")
    stated = config.architectures if isinstance(config.architectures, list) else []
    for name in () if own_code else stated:
        found = model_class(name)
        if found is not None:
            with _building(folder), torch.device("meta"):
                model = found(config)
            seen.add(type(model))
            yield model
    options = {"trust_remote_code": True} if trust_remote_code else {}
    problem: ValueError | None = None
    for one in (config,) if text is config else (text, config):
        try:
            with _building(folder), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(one, **options)
        except ValueError as error:
            problem = error
            continue
        if type(model) not in seen:
            yield model
        return
    if not seen:
        raise ValueError(f"{folder}: {problem}") from problem


@contextmanager
def _building(folder: Path) -> Iterator[None]:
    """A config may hold anything: whatever transformers raises for it becomes a `ValueError` that names the folder.

    So does a model of more modules than any has.
    """
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ValueError(f"{folder}: its config.json asks for a model of more than {MAX_MODULES} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    except ValueError as error:
        raise error if str(folder) in str(error) else ValueError(f"{folder}: {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"{folder}: transformers cannot build a model of its config.json ({type(error).__name__}: {error})"
        ) from error
    finally:
        hook.remove()


def _check_counts(value: Any, path: Path) -> None:
    """Raise `ValueError` for numbers of layers or experts that no model has: lists of that length are made of them."""
    for name, one in value.items() if isinstance(value, dict) else ():
        if isinstance(one, dict):
            _check_counts(one, path)
        elif isinstance(one, int) and one > MAX_MODULES and ("layer" in name or "expert" in name):
            raise ValueError(f"{path}: `{name}` is {one}: no model has so many")


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
