"""What the quantization config of a packed checkpoint says of its tensors: names, shapes and dtypes of the scales."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..compat import QuantizationConfigMixin


def float8_group(settings: dict[str, Any], path: str) -> dict[str, Any]:
    """What a compressed-tensors config says of its weights. Raises `ValueError` unless all are 8-bit floats."""
    groups = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
    if len(groups) != 1 or groups[0].get("type") != "float" or groups[0].get("num_bits") != 8:
        raise ValueError(
            f"{path}: expected one group of 8-bit floating-point weights in its compressed-tensors config, found "
            f"{[(group.get('type'), group.get('num_bits')) for group in groups]}"
        )
    return groups[0]


class PackedConfig(QuantizationConfigMixin):
    """The quantization config of a checkpoint whose weights stay packed. It is saved as the original one."""

    def __init__(self, original: dict[str, Any], quant_method: str, **kwargs: Any) -> None:
        self.original, self.quant_method = original, quant_method
        self.modules_to_not_convert = original.get("modules_to_not_convert") or original.get("ignored_layers")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.original)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def get(self, name: str, default: Any = None) -> Any:
        """A setting of the checkpoint."""
        return self.original.get(name, default)

    @property
    def weight_block_size(self) -> tuple[int, int] | None:
        """Rows and columns of a block; `None` if the scales are not of blocks."""
        if self.original.get("quant_method") == "compressed-tensors":
            found = float8_group(self.original, "the checkpoint").get("block_structure")
        else:
            found = self.original.get("weight_block_size", (128, 128))
        return None if found is None else (int(found[0]), int(found[1]))

    @property
    def scale_name(self) -> str:
        """How the scale of a linear is called."""
        return "weight_scale" if self.original.get("quant_method") == "compressed-tensors" else "weight_scale_inv"

    def scale_shape(self, rows: int, cols: int) -> tuple[int, ...]:
        """Of the scale of a `(rows, cols)` weight."""
        block = self.weight_block_size
        if block is not None:
            return math.ceil(rows / block[0]), math.ceil(cols / block[1])
        if self.scale_name == "weight_scale_inv":
            return ()
        weights = float8_group(self.original, "the checkpoint")
        return (rows, 1) if weights.get("strategy") == "channel" else (1,)

    @property
    def activation_scale_name(self) -> str | None:
        """How the static scale of a linear's activations is called; `None` where the checkpoint has none."""
        if self.original.get("quant_method") != "compressed-tensors":
            return "activation_scale" if self.original.get("activation_scheme") == "static" else None
        groups = self.original.get("config_groups", {}).values()
        static = [(group.get("input_activations") or {}).get("dynamic") is False for group in groups]
        return "input_scale" if any(static) else None

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales."""
        return torch.float8_e8m0fnu if self.original.get("scale_fmt") == "ue8m0" else torch.float32
