"""The native format: contiguous-r tensors under the names of the model.

One tensor pair a projection, `lora_A (E', r, in)` and `lora_B (E', out, r)`. Where the experts of a projection differ
in rank nothing of the padding is written: the rows of all experts follow each other, `lora_A (sum of r, in)` and
`lora_B (sum of r, out)`.

Names are those of the model the adapter was trained on. They are read on any layout of the same model: what differs
between transformers 4 and 5 in the path of a block is set aside when they are compared (`canonical`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_BLOCK_NAMES = re.compile(r"\.(mlp|block_sparse_moe|feed_forward|ffn|mixer|moe|feedforward)\.")
_SLOTS = "gate_up_proj|gate_proj|up_proj|down_proj"
_PARALLEL_LINEARS = re.compile(rf"\.(experts\.)?(input_linear|output_linear|fc1|fc2)\.({_SLOTS})\.")
EXPERT_KEY = re.compile(rf"\.({_SLOTS})\.(lora_A|lora_B|lora_magnitude_vector)$")


def canonical(key: str) -> str:
    """The name of a tensor without what transformers 4 and 5 disagree on."""
    key = _PARALLEL_LINEARS.sub(r".experts.\3.", key)
    return _BLOCK_NAMES.sub(".mlp.", key).replace(".model.transformer.", ".model.").replace(".transformer.", ".model.")


def is_expert_key(key: str) -> bool:
    """Whether a key of an adapter file names an expert tensor."""
    return EXPERT_KEY.search(key) is not None


def pack(tensor: Tensor, factor: str, ranks: Sequence[int]) -> Tensor:
    """What is written of one factor: itself, or the rows of all experts without padding where ranks differ."""
    if factor == "lora_magnitude_vector" or len(set(ranks)) == 1:
        return tensor.contiguous()
    rows = tensor if factor == "lora_A" else tensor.transpose(1, 2)
    return torch.cat([rows[expert, :rank] for expert, rank in enumerate(ranks)]).contiguous()


def packed_shape(shape: Sequence[int], factor: str, ranks: Sequence[int]) -> tuple[int, ...]:
    """The shape that `pack` gives a factor of the given shape."""
    if factor == "lora_magnitude_vector" or len(set(ranks)) == 1:
        return tuple(shape)
    return (sum(ranks), shape[2] if factor == "lora_A" else shape[1])


def unpack(tensor: Tensor, factor: str, ranks: Sequence[int]) -> Tensor:
    """The padded factor of what `pack` wrote."""
    if factor == "lora_magnitude_vector" or len(set(ranks)) == 1:
        return tensor
    out = tensor.new_zeros(len(ranks), max(ranks), tensor.shape[1])
    for expert, rows in enumerate(tensor.split(list(ranks))):
        out[expert, : rows.shape[0]] = rows
    return out if factor == "lora_A" else out.transpose(1, 2).contiguous()


def check_keys(found: Iterable[str], expected: Iterable[str], adapter: str) -> None:
    """Raise `ValueError` naming the tensors that are missing or that nothing takes."""
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if extra:
        parts.append(f"not used by this model {_some(extra)}")
    raise ValueError(
        f"adapter {adapter!r}: its expert tensors do not fit the model: {'; '.join(parts)}. Was it trained on another "
        "model, or with another config than its adapter_config.json? Nothing was loaded."
    )


def check_shape(key: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise `ValueError` naming the tensor, what was found and what was expected."""
    if tuple(found) != tuple(expected):
        raise ValueError(
            f"{key}: found shape {tuple(found)}, expected {tuple(expected)} (experts, rank and sizes of this model "
            "and of adapter_config.json). Nothing was loaded."
        )


def _some(keys: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def match(found: Iterable[str], expected: Iterable[str], adapter: str) -> dict[str, str]:
    """Key of the model -> key of the file, for every expert tensor the model expects.

    Raises `ValueError` (see `check_keys`) if they are not one to one.
    """
    expected = list(expected)
    by_canonical = {canonical(key): key for key in expected}
    files = {canonical(key): key for key in found}
    check_keys([by_canonical.get(name, key) for name, key in files.items()], by_canonical.values(), adapter)
    return {by_canonical[name]: key for name, key in files.items()}
