"""From the names of a model's parameters to those of its checkpoint, and from values in one to values in the other.

transformers 5 keeps experts in stacks that most checkpoints hold apart, fuses and renames other tensors too, and knows
how for every architecture. Its own conversions are asked here: for loading they tell which tensors of the file make a
parameter, and run backwards they bring a change of that parameter into the form of the file. Stacks of experts go
through them one expert at a time. On transformers 4 a checkpoint has the names of the model, or a prefix apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compat import core_model_loading as loading
from ...compat import get_model_conversion_mapping

Shape = tuple[int, ...]
_PLAIN = re.compile(r"[\w.*]+")


@dataclass(eq=False)
class Group:
    """Parameters of the model and the tensors of the checkpoint that they are made of.

    Attributes:
        parameters: pattern -> name of the parameter; sources: pattern -> names in the checkpoint, in order.
        converter: transformers' conversion between the two; `None`: one tensor, as it is.
    """

    model: Any
    parameters: dict[str, str]
    sources: dict[str, list[str]]
    converter: Any = None

    @property
    def listed(self) -> bool:
        """Whether the checkpoint holds each slice of the stacked parameter in tensors of its own."""
        return self.converter is not None and any(
            isinstance(one, loading.MergeModulelist) for one in self.converter.operations
        )

    def check_slices(self) -> None:
        """Raise `ValueError` unless each slice of a stack can be converted without the others."""
        if self.converter is None:
            return
        stacked = not self.listed
        for operation in self.converter.operations:
            merges = isinstance(operation, loading.MergeModulelist)
            axes = {getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)}
            if operation.supports_many_to_many or (merges and operation.dim != 0) or (stacked and 0 in axes):
                raise ValueError(
                    f"{next(iter(self.parameters.values()))}: transformers makes it of {sorted(self.sources)} with "
                    f"{operation}, which mixes experts; merging this architecture on disk is not supported. Load the "
                    "model and use `merge_and_unload`."
                )
            stacked = stacked or merges

    def to_source(self, values: Mapping[str, Tensor], shape_of: Callable[[str], Shape], slice_: int | None) -> Any:
        """Pattern -> value in the form of the checkpoint.

        Args: values: parameter -> tensor, of all parameters; with `slice_` only that slice, with a first axis of one.
        shape_of: name in the checkpoint -> its shape.

        Raises `ValueError` if what comes out has another shape than the checkpoint's tensors.
        """
        if self.converter is None:
            (only,) = values.values()
            found: dict[str, Any] = {next(iter(self.sources)): only}
        else:
            found = self._run_back({pattern: [values[name]] for pattern, name in self.parameters.items()}, slice_)
        result = {}
        for pattern, names in self.sources.items():
            name = names[slice_] if self.listed and slice_ is not None else names[0]
            expected, made = shape_of(name), found[pattern.replace("*", "0") if self.listed else pattern]
            value: Tensor = made[0] if isinstance(made, list) else made
            if slice_ is not None and not self.listed:
                expected = (1, *expected[1:])
            if self._either_way and value.shape != expected and value.transpose(-1, -2).shape == expected:
                value = value.transpose(-1, -2)
            if tuple(value.shape) != tuple(expected):
                raise ValueError(
                    f"{name}: the checkpoint holds a tensor of shape {shape_of(name)}, and this model would have a "
                    f"slice or tensor of {tuple(value.shape)}. Is it a checkpoint of another model or size?"
                )
            result[pattern] = value
        return result

    @property
    def _either_way(self) -> bool:
        """Whether the checkpoint may hold the tensor in either orientation: loading looks at its shape."""
        return self.converter is not None and any(
            getattr(one, "check_dims", False) for one in self.converter.operations
        )

    def _run_back(self, tensors: dict[str, Any], slice_: int | None) -> dict[str, Any]:
        for operation in reversed(self.converter.operations):
            tensors = operation.reverse_op.convert(
                tensors,
                source_patterns=list(self.converter.target_patterns),
                target_patterns=list(self.converter.source_patterns),
                **self._context(slice_),
            )
        return tensors

    def to_parameter(self, read: Callable[[str, int | None], Tensor], parameter: str, slice_: int | None) -> Tensor:
        """The value of one parameter (or one slice of it, with a first axis of one) from the checkpoint's tensors.

        Args: read: (name in the checkpoint, slice of it or `None` for all of it) -> its numbers.
        """
        tensors: dict[str, Any] = {}
        for pattern, names in self.sources.items():
            if slice_ is None:
                tensors[pattern] = [read(name, None) for name in names]
            else:
                tensors[pattern] = [read(names[slice_], None) if self.listed else read(names[0], slice_)]
        if self.converter is None:
            (values,) = tensors.values()
            return values[0]
        for operation in self.converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=list(self.converter.source_patterns),
                target_patterns=list(self.converter.target_patterns),
                **self._context(slice_),
            )
        (pattern,) = (pattern for pattern, name in self.parameters.items() if name == parameter)
        value = tensors[pattern]
        return value[0] if isinstance(value, list) else value

    def _context(self, slice_: int | None) -> dict[str, Any]:
        name = next(iter(self.parameters.values()))
        model = self.model if slice_ is None else _OneSlice(self.model)
        return {"full_layer_name": name, "model": model, "config": self.model.config, "missing_keys": None}


class _OneSlice:
    """The model as conversions see it that look at shapes, when they get one slice of each stack."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_parameter(self, name: str) -> Tensor:
        found = self.model.get_parameter(name)
        return torch.empty(1, *found.shape[1:], device="meta")


def match_names(model: Any, names: list[str]) -> dict[str, Group]:
    """Parameter of a model -> the group it is in, for all that the checkpoint has.

    Args: model: on the meta device. names: of the checkpoint's plain tensors.
    """
    return _convert_names(model, names) if loading is not None else _rename(model, names)


def _convert_names(model: Any, names: list[str]) -> dict[str, Group]:
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    groups: dict[str, Group] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        options = (model.base_model_prefix, known)
        renamed, pattern = loading.rename_source_key(name, renamings, converters, *options)
        if renamed not in known and name in known:
            renamed, pattern = loading.rename_source_key(name, [], [], *options)
        if renamed not in known:
            continue  # of a part that this model leaves out, such as layers that predict several tokens
        if pattern is None:
            groups.setdefault(renamed, Group(model, {renamed: renamed}, {name: [name]}))
            continue
        if _PLAIN.fullmatch(pattern):  # as a regex, in which a dot stands for anything, it has matched already
            own, _ = loading.rename_source_key(name, renamings, [], *options)
            if not re.search(re.escape(pattern).replace(r"\*", r"\d+"), own):
                continue
        converter = by_pattern[pattern]
        if renamed not in groups:
            first, *others = converter.target_patterns
            parameters = {first: renamed} | {other: renamed.replace(first, other) for other in others}
            groups[renamed] = Group(model, parameters, {}, converter)
        groups[renamed].sources.setdefault(pattern, []).append(name)
    return {parameter: group for group in groups.values() for parameter in group.parameters.values()}


def _rename(model: Any, names: list[str]) -> dict[str, Group]:
    known = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    rules = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    groups = {}
    for name in names:
        renamed = name
        for pattern, replacement in rules.items():
            renamed, count = re.subn(pattern, replacement, renamed)
            if count:
                break
        spellings = (renamed, name, prefix + renamed, renamed.removeprefix(prefix))
        found = next((one for one in spellings if one in known), None)
        if found is not None:
            groups[found] = Group(model, {found: found}, {name: [name]})
    return groups
