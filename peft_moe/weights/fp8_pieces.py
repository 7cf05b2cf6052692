"""Pieces of FP8 weights: one tensor of the base with its scale.

It is a stacked parameter of all experts, or the weight of one linear of one expert. A piece whose weight is in 16 bits
is taken as it is, whatever scale lies next to it: some layers are 16-bit by design, and compressed-tensors
decompresses a linear in place and leaves its scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.scaled import ScaledStack
from .built import chunks
from .dense import DENSE_DTYPES
from .grid import FLOAT8, Grid, are_powers, decode_scale, find_grids, quantize
from .requantized import Change


def scale_names(weight: str) -> tuple[str, ...]:
    """The attributes under which the scale of a weight is looked for, next to it."""
    suffixes = ("_scale_inv", "_scale", "_weight_scale_inv", "_weight_scale")
    return tuple(f"{weight}{suffix}" for suffix in (suffixes[:2] if weight == "weight" else suffixes))


def has_float8(tensors: Iterable[Any]) -> bool:
    """Whether any of these tensors holds FP8 codes."""
    return any(getattr(tensor, "dtype", None) in FLOAT8 for tensor in tensors)


def find_scale(module: Any, weight: str) -> str | None:
    """The name of the scale next to a weight; `None` if there is none."""
    return next((name for name in scale_names(weight) if isinstance(getattr(module, name, None), Tensor)), None)


def stated_block(module: Any) -> tuple[int, int] | None:
    """The block size that a module or its config states for weights; `None` if it states none."""
    block = getattr(module, "block_size", None)
    if block is None:
        settings = getattr(getattr(module, "config", None), "quantization_config", None)
        block = settings.get("weight_block_size") if isinstance(settings, dict) else None
        block = getattr(settings, "weight_block_size", block)
    return None if block is None else (int(block[0]), int(block[1]))


@dataclass(eq=False)
class FP8Piece:
    """One tensor of the base, seen as `(experts, rows, cols)`, and the rows of the projection that it fills.

    Attributes:
        module, weight: the tensor is `module.<weight>`, 3-D of all experts or 2-D of one.
        where: its path, for messages. rows: which rows of the projection. expert: of a 2-D tensor.
        transposed: held as `(in, out)`. halves: its rows are gate and up.
    """

    module: Any
    weight: str
    where: str
    rows: slice
    expert: int | None = None
    transposed: bool = False
    halves: bool = False
    _grids: dict[Any, Grid] = field(default_factory=dict, repr=False)
    _indices: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    _scaled: tuple[Any, ScaledStack | None] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies: their tensors lie elsewhere."""
        return vars(self) | {"_scaled": None}

    @property
    def tensor(self) -> Tensor:
        """The weight as it is stored."""
        return getattr(self.module, self.weight).data

    @property
    def source(self) -> tuple[Any, str]:
        """See `built.Piece`."""
        return self.module, self.weight

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return self.codes[0].numel()

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors of the base: the weight and, if it is FP8, its scale."""
        weight = getattr(self.module, self.weight)
        name = find_scale(self.module, self.weight) if self.packed else None
        return [weight] if name is None else [weight, getattr(self.module, name)]

    @property
    def packed(self) -> bool:
        """Whether the weight is FP8; a weight in 16 bits needs no scale."""
        return self.tensor.dtype in FLOAT8

    @property
    def codes(self) -> Tensor:
        """`(E, rows, cols)`, a view."""
        return self.tensor if self.tensor.dim() == 3 else self.tensor.unsqueeze(0)

    @property
    def scale(self) -> Tensor:
        """The scale as it is stored. Raises `ValueError` if there is none."""
        name = find_scale(self.module, self.weight)
        if name is None:
            raise ValueError(
                f"{self.where} is stored as {self.tensor.dtype} without a scale: looked for "
                f"{', '.join(scale_names(self.weight))} on {type(self.module).__name__}. FP8 codes mean nothing "
                "without their scale, so they are not cast. If the checkpoint has the scale and the loader dropped "
                "it, call `peft_moe.checkpoint.scales.recover_scales(model, checkpoint)` first."
            )
        return getattr(self.module, name).data

    def scales(self) -> Tensor:
        """The scales as stored, viewed as `(E or 1, r, c)`. Raises `ValueError` for a shape that cannot be."""
        scale, (experts, rows, _) = self.scale, self.codes.shape
        if scale.numel() == 1:
            return scale.reshape(1, 1, 1)
        if self.tensor.dim() == 3:
            if scale.dim() in (1, 2) and scale.shape[0] == experts:
                return scale.reshape(experts, -1, 1)  # one an expert, one for gate and one for up, one a row
            if scale.dim() == 3 and scale.shape[0] == experts:
                return scale
        elif scale.shape == (rows,) or (scale.shape == (1, rows) and stated_block(self.module) is None):
            return scale.reshape(1, rows, 1)  # by row; `(1, rows)` is how row-wise kernels want it
        elif scale.dim() == 2:
            return scale.unsqueeze(0)
        raise self._misfit(scale, "")

    def _misfit(self, scale: Tensor, why: str) -> ValueError:
        block = stated_block(self.module)
        return ValueError(
            f"{self.where}: a scale of shape {tuple(scale.shape)} does not fit a weight of shape "
            f"{tuple(self.tensor.shape)}{f' in blocks of {block}' if block else ''}{why and f': {why}'}. Expected one "
            "scale for the tensor, one an expert, one a row, or one a block."
        )

    def grid(self) -> Grid:
        """Where the scales apply. Raises `ValueError` if they do not fit."""
        scales, codes = self.scales(), self.codes
        key = (codes.shape, scales.shape)
        if key not in self._grids:
            counts = (scales.shape[1], scales.shape[2])
            # A block size is stated for scales of blocks: scales without columns are none, `weight_scale` may be.
            always = find_scale(self.module, self.weight) == f"{self.weight}_scale_inv"
            stated = stated_block(self.module) if self.scale.dim() == self.tensor.dim() else None
            try:
                found = self._fitting(counts, stated, always)
            except ValueError as error:
                raise self._misfit(self.scale, str(error)) from error
            if len(found) > 1 and codes.device.type == "meta":
                return found[0]
            self._grids[key] = found[0] if len(found) == 1 else max(found, key=self._fill)
        return self._grids[key]

    def _fitting(self, counts: tuple[int, int], stated: tuple[int, int] | None, always: bool) -> list[Grid]:
        """The grids of `(r, c)` scales. Args: stated: a block size. always: scales that do not fit it are wrong."""
        _, rows, cols = self.codes.shape
        if stated is not None:
            try:
                return find_grids(rows, cols, counts, stated, self.halves)
            except ValueError:
                if always:
                    raise
        return find_grids(rows, cols, counts, None, self.halves)

    def _fill(self, grid: Grid) -> float:
        """How near the largest code of each block comes to the largest code there is: at its top in the right grid.

        Gate and up that were quantized apart, in blocks that do not divide their rows, can have as many scales as
        the joined rows would have. A quantizer makes the largest code of a block as large as it can, which tells.
        """
        largest = grid.largest(self.codes.float())
        return float((largest / torch.finfo(self.tensor.dtype).max).mean())

    def check(self) -> None:
        """Raise `ValueError` unless the weight is in 16 bits, or FP8 with a scale that can be used."""
        if self.packed:
            self.grid()
            scale = self.scale
            if scale.device.type != "meta" and not torch.isfinite(decode_scale(scale)).all():
                raise self._misfit(scale, "it holds values that are not finite")
        elif self.tensor.dtype not in DENSE_DTYPES:
            raise ValueError(f"{self.where}: expert weights are stored as {self.tensor.dtype}, expected FP8 or 16 bits")

    def dequantize(self, experts: Sequence[int] | slice | Tensor, wide: torch.dtype) -> Tensor:
        """`(E', rows, cols)` in fp32 or fp64, as stored: not transposed."""
        values = _take(self.codes, experts).to(wide, copy=True)
        if not self.packed:
            return values
        scales = self.scales()
        scales = scales if scales.shape[0] == 1 else _take(scales, experts)
        return self.grid().scale_(values, decode_scale(scales).to(wide))

    def dequantize_into(self, out: Tensor, experts: Tensor | None = None) -> bool:
        """One pass over the codes where the GPU converts FP8: `out (E', rows, cols)` gets these experts, or all."""
        codes = self.codes
        if not self.packed or out.dtype == torch.float64 or find_spec("triton") is None or codes.device.type != "cuda":
            return False
        from ..ops.triton.dequantize import dequantize_blocks, runs_on

        if not runs_on(codes.device) or not codes.is_contiguous():
            return False
        grid = self.grid()
        key = ("row index", codes.device)
        if key not in self._indices:
            self._indices[key] = grid.row_index(codes.device).to(torch.int32)
        scales = self.scales()
        if experts is not None:
            codes = _take(codes, experts)
            scales = scales if scales.shape[0] == 1 else _take(scales, experts)
        scales = decode_scale(scales).float().contiguous()
        dequantize_blocks(codes, scales, self._indices[key], grid.block_cols, out)
        return True

    def scaled(self, experts: int) -> ScaledStack | None:
        """Codes and scales for products on them, `(E, rows, cols)`; rows of several tensors of an expert are joined.

        `None` where the weight is not FP8, or the scales do not lie in equal blocks over all of an expert's rows.
        """
        tensor = self.tensor
        if tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return None
        scale = self.scale
        # Views of the same memory are what they were; scales in another dtype are decoded for each call.
        key = (tensor.data_ptr(), scale.data_ptr(), tensor.shape, scale.shape, tensor.dtype, scale.dtype, experts)
        if self._scaled is None or self._scaled[0] != key or scale.dtype != torch.float32:
            self._scaled = (key, self._scaled_now(experts))
        return self._scaled[1]

    def _scaled_now(self, experts: int) -> ScaledStack | None:
        grid, codes, scales = self.grid(), self.codes, decode_scale(self.scales()).float()
        tensors = len(codes) // experts  # of each expert
        rows = codes.shape[1]
        if (len(grid.sections) > 1 or tensors > 1) and grid.sections[0] % grid.block_rows:
            return None
        codes = codes.reshape(experts, tensors * rows, codes.shape[2])
        if len(scales) > 1:
            scales = scales.reshape(experts, tensors * scales.shape[1], scales.shape[2])
        elif tensors > 1:
            return None
        return ScaledStack(codes, scales.expand(experts, -1, -1), grid.block_rows, grid.block_cols)

    def requantize(self, experts: list[int], delta: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor | None, Change]:
        """New codes and scales of some experts after `delta (E', rows, cols)`, and what rounding did. Writes nothing.

        A block whose delta is zero keeps its bytes.
        """
        exact = self.dequantize(experts, wide) + delta
        if not self.packed:
            codes = exact.to(self.tensor.dtype)
            return codes, None, Change.of(codes.to(wide), exact, delta)
        grid, scales = self.grid(), self.scales()
        shared = scales.shape[0] == 1 and len(self.codes) > 1
        codes, found = quantize(exact.clone(), grid, self.tensor.dtype, scales.dtype, shared, are_powers(scales))
        old_codes, old_scales = _take(self.codes, experts), scales if shared else _take(scales, experts)
        still = grid.largest(delta) == 0
        if shared:
            still = still.all().expand(1, 1, 1)
        if still.any():
            elements = grid.expand(still.expand(len(experts), *grid.shape))
            codes = torch.where(elements, old_codes.view(torch.uint8), codes.view(torch.uint8)).view(codes.dtype)
            found = torch.where(still, old_scales.view(_bits(found)), found.view(_bits(found))).view(found.dtype)
        stored = grid.scale_(codes.to(wide), decode_scale(found).to(wide))
        return codes, found, Change.of(stored, exact, delta)

    def write(self, experts: list[int], codes: Tensor, scales: Tensor | None) -> None:
        """Put new codes and scales of some experts in place."""
        old = self.codes
        old.view(_bits(old))[experts] = codes.view(_bits(old))
        if scales is not None:
            stored = self.scales()
            bits = _bits(stored)
            stored.view(bits)[experts if len(stored) == len(old) else slice(None)] = scales.view(bits)

    def put(self, saved: list[Tensor]) -> None:
        """Restore a weight that was FP8 when it was saved and has been decompressed since: decompressed, too."""
        parameter, name = getattr(self.module, self.weight), find_scale(self.module, self.weight)
        if len(saved) != 2 or name is None:
            raise ValueError(f"{self.where} was in {saved[0].dtype} when its bytes were kept, and cannot be put back")
        dtype = parameter.dtype
        parameter.data = saved[0]
        getattr(self.module, name).data.copy_(saved[1])
        parameter.data = self.dequantize(slice(None), torch.float32).to(dtype).view(saved[0].shape)

    def densify(self, dtype: torch.dtype) -> None:
        """Replace the weight by a plain parameter, and drop its scale."""
        codes = self.codes
        dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for chunk in chunks(len(codes), codes[0].numel()):
            dense[chunk] = self.dequantize(chunk, torch.float32).to(dtype)
        name = find_scale(self.module, self.weight)
        setattr(self.module, self.weight, nn.Parameter(dense.view(self.tensor.shape), requires_grad=False))
        # With it go static scales of the activations, which mean nothing to 16-bit weights.
        front = "" if self.weight == "weight" else f"{self.weight}_"
        for dropped in (name, f"{front}activation_scale", f"{front}input_scale"):
            if dropped is not None and hasattr(self.module, dropped):
                delattr(self.module, dropped)


def _bits(tensor: Tensor) -> torch.dtype:
    """The integer type of a tensor's width: selecting and writing is not implemented for all 8-bit floats."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]


def _take(tensor: Tensor, experts: Sequence[int] | slice | Tensor) -> Tensor:
    return tensor.view(_bits(tensor))[experts].view(tensor.dtype)
