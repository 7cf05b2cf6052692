"""Finding FP8 scales that a loader dropped again, in the checkpoint that the model came from.

A loader that knows the weights and not their scales leaves FP8 codes that mean nothing. The scales are looked for in
the checkpoint's own files: under stacked names or those of single experts, as `*_scale_inv` or `*_scale`. Every key is
looked at (its shape, its dtype, its values, whether all experts have it) before a scale is put next to its weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor, nn

from ..compat import cached_file
from ..layouts import find_experts
from ..weights.built import split_path
from ..weights.fp8_pieces import FP8Piece, find_scale, has_float8, scale_names
from ..weights.grid import E8M0, FLOAT8
from .files import read_shapes
from .json_input import read_object

_SUFFIXES = ("_scale_inv", "_scale")
_LEAVES = {  # of single experts, in the order in which their rows follow each other
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("gate_up_proj",)),
    "up_proj": (("up_proj",), ("w1",), ("fc1",)),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
_SCALE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, E8M0)


class Checkpoint:
    """The tensors of a checkpoint by key, read one at a time.

    Args: path: a folder, a safetensors file, or the name of a model in the hub's local cache.

    Raises `ValueError` if there is no safetensors file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.files: dict[str, str] = {}
        for file in checkpoint_files(path):
            self.files |= dict.fromkeys(read_shapes(file), file)

    def get(self, key: str) -> Tensor:
        """One tensor."""
        with safe_open(self.files[key], "pt") as file:
            return file.get_tensor(key)


