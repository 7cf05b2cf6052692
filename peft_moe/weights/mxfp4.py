"""Packed FP4 weights (MXFP4): two e2m1 values a byte, one power of two for each 32 of them.

Three forms are read: `<weight>_blocks` `(E, out, in / 32, 16)` with `<weight>_scales` `(E, out, in / 32)`, as GPT-OSS
checkpoints and transformers 4 hold them; `<weight>` `(E, out, in / 2)` uint8 with `<weight>_scales`; and the int8
stacks `(E, out, in / 2)` with `<weight>_scale_inv` of DeepSeek-V4. The low half of a byte is the earlier value.

FP4 is too coarse to merge into: one step is a quarter of a value or more, so a rounded merge loses the adapter. Such
weights are merged into 16 bits (`densify`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .built import BuiltWeight, chunks, split_path, stated_dtype
from .dense import DENSE_DTYPES
from .grid import FLOAT8, decode_scale

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_READABLE = (*DENSE_DTYPES, *FLOAT8)


def unpack_e2m1(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """`(..., n)` bytes of two values each -> `(..., 2 n)` in `dtype`, which holds every e2m1 value exactly."""
    values = torch.tensor(E2M1, dtype=dtype, device=packed.device)
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=-1)  # by byte: low half, high half
    flat = pairs.index_select(0, packed.reshape(-1).view(torch.uint8).to(torch.int32))
    return flat.view(*packed.shape[:-1], 2 * packed.shape[-1])


def find_packed4(module: Any, path: str) -> tuple[str, str] | None:
    """The names of the packed weight and of its scales below a module; `None` if the weight is not packed FP4."""
    owner, name = split_path(module, path)
    weight = getattr(owner, name, None)
    found = None
    if isinstance(getattr(owner, f"{name}_blocks", None), Tensor):
        found = f"{name}_blocks", f"{name}_scales"
    elif isinstance(weight, Tensor) and weight.dim() == 3:
        if weight.dtype == torch.uint8 and isinstance(getattr(owner, f"{name}_scales", None), Tensor):
            found = name, f"{name}_scales"
        elif weight.dtype == torch.int8 and isinstance(getattr(owner, f"{name}_scale_inv", None), Tensor):
            found = name, f"{name}_scale_inv"
    return found


@dataclass(eq=False)
class _Piece4:
    module: Any
    weight: str  # the name of the plain weight
    names: tuple[str, str]
    where: str
    rows: slice
    plain_transposed: bool  # how the plain weight lies; the packed one is always `(out, in)`
    expert: int | None = None
    _table: Tensor | None = field(default=None, repr=False)

    @property
    def transposed(self) -> bool:
        return self.plain_transposed and not self.packed

    @property
    def packed(self) -> bool:
        return hasattr(self.module, self.names[1])

    @property
    def parameters(self) -> list[Tensor]:
        if not self.packed:
            return [getattr(self.module, self.weight)]
        return [getattr(self.module, name) for name in self.names]

    @property
    def source(self) -> tuple[Any, str]:
        return self.module, self.weight

    @property
    def elements(self) -> int:
        weight = self.parameters[0]
        return weight[0].numel() * (2 if self.packed else 1)

    def check(self) -> None:
        blocks, scales = self.parameters
        count, out = blocks.shape[:2]
        groups = 2 * blocks[0, 0].numel() / 32
        if tuple(scales.shape) != (count, out, groups):
            raise ValueError(
                f"{self.where}: scales of shape {tuple(scales.shape)} do not fit packed FP4 weights of shape "
                f"{tuple(blocks.shape)}; expected {(count, out, groups)}, one for each 32 values of a row."
            )

    def dequantize(self, experts: Sequence[int] | slice | Tensor, wide: torch.dtype) -> Tensor:
        tensors = [tensor.detach()[experts] for tensor in self.parameters]
        if not self.packed:
            return tensors[0].to(wide)
        blocks, scales = tensors
        values = unpack_e2m1(blocks.reshape(*scales.shape, 16), wide)
        values.mul_(decode_scale(scales).to(wide).unsqueeze(-1))
        return values.view(*scales.shape[:2], -1)

    def dequantize_into(self, out: Tensor, experts: Tensor | None = None) -> bool:
        """One pass over the codes on a GPU: `out (E', rows, cols)` gets these experts, or all."""
        if not self.packed or out.device.type != "cuda" or not out.is_contiguous() or out.dtype == torch.float64:
            return False
        blocks, scales = (one.detach().contiguous() for one in self.parameters)
        if find_spec("triton") is None:
            return False
        from ..ops.triton.four_bit import dequantize_4bit

        if self._table is None or self._table.device != out.device:
            self._table = torch.tensor(E2M1, dtype=torch.float32, device=out.device)
        scales = scales.view(torch.uint8) if scales.element_size() == 1 else decode_scale(scales).float()
        dequantize_4bit(blocks.view(torch.uint8), scales, self._table, 32, out, runs=experts, low_first=True)
        return True

    def densify(self, dtype: torch.dtype) -> None:
        count = self.parameters[0].shape[0]
        parts = [self.dequantize(chunk, torch.float32).to(dtype) for chunk in chunks(count, self.elements)]
        dense = torch.cat(parts)
        for name in self.names:
            delattr(self.module, name)
        if self.plain_transposed:
            dense = dense.transpose(1, 2).contiguous()
        setattr(self.module, self.weight, nn.Parameter(dense, requires_grad=False))


class MXFP4Weight(BuiltWeight):
    """The store of one projection in packed FP4; arguments as those of `BuiltWeight`."""

    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        """Add to weights that were brought into 16 bits before; packed ones raise `ValueError`, unchanged."""
        for piece in self.pieces:
            if piece.packed:
                raise ValueError(
                    f"{piece.where} is stored in MXFP4, whose steps are larger than what an adapter changes: merging "
                    "into it would lose the adapter. Merge into 16 bits: `merge_and_unload(dtype=torch.bfloat16)`."
                )
        with torch.no_grad():
            for experts, delta in deltas:
                for piece in self.pieces:
                    weight = piece.parameters[0].data
                    part = delta[:, piece.rows].to(weight.device)
                    part = part.transpose(1, 2) if piece.transposed else part
                    chosen = list(experts)
                    weight[chosen] = (weight[chosen].to(part.dtype) + part).to(weight.dtype)


def open_mxfp4(
    module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
) -> MXFP4Weight:
    """The store of packed FP4 stacks; the arguments are those of `open_stacked`."""
    pieces, start = [], 0
    for path, transposed, _ in parts:
        owner, weight = split_path(module, path)
        names = find_packed4(module, path)
        assert names is not None  # `open_stacked` asked
        if not isinstance(getattr(owner, names[1], None), Tensor):
            raise ValueError(
                f"{name}.{path} is packed FP4 without its scales: looked for {names[1]} on {type(owner).__name__}. "
                "Load the checkpoint again with `peft_moe.packed_config`."
            )
        rows = slice(start, start + getattr(owner, names[0]).shape[1])
        pieces.append(_Piece4(owner, weight, names, f"{name}.{path}", rows, transposed))
        start = rows.stop
    return MXFP4Weight(pieces, shape, name, stated_dtype(module))


def refuse_unknown(tensors: Iterable[Any], name: str) -> None:
    """Raise `ValueError` for storages that are recognised and not supported: torchao, NVFP4, kernels' own layouts."""
    for tensor in tensors:
        kind = type(tensor)
        home = kind.__module__.partition(".")[0]
        data_home = type(getattr(tensor, "data", None)).__module__.partition(".")[0]
        if "torchao" in (home, data_home):
            _refuse(name, f"torchao tensors ({type(getattr(tensor, 'data', tensor)).__name__})", "`TorchAoConfig`")
        if not isinstance(tensor, Tensor) and hasattr(tensor, "storage"):
            _refuse(name, f"a {kind.__name__} in the layout of a Triton kernel", "an MXFP4 kernel")
        if isinstance(tensor, Tensor) and tensor.dtype == torch.int8:
            _refuse(name, "int8 codes without their scales", "the loader that dropped them")
        if isinstance(tensor, Tensor) and tensor.dtype not in _READABLE:
            _refuse(name, f"{tensor.dtype} codes (NVFP4, or another packed format)", "this quantization")


def refuse_without_weight(linear: Any, name: str) -> NoReturn:
    """Raise `ValueError` for a linear that holds something else than a `weight`: NVFP4 and int4 packed, GPTQ, AWQ."""
    held = ", ".join(f"{key} in {tensor.dtype}" for key, tensor in linear.state_dict().items()) or "nothing"
    _refuse(name, f"{type(linear).__name__} modules without a `weight`, which hold {held}", "this quantization")


def _refuse(name: str, found: str, loader: str) -> NoReturn:
    raise ValueError(
        f"{name}: its expert weights are {found}, which this version cannot adapt. It reads 16-bit weights, FP8 with "
        f"scales, and MXFP4 as blocks and scales. Load the model dequantized instead of with {loader}; FP8, MXFP4 and "
        "bitsandbytes checkpoints load packed with `config=peft_moe.packed_config(path)`."
    )
