"""What the result holds, before a byte of it is written: which file, which tensor, which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...quantize.config import METHODS
from ...weights.requantized import Change as Rounding
from ..header import DTYPES
from ..packed import SETTINGS_OF_FP8
from ..packed_settings import PackedConfig
from .edits import Edit
from .produce import Copied, Output, Plain, Requantized, code_of
from .source import Source
from .stored import Stored, StoredFP8

_HALF = (torch.bfloat16, torch.float16)
_FLOATING = {code for code, dtype in DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
READABLE = (*SETTINGS_OF_FP8, "mxfp4", "bitsandbytes", *METHODS.values())


@dataclass
class Plan:
    """Attributes: shards: file name -> its tensors, in the order of the file. rounding: of requantized weights.
    dtype: of what was packed and is plain now, `None` where nothing was.
    """

    shards: dict[str, list[Output]]
    rounding: Rounding = field(default_factory=Rounding)
    dtype: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(one.nbytes for outputs in self.shards.values() for one in outputs)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization block of a `config.json`, wherever it stands; `None` if there is none."""
    for place in _places(config):
        found = place.get("quantization_config")
        if found:
            if not isinstance(found, dict):
                raise ValueError(f"config.json: `quantization_config` is {str(found)[:80]!r}, expected an object")
            return dict(found)
    return None


def _places(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def check_readable(settings: Mapping[str, Any] | None, path: Any) -> tuple[int, int] | None:
    """The block size of FP8 weights that a quantization block states, if any.

    Raises `ValueError` for a quantization that cannot be read.
    """
    if settings is None:
        return None
    method = str(settings.get("quant_method"))
    if method not in READABLE:
        raise ValueError(f"{path}: its quantization is {method!r}, expected none or one of {', '.join(READABLE)}")
    if method not in SETTINGS_OF_FP8:
        return None
    return PackedConfig(dict(settings), method).weight_block_size


def stated_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The 16-bit dtype that a `config.json` states for its model; bfloat16 if it states none."""
    for place in _places(config):
        found = getattr(torch, str(place.get("dtype") or place.get("torch_dtype")).removeprefix("torch."), None)
        if found in _HALF:
            return found
    return torch.bfloat16


def make_plan(
    source: Source,
    stored: Mapping[str, Stored],
    edits: Mapping[str, Edit],
    dtype: torch.dtype | None,
    requantize: bool,
    kept: tuple[str, ...],
) -> Plan:
    """Args: dtype: of all floating tensors; `None`: their own, and 16 bits for packed ones. requantize: leave FP8
    weights FP8. kept: parts of names that stay in fp32 whatever `dtype` is.

    Raises `ValueError` for weights that cannot be read, or not requantized.
    """
    plan = Plan({})
    by_key = {one.key: one for one in stored.values()}
    owners = {companion: one for one in stored.values() for companion in one.companions}
    if requantize:
        other = [one.key for one in stored.values() if one.packed and not isinstance(one, StoredFP8)]
        if other or not any(one.packed for one in stored.values()):
            raise ValueError(
                f"`requantize=True` is for FP8 checkpoints; {source.folder} holds {other[0] if other else 'no FP8'}"
                f"{' in another storage' if other else ''}. Leave it out: the result is then in 16 bits."
            )
    elif any(one.packed for one in stored.values()):
        plan.dtype = dtype or stated_dtype(source.config)
    for name, shard in source.shards.items():
        outputs: list[Output] = []
        for key in shard.entries:
            one = by_key.get(key)
            if one is None:
                found = _companion(source, key, owners[key], edits, requantize, plan)
            else:
                found = _weight(source, one, edits.get(one.name), dtype, requantize, kept, plan)
            if found is not None:
                outputs.append(found)
        # As safetensors orders them: wide dtypes first, so that every tensor is aligned.
        outputs.sort(key=lambda one: -DTYPES[one.code].itemsize if one.code in DTYPES else 0)
        if outputs:
            plan.shards[name] = outputs
    return plan


def _companion(
    source: Source, key: str, owner: Stored, edits: Mapping[str, Edit], requantize: bool, plan: Plan
) -> Output | None:
    if not requantize:
        return None
    entry, edit = source.entry(key), edits.get(owner.name)
    assert isinstance(owner, StoredFP8)
    if edit is not None and key == owner.scale:
        return Requantized(key, entry.code, entry.shape, owner, edit, True, plan.rounding)
    return Copied(key, entry.code, entry.shape, source)


def _weight(
    source: Source,
    one: Stored,
    edit: Edit | None,
    dtype: torch.dtype | None,
    requantize: bool,
    kept: tuple[str, ...],
    plan: Plan,
) -> Output:
    if isinstance(one, StoredFP8) and (edit is not None or not requantize):
        one.check()
    if one.packed and not requantize:
        assert plan.dtype is not None
        return Plain(one.name, code_of(plan.dtype), one.shape, one, edit)
    if isinstance(one, StoredFP8) and edit is not None:
        if edit.replaced is not None or edit.flat is not None:
            raise ValueError(f"{one.key} is FP8 and would be replaced or lies flat: leave `requantize` out")
        return Requantized(one.key, one.code, one.shape, one, edit, False, plan.rounding)
    code = one.code
    if dtype is not None and code in _FLOATING and not any(part in one.name for part in kept):
        code = code_of(dtype)
    if edit is None and code == one.code:
        return Copied(one.key, code, one.shape, source)
    if edit is not None and code not in _FLOATING:
        raise ValueError(f"{one.key} is stored as {code}, which this version cannot merge into; expected a plain "
                         "floating tensor, FP8 with scales, bitsandbytes or MXFP4")  # fmt: skip
    return Plain(one.name, code, one.shape, one, edit)