def checkpoint_files(path: str) -> list[str]:
    """The safetensors files of a checkpoint: a folder, one file, or a name in the local cache of the hub.

    Raises `ValueError` if there are none.
    """
    given = Path(path)
    if given.is_file():
        return [str(given)]
    index, single = "model.safetensors.index.json", "model.safetensors"
    if given.is_dir():
        if (given / index).is_file():
            files = [given / name for name in _shards(given / index)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise ValueError(f"{path}: {index} names {', '.join(missing)}, which are not there")
            return [str(file) for file in files]
        found = sorted(str(file) for file in given.glob("*.safetensors") if file.is_file())  # a pipe would never end
    else:
        found = _cached(path, index, single)
    if not found:
        raise ValueError(
            f"{path}: no checkpoint found: looked for {single}, {index} and other safetensors files in a folder of "
            "this name, and for the first two in the local cache of the hub"
        )
    return found


def _cached(name: str, index: str, single: str) -> list[str]:
    options: dict[str, Any] = {
        "local_files_only": True,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    try:
        listing = cached_file(name, index, **options)
        names = [single] if listing is None else _shards(Path(listing))
        files = [cached_file(name, one, **options) for one in names]
    except (OSError, HFValidationError):  # not there, or not a name that the hub could have
        return []
    return [str(file) for file in files if file is not None]


def _shards(index: Path) -> list[str]:
    """The files that an index names. Raises `ValueError` for an index without them, and for a name that is a path."""
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index}: expected a `weight_map` of tensors to files")
    for name in found.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, expected safetensors files that lie beside it")
    return sorted(set(found.values()))


def missing_scales(model: nn.Module) -> list[FP8Piece]:
    """The FP8 weights of experts and linears that have no scale next to them."""
    pieces = []
    for name, spec in find_experts(model).items():
        base = model.get_submodule(name)
        if spec.experts or spec.refused is not None:
            continue  # a list of experts is linears
        for projection in spec.projections:
            for part in projection.parts:
                owner, weight = split_path(base, part.path)
                if not has_float8([getattr(owner, weight, None)]):
                    continue
                where = f"{name}.{part.path}"
                pieces.append(FP8Piece(owner, weight, where, slice(None), transposed=part.transposed))
                pieces[-1].halves = "gate_up" in weight and not part.transposed
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and has_float8([getattr(module, "weight", None)]):
            pieces.append(FP8Piece(module, "weight", f"{name}.weight", slice(None), expert=0))
    lacking = [one for one in pieces if find_scale(one.module, one.weight) is None]
    return sorted(lacking, key=lambda one: "experts" not in one.where)  # those matter most to whoever reads of it


def recover_scales(model: nn.Module, checkpoint: str | None = None) -> list[str]:
    """Put the scales that FP8 weights lack next to them, from the checkpoint.

    Args: checkpoint: a folder, a safetensors file or a name in the hub's cache; `None`: where the model says that it
        came from (`config._name_or_path`).

    Returns: the paths of the weights that got a scale; empty, and nothing read, if none lacks one.

    Raises `ValueError` for a weight whose scale is not in the checkpoint or does not fit, naming the keys that were
    looked for. Nothing is changed then.
    """
    pieces = missing_scales(model)
    if not pieces:
        return []
    source = checkpoint or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not source:
        raise ValueError(
            f"{pieces[0].where} and {len(pieces) - 1} more weights are FP8 without a scale: looked for "
            f"{', '.join(scale_names(pieces[0].weight))} next to it. The model does not say which checkpoint it came "
            "from, where they might be: name it, `peft_moe.checkpoint.scales.recover_scales(model, checkpoint)`."
        )
    opened = Checkpoint(source)
    found = [(piece, *_find(opened, piece)) for piece in pieces]
    done: list[tuple[FP8Piece, str]] = []
    try:
        for piece, name, scale in found:
            parameter = nn.Parameter(scale.to(piece.tensor.device), requires_grad=False)
            piece.module.register_parameter(name, parameter)
            done.append((piece, name))
            piece.check()
    except ValueError:
        for piece, name in done:
            delattr(piece.module, name)
        raise
    return [piece.where for piece in pieces]


def _find(checkpoint: Checkpoint, piece: FP8Piece) -> tuple[str, Tensor]:
    """The name under which a scale belongs next to its weight, and the scale."""
    tried: list[str] = []
    for suffix in _SUFFIXES:
        for key in _spellings(checkpoint, f"{piece.where}{suffix}", tried):
            return f"{piece.weight}{suffix}", _checked(checkpoint, key)
        if piece.tensor.dim() == 3:
            stacked = piece.where.removesuffix(f".{piece.weight}")
            for leaves in _LEAVES.get(piece.weight, ()):
                scale = _from_experts(checkpoint, stacked, leaves, suffix, piece, tried)
                if scale is not None:
                    return f"{piece.weight}{suffix}", scale
    near = [key for key in checkpoint.files if "scale" in key][:4]
    raise ValueError(
        f"{piece.where} is {piece.tensor.dtype} without a scale, and {checkpoint.path} has none for it either: looked "
        f"for {', '.join(tried)}. Scales that are there: {', '.join(near) or 'none'}."
    )


def _from_experts(
    checkpoint: Checkpoint, stacked: str, leaves: tuple[str, ...], suffix: str, piece: FP8Piece, tried: list[str]
) -> Tensor | None:
    """The scales of single experts as one stack `(E, r, c)`; `None` if the checkpoint has none of these names."""
    experts = piece.codes.shape[0]
    keys = [[f"{stacked}.{expert}.{leaf}.weight{suffix}" for leaf in leaves] for expert in range(experts)]
    found = [[next(iter(_spellings(checkpoint, key, tried if e == 0 else [])), None) for key in row]
             for e, row in enumerate(keys)]  # fmt: skip
    flat = [
        (want, have) for wanted, got in zip(keys, found, strict=True) for want, have in zip(wanted, got, strict=True)
    ]
    if all(have is None for _, have in flat):
        return None
    lacking = [want for want, have in flat if have is None]
    if lacking:
        raise ValueError(
            f"{checkpoint.path} has scales for some of the {experts} experts of {piece.where} only: "
            f"{', '.join(lacking[:3])}{' and others' if len(lacking) > 3 else ''} are missing"
        )
    rows = []
    for got in found:
        scales = [_checked(checkpoint, key) for key in got if key is not None]
        scales = [scale.reshape(1, 1) if scale.numel() == 1 else scale for scale in scales]
        scales = [scale.unsqueeze(1) if scale.dim() == 1 else scale for scale in scales]
        if len({(scale.dtype, scale.shape[1:]) for scale in scales}) > 1:
            raise ValueError(f"{got}: the scales of one expert differ in kind: {[tuple(one.shape) for one in scales]}")
        rows.append(_cat(scales))
    if len({row.shape for row in rows}) > 1:
        raise ValueError(
            f"{piece.where}: the scales of its experts differ in shape: {sorted({row.shape for row in rows})}"
        )
    stack = torch.stack([row.view(_bytes(row)) for row in rows]).view(rows[0].dtype)
    return stack.transpose(1, 2).contiguous() if piece.transposed else stack


def _cat(scales: list[Tensor]) -> Tensor:
    return torch.cat([scale.contiguous().view(_bytes(scale)) for scale in scales]).view(scales[0].dtype)


def _bytes(scale: Tensor) -> torch.dtype:
    """e8m0 has no `cat` of its own."""
    return torch.uint8 if scale.element_size() == 1 else scale.dtype


def _checked(checkpoint: Checkpoint, key: str) -> Tensor:
    scale = checkpoint.get(key)
    if scale.dtype not in _SCALE_DTYPES:
        raise ValueError(f"{checkpoint.path}: {key} is {scale.dtype}, expected a scale in a floating dtype")
    return scale


def _spellings(checkpoint: Checkpoint, key: str, tried: list[str]) -> Iterable[str]:
    """The key itself, or the only key that differs from it in what stands before the number of the layer."""
    tried.append(key)
    if key in checkpoint.files:
        return [key]
    tail = re.search(r"(?:^|\.)(layers\.\d+\..*)$", key)
    if tail is None:
        return []
    ending = tail.group(1)
    like = [other for other in checkpoint.files if other == ending or other.endswith(f".{ending}")]
    return like if len(like) == 1 else []


def drop_unused_scales(model: nn.Module) -> list[str]:
    """Take scale parameters out that stand next to weights in 16 bits. Returns their paths."""
    dropped = []
    for name, module in list(model.named_modules()):
        for weight, tensor in list(module.named_parameters(recurse=False)):
            scale = find_scale(module, weight)
            if scale is not None and tensor.dim() >= 2 and tensor.is_floating_point() and tensor.dtype not in FLOAT8:
                delattr(module, scale)
                dropped.append(f"{name}.{scale}")
    return dropped
