"""Every tensor of an adapter file against the parameter of the model that it changes, each used once."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from ...compat import check_target_module_exists
from ...config import MoELoraConfig
from ...config_input import read_config
from ...layouts import ExpertsSpec, ProjectionSpec, find_experts
from ...patterns import value_of
from ...settings import AdapterSettings, keeps_base, nominal_scaling, resolve, scaling_of
from ...targets import is_inside, targeted_experts
from .. import native
from ..files import check_adapter_tensors
from ..tensor_file import TensorFile
from .deltas import Change, ExpertFactors, ExpertsDelta, LinearDelta, Replaced

_CONVERT = '`peft_moe.import_adapter("{folder}", "<new folder>")`, or `peft-moe convert {folder} <new folder>`'
_OF_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.lora_")
_UNLIKE_LORA = (  # what a linear gets is not `scaling * B A`, or not on every token
    "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "fan_in_fan_out",
    "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
_LINEAR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")


@dataclass(frozen=True)
class Targeted:
    """An experts module that an adapter changes.

    Attributes: name: its path. spec: how the model holds it. settings: what the adapter asks of it.
        keys: `(slot, factor)` -> key in the file.
    """

    name: str
    spec: ExpertsSpec
    settings: AdapterSettings
    keys: dict[tuple[str, str], str]

    def projections(self) -> list[ProjectionSpec]:
        """The adapted ones."""
        return [one for one in self.spec.projections if one.name in self.settings.projections]


def targeted_by(config: LoraConfig, shapes: dict[str, tuple[int, ...]], model: Any, adapter: str) -> list[Targeted]:
    """The experts modules of a model that an adapter changes, each with its keys in the file.

    Args: shapes: of the file. model: on the meta device. adapter: its name, for messages.

    Raises `ValueError` naming the tensors that are missing, that nothing takes, or whose shape is another.
    """
    if not isinstance(config, MoELoraConfig):
        return []
    targets = targeted_experts(model, config, find_experts(model))
    settings = {name: resolve(config, spec, name) for name, spec in targets.items()}
    wanted = {name: native.expected_shapes(name, spec, settings[name]) for name, spec in targets.items()}
    expected = {key: shape for one in wanted.values() for key, shape in one.items()}
    keys = native.check_shapes(shapes, expected, adapter)
    return [
        Targeted(name, spec, settings[name], {native.split_expert_key(key)[1:]: keys[key] for key in wanted[name]})
        for name, spec in targets.items()
    ]


class AdapterFiles:
    """An adapter on disk.

    Args: stock: let adapters of PEFT's `target_parameters` pass, to be looked at.

    Attributes: config: its config. tensors: its file. name: for messages.

    Raises `ValueError` for a kind of adapter that cannot be merged on disk.
    """

    def __init__(self, folder: Path, stock: bool = False) -> None:
        self.folder, self.name = folder, folder.name
        self.config: Any = read_config(folder)
        self.tensors = TensorFile(folder / "adapter_model.safetensors")
        check_adapter_tensors(self.tensors.path, self.tensors.entries)
        if getattr(self.config, "target_parameters", None) and not stock:
            raise ValueError(
                f"{folder} is an adapter of PEFT's `target_parameters`, whose experts lie in another layout. Convert "
                f"it first: {_CONVERT.format(folder=folder)}."
            )
        start = getattr(self.config, "init_lora_weights", True)
        if not keeps_base(start) and not stock:
            raise ValueError(
                f"{folder}: `init_lora_weights={start!r}` may have changed weights of the base before training, which "
                "is not repeated on disk; load the model and use `merge_and_unload`"
            )
        for option in _UNLIKE_LORA:
            if getattr(self.config, option, None) and not stock:
                raise ValueError(
                    f"{folder}: `{option}` is not merged on disk; load the model and use `merge_and_unload`, "
                    "where PEFT can merge it"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        return {key: entry.shape for key, entry in self.tensors.entries.items()}

    def bind(self, model: Any) -> dict[str, Change]:
        """Parameter of a model -> what the adapter does to it.

        Args: model: on the meta device.

        Raises `ValueError` naming the tensors that fit nothing, are missing, or would be used twice.
        """
        shapes = self.shapes()
        changes, used = self._experts(model)
        linears = {key: shape for key, shape in shapes.items() if key not in set(used)}
        known = model.state_dict()
        replaced: dict[str, Replaced] = {}
        for key in linears:
            path = native.full_key(key).removeprefix(native.PREFIX)
            found = _LINEAR.fullmatch(path)
            plain = path.replace(".base_layer.", ".")
            if found is None and plain in known and plain not in replaced:
                replaced[plain] = Replaced(self.tensors, key)
            elif found is not None and f"{found.group(1)}.weight" in known:
                linear = found.group(1)
                made = LinearDelta(self.tensors, {}, self.linear_scaling(linear))
                one = changes.setdefault(f"{linear}.weight", made)
                assert isinstance(one, LinearDelta)
                one.keys[found.group(2)] = key
            else:
                continue
            used.append(key)
        for parameter, new in replaced.items():
            one = changes.setdefault(parameter, new)
            if isinstance(one, LinearDelta):
                one.instead = new
        _check_used(shapes, used, self.folder)
        native.check_linears(linears, model, self.config, self.name)
        taken = {one for one, change in changes.items() if isinstance(change, LinearDelta) and change.keys}
        _check_targets(self.config, {one.removesuffix(".weight") for one in taken}, model, self.name)
        for parameter, change in changes.items():
            _check_value(change, parameter, known[parameter], shapes, self.name)
            if isinstance(change, LinearDelta):
                self._check_linear(change, parameter, shapes)
        return changes

    def _check_linear(self, change: LinearDelta, parameter: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise `ValueError` where the tensors of a linear or an embedding are not what the config says of them."""
        a, b = (shapes[change.keys[name]] for name in sorted(set(change.keys) - {"lora_magnitude_vector"}))
        rank = value_of(self.config.rank_pattern, parameter.removesuffix(".weight"), self.config.r)
        if a[0] != rank:
            raise ValueError(
                f"adapter {self.name!r}: {parameter}: found factors of rank {a[0]}, adapter_config.json says {rank}"
            )
        size = change.keys.get("lora_magnitude_vector")
        if (size is not None) != bool(self.config.use_dora):
            raise ValueError(
                f"adapter {self.name!r}: {parameter}: magnitudes of DoRA {'are missing' if size is None else 'found'}, "
                f"and adapter_config.json says `use_dora={self.config.use_dora}`"
            )
        if size is not None and math.prod(shapes[size]) != b[0]:
            raise ValueError(f"adapter {self.name!r}: {size}: found shape {shapes[size]}, expected ({b[0]},)")

    def linear_scaling(self, path: str) -> float:
        """Of the linear at a path."""
        rank = value_of(self.config.rank_pattern, path, self.config.r)
        alpha = value_of(self.config.alpha_pattern, path, self.config.lora_alpha)
        return scaling_of(self.config, alpha, rank)

    def targeted(self, model: Any) -> list[Targeted]:
        """The experts modules of a model that the adapter changes. See `targeted_by`."""
        return targeted_by(self.config, self.shapes(), model, self.name)

    def _experts(self, model: Any) -> tuple[dict[str, Change], list[str]]:
        changes: dict[str, Change] = {}
        used: list[str] = []
        cache: dict[ExpertFactors, Any] = {}
        for one in self.targeted(model):
            for projection in one.projections():
                slots = one.settings.slots(projection)
                mine = {where: key for where, key in one.keys.items() if where[0] in slots}
                used += mine.values()
                scaling = nominal_scaling(self.config)
                made = ExpertFactors(
                    self.tensors, mine, one.settings, projection, scaling, one.spec.num_experts, cache
                )  # fmt: skip
                changes |= _parameters(model, one.name, one.spec, projection, made)
        return changes, used


