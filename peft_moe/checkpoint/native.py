"""The native format: contiguous-r tensors under the names of the model.

One tensor pair a projection, `lora_A (E', r, in)` and `lora_B (E', out, r)`; where experts differ in rank their ranks
follow each other without padding, `lora_A (sum of r, in)` and `lora_B (sum of r, out)`.

Names are those of the model the adapter was trained on. They are read on any layout of the same model: what differs
between transformers 4 and 5 in the path of a block is set aside when they are compared (`canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from peft import LoraConfig
from torch import Tensor, nn

from ..layouts import ExpertsSpec
from ..patterns import value_of
from ..settings import AdapterSettings

PREFIX = "base_model.model."  # of every key, as in all adapters of PEFT

_BLOCK_NAMES = re.compile(r"\.(mlp|block_sparse_moe|feed_forward|ffn|mixer|moe|feedforward)\.")
_SLOTS = "gate_up_proj|gate_proj|up_proj|down_proj"
_PARALLEL_LINEARS = re.compile(rf"\.(experts\.)?(input_linear|output_linear|fc1|fc2)\.({_SLOTS})\.")
_FACTOR = re.compile(rf"\.({_SLOTS})\.(lora_A|lora_B)$")
_LINEAR_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B)\.weight")
_MAGNITUDE = re.compile(rf"\.({_SLOTS})\.lora_magnitude_vector$")


def canonical(key: str) -> str:
    """The name of a tensor without what transformers 4 and 5 disagree on."""
    key = _PARALLEL_LINEARS.sub(r".experts.\3.", key)
    return _BLOCK_NAMES.sub(".mlp.", key).replace(".model.transformer.", ".model.").replace(".transformer.", ".model.")


def expert_keys(keys: Iterable[str]) -> set[str]:
    """The keys of an adapter file that name expert tensors.

    A linear's factors end in `.weight`; its DoRA magnitudes do not, and are told apart by the factors beside them.
    """
    keys = set(keys)
    found = {key for key in keys if _FACTOR.search(key)}
    return found | {key for key in keys if _MAGNITUDE.search(key) and _MAGNITUDE.sub(r".\1.lora_A", key) in found}


def split_expert_key(key: str) -> tuple[str, str, str]:
    """(path of the experts module, slot, factor) of a key that `expert_keys` found."""
    path, factor = key.rsplit(".", 1)
    module, slot = path.rsplit(".", 1)
    return module, slot, factor


def full_key(key: str) -> str:
    """A key with the prefix that all adapters of PEFT have on disk; in memory a bare model has none."""
    return PREFIX + key.removeprefix(PREFIX)


def expected_shapes(name: str, spec: ExpertsSpec, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
    """Key -> shape in the file of every tensor of an adapter on one experts module.

    Args: name: path of the module in the base model.
    """
    return {
        f"{PREFIX}{name}.{slot}.{factor}": shape
        for projection in spec.projections
        if projection.name in settings.projections
        for slot in settings.slots(projection)
        for factor, shape in settings.shapes(projection, slot, spec.num_experts).items()
    }


def check_shapes(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], adapter: str
) -> dict[str, str]:
    """Key of the model -> key of the file, for every expert tensor that the model expects.

    Raises `ValueError` naming the tensors that are missing, that nothing takes, or whose shape is another.
    """
    matched = match(expert_keys(found), expected, adapter)
    for wanted, key in matched.items():
        if tuple(found[key]) != tuple(expected[wanted]):
            raise ValueError(
                f"adapter {adapter!r}: {key}: found shape {tuple(found[key])}, expected {tuple(expected[wanted])} "
                "(experts, rank and sizes of this model and of adapter_config.json). Nothing was loaded."
            )
    return matched


def match(found: Iterable[str], expected: Iterable[str], adapter: str) -> dict[str, str]:
    """Key of the model -> key of the file. Raises `ValueError` if they are not one to one."""
    wanted, files = ({canonical(key): key for key in keys} for keys in (expected, found))
    missing = sorted(wanted[name] for name in wanted.keys() - files.keys())
    extra = sorted(files[name] for name in files.keys() - wanted.keys())
    if missing or extra:
        parts = [f"missing {_some(missing)}"] if missing else []
        parts += [f"not used by this model {_some(extra)}"] if extra else []
        raise ValueError(
            f"adapter {adapter!r}: its expert tensors do not fit the model: {'; '.join(parts)}. Was it trained on "
            "another model, or with another config than its adapter_config.json? Nothing was loaded."
        )
    return {wanted[name]: files[name] for name in wanted}


def check_linears(found: Mapping[str, Sequence[int]], model: nn.Module, config: LoraConfig, adapter: str) -> None:
    """Raise `ValueError` for a linear's factor that the model has no module for, or whose shape is another.

    PEFT passes over the former without a word, and loads the other tensors before it fails at the latter.

    Args: found: key -> shape. model: the base model, with or without adapters, or the PEFT model around it.
    """
    modules = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    injected = any(_holds(module, adapter) for module in modules.values())
    for key, shape in found.items():
        name = _LINEAR_FACTOR.fullmatch(full_key(key).removeprefix(PREFIX))
        if name is None:
            continue
        path, factor = name.groups()
        module = modules.get(path)
        if module is None:
            raise ValueError(
                f"adapter {adapter!r}: {key}: this model has no module {path}. Was the adapter trained on another "
                "model or with another version of transformers? Nothing was loaded."
            )
        if injected and not _holds(module, adapter):
            raise ValueError(
                f"adapter {adapter!r}: {key}: adapter_config.json does not target {path}, and nothing takes it. Are "
                "the two files of one adapter?"
            )
        sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
        if None in sizes:
            continue
        rank = value_of(config.rank_pattern, path, config.r)
        expected = (rank, sizes[0]) if factor == "lora_A" else (sizes[1], rank)
        if tuple(shape) != expected:
            raise ValueError(
                f"adapter {adapter!r}: {key}: found shape {tuple(shape)}, expected {expected} (rank and sizes of this "
                "model and of adapter_config.json). Nothing was loaded."
            )
    _check_whole(found, modules, config, adapter, injected)


def _plain_parameters(modules: Mapping[str, nn.Module], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the modules that an adapter saves whole, where they are plain numbers; by name in the file."""
    for path, module in modules.items():
        if any(path.endswith(saved) for saved in config.modules_to_save or ()):  # as PEFT finds them
            base = getattr(module, "original_module", module)
            for name, parameter in base.named_parameters():
                if parameter.is_floating_point():
                    yield f"{path}.{name}", parameter


