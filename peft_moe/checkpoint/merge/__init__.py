"""Merging an adapter into a checkpoint on disk, tensor by tensor: no model is built, no weight is held for long."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...weights.requantized import SIZEABLE
from ..device import usable_device
from ..durable import copy_file, write_file
from .binding import AdapterFiles
from .edits import Edit, edits_of
from .names import match_names
from .plan import check_readable, make_plan, quantization_of
from .sidecar import config_of, index_of, other_files
from .skeleton import aliases_of, kept_in_fp32, skeletons
from .source import Source, adapter_folder
from .stored import Stored, open_stored
from .writer import Run, fingerprint

__all__ = ["MergeResult", "bind", "merge_checkpoint"]
logger = logging.getLogger("peft_moe")
_VERSION = 1  # of the bytes that a run writes: an unfinished one of another version is not continued


@dataclass(frozen=True)
class MergeResult:
    """What was written.

    Attributes: path: the folder. files: of weights. tensors, merged: how many, and how many of them the adapter
        changed. nbytes: of all tensors. rounding: share of the adapter's change that requantization ate, 0 otherwise.
    """

    path: Path
    files: int
    tensors: int
    merged: int
    nbytes: int
    rounding: float


def merge_checkpoint(
    base_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | str | None = None,
    *,
    requantize: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge an adapter into a checkpoint, in the memory of a few tensors.

    The result has the keys and files of the base and loads without this package. Sums are made in fp32 and rounded
    once. A run that was interrupted goes on where it was when it is started again, and ends with the same bytes.

    Args:
        base_dir: a folder with safetensors, in one file or several, or a model in the hub's local cache. Plain
            weights, FP8, bitsandbytes (4 and 8 bits) and MXFP4 are read.
        adapter_dir: a folder, or an adapter in the hub's local cache; MOELORA, or LORA on linears.
        out_dir: a new folder, or that of an interrupted run.
        dtype: of all floating weights. `None`: as in the base, and 16 bits for what was quantized there.
        requantize: leave FP8 weights FP8, with new scales where the adapter changed something.
        device: where sums are made; `None`: a GPU if there is one.
        progress: show a bar.
        trust_remote_code: run the model's own code that lies in `base_dir`, to know its modules.

    Raises `ValueError`, before anything is written, for an adapter tensor that fits nothing, weights that cannot be
    read, an `out_dir` that holds something else, a device that is not there, and a disk without enough space; while
    writing, for a sum that is not finite.
    """
    dtype, where = float_dtype(dtype), usable_device(device)
    if requantize and dtype is not None:
        raise ValueError("`dtype` and `requantize=True` contradict each other: give one of them")
    base, out = Source(base_dir), Path(out_dir)
    adapter = AdapterFiles(adapter_folder(adapter_dir))
    for folder in (base.folder, adapter.folder):
        if out.resolve() == folder.resolve():
            raise ValueError(f"{out}: the result cannot take the place of what it is made of; name another folder")
    stored = open_stored(base, check_readable(quantization_of(base.config), base.folder))
    edits, model = bind(base, adapter, stored, trust_remote_code)
    plan = make_plan(base, stored, edits, dtype, requantize, kept_in_fp32(model))
    home = base.folder.resolve()
    others = [name for name in other_files(base.folder) if not (home / name).is_relative_to(out.resolve())]
    size = sum((base.folder / name).stat().st_size for name in others)
    with tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="Merging", disable=not progress) as bar:
        run = Run(
            out, plan, {name: shard.metadata for name, shard in base.shards.items()},
            _fingerprint(base, adapter, dtype, requantize), size, bar.update,
        )  # fmt: skip
        with run.alone():
            run.write(where)
            for name in others:
                copy_file(base.folder / name, out / name)
            if base.index_name is not None:
                write_file(out / base.index_name, index_of(plan))
            config = config_of(base, dtype or plan.dtype, plan.dtype is None, aliases_of(model))
            write_file(out / "config.json", config)  # last: what is unfinished cannot be loaded
            run.finish()
    share = plan.rounding.share
    if share > SIZEABLE:
        logger.warning(
            "%s: the requantized weights differ from the exact sum by %.0f%% of the adapter's own change; leave "
            "`requantize` out to keep it", out, 100 * share,
        )  # fmt: skip
    tensors = sum(len(outputs) for outputs in plan.shards.values())
    return MergeResult(out, len(plan.shards), tensors, len(edits), plan.nbytes, share)


def float_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of a name; `None` is `None`. Raises `ValueError` for one that is not of plain floating weights."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and found in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        return found
    if dtype is None:
        return None
    raise ValueError(f"`dtype={dtype!r}` is none of bfloat16, float16, float32 and float64")


def bind(
    base: Source, adapter: AdapterFiles, stored: dict[str, Stored], trust_remote_code: bool
) -> tuple[dict[str, Edit], Any]:
    """The edits, by the first class of model that the adapter fits."""
    first: ValueError | None = None
    for model in skeletons(base.folder, trust_remote_code):
        try:
            return edits_of(adapter.bind(model), match_names(model, list(stored)), stored), model
        except ValueError as error:
            first = first or error
    assert first is not None  # there is one model at least
    raise first


def _fingerprint(base: Source, adapter: AdapterFiles, dtype: torch.dtype | None, requantize: bool) -> str:
    parts: list[Any] = [_VERSION, str(dtype), requantize, str(torch.__version__), base.config]
    for name, shard in base.shards.items():
        stat = shard.path.stat()
        parts += [name, stat.st_size, stat.st_mtime_ns, shard.metadata]
        parts.append({key: asdict(entry) for key, entry in shard.entries.items()})
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        parts.append(adapter.folder / name)
    return fingerprint(parts)
