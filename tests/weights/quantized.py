"""FP8 models made by hand, with their dense twins: every formula is written in float64 and on its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.model.tiny import BUILDERS
from tests.remote_code import RemoteConfig, RemoteForCausalLM
from tests.zoo.builder import reinitialise

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def block_scales(weight: Tensor, block: tuple[int, int], dtype: torch.dtype, power_of_two: bool = False) -> Tensor:
    """`(r, c)` float64 scales of a `(rows, cols)` matrix, block by block; the last blocks may be short."""
    rows, cols = weight.shape
    out = torch.ones(math.ceil(rows / block[0]), math.ceil(cols / block[1]), dtype=torch.float64)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            top = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].abs().max().double()
            if top > 0:
                out[i, j] = top / torch.finfo(dtype).max
                if power_of_two:
                    out[i, j] = 2.0 ** math.ceil(math.log2(out[i, j]))
    return out.float().double()


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """`(rows, cols)`: the scale of every element, one by one."""
    out = torch.empty(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for col in range(shape[1]):
            out[row, col] = scales[row // block[0], col // block[1]]
    return out


def encode(weight: Tensor, block: tuple[int, int], dtype: torch.dtype = E4M3, power_of_two: bool = False) -> tuple:
    """Codes, `(r, c)` float64 scales, and the float64 weights they stand for."""
    scales = block_scales(weight, block, dtype, power_of_two)
    factor = spread(scales, block, tuple(weight.shape))
    top = torch.finfo(dtype).max
    codes = (weight.double() / factor).clamp(-top, top).float().to(dtype)
    return codes, scales, codes.double() * factor


def encode_stack(
    stack: Tensor, block: tuple[int, int], dtype: torch.dtype = E4M3, power_of_two: bool = False, halves: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for `(E, rows, cols)`; with `halves` gate and up are quantized apart, as checkpoints of experts are."""
    found = []
    for expert in stack:
        parts = expert.chunk(2) if halves else [expert]
        pieces = [encode(part, block, dtype, power_of_two) for part in parts]
        found.append([torch.cat(kind) for kind in zip(*pieces, strict=True)])
    codes, scales, values = (torch.stack(kind) for kind in zip(*found, strict=True))
    return codes, scales, values


def fp8_linear(linear: nn.Linear, block: tuple[int, int] = (32, 32)) -> nn.Linear:
    """An FP8 linear as transformers holds it, of a plain one whose weight becomes what the codes stand for."""
    codes, scales, values = encode(linear.weight.data, block)
    linear.weight.data.copy_(values)
    new = copy.deepcopy(linear)
    new.weight, new.weight_scale_inv = nn.Parameter(codes), nn.Parameter(scales.float())
    new.block_size = block  # type: ignore[assignment]
    return new


def channel_linear(linear: nn.Linear, per_tensor: bool = False) -> nn.Linear:
    """A linear as compressed-tensors leaves it: FP8 weight, `weight_scale` `(out, 1)`, or one element."""
    rows, cols = linear.weight.shape
    codes, scales, values = encode(linear.weight.data, (rows if per_tensor else 1, cols))
    linear.weight.data.copy_(values)
    new = copy.deepcopy(linear)
    new.weight = nn.Parameter(codes, requires_grad=False)
    new.weight_scale = nn.Parameter(scales.float().view(-1) if per_tensor else scales.float(), requires_grad=False)
    return new


def _list() -> nn.Module:
    """A model with a list of experts whose own forward can train, which makes it a reference."""
    settings: dict[str, Any] = {"block": "bailing", "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 40}
    model = RemoteForCausalLM(RemoteConfig(**settings))
    reinitialise(model)
    return model.eval()


def fp8_list(convert: Callable[[nn.Linear], nn.Module], name: str | None = None) -> tuple[nn.Module, nn.Module]:
    """(quantized, dense twin) of a model whose experts are a list, every linear of every expert converted."""
    dense = _list() if name is None else BUILDERS[name]()
    quantized = copy.deepcopy(dense)
    for path, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and ".experts." in path:
            twin: Any = dense.get_submodule(path)
            new = convert(twin)
            parent, _, leaf = path.rpartition(".")
            setattr(quantized.get_submodule(parent), leaf, new)
    return quantized, dense


def fp8_stacked(
    name: str = "qwen3_moe",
    block: tuple[int, int] = (32, 32),
    power_of_two: bool = False,
    halves: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """(quantized, dense twin) of a model of transformers 5 with `FP8Experts` in the place of its experts."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    from tests.zoo import ENTRIES

    dense = ENTRIES[name].build()
    quantized = copy.deepcopy(dense)
    for path, _ in list(quantized.named_modules()):
        if not path.endswith(".experts"):
            continue
        twin: Any = dense.get_submodule(path)
        config = quantized.config
        new = FP8Experts(config, block_size=block, scale_fmt="ue8m0" if power_of_two else "float")
        new.config = config
        for leaf in ("gate_up_proj", "down_proj"):
            weight = getattr(twin, leaf)
            codes, scales, values = encode_stack(
                weight.data, block, E4M3, power_of_two, halves and leaf == "gate_up_proj"
            )
            weight.data.copy_(values)
            dtype = torch.float8_e8m0fnu if power_of_two else torch.float32
            setattr(new, leaf, nn.Parameter(codes))
            setattr(new, f"{leaf}_scale_inv", nn.Parameter(scales.float().to(dtype)))
        parent, _, leaf = path.rpartition(".")
        setattr(quantized.get_submodule(parent), leaf, new)
    return quantized.eval(), dense