def check_taken(loaded: Iterable[str], model: nn.Module, adapter: str) -> None:
    """Raise `ValueError` for names of tensors that a model with its adapters in place has no place for.

    PEFT leaves them out without a word.
    """
    known = {name.removeprefix(PREFIX) for name in model.state_dict()}
    extra = sorted(name for name in loaded if name.removeprefix(PREFIX) not in known)
    if extra:
        raise ValueError(
            f"adapter {adapter!r}: its tensors do not fit the model: not used by this model {_some(extra)}. Is its "
            "adapter_config.json that of another adapter?"
        )


def _holds(module: nn.Module, adapter: str) -> bool:
    """Whether a module is a layer of PEFT with this adapter."""
    return any(adapter in (getattr(module, name, None) or ()) for name in ("lora_A", "lora_embedding_A"))


def _check_whole(
    found: Mapping[str, Sequence[int]],
    modules: Mapping[str, nn.Module],
    config: LoraConfig,
    adapter: str,
    injected: bool,
) -> None:
    """Raise `ValueError` for a factor without its other half, a saved module that is missing, or an unknown tensor.

    Args: injected: the modules have their adapters already, and saved modules their names in memory.
    """
    keys = {full_key(key) for key in found}
    missing = []
    for key in keys:
        for one, other in ((".lora_A.", ".lora_B."), (".lora_B.", ".lora_A.")):
            if one in key and key.replace(one, other) not in keys:
                missing.append(key.replace(one, other))
    for saved in config.modules_to_save or ():
        if not any(f".{saved}." in f".{key.removeprefix(PREFIX)}" for key in keys):
            missing.append(f"{saved} (of `modules_to_save`)")
    if config.trainable_token_indices and not any("trainable_tokens_delta" in key for key in keys):
        missing.append("the values of `trainable_token_indices`")
    shapes = {} if injected else {name: one.shape for name, one in _plain_parameters(modules, config)}
    missing += [name for name in shapes if PREFIX + name not in keys]
    for key, shape in found.items():
        wanted = shapes.get(full_key(key).removeprefix(PREFIX), shape)
        if tuple(shape) != tuple(wanted):
            raise ValueError(
                f"adapter {adapter!r}: {key}: found shape {tuple(shape)}, expected {tuple(wanted)} (of "
                "`modules_to_save`). Nothing was loaded."
            )
    extra = [key for key in keys - expert_keys(keys) if not _has_owner(key, modules)]
    if missing or extra:
        parts = [f"missing {_some(sorted(missing))}"] if missing else []
        parts += [f"not used by this model {_some(sorted(extra))}"] if extra else []
        raise ValueError(
            f"adapter {adapter!r}: its tensors do not fit the model: {'; '.join(parts)}. Nothing was loaded."
        )


def _has_owner(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module of the model, or one above it but the root, could take a tensor of this name."""
    path = key.removeprefix(PREFIX)
    while "." in path:
        path = path.rpartition(".")[0]
        if path in modules:
            return True
    return False


def _some(keys: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