def _parameters(
    model: Any, name: str, spec: ExpertsSpec, projection: ProjectionSpec, made: ExpertFactors
) -> dict[str, Change]:
    """The parameters that hold a projection, each with the rows that it holds."""
    found: dict[str, Change] = {}
    for expert in spec.experts or (None,):
        start = 0
        for part in projection.parts:
            path = [name, part.path] if expert is None else [name, expert, part.path, "weight"]
            parameter = ".".join(one for one in path if one)
            shape = model.get_parameter(parameter).shape
            rows = shape[-1] if part.transposed else shape[-2] // (spec.num_experts if part.flat else 1)
            rows_of = slice(start, start + rows)
            index = None if expert is None else spec.experts.index(expert)
            found[parameter] = ExpertsDelta(made, rows_of, part.transposed, index, part.flat)
            start += rows
    return found


def _check_used(shapes: dict[str, tuple[int, ...]], used: list[str], folder: Path) -> None:
    unused = sorted(set(shapes) - set(used))
    twice = sorted(key for key, count in Counter(used).items() if count > 1)
    if unused or twice:
        parts = [f"not used by this model: {', '.join(unused)}"] if unused else []
        parts += [f"used more than once: {', '.join(twice)}"] if twice else []
        why = "Was it trained on another model?"
        if any(_OF_EXPERT.search(key) for key in unused):
            why = f"If it was trained on lists of experts, convert it first: {_CONVERT.format(folder=folder)}."
        raise ValueError(
            f"adapter {folder.name!r}: every tensor has to be merged once; {'; '.join(parts)}. {why} Nothing was "
            "written."
        )


