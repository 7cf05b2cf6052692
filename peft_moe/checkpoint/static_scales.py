"""Scales of single numbers in a checkpoint: of whole tensors, and static ones of activations.

Weights are dequantized here and activations are never quantized, so nothing multiplies with a static scale of
activations. It is read, kept next to its weight, and written again as it was, for whoever serves the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import core_model_loading as loading

_Operation: Any = object if loading is None else loading.ConversionOps


class LiftNumbers(_Operation):
    """Gives numbers `()` of single experts an axis, along which those of gate and up can follow each other."""

    def __init__(self) -> None:
        self.lifted = False  # saving takes the axis away again where there was none

    def __deepcopy__(self, memo: Any) -> LiftNumbers:
        return self  # transformers copies a converter for each key, and saves with the one that it copied

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
        """`{pattern: [tensor]}` -> the same, `(1,)` for `()`."""
        found = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        self.lifted |= any(tensor.dim() == 0 for tensors in found.values() for tensor in tensors)
        return {key: [one.reshape(1) if one.dim() == 0 else one for one in tensors] for key, tensors in found.items()}

    @property
    def reverse_op(self) -> Any:
        return _DropAxis(self)


class _DropAxis(_Operation):
    def __init__(self, lift: LiftNumbers) -> None:
        self.lift = lift

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The way back: `(1,)` -> `()` if that is what was read."""
        if not self.lift.lifted:
            return input_dict
        return {
            key: [one.reshape(()) for one in value] if isinstance(value, list) else value.reshape(())
            for key, value in input_dict.items()
        }

    @property
    def reverse_op(self) -> Any:
        return self.lift


def for_numbers(conversions: list[Any], model: nn.Module, name: str | None) -> list[Any]:
    """Converters that stack the scales of single experts, too: those of weights are there, those of activations not.

    Args: name: `activation_scale`, `input_scale`, or `None` where the checkpoint has none.
    """
    parameters = {key for key, _ in model.named_parameters()}
    found = []
    for one in conversions:
        found.append(one)
        if not isinstance(one, loading.WeightConverter) or not all("*." in key for key in one.source_patterns):
            continue
        sources, targets = list(one._original_source_patterns), list(one._original_target_patterns)
        if targets[0].endswith(("_scale_inv", "_scale")):
            found[-1] = one.copy(sources, targets, operations=[LiftNumbers(), *one.operations])
        elif name is not None and any(key.endswith(f"{targets[0]}_{name}".lstrip(".\\")) for key in parameters):
            sources = [f"{source.removesuffix('weight')}{name}" for source in sources]
            operations = [LiftNumbers(), *one.operations]
            found.append(one.copy(sources, [f"{target}_{name}" for target in targets], operations=operations))
    return found


def activation_parameter(*shape: int) -> nn.Parameter:
    """Where a static scale is read into."""
    return nn.Parameter(torch.ones(shape, device="meta"), requires_grad=False)
