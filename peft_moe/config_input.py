"""Configs of adapters that come from strangers: what they may hold before PEFT builds anything from them."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .checkpoint.json_input import read_object
from .compat import cached_file, has_file
from .ops.grouped import log_once
from .patterns import check_patterns

MAX_ITERATIONS = 1000  # of an initialisation that a config asks for
MAX_COPIES = 10_000  # of layers or tokens that a config asks for: memory is taken for each
ALLOW_PICKLE = "PEFT_MOE_ALLOW_PICKLE"
_PAIRS = ("expert_rank_pattern", "expert_alpha_pattern")  # written as pairs where their order counts
_FLOATS = ("lora_alpha",)  # annotated as integers, and used as any number


def read_config(folder: str | os.PathLike[str]) -> LoraConfig:
    """The config of a MOELORA or LORA adapter in a folder. Raises `ValueError`: see `checked`."""
    return checked(folder, functools.partial(PeftConfig.from_pretrained, str(folder)))


def checked(folder: str | os.PathLike[str], read: Any) -> Any:
    """What PEFT reads of the config in a folder, looked at before and afterwards. Args: read: PEFT's call.

    Raises `ValueError` naming the file, for another type than MOELORA and LORA, for values that an option cannot have,
    for regexes that take long, and for what would import a module.
    """
    path = Path(folder) / CONFIG_NAME
    kind = read_object(path).get("peft_type")
    if kind not in ("MOELORA", "LORA"):
        raise ValueError(f"{path}: its type is {str(kind)[:40]!r}, expected MOELORA or LORA")
    try:
        config = read()
        if kind == "LORA":  # the class of the other looks at itself
            check_types(config.__class__, vars(config))
            check_input(config)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, ImportError) as error:
        said = "" if isinstance(error, (ValueError, ImportError)) else f"PEFT cannot use it: {type(error).__name__}: "
        raise ValueError(f"{path}: {said}{error}") from error
    return config


def adapter_home(name: str, below: str, options: Mapping[str, Any]) -> str | None:
    """The folder of an adapter's config: a local one, or that in the hub's cache once the file is there.

    Args: below: a subfolder, or "". options: those of PEFT's `from_pretrained`.
    """
    folder = os.path.join(name, below)
    if os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        return folder
    quiet = {f"_raise_exceptions_for_{one}": False for one in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        found = cached_file(name, CONFIG_NAME, subfolder=below, **_of_hub(options), **quiet)
    except (OSError, ValueError):  # no name that the hub could have, or none that it has
        return None
    return None if found is None else os.path.dirname(found)


def check_pickle(name: str, below: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an adapter whose tensors are in a pickle alone, unless that is allowed.

    Args: see `adapter_home`.
    """
    if os.environ.get(ALLOW_PICKLE) == "1":
        return
    safe, pickled = (os.path.join(below, file) for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    hub = _of_hub(options)
    if not has_file(name, safe, **hub) and has_file(name, pickled, **hub):
        raise ValueError(
            f"{name} holds {pickled}, a pickle, and no {SAFETENSORS_WEIGHTS_NAME}: only safetensors is read. Ask for "
            f"the adapter in safetensors, or set {ALLOW_PICKLE}=1 to let PEFT read it (`torch.load`, weights only)."
        )


def _of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {one: options.get(one) for one in ("revision", "cache_dir", "token")}


def check_types(cls: Any, values: Mapping[str, Any], where: Any = None) -> None:
    """Raise `ValueError` for an option of a config from JSON whose value is of another kind than it can have.

    Args: cls: of the config. values: by option; what is not there is not looked at. where: the file, for messages.
    """
    for name, kind in _kinds(cls).items():
        if name not in values:
            continue
        value = values[name]
        if name in _PAIRS and isinstance(value, list):
            if all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in value):
                value = dict(value)
        kind = float if name in _FLOATS else kind
        if not _fits(value, kind):
            place = cls.__name__ if where is None else where
            raise ValueError(f"{place}: `{name}={repr(value)[:200]}` is of the wrong kind; expected {_text(kind)}.")


