"""Which blocks run grouped: the forward of a known Mixture-of-Experts block with its experts computed by one call.

`find_block_forward` recognises a block; `expert_leaf_names` and `expert_activation` describe its experts. A block of
transformers is known by its class and module and by the parts that its forward uses; a block of remote code by the way
it is built (see `blocks_remote`). Anything else is unknown and gets None: the caller then adapts each expert's own
projections instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from . import blocks_native as native
from .blocks_common import Block, BlockForward
from .blocks_experts import ExpertForm, expert_activation, expert_form, expert_leaf_names, mlp_experts
from .blocks_remote import is_moe_infer_block, moe_infer_forward
from .spec import RunExperts

__all__ = [
    "BlockForward",
    "ExpertForm",
    "RunExperts",
    "expert_activation",
    "expert_form",
    "expert_leaf_names",
    "find_block_forward",
]


@dataclass(frozen=True)
class _Known:
    """A block of transformers: its grouped forward, the modules and settings that it uses, a check of its experts."""

    forward: BlockForward
    modules: tuple[str, ...]
    settings: tuple[str, ...] = ()
    experts: Callable[[Block], bool] = lambda block: mlp_experts(getattr(block, "experts", None)) > 0


def _longcat_experts(block: Block) -> bool:
    """The MLPs come first, as many as the config says, and only identities follow."""
    return mlp_experts(getattr(block, "experts", None), identities=True) == block.config.n_routed_experts


_MIXTRAL = _Known(native.mixtral_forward, ("gate",), ("top_k", "jitter_noise"))
_QWEN = _Known(native.qwen_moe_forward, ("gate",), ("top_k", "norm_topk_prob"))
_QWEN_SHARED = _Known(
    native.qwen_moe_shared_forward, ("gate", "shared_expert", "shared_expert_gate"), ("top_k", "norm_topk_prob")
)
_DEEPSEEK_V3 = _Known(native.deepseek_v3_forward, ("gate", "shared_experts"))

#: transformers.models.<family>.modeling_<family>, class of the block
_NATIVE: dict[tuple[str, str], _Known] = {
    ("mixtral", "MixtralSparseMoeBlock"): _MIXTRAL,
    ("minimax", "MiniMaxSparseMoeBlock"): _MIXTRAL,
    ("qwen3_moe", "Qwen3MoeSparseMoeBlock"): _QWEN,
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextSparseMoeBlock"): _QWEN,
    ("olmoe", "OlmoeSparseMoeBlock"): _QWEN,
    ("flex_olmo", "FlexOlmoSparseMoeBlock"): _QWEN,
    ("qwen2_moe", "Qwen2MoeSparseMoeBlock"): _QWEN_SHARED,
    ("qwen3_next", "Qwen3NextSparseMoeBlock"): _QWEN_SHARED,
    ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextSparseMoeBlock"): _QWEN_SHARED,
    ("jamba", "JambaSparseMoeBlock"): _Known(native.jamba_forward, ("router",), ("top_k",)),
    ("phimoe", "PhimoeSparseMoeBlock"): _Known(
        native.phimoe_forward, ("gate",), ("router_jitter_noise", "input_jitter_noise")
    ),
    ("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"): _Known(
        native.ernie_forward, ("gate", "moe_statics"), ("top_k", "norm_min", "shared_experts")
    ),
    ("hunyuan_v1_moe", "HunYuanMoEV1Moe"): _Known(native.hunyuan_forward, ("gate", "shared_mlp"), ("top_k",)),
    ("deepseek_v2", "DeepseekV2MoE"): _Known(native.deepseek_v2_forward, ("gate", "shared_experts")),
    ("deepseek_v3", "DeepseekV3MoE"): _DEEPSEEK_V3,
    ("dots1", "Dots1MoE"): _DEEPSEEK_V3,
    ("glm4_moe", "Glm4MoeMoE"): _DEEPSEEK_V3,
    ("glm4v_moe", "Glm4vMoeTextMoE"): _DEEPSEEK_V3,
    ("longcat_flash", "LongcatFlashMoE"): _Known(
        native.longcat_forward, ("router",), ("config",), experts=_longcat_experts
    ),
}

_MODELS = "transformers.models."


def find_block_forward(block: nn.Module) -> BlockForward | None:
    """The grouped forward of a known block, None for any other module.

    Args:
        block: the module that owns router and experts (`mlp`, `block_sparse_moe`, `feed_forward`...).

    Returns:
        A module-level function `forward(block, run_experts, *args, **kwargs)` that returns what
        `block.forward(*args, **kwargs)` returns, with the routed experts computed by `run_experts` (see
        `spec.RunExperts`): no loop over the experts, no wait for the device, gradients in training and in inference
        mode. It reads the block at each call, so it holds as long as the block is the same kind of block.
    """
    cls = type(block)
    if not cls.__module__.startswith(_MODELS):
        return moe_infer_forward if is_moe_infer_block(block) else None
    family = cls.__module__[len(_MODELS) :].split(".")[0]
    known = _NATIVE.get((family, cls.__name__))
    if known is None or cls.__module__ != f"{_MODELS}{family}.modeling_{family}":
        return None
    # A forward that someone else put on the class is no longer the one that is reproduced here.
    if inspect.unwrap(cls.forward).__module__ != cls.__module__:
        return None
    parts = all(isinstance(getattr(block, name, None), nn.Module) for name in known.modules)
    settings = all(hasattr(block, name) for name in known.settings)
    return known.forward if parts and settings and known.experts(block) else None
