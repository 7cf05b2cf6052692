"""What no format but the native one holds."""

from __future__ import annotations

from ...settings import keeps_base
from .native import NativeAdapter


def check_plain(adapter: NativeAdapter, consumer: str) -> None:
    """Raise `ValueError` for an adapter of experts that is more than `W + scaling * B A`."""
    config = adapter.config
    if config.use_dora and adapter.modules:
        raise ValueError(
            f"adapter {adapter.name!r}: `use_dora` on experts cannot be exported to {consumer}: it has no place for "
            "their magnitudes, and would compute another function. Merge it instead (`peft_moe.merge_checkpoint`)."
        )
    if not keeps_base(config.init_lora_weights):
        raise ValueError(
            f"adapter {adapter.name!r}: `init_lora_weights={config.init_lora_weights!r}` may have changed weights of "
            f"the base before training, which {consumer} does not do again. Merge it instead: load the model and use "
            "`merge_and_unload`."
        )
    if config.target_experts and not adapter.modules:
        raise ValueError(f"adapter {adapter.name!r}: it holds no tensors of experts, which its config says it has")