def check_input(config: LoraConfig) -> None:
    """Raise `ValueError` for regexes that take long, for values that make one wait, and for modules to import."""
    check_ranks_and_alphas(vars(config), type(config).__name__)
    for option in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, option), str):  # lists are plain names
            _patterns(config, option, [getattr(config, option)])
    for option in ("layers_pattern", "modules_to_save"):  # PEFT matches their entries as regexes
        found = getattr(config, option)
        _patterns(config, option, [found] if isinstance(found, str) else found or ())
    if not 0 <= config.lora_dropout <= 1:
        _refuse(config, "lora_dropout", config.lora_dropout, "is not a probability")
    if config.megatron_core not in (None, "megatron.core"):
        _refuse(config, "megatron_core", config.megatron_core, "names a module to import; expected 'megatron.core'")
    init = config.init_lora_weights
    steps = init.rpartition("_niter_")[2] if isinstance(init, str) and "_niter_" in init else "0"
    if steps.isdecimal() and (len(steps) > 9 or int(steps) > MAX_ITERATIONS):
        _refuse(config, "init_lora_weights", init, f"asks for more than {MAX_ITERATIONS} iterations")
    loftq: Any = config.loftq_config or {}
    steps = loftq.get("loftq_iter", 1) if isinstance(loftq, dict) else loftq.loftq_iter
    if isinstance(steps, (int, float)) and steps > MAX_ITERATIONS:
        _refuse(config, "loftq_config", loftq, f"asks for more than {MAX_ITERATIONS} iterations")
    copies: Any = config.layer_replication or ()
    if sum(max(0, last - first) for first, last in copies) > MAX_COPIES:
        _refuse(config, "layer_replication", copies, f"asks for more than {MAX_COPIES} layers")
    tokens: Any = config.trainable_token_indices or ()
    if sum(map(len, tokens.values() if isinstance(tokens, dict) else [tokens])) > MAX_COPIES:
        _refuse(config, "trainable_token_indices", tokens, f"names more than {MAX_COPIES} tokens")
    mapping: dict[str, Any] | None = vars(config).get("auto_mapping")
    library = (mapping or {}).get("parent_library")
    if library is not None and library not in sys.modules:
        log_once(f"auto_mapping: {library!r} is not imported here, and a config imports nothing: it is ignored")
        config.auto_mapping = None


def check_ranks_and_alphas(options: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` for a rank or an alpha of LoRA, its own or by pattern, that is none.

    Args: options: by name. where: their config, for messages.
    """
    if not _fits(options["r"], int) or options["r"] < 1:
        raise ValueError(f"{where}: `r={str(options['r'])[:80]}` is not a positive integer of 64 bits.")
    if not _fits(options["lora_alpha"], float):
        raise ValueError(f"{where}: `lora_alpha={str(options['lora_alpha'])[:80]}` is not a number.")
    for option, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        found = options.get(option) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{where}: `{option}={str(found)[:200]!r}` is not a dict of pattern to number.")
        check_patterns(found, f"{where}: `{option}`")
        for pattern, value in found.items():
            if not _fits(value, kind) or (kind is int and value < 1):
                raise ValueError(
                    f"{where}: `{option}={str(found)[:200]!r}` has no number for {pattern!r} that could be one of its "
                    "kind."
                )


def _patterns(config: LoraConfig, option: str, found: Any) -> None:
    check_patterns(found, f"{type(config).__name__}: `{option}`")


def _refuse(config: LoraConfig, option: str, found: object, reason: str) -> None:
    raise ValueError(f"{type(config).__name__}: `{option}={str(found)[:200]!r}` {reason}.")


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if one.name != "runtime_config"}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, as JSON or PEFT's own reading of JSON gives it, is of an annotated kind."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Union or origin is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        placeholder = any("[" in str(one) for one in inner)  # "pissa_niter_[number of iters]"
        return any(value == one or (placeholder and type(value) is type(one)) for one in inner)
    if origin is dict or kind is dict:
        keys = isinstance(value, dict) and all(isinstance(one, (str, int)) for one in value)
        return keys and (not inner or all(_fits(one, inner[1]) for one in value.values()))
    if origin in (list, tuple):
        return isinstance(value, (list, tuple, set)) and all(_fits(one, inner[0]) for one in value)
    if kind is float:  # a JSON number may be an integer that no float holds
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if dataclasses.is_dataclass(kind):
        return isinstance(value, (dict, typing.cast(type, kind)))
    return isinstance(value, kind)


def _text(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