def _check_targets(config: Any, found: set[str], model: Any, adapter: str) -> None:
    """Raise `ValueError` if the linears that have tensors are not those that the config targets.

    Args: found: paths of the modules that have tensors.
    """
    if config.target_modules is None or str(config.target_modules).lower() == "all-linear":
        return  # PEFT fills them in when an adapter is made: only a config written by hand lacks them
    experts = find_experts(model) if isinstance(config, MoELoraConfig) else {}
    wanted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
        and not is_inside(name, experts)
        and check_target_module_exists(config, name)
    }
    missing = sorted(wanted - found)
    extra = sorted(name for name in found - wanted if not check_target_module_exists(config, name))
    if missing or extra:
        parts = [f"missing tensors of {', '.join(missing)}, which it targets"] if missing else []
        parts += [f"found tensors of {', '.join(extra)}, which it does not target"] if extra else []
        raise ValueError(
            f"adapter {adapter!r}: its tensors are not those of its adapter_config.json: {'; '.join(parts)}. Are the "
            "two files of one adapter? Nothing was written."
        )


def _check_value(
    change: Change, parameter: str, value: Tensor, shapes: dict[str, tuple[int, ...]], adapter: str
) -> None:
    """Raise `ValueError` for a linear's change that does not have the shape of its parameter, or is not whole."""
    if isinstance(change, ExpertsDelta):
        return
    if isinstance(change, LinearDelta) and change.instead is not None:
        _check_value(change.instead, parameter, value, shapes, adapter)
    if isinstance(change, Replaced):
        key, found = change.key, shapes[change.key]
    else:
        names = set(change.keys) - {"lora_magnitude_vector"}
        embedding = "lora_embedding_A" in change.keys
        wanted = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A", "lora_B"}
        if embedding and "lora_magnitude_vector" in change.keys:
            raise ValueError(f"adapter {adapter!r}: {parameter}: DoRA on embeddings is not merged on disk")
        if names != wanted:
            raise ValueError(f"adapter {adapter!r}: {parameter}: found {sorted(names)}, expected {sorted(wanted)}")
        key = next(iter(change.keys.values()))
        a, b = (shapes[change.keys[name]] for name in sorted(wanted))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"adapter {adapter!r}: {key}: factors of shapes {a} and {b}, expected (r, in) and (out, r)"
            )
        found = (a[1], b[0]) if embedding else (b[0], a[1])
    if tuple(found) != tuple(value.shape):
        raise ValueError(
            f"adapter {adapter!r}: {key} would change {parameter} as a tensor of shape {tuple(found)}, which is "
            f"{tuple(value.shape)} in this model. Nothing was written."
        )
