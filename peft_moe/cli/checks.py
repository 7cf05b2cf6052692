"""An adapter against its base, slice by slice: forward, merge and export."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.device import usable_device
from ..checkpoint.formats import export_adapter, import_adapter
from ..checkpoint.formats.fuse import same_bits
from ..checkpoint.merge import bind
from ..checkpoint.merge.binding import AdapterFiles
from ..checkpoint.merge.deltas import ExpertsDelta, LinearDelta
from ..checkpoint.merge.edits import Merging
from ..checkpoint.merge.plan import check_readable, quantization_of, stated_dtype
from ..checkpoint.merge.source import Source, adapter_folder
from ..checkpoint.merge.stored import open_stored
from ..checkpoint.tensor_file import TensorFile
from ..ops.linear import frozen_linear, lora_linear

_TOKENS = 16
_FORWARD = 1e-4  # in fp32, whose sums are as long as rows


def check_adapter(
    adapter: str, base: str, layers: int, experts: int, device: str, seed: int, trust_remote_code: bool
) -> dict[str, Any]:
    """Everything `peft-moe verify` shows. Raises `ValueError` for an adapter that does not fit."""
    where = usable_device(device)
    source, files = Source(base), AdapterFiles(adapter_folder(adapter))
    stored = open_stored(source, check_readable(quantization_of(source.config), source.folder))
    edits, _ = bind(source, files, stored, trust_remote_code)
    groups = list(dict.fromkeys(edit.group for edit in edits.values()))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    slices = []
    all_changes = [(one, name, change) for one in groups for name, change in one.changes.items()]
    stacks = [one for one in all_changes if isinstance(one[2], ExpertsDelta) and one[2].expert is None]
    listed = [one for one in all_changes if isinstance(one[2], ExpertsDelta) and one[2].expert is not None]
    linears = [one for one in all_changes if isinstance(one[2], LinearDelta)]
    for group, parameter, change in _spread(stacks, 2 * layers):
        for expert in _chosen(change, experts, rng):
            slices.append(_check(group, parameter, change, expert, where, source))
    for group, parameter, change in [*_spread(listed, 2 * layers * experts), *_spread(linears, layers)]:
        if not isinstance(change, ExpertsDelta) or change.low_rank(None, where) is not None:
            slices.append(_check(group, parameter, change, None, where, source))
    ok_export, export = _export(files.folder, source.folder, trust_remote_code)
    return {
        "ok": ok_export and all(one["ok"] for one in slices),
        "tensors": len(files.tensors.entries),
        "slices": slices,
        "export": export,
    }


def _chosen(change: ExpertsDelta, count: int, rng: random.Random) -> list[int]:
    adapted = list(change.factors.settings.adapted(change.factors.count))
    return sorted(rng.sample(adapted, min(count, len(adapted))))


def _spread(found: list[Any], count: int) -> list[Any]:
    """The first, the last, and as many between them."""
    if len(found) <= count:
        return found
    return [found[round(position * (len(found) - 1) / max(1, count - 1))] for position in range(count)]


def _check(
    group: Merging, parameter: str, change: ExpertsDelta | LinearDelta, expert: int | None, device: torch.device,
    source: Source,
) -> dict[str, Any]:  # fmt: skip
    weight = group.read(parameter, expert, device)
    delta = change.delta(expert, lambda: weight, device)
    assert delta is not None
    wanted = weight.double() + delta.double()
    merged = group.read(parameter, expert, device, merged=True)
    dtype = _result_dtype(group, source)
    error = float((merged.to(dtype).double() - wanted).abs().max() / wanted.abs().max())
    forward = _forward(change, expert, weight, wanted, device)
    allowed = max(_FORWARD, 2 * torch.finfo(dtype).eps)
    finite = bool(torch.isfinite(wanted).all())
    return {
        "parameter": parameter, "expert": expert,
        "forward": forward, "merge": error, "allowed": allowed,
        "ok": finite and error <= allowed and (forward is None or forward <= allowed),
    }  # fmt: skip


def _result_dtype(group: Merging, source: Source) -> torch.dtype:
    """In which the merged tensor would be written."""
    name = next(iter(group.group.sources.values()))[0]
    return group.stored[name].dtype or stated_dtype(source.config)


def _forward(
    change: ExpertsDelta | LinearDelta, expert: int | None, weight: Tensor, wanted: Tensor, device: torch.device
) -> float | None:
    """The difference of the package's grouped products, base and low rank, to the product with the float64 sum."""
    low = change.low_rank(expert, device)
    if low is None:
        return None
    a, b, size = low
    transposed = isinstance(change, ExpertsDelta) and change.transposed
    base, exact = (one.flatten(0, -2) for one in (weight, wanted))
    base, exact = (base.T, exact.T) if transposed else (base, exact)
    x = torch.randn(_TOKENS, base.shape[1], device=device)
    offsets = torch.tensor([_TOKENS], dtype=torch.int32, device=device)
    stack = base.float().contiguous().unsqueeze(0)
    found = frozen_linear(x, stack, offsets, "auto") + lora_linear(x, a[None], b[None].contiguous(), offsets, "auto")
    if size is not None:
        found = found * (size / (base.float() + b @ a).norm(dim=1))
    reference = x.double() @ exact.T
    return float((found.double() - reference).abs().max() / reference.abs().max())


def _export(folder: Path, base: Path, trust_remote_code: bool) -> tuple[bool, str]:
    """Whether every tensor comes back bit for bit from what stock PEFT reads of this base, and what to say of it."""
    refused = []
    options: dict[str, Any] = {"base": base, "trust_remote_code": trust_remote_code, "progress": False}
    for name in ("peft", "peft-per-expert"):  # of stacks, and of lists of experts
        with tempfile.TemporaryDirectory() as temporary:
            there, back = Path(temporary) / "there", Path(temporary) / "back"
            try:
                export_adapter(folder, there, format=name, **options)
            except ValueError as error:
                refused.append(str(error))
                continue
            import_adapter(there, back, format=name, **options)
            return _same(*(TensorFile(path / "adapter_model.safetensors") for path in (folder, back)))
    return True, f"not possible for this adapter: {refused[0]}"


def _same(one: TensorFile, other: TensorFile) -> tuple[bool, str]:
    if set(one.entries) != set(other.entries):
        return False, "the tensors that came back have other names"
    different = [key for key in one.entries if not same_bits(one.read(key), other.read(key))]
    if different:
        return False, f"{len(different)} tensors changed on the way to PEFT's layout and back: {different[0]}"
    return True, "to stock PEFT's layout and back, bit for bit"
