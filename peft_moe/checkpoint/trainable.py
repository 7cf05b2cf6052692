"""What a packed base needs before adapters can train on it: linears that differentiate, and a Trainer that accepts it.

Both change this model alone, and only once adapters are put on its experts.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..weights.grid import FLOAT8
from .packed_modules import PackedLinear
from .scales import recover_scales


def prepare(model: nn.Module) -> None:
    """Let packed linears compute and differentiate where their own kernels do not, and mark the model trainable.

    Scales that the loader dropped are found again. Raises `ValueError` for FP8 weights whose scale is nowhere.
    """
    recover_scales(model)
    for module in model.modules():
        if type(module).__name__ == "FP8Linear" and module.weight.dtype in FLOAT8 and not _differentiates(module):
            module.__class__ = PackedLinear
    quantizer: Any = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if str(getattr(method, "value", method)) in ("fp8", "mxfp4") and not quantizer.is_trainable:
        cls: Any = type(quantizer)
        quantizer.__class__ = _trainable(cls)


def _differentiates(linear: Any) -> bool:
    """The FP8 linear of transformers 5 has a backward; its kernels, and all of transformers 4's, are for GPUs."""
    return linear.weight.device.type != "cpu" and hasattr(linear, "_deepgemm_disabled")


@functools.cache
def _trainable(cls: type) -> type:
    return type(cls.__name__, (cls,), {"is_trainable": True, "__module__": cls.__module__})
