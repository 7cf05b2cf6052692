"""What lies beside the weights: the config and the index made anew, tokenizer and all other files copied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .plan import Plan
from .source import Source

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".index.json")
_ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor")


def other_files(folder: Path) -> Iterator[Path]:
    """The files to copy, relative to the folder: all but weights, their indexes, the config, and hidden ones.

    Raises `ValueError` for a link to a file elsewhere: what it leads to would be copied into the result.
    """
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":  # of the hub's cache, whose files are links to its blobs
        homes.append(folder.resolve().parent.parent / "blobs")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS) and str(name) != "config.json":
            target = path.resolve()
            if not any(target.is_relative_to(home) for home in homes):
                raise ValueError(
                    f"{path} is a link to {target}, outside of the folder, and would be copied into the result: put "
                    "the file itself there, or take the link away"
                )
            yield name


def index_of(plan: Plan) -> bytes:
    """The index of a sharded result."""
    weight_map = {one.key: name for name, outputs in plan.shards.items() for one in outputs}
    content = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def config_of(source: Source, dtype: torch.dtype | None, keep_quantization: bool, aliases: Mapping[str, str]) -> bytes:
    """The `config.json` of the result.

    Args:
        dtype: of the weights, if it is another one than the base's. keep_quantization: they are packed as they were.
        aliases: names that older readers know a value by -> the name that it is written under, of the config's class.
    """
    config = _renewed(source.config, dtype, keep_quantization, aliases)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _renewed(
    config: Mapping[str, Any], dtype: torch.dtype | None, keep_quantization: bool, aliases: Mapping[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "quantization_config" and not keep_quantization:
            continue
        nested = isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
        found[key] = _renewed(value, dtype, keep_quantization, aliases) if nested else value
    stated = found.get("dtype", found.get("torch_dtype"))
    if stated is not None:  # older readers know the second name alone
        found["dtype"] = found["torch_dtype"] = stated if dtype is None else str(dtype).removeprefix("torch.")
    for old, new in aliases.items():
        if new in found and old not in found:
            found[old] = found[new]
    return _with_rope(found)


def _with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 under the names that 4 reads, and the other way round is its own business."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    for name in _ROPE_OUTSIDE:
        if name in rope:
            config.setdefault(name, rope[name])
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", {name: one for name, one in rope.items() if name not in _ROPE_OUTSIDE})
    return config
