"""Experts held as stacked parameters: transformers 5, and the stacked classes of transformers 4.

Classes of transformers' experts interface say themselves how they are laid out (`is_transposed`, `has_bias`,
`is_concatenated`, `has_gate`). The few outside it are named here, each with its layout and the way it is called.
Sizes always come from the shapes of the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import SILU_GATED, GatedSwish
from . import calls
from .spec import ExpertsSpec, Part, ProjectionSpec, logical_shape

_INTERFACE_FLAGS = ("is_transposed", "has_bias", "has_gate", "is_concatenated")


def _shape(base: Any, path: str) -> tuple[int, ...]:
    found = logical_shape(base, path)
    assert found is not None  # the layout was chosen by this parameter
    return found


def _is_stack(base: Any, name: str) -> bool:
    shape = logical_shape(base, name)
    return shape is not None and len(shape) == 3


# --- activations, each `(base, pre) -> hidden` ---------------------------------------------------------------------


def _own_gate(base: Any, pre: Tensor) -> Tensor:
    return base._apply_gate(pre)


def _ungated(base: Any, pre: Tensor) -> Tensor:
    return base.act_fn(pre)


def _gated(base: Any, pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return base.act_fn(gate) * up


def _dbrx_gate(base: Any, pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, dim=-1)
    return base.mlp.activation_fn(gate) * up


def _gpt_oss_gate(base: Any, pre: Tensor) -> Tensor:
    """Of transformers 4, which has it inline: interleaved, clamped, `(up + 1) * gate * sigmoid(alpha * gate)`."""
    gate, up = pre[..., ::2].clamp(max=base.limit), pre[..., 1::2].clamp(min=-base.limit, max=base.limit)
    return (up + 1) * gate * torch.sigmoid(gate * base.alpha)


def _gpt_oss_form(base: Any) -> GatedSwish | None:
    """`_gpt_oss_gate`, which is that of transformers 5 too, as `ops.activation` knows it."""
    own = type(base).__module__.endswith((".modeling_gpt_oss", ".mxfp4"))
    if not own or not all(isinstance(getattr(base, name, None), (int, float)) for name in ("alpha", "limit")):
        return None
    return GatedSwish(float(base.alpha), 1.0, float(base.limit), interleaved=True)


def is_silu(activation: object) -> bool:
    """Whether this module or function is SiLU, under any of its names."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation") or activation is torch.nn.functional.silu


def _default_gate(base: Any) -> bool:
    """Whether the class leaves `_apply_gate` as the interface provides it (`act_fn(gate) * up`)."""
    return getattr(type(base)._apply_gate, "__module__", "") == "transformers.integrations.moe"


# --- the layouts ---------------------------------------------------------------------------------------------------


def _two_projections(
    base: Any, *, first: str, transposed: bool, gate: str | None, bias: bool
) -> tuple[ProjectionSpec, ProjectionSpec]:
    up, down = _shape(base, first), _shape(base, "down_proj")
    out_axis, in_axis = (2, 1) if transposed else (1, 2)
    return (
        ProjectionSpec(
            first, "gate_up_proj", up[out_axis], up[in_axis], (Part(first, transposed),),
            (f"{first}_bias",) if bias else (), gate,
        ),
        ProjectionSpec(
            "down_proj", "down_proj", down[out_axis], down[in_axis], (Part("down_proj", transposed),),
            ("down_proj_bias",) if bias else (),
        ),
    )  # fmt: skip


def _interface(base: Any) -> ExpertsSpec | None:
    if not all(hasattr(base, flag) for flag in _INTERFACE_FLAGS):
        return None
    first = "gate_up_proj" if base.has_gate else "up_proj"
    if not (_is_stack(base, first) and _is_stack(base, "down_proj")):
        return None
    gate = None
    if base.has_gate:
        gate = "concatenated" if base.is_concatenated else "interleaved"
    closed = base.has_gate and _default_gate(base) and is_silu(getattr(base, "act_fn", None))
    form = _gpt_oss_form(base) if type(base).__name__ == "GptOssExperts" else None
    return ExpertsSpec(
        num_experts=_shape(base, "down_proj")[0],
        projections=_two_projections(base, first=first, transposed=base.is_transposed, gate=gate, bias=base.has_bias),
        call=calls.tokens_index_weights,
        activation=_own_gate if base.has_gate else _ungated,
        closed_form=SILU_GATED if closed else form,
        post_norm="post_expert_norm" if getattr(base, "has_post_expert_norm", False) else None,
        # Its own forward multiplies in fp32, whatever the weights are.
        compute_dtype=torch.float32 if type(base).__name__ == "OpenAIPrivacyFilterExperts" else None,
    )


