"""Turning a 16-bit stack of experts into packed codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..weights import bnb_codes
from ..weights.bnb_records import Int8State, PackedRecord
from ..weights.dense import DENSE_DTYPES
from .config import PackSettings

_NESTED_BLOCKSIZE = 256  # bitsandbytes' own, of scales
_CPU_LIMIT = 2**20  # elements a call: bitsandbytes' quantizers for CPUs take ten and more bytes an element beside them


def pack(values: Tensor, settings: PackSettings) -> tuple[nn.Parameter, PackedRecord]:
    """The packed parameter of a floating tensor of any shape, on its device, and its record.

    bitsandbytes quantizes it in one call, or range by range where it has more elements than its kernels can count.
    Raises `ValueError` for values that are no weights (see `check_values`), and `ImportError` without bitsandbytes.
    """
    check_values(values)
    dtype, shape = values.dtype, values.shape
    values = values.detach().as_subclass(torch.Tensor).contiguous()  # type: ignore[arg-type]
    if dtype == torch.float64:
        values = values.float()
    if settings.quant_type == "int8":
        codes, scales = _pack_rows(values.reshape(-1, shape[-1]))
        record = PackedRecord(Int8State(scales, shape, dtype), settings.compute_dtype)
        return parameter_of(codes, record), record
    packed, state = _pack_blocks(values, settings)
    state.dtype, state.shape = values.dtype, shape
    record = PackedRecord(state, settings.compute_dtype)
    return parameter_of(packed, record), record


def check_values(values: Tensor) -> None:
    """Raise `ValueError` unless these are finite weights in 16, 32 or 64 bits: codes of another format are none."""
    if values.dtype not in DENSE_DTYPES:
        raise ValueError(
            f"expected weights in 16 or 32 bits to quantize, found {values.dtype}; codes of another quantization are "
            "not quantized again: start from the 16-bit checkpoint"
        )
    values = values.detach().as_subclass(torch.Tensor)  # type: ignore[arg-type]
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise ValueError("the weights hold values that are not finite; they cannot be quantized")


def parameter_of(packed: Tensor, record: PackedRecord) -> nn.Parameter:
    """The frozen parameter of packed codes, of bitsandbytes' own class, in the storage dtype that they have."""
    modules, state = bnb_codes.library().nn, record.state
    if isinstance(state, Int8State):
        return modules.Int8Params(packed, requires_grad=False, SCB=state.SCB)
    return modules.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=state.blocksize, compress_statistics=state.nested,
        quant_type=state.quant_type, quant_storage=packed.dtype, bnb_quantized=True,
    )  # fmt: skip


def _limit(values: Tensor) -> int:
    """Elements that one call of a quantizer may get."""
    return min(bnb_codes.KERNEL_LIMIT, _CPU_LIMIT) if values.device.type == "cpu" else bnb_codes.KERNEL_LIMIT


def _pack_blocks(values: Tensor, settings: PackSettings) -> tuple[Tensor, Any]:
    functions, size = bnb_codes.functional(), settings.blocksize
    kind = {"blocksize": size, "quant_type": settings.quant_type}
    limit = _limit(values) // size * size
    if values.numel() <= limit:
        return functions.quantize_4bit(
            values, compress_statistics=settings.nested, quant_storage=settings.storage, **kind
        )
    parts = [functions.quantize_4bit(part, **kind) for part in values.view(-1).split(limit)]
    packed = torch.cat([codes.reshape(-1) for codes, _ in parts]).view(settings.storage).unsqueeze(1)
    scales = torch.cat([state.absmax for _, state in parts])
    state = parts[0][1]
    state.absmax = scales
    if settings.nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = functions.quantize_blockwise(scales - state.offset, blocksize=_NESTED_BLOCKSIZE)
        state.nested = True
    return packed, state


def _pack_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and fp32 scales of `(rows, in)`, from fp16 values as bitsandbytes makes them."""
    step = max(1, min(_limit(values), 2**26) // values.shape[1])
    codes, scales = [], []
    for rows in values.split(step):
        found, largest, _ = bnb_codes.functional().int8_vectorwise_quant(rows.to(torch.float16, copy=True))
        # A row of zeros divides by its scale of zero: no code means anything there but zero.
        codes.append(torch.where(largest.unsqueeze(1) > 0, found, 0))
        scales.append(largest.float())
    return torch.cat(codes), torch.cat(scales)
