"""Adapters in the formats of servers, back to native ones.

What this package wrote comes back bit for bit (`served_restore`). Anything else is read as it lies: gate and up apart
where the file has them apart, experts and projections that are all zeros left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...settings import layer_number
from . import record
from .foreign import ForeignAdapter
from .fuse import target_of
from .native import NativeAdapter
from .pairs import Found, Pair, check_fits, to_native
from .plan import Converted
from .served_file import ServedFile
from .served_restore import restored
from .served_stacks import FACTORS
from .stock_import import check_lora

_KIND = "peft_moe_format"


def note(kind: str, adapter: NativeAdapter) -> dict[str, str]:
    """For the header of the file: what the adapter was, and the format that it is in now."""
    return record.of(adapter) | {_KIND: kind}


def marked_as(adapter: ForeignAdapter, kind: str) -> bool:
    """Whether a file says that it is of this format."""
    return adapter.tensors.metadata.get(_KIND) == kind


def read_served(adapter: ForeignAdapter, kind: str) -> Converted:
    """The native adapter of a file. Args: kind: the name of the format.

    Raises `ValueError` for keys of experts that are not of a known form, or that contradict the config.
    """
    check_lora(adapter)
    file = ServedFile(adapter)
    known = record.read(adapter) if marked_as(adapter, kind) else None
    found = None if known is None else restored(file, known)
    if found is None:
        return to_native(adapter, _as_it_lies(file))
    check_fits(adapter, found)
    return found


def _as_it_lies(file: ServedFile) -> Found:
    """Everything but what is all zeros: experts and projections that a server only needs filled in."""
    shapes: dict[str, dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]]] = {}
    used: dict[str, Tensor] = {}
    targets: set[str] = set()
    for path in file.paths:
        stacks = file.load(path)
        shapes[path] = {where: (tuple(value.shape), value.dtype) for where, value in stacks.items()}
        used[path] = torch.stack([value.flatten(1).ne(0).any(dim=1) for value in stacks.values()]).any(dim=0)
        targets |= {target_of(leaf) for (leaf, _), value in stacks.items() if value.ne(0).any()}
    if not targets:  # all zeros: nothing was trained
        targets = {target_of(leaf) for mine in shapes.values() for leaf, _ in mine}
        used = {path: torch.ones_like(one) for path, one in used.items()}
    experts = {path: tuple(one.nonzero().flatten().tolist()) for path, one in used.items() if one.any()}
    pairs = []
    for path, chosen in experts.items():
        for leaf in sorted({leaf for leaf, _ in shapes[path] if target_of(leaf) in targets}):
            (a, a_dtype), (b, b_dtype) = (shapes[path][leaf, factor] for factor in FACTORS)
            ranks, scalings = (file.rank,) * len(chosen), (file.scale,) * len(chosen)
            read = partial(_factor, file, path, leaf, chosen)
            pairs.append(Pair(path, leaf, ranks, scalings, a[2], b[1], {"lora_A": a_dtype, "lora_B": b_dtype}, read))
    indices = {path: chosen for path, chosen in experts.items() if len(chosen) < len(used[path])}
    fields: dict[str, Any] = {"split_gate_up": not file.joined and "gate_up_proj" in targets}
    if len(experts) < len(used):
        fields["expert_indices"] = {_layer(file, path): list(chosen) for path, chosen in experts.items()}
    return Found(pairs, file.others, [], indices, fields=fields)


def _layer(file: ServedFile, path: str) -> int:
    number = layer_number(path)
    if number is None:
        raise ValueError(
            f"{file.where}: {path}: some experts modules are all zeros, and this one has no number to tell them apart"
        )
    return number


def _factor(file: ServedFile, path: str, leaf: str, experts: tuple[int, ...], factor: str) -> Tensor:
    return file.load(path)[leaf, factor][torch.tensor(experts)].contiguous()