def _plain(
    transposed: bool, call: Callable[..., Any], activation: Callable[[Any, Tensor], Tensor], **extra: Any
) -> Callable[[Any], ExpertsSpec]:
    """The layout of a class outside the interface with parameters `gate_up_proj` and `down_proj`."""

    def describe(base: Any) -> ExpertsSpec:
        closed = activation is _gated and is_silu(getattr(base, "act_fn", None))
        gate = extra.get("gate", "concatenated")
        return ExpertsSpec(
            num_experts=_shape(base, "down_proj")[0],
            projections=_two_projections(
                base, first="gate_up_proj", transposed=transposed, gate=gate, bias=extra.get("bias", False)
            ),
            call=call,
            activation=activation,
            closed_form=SILU_GATED if closed else _gpt_oss_form(base) if activation is _gpt_oss_gate else None,
            sentinels=call is calls.identity_experts,
        )

    return describe


def _dbrx(base: Any) -> ExpertsSpec:
    experts = getattr(base, "num_experts", None) or base.moe_num_experts
    rows, hidden = _shape(base, "mlp.w1")
    inner = rows // experts
    versions = {"top_k_index": calls.tokens_index_weights, "top_experts": calls.dbrx_4}
    known = [call for name, call in versions.items() if name in inspect.signature(type(base).forward).parameters]
    return ExpertsSpec(
        num_experts=experts,
        projections=(
            ProjectionSpec(
                "gate_up_proj", "gate_up_proj", 2 * inner, hidden,
                (Part("mlp.w1", flat=True), Part("mlp.v1", flat=True)), gate="concatenated",
            ),
            ProjectionSpec("down_proj", "down_proj", hidden, inner, (Part("mlp.w2", transposed=True, flat=True),)),
        ),
        call=known[0],
        activation=_dbrx_gate,
        closed_form=SILU_GATED if is_silu(base.mlp.activation_fn) else None,
    )  # fmt: skip


def _parallel_linear(transposed: bool) -> Callable[[Any], ExpertsSpec]:
    """One projection of all experts as a module of its own, called with sorted rows and a count per expert."""

    def describe(base: Any) -> ExpertsSpec:
        out_axis, in_axis = (2, 1) if transposed else (1, 2)
        shape = _shape(base, "weight")
        projection = ProjectionSpec(
            "gate_up_proj", "gate_up_proj", shape[out_axis], shape[in_axis], (Part("weight", transposed),)
        )
        return ExpertsSpec(num_experts=shape[0], projections=(projection,), call=calls.sorted_rows)

    return describe


def _fp8(base: Any) -> ExpertsSpec:
    """transformers' `FP8Experts`, which replaces stacked experts of any model: gate and up concatenated, no bias."""
    first = "gate_up_proj" if base.has_gate else "up_proj"
    up, down = _quantized_sizes(base, first), _quantized_sizes(base, "down_proj")
    return ExpertsSpec(
        num_experts=up[0],
        projections=(
            ProjectionSpec(
                first, "gate_up_proj", up[1], up[2], (Part(first),), gate="concatenated" if base.has_gate else None
            ),
            ProjectionSpec("down_proj", "down_proj", down[1], down[2], (Part("down_proj"),)),
        ),
        call=calls.tokens_index_weights,
        activation=_own_gate if base.has_gate else _ungated,
        closed_form=SILU_GATED if base.has_gate and _plain_fp8_gate(base) else None,
    )


def _plain_fp8_gate(base: Any) -> bool:
    """Whether `FP8Experts._apply_gate` is `silu(gate) * up`: none of the limits that some models set."""
    limits = ("limit", "swiglu_alpha", "gate_softcap")
    return is_silu(base.act_fn) and all(getattr(base, name, None) is None for name in limits)


