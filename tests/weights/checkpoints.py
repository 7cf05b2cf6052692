"""Quantized checkpoints on disk, written tensor by tensor as quantizers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.weights.quantized import E4M3, encode


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


def write_fp8(
    model: nn.Module,
    folder: Path,
    block: tuple[int, int] = (32, 32),
    dtype: torch.dtype = E4M3,
    kind: str = "block",
    shards: int = 1,
    static: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a model with its projections in FP8.

    Args: kind: `block` or `number` (fine-grained, in blocks or one scale a tensor), `channel` or `tensor`
    (compressed-tensors). static: with scales of activations.

    Returns: what was written, and the float64 weights that it stands for.
    """
    model.save_pretrained(folder)  # type: ignore[operator]
    plain = read(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    written, exact = {}, {}
    for key, value in plain.items():
        exact[key] = value.double()
        written[key] = value
        if value.dim() == 2 and "_proj" in key:
            size = {"block": block, "channel": (1, value.shape[1])}.get(kind, tuple(value.shape))
            codes, scales, exact[key] = encode(value, size, dtype)
            written[key] = codes
            scale = scales.float()
            name = f"{key}_scale_inv" if kind in ("block", "number") else f"{key}_scale"
            written[name] = scale.view({"tensor": (1,), "number": ()}.get(kind, scale.shape))
            if static:
                number = torch.rand(()) + 0.5
                fine = kind in ("block", "number")
                name = f"{key.removesuffix('weight')}{'activation_scale' if fine else 'input_scale'}"
                written[name] = number if fine else number.view(1)
    if kind in ("block", "number"):
        settings: dict[str, Any] = {
            "quant_method": "fp8",
            "activation_scheme": "static" if static else "dynamic",
            "weight_block_size": list(block) if kind == "block" else None,
            "modules_to_not_convert": ["lm_head"],
        }
    else:
        weights = {"num_bits": 8, "type": "float", "strategy": kind, "symmetric": True, "dynamic": False}
        inputs = {**weights, "strategy": "tensor"} if static else None
        settings = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        }
    save_shards(written, folder, shards)
    set_quantization(folder, settings)
    return written, exact


def save_shards(tensors: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """Write tensors as one file, or as several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def set_quantization(folder: Path, settings: dict[str, Any]) -> None:
    """Put a quantization config into `config.json`. The gate is no linear of its own on all versions: left plain."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if settings["quant_method"] == "fp8":
        layers = range(config["num_hidden_layers"])
        settings["modules_to_not_convert"] = ["lm_head", *[f"model.layers.{layer}.mlp.gate" for layer in layers]]
    config["quantization_config"] = settings
    path.write_text(json.dumps(config))


def dense_twin(model: nn.Module, exact: dict[str, Tensor], folder: Path) -> Any:
    """The model that a packed checkpoint stands for: `exact` weights, read by stock transformers."""
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)  # type: ignore[operator]
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_shards({key: value.float() for key, value in exact.items()}, folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[attr-defined]
