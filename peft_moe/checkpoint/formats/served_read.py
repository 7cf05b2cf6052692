"""Adapters in the formats of servers, back to native ones.

What this package wrote comes back bit for bit (`served_restore`). Anything else is read as it lies: gate and up apart
where the file has them apart, experts and projections that are all zeros left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...layouts import find_experts
from .. import native as keys
from . import record
from .foreign import ForeignAdapter
from .native import NativeAdapter
from .pairs import Found, Pair, to_native
from .plan import Converted
from .served_file import ServedFile
from .served_restore import restored
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
    return found or to_native(adapter, _as_it_lies(file))


def _as_it_lies(file: ServedFile) -> Found:
    """Everything but what is all zeros: experts and projections that a server only needs filled in."""
    shapes: dict[str, dict[tuple[str, str], tuple[tuple[int, ...], torch.dtype]]] = {}
    used: dict[str, Tensor] = {}
    targets: set[str] = set()
    for path in file.paths:
        stacks = file.load(path)
        shapes[path] = {where: (tuple(value.shape), value.dtype) for where, value in stacks.items()}
        used[path] = torch.stack([value.flatten(1).ne(0).any(dim=1) for value in stacks.values()]).any(dim=0)
        targets |= {_target(leaf) for (leaf, _), value in stacks.items() if value.ne(0).any()}
    if not targets:  # all zeros: nothing was trained
        targets = {_target(leaf) for mine in shapes.values() for leaf, _ in mine}
        used = {path: torch.ones_like(one) for path, one in used.items()}
    some = not all(bool(one.all()) for one in used.values()) or _leaves_out(file)
    indices: dict[str, Sequence[int]] = {
        path: one.nonzero().flatten().tolist() for path, one in used.items() if one.any()
    }
    pairs = []
    for path, experts in indices.items():
        for leaf in {leaf for leaf, _ in shapes[path] if _target(leaf) in targets}:
            (a, a_dtype), (b, b_dtype) = (shapes[path][leaf, factor] for factor in ("lora_A", "lora_B"))
            dtypes = {"lora_A": a_dtype, "lora_B": b_dtype}
            read = partial(_factor, file, path, leaf, experts)
            pairs.append(Pair(path, leaf, len(experts), file.rank, file.scale, a[2], b[1], dtypes, read))
    fields = {"split_gate_up": not file.joined and "gate_up_proj" in targets}
    return Found(pairs, file.others, indices=indices if some else None, fields=fields | _linear_targets(file))


def _factor(file: ServedFile, path: str, leaf: str, experts: Sequence[int], factor: str) -> Tensor:
    return file.load(path)[leaf, factor][torch.tensor(experts)].contiguous()


def _target(leaf: str) -> str:
    return "down_proj" if leaf == "down_proj" else "gate_up_proj"


def _leaves_out(file: ServedFile) -> bool:
    """Whether the base has layers of experts that the file does not adapt; without the base none are known."""
    if file.adapter.base is None:
        return False
    model, _ = file.adapter.base.first(lambda model: model)
    mine = {keys.canonical(f".{path}.") for path in file.paths}
    return not {keys.canonical(f".{name}.") for name in find_experts(model)} <= mine


def _linear_targets(file: ServedFile) -> dict[str, list[str]]:
    """`target_modules`: names of linears by their last part, whole where experts have linears of that name too."""
    paths = {keys.full_key(key).removeprefix(keys.PREFIX).partition(".lora_")[0] for key in file.others}
    mine = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    names = {path if path.rpartition(".")[2] in mine else path.rpartition(".")[2] for path in paths}
    return {"target_modules": sorted(names)}