def _mxfp4(base: Any) -> ExpertsSpec:
    """GPT-OSS with packed FP4 experts: gate and up interleaved, biases, `(out, in)`."""
    if not isinstance(getattr(base, "gate_up_proj_blocks", getattr(base, "gate_up_proj", None)), Tensor):
        return ExpertsSpec(
            0, (), None,
            refused="its MXFP4 weights lie in the layout of a kernel; load the checkpoint with "
            "`config=peft_moe.packed_config(path)`, which keeps them as blocks and scales",
        )  # fmt: skip
    up, down = _quantized_sizes(base, "gate_up_proj"), _quantized_sizes(base, "down_proj")
    parts = {name: (Part(name, transposed=True),) for name in ("gate_up_proj", "down_proj")}
    is_interface = all(hasattr(base, flag) for flag in _INTERFACE_FLAGS)
    arguments = inspect.signature(type(base).forward).parameters
    scattered = not is_interface and not {"routing_weights", "routing_data"}.isdisjoint(arguments)  # transformers 4
    return ExpertsSpec(
        num_experts=up[0],
        projections=(
            ProjectionSpec(
                "gate_up_proj", "gate_up_proj", up[1], up[2], parts["gate_up_proj"], ("gate_up_proj_bias",),
                "interleaved",
            ),
            ProjectionSpec("down_proj", "down_proj", down[1], down[2], parts["down_proj"], ("down_proj_bias",)),
        ),
        call=calls.tokens_scattered_weights if scattered else calls.tokens_index_weights,
        activation=_gpt_oss_gate,
        closed_form=_gpt_oss_form(base),
    )  # fmt: skip


def _quantized_sizes(base: Any, name: str) -> tuple[int, int, int]:
    """`(E, out, in)` of a stack held as `(E, out, in)`, unpacked where two 4-bit values share a byte."""
    tensor = getattr(base, f"{name}_blocks", None)
    if tensor is None:
        tensor = getattr(base, name)
    experts, out = tensor.shape[:2]
    values = tensor.shape[2:].numel()
    return experts, out, values if tensor.is_floating_point() else 2 * values


_BY_CLASS: dict[str, Callable[[Any], ExpertsSpec]] = {
    "Llama4TextExperts": _plain(True, calls.every_expert_dense, _gated),
    "LongcatFlashExperts": _plain(False, calls.identity_experts, _gated),
    "Step3p7Experts": _plain(False, calls.tokens_index_weights, _own_gate),
    "Qwen3VLMoeTextExperts": _plain(True, calls.tokens_scattered_weights, _gated),
    "GptOssExperts": _plain(True, calls.tokens_scattered_weights, _gpt_oss_gate, gate="interleaved", bias=True),
    "DbrxExperts": _dbrx,
    "JetMoeParallelExperts": _parallel_linear(False),
    "GraniteMoeParallelExperts": _parallel_linear(False),
    "GraniteMoeSharedParallelExperts": _parallel_linear(False),
    "GraniteMoeHybridParallelExperts": _parallel_linear(False),
    "AriaGroupedExpertsGemm": _parallel_linear(True),
}

# Classes that a quantizer puts in the place of any model's own: asked first, as their flags do not tell it all.
_QUANTIZED: dict[str, Callable[[Any], ExpertsSpec]] = {
    "FP8Experts": _fp8,
    "Mxfp4GptOssExperts": _mxfp4,
}

_SECOND_LINEAR = ("output_linear", "fc2")  # of a pair of parallel linears

_REFUSED = {
    "DogeCDMoE": "its experts are single rows of two embeddings (rank 1): a LoRA of any rank is larger than the "
    "expert. Adapt `down_embed` and `up_embed` as embeddings through target_modules, or use modules_to_save",
}


def describe_stacked(name: str, module: nn.Module) -> ExpertsSpec | None:
    """The spec of a module that holds its experts in stacked parameters; `None` if it does not.

    Args: name: module path in the model, whose last part tells which of a pair of parallel linears this is.
    """
    kind = type(module).__name__
    if kind in _REFUSED:
        return ExpertsSpec(0, (), None, refused=_REFUSED[kind])
    spec: ExpertsSpec | None
    if kind in _QUANTIZED:
        spec = _QUANTIZED[kind](module)
    else:
        spec = _mxfp4(module) if hasattr(module, "gate_up_proj_blocks") else _interface(module)
    if spec is None and kind in _BY_CLASS:
        spec = _BY_CLASS[kind](module)
        if spec.call is calls.sorted_rows and name.rpartition(".")[2] in _SECOND_LINEAR:
            (only,) = spec.projections
            down = ProjectionSpec("down_proj", "down_proj", only.out_features, only.in_features, only.parts)
            spec = ExpertsSpec(spec.num_experts, (down,), spec.call)
    # Shared experts see every token: they are dense layers, whatever they are called.
    stacks = any(_is_stack(module, first) for first in ("gate_up_proj", "down_proj"))
    if spec is None and stacks and "shared" not in name.rpartition(".")[2]:
        return ExpertsSpec(
            0, (), None,
            refused=f"{kind} holds stacked experts but says nothing of their layout (no "
            f"{', '.join(_INTERFACE_FLAGS)}): add it to peft_moe/layouts/stacked.py",
        )  # fmt: skip
    return spec
