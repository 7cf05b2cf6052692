"""What no format but the native one holds."""

from __future__ import annotations

from ...settings import decomposes
from .native import NativeAdapter


def check_plain(adapter: NativeAdapter, consumer: str) -> None:
    """Raise `ValueError` for an adapter of experts that is more than `W + scaling * B A`."""
    config = adapter.config
    if config.use_dora and adapter.modules:
        raise ValueError(
            f"adapter {adapter.name!r}: `use_dora` on experts cannot be exported to {consumer}: it has no place for "
            "their magnitudes, and would compute another function. Merge it instead (`peft_moe.merge_checkpoint`)."
        )
    if decomposes(config.init_lora_weights):
        raise ValueError(
            f"adapter {adapter.name!r}: `init_lora_weights={config.init_lora_weights!r}` trained against a base whose "
            f"experts were changed at the start, which {consumer} does not do again. Merge it instead "
            "(`peft_moe.merge_checkpoint`)."
        )
    if config.target_experts and not adapter.modules:
        raise ValueError(f"adapter {adapter.name!r}: it holds no tensors of experts, which its config says it has")
