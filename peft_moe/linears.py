"""LoRA on FP8 linears: PEFT's own layer, whose merge would add deltas to raw codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .compat import LoraLinear, check_adapters_to_merge
from .weights.fp8 import FP8Weight, open_fp8_modules
from .weights.grid import FLOAT8


def check_options(config: Any, module: Any, name: str) -> None:
    """Raise `ValueError` for what LoRA cannot do on an FP8 linear. Other modules pass."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if not is_fp8_linear(base):
        return
    if config.use_dora:
        raise ValueError(
            f"{name}: `use_dora` needs the norms of a weight in 16 bits, and this linear is FP8. Leave it out of "
            "`target_modules`, or load the model dequantized."
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"{name}: `init_lora_weights={config.init_lora_weights!r}` decomposes a weight in 16 bits, and this linear "
            "is FP8. Use `True` or `'gaussian'`, or leave it out of `target_modules`."
        )


def is_fp8_linear(module: Any) -> bool:
    """Whether this is a linear with FP8 codes for a weight."""
    return isinstance(module, nn.Linear) and getattr(module.weight, "dtype", None) in FLOAT8


class FP8LoraLinear(LoraLinear):
    """PEFT's LoRA of a linear, on FP8: merged in fp32 and requantized once; `unmerge` restores all bytes."""

    _base_bytes: Any = None

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, torch.bfloat16 if dtype in FLOAT8 else dtype  # adapters in FP8 would be noise

    def _store(self) -> FP8Weight:
        base: Any = self.get_base_layer()
        return open_fp8_modules([[base]], (1, base.out_features, base.in_features), "a linear with LoRA")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """See PEFT. Adapters merged before are merged anew together with these. A failure changes nothing."""
        base = self.get_base_layer()
        if not is_fp8_linear(base):  # decompressed since
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        store, before = self._store(), list(self.merged_adapters)
        current = store.snapshot()
        if before:
            store.restore(self._base_bytes)
        codes, dense = base.weight, store.materialize(None, torch.float32)[0]
        self.merged_adapters.clear()
        try:
            try:
                base.weight = nn.Parameter(dense.clone(), requires_grad=False)
                super().merge(safe_merge=safe_merge, adapter_names=[*before, *names])  # on the dense weight
                delta: Tensor = base.weight.data - dense
            finally:
                base.weight = codes
            store.add_([([0], delta.unsqueeze(0))])
        except BaseException:
            store.restore(current)
            self.merged_adapters[:] = before
            raise
        if not before:
            self._base_bytes = current

    def unmerge(self) -> None:
        """See PEFT; the codes and scales of before, byte for byte."""
        if not self.merged or self._base_bytes is None:
            super().unmerge()
            return
        self._store().restore(self._base_bytes)
        self._base_bytes = None
        self.merged_adapters.clear()
