"""What the catalogue says about one architecture, and the inputs that reach its experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from .builder import BATCH, HIDDEN, TOKENS, VOCAB, build_model

Inputs = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    name: its `model_type`, with a suffix where one type is listed twice.
    build: a tiny deterministic float32 model in eval mode.
    inputs: keyword arguments of a forward that reaches every module of `experts_path`.
    experts_path: regular expression that the names of the experts modules match in full (`re.fullmatch`).
    kind: "stacked" (one module owns the parameters of all experts), "modulelist" (an `nn.ModuleList` of gated MLPs), or
        "other" (a block with parallel linears, an `nn.ModuleDict`, product keys...).
    """

    name: str
    build: Callable[[], PreTrainedModel]
    inputs: Inputs
    experts_path: str
    kind: str


def entry(
    name: str,
    model_class: str,
    path: str,
    *,
    module: str | None = None,
    kind: str = "stacked",
    inputs: Inputs | None = None,
    prepare: Callable[[PreTrainedModel], None] | None = None,
    **overrides: Any,
) -> Entry:
    """An `Entry` for `transformers.models.<module or name>`; `overrides` are config fields, `prepare` a last touch."""
    return Entry(
        name=name,
        build=partial(_build, module or name, model_class, overrides, prepare),
        inputs=inputs or text_inputs,
        experts_path=path,
        kind=kind,
    )


def _build(
    module: str, model_class: str, overrides: dict[str, Any], prepare: Callable[[PreTrainedModel], None] | None
) -> PreTrainedModel:
    model = build_model(module, model_class, overrides)
    if prepare is not None:
        prepare(model)
    return model


def token_ids(seed: int = 1) -> torch.Tensor:
    """Ids (BATCH, TOKENS), int64, without the special ids 0, 1, 2."""
    return torch.randint(3, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))


def text_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Token ids for a text model; the cache is off where there is one."""
    inputs: dict[str, Any] = {"input_ids": token_ids()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def masked_text_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """As `text_inputs`, with an all-ones mask, for models that look for packed sequences when there is none."""
    return {**text_inputs(model), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}


def embedded_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Embeddings (BATCH, TOKENS, HIDDEN) for a model without a token embedding."""
    embeds = torch.randn(BATCH, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    return {"inputs_embeds": embeds.to(model.dtype), "use_cache": False}


def seq2seq_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Different token ids for the encoder and the decoder."""
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(seed=2), "use_cache": False}


def mixed_modality_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Text inputs whose second half is marked as vision, so that both sets of experts run."""
    types = torch.zeros(BATCH, TOKENS, dtype=torch.int)
    types[:, TOKENS // 2 :] = 1
    return {**text_inputs(model), "moe_mm_token_type_ids": types}


def image_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Two pictures, each sent to another expert."""
    height, width = model.config.image_size
    pixels = torch.randn(BATCH, 3, height, width, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels.to(model.dtype), "dataset_index": torch.arange(BATCH)}


def loss(model: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """A scalar: a fixed random projection of the model's first floating output, scaled to order one.

    A random direction, because a sum over logits or hidden states can have a gradient of zero behind a norm.
    """
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()})
    first = first_floating(output)
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(2)).to(first.device, first.dtype)
    return (first * direction).sum() / first.numel() ** 0.5


def first_floating(output: Any) -> torch.Tensor:
    """The first floating tensor of a model output, depth first."""
    found = _search(output)
    if found is None:
        raise ValueError(f"{type(output).__name__} holds no floating tensor; expected logits or hidden states")
    return found


def _search(value: Any) -> torch.Tensor | None:
    if torch.is_tensor(value):
        return value if value.is_floating_point() else None
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((found for child in children if (found := _search(child)) is not None), None)
