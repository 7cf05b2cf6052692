"""The codes of bitsandbytes as flat runs of elements, which are read, written and copied by range.

A range is always exact: where it does not start on a block, the blocks around it are decoded and cut. bitsandbytes is
imported when the first code is read, never with the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

# bitsandbytes' kernels count elements in 32 bits, so no call may see 2**31 of them; where a kernel cannot write to
# its destination (on the CPU) a temporary of this size is the price.
KERNEL_LIMIT = 2**30
_TEMPORARY = 2**24
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library() -> Any:
    """`bitsandbytes`. Raises `ImportError` with what to install."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ImportError(
            "expert weights quantized with bitsandbytes need it installed: `pip install bitsandbytes`"
        ) from error


def functional() -> Any:
    """`bitsandbytes.functional`."""
    return library().functional


def _ranges(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _step(limit: int, unit: int) -> int:
    return max(unit, limit // unit * unit)


class FourBit:
    """nf4 or fp4 codes, two a byte (the earlier element in the high half), with a scale for each block.

    Args:
        data: the packed tensor, of any storage dtype. state: its `QuantState`. A nested state holds the scales in 8
            bits, in blocks of their own and less an offset.
    """

    def __init__(self, data: Tensor, state: Any) -> None:
        self.data, self.state = data, state
        self.numel = _numel(state.shape)
        self._loose: Tensor | None = None  # all elements in fp32, while blocks that two writers share wait for both
        self._scales: Tensor | None = None  # all scales in fp32, while nested ones wait to be coded
        self._touched: Tensor | None = None

    @property
    def bytes(self) -> Tensor:
        """The packed bytes, flat uint8, a view."""
        return self.data.detach().as_subclass(torch.Tensor).view(torch.uint8).reshape(-1)  # type: ignore[arg-type]

    # --- reading -------------------------------------------------------------------------------------------------

    def scales(self, first: int, last: int) -> Tensor:
        """fp32 scales of the blocks `first` to `last`."""
        state = self.state
        if self._scales is not None:
            return self._scales[first:last]
        if not state.nested:
            return state.absmax[first:last].float()
        outer = state.state2
        size = outer.blocksize
        low, high = first // size * size, min(-(-last // size) * size, state.absmax.numel())
        found = functional().dequantize_blockwise(
            state.absmax[low:high].contiguous(),
            absmax=outer.absmax[low // size : -(-high // size)].contiguous(),
            code=outer.code,
            blocksize=size,
        )
        return self._shift(found.reshape(-1), low)[first - low : last - low]

    def _shift(self, scales: Tensor, first: int) -> Tensor:
        """Nested scales with the offset added that their codes leave out. Args: first: number of the first of them."""
        return scales + self.state.offset

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Decode the elements `start` to `stop` into a contiguous tensor of that many elements, any floating dtype."""
        flat = out.view(-1)
        if self._loose is not None:
            flat.copy_(self._loose[start:stop])
            return
        if self._read_by_kernel(flat, start, stop):
            return
        size = self.state.blocksize
        direct = out.device.type == "cuda" and out.dtype in _KERNEL_DTYPES
        step = _step(KERNEL_LIMIT if direct else min(KERNEL_LIMIT, _TEMPORARY), size)
        for first, last in _ranges(start // size * size, stop, step):
            end = min(-(-last // size) * size, self.numel)
            low, high = max(first, start), min(end, stop)
            target = flat[low - start : high - start]
            if direct and (low, high) == (first, end):
                self._decode(first, end, target.dtype, target)
            else:
                kind = out.dtype if out.dtype in _KERNEL_DTYPES else torch.float32
                target.copy_(self._decode(first, end, kind)[low - first : high - first])

    def _read_by_kernel(self, out: Tensor, start: int, stop: int, runs: Tensor | None = None) -> bool:
        """Whole blocks on a GPU, in one pass."""
        state = self.state
        if out.device.type != "cuda" or out.dtype not in _KERNEL_DTYPES or find_spec("triton") is None:
            return False
        if self._loose is not None or self._scales is not None or start % state.blocksize or stop % state.blocksize:
            return False
        from ..ops.triton.four_bit import Nested, dequantize_4bit, takes_blocks

        if not takes_blocks(state.blocksize):
            return False
        nested = None
        if state.nested:
            outer, (offsets, blocks) = state.state2, self._shifts()
            nested = Nested(outer.code, outer.absmax, outer.blocksize, offsets, blocks)
        elif state.absmax.dtype != torch.float32:
            return False
        dequantize_4bit(
            self.bytes, state.absmax, state.code, state.blocksize, out, start // state.blocksize, runs, nested
        )
        return True

    def _shifts(self) -> tuple[Tensor, int]:
        """The offsets of nested scales, and to how many scales each of them belongs."""
        return self.state.offset.reshape(1), self.state.absmax.numel()

    def read_runs(self, runs: Tensor, elements: int, out: Tensor) -> None:
        """Decode some runs of `elements` each, whole blocks, which `(n,)` indices on the device name, one by one."""
        flat = out.view(-1)
        if not self._read_by_kernel(flat, 0, elements, runs):
            self._gather(runs, elements).read(0, flat.numel(), out)

    def _decode(self, start: int, stop: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Whole blocks (or the short last one)."""
        size, count = self.state.blocksize, stop - start
        module = functional()
        # As rows of one block each: no row ends inside a block, and the CPU's kernel goes row by row.
        shape = (count // size, size) if count % size == 0 else (count,)
        state = module.QuantState(
            self.scales(start // size, -(-stop // size)),
            shape=torch.Size(shape), dtype=dtype, blocksize=size, quant_type=self.state.quant_type,
        )  # fmt: skip
        packed = self.bytes[start // 2 : -(-stop // 2)]
        out = None if out is None else out.view(shape)
        return module.dequantize_4bit(packed, state, out=out).reshape(-1)

    def _gather(self, runs: Tensor, elements: int) -> FourBit:
        size, state = self.state.blocksize, self.state
        scales = self.scales(0, self.numel // size).view(-1, elements // size)[runs].reshape(-1)
        picked = functional().QuantState(
            scales, shape=torch.Size((runs.numel() * elements,)), code=state.code, blocksize=size,
            quant_type=state.quant_type, dtype=state.dtype,
        )  # fmt: skip
        return FourBit(self.bytes.view(-1, elements // 2)[runs].reshape(-1), picked)

    # --- writing -------------------------------------------------------------------------------------------------

    def clone(self) -> FourBit:
        """A copy to write to. Only `take` brings it back."""
        functions, state = functional(), self.state
        outer = state.state2 if state.nested else None
        if outer is not None:
            outer = functions.QuantState(
                outer.absmax.clone(), code=outer.code, blocksize=outer.blocksize, dtype=outer.dtype
            )
        copied = functions.QuantState(
            state.absmax.clone(), shape=state.shape, code=state.code, blocksize=state.blocksize,
            quant_type=state.quant_type, dtype=state.dtype, offset=state.offset, state2=outer,
        )  # fmt: skip
        return FourBit(self.data.detach().as_subclass(torch.Tensor).clone(), copied)  # type: ignore[arg-type]

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Code fp32 values in place of the elements `start` to `stop`: same type, block size and kind of scales."""
        size = self.state.blocksize
        if self._loose is not None or start % size or (stop % size and stop != self.numel):
            if self._loose is None:
                loose = torch.empty(self.numel, dtype=torch.float32, device=self.data.device)
                self.read(0, self.numel, loose)
                self._loose = loose
            self._loose[start:stop] = values.reshape(-1)
            return
        self._code(start, stop, values.reshape(-1).float())

    def _code(self, start: int, stop: int, values: Tensor) -> None:
        size, state = self.state.blocksize, self.state
        if state.nested and self._scales is None:
            self._scales = self.scales(0, state.absmax.numel()).clone()
            self._touched = torch.zeros(state.state2.absmax.numel(), dtype=torch.bool, device=self.data.device)
        scales = state.absmax if self._scales is None else self._scales
        for first, last in _ranges(start, stop, _step(KERNEL_LIMIT, size)):
            codes, found = functional().quantize_4bit(
                values[first - start : last - start].contiguous(), blocksize=size, quant_type=state.quant_type
            )
            self.bytes[first // 2 : -(-last // 2)] = codes.reshape(-1)
            scales[first // size : -(-last // size)] = found.absmax
        if self._touched is not None:
            outer, last = state.state2.blocksize, -(-stop // size)
            self._touched[start // size // outer : -(-last // outer)] = True

    def settle(self) -> Tensor | float:
        """Code what `write` has put off. Returns the squared error of elements that were not coded before."""
        exact, self._loose = self._loose, None
        if exact is not None:
            self._code(0, self.numel, exact)
        self._settle_scales()
        error: Tensor | float = 0.0
        step = _step(_TEMPORARY, self.state.blocksize)
        for start, stop in _ranges(0, 0 if exact is None else self.numel, step):
            stored = torch.empty(stop - start, device=self.data.device)
            self.read(start, stop, stored)
            error += (stored - exact[start:stop]).double().square().sum()  # type: ignore[index]
        return error

    def _settle_scales(self) -> None:
        if self._scales is None or self._touched is None:
            return
        # The offset stays, so that blocks of scales which nothing touched keep their bytes.
        state, outer = self.state, self.state.state2
        blocks, size, count = outer.absmax.numel(), outer.blocksize, state.absmax.numel()
        padded = torch.zeros(blocks * size, device=self.data.device)
        padded[:count] = self._scales - state.offset
        touched = self._touched
        codes, found = functional().quantize_blockwise(
            padded.view(blocks, size)[touched].reshape(-1), code=outer.code, blocksize=size
        )
        bytes_ = torch.zeros(blocks * size, dtype=torch.uint8, device=self.data.device)
        bytes_[:count] = state.absmax
        bytes_.view(blocks, size)[touched] = codes.view(-1, size)
        state.absmax.copy_(bytes_[:count])
        outer.absmax[touched] = found.absmax
        self._scales = self._touched = None

    def take(self, other: FourBit) -> None:
        """Take over the bytes of a clone."""
        other.settle()
        self.bytes.copy_(other.bytes)
        self.state.absmax.copy_(other.state.absmax)
        if self.state.nested:
            self.state.state2.absmax.copy_(other.state.state2.absmax)


class EightBit:
    """int8 codes `(rows, in)` with a scale for each row: `weight = codes * scales / 127`.

    Args: data: int8. scales: fp32 `(rows,)`.
    """

    def __init__(self, data: Tensor, scales: Tensor) -> None:
        self.data, self.scales = data.detach().as_subclass(torch.Tensor), scales  # type: ignore[arg-type]
        self.numel = self.data.numel()

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        columns = self.data.shape[1]
        return start // columns, stop // columns

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """See `FourBit.read`; whole rows."""
        first, last = self._rows(start, stop)
        target = out.view(-1, self.data.shape[1])
        for low, high in _ranges(first, last, max(1, _TEMPORARY // self.data.shape[1])):
            values = functional().int8_vectorwise_dequant(self.data[low:high], self.scales[low:high])
            target[low - first : high - first].copy_(values)

    def read_runs(self, runs: Tensor, elements: int, out: Tensor) -> None:
        """See `FourBit.read_runs`; whole rows."""
        columns = self.data.shape[1]
        codes = self.data.view(-1, elements)[runs].reshape(-1, columns)
        picked = EightBit(codes, self.scales.view(-1, elements // columns)[runs].reshape(-1))
        picked.read(0, out.numel(), out)

    def clone(self) -> EightBit:
        """A copy to write to."""
        return EightBit(self.data.clone(), self.scales.clone())

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Code fp32 values in place of whole rows."""
        first, last = self._rows(start, stop)
        codes, scales = code_rows(values.reshape(last - first, -1))
        self.data[first:last], self.scales[first:last] = codes, scales

    def take(self, other: EightBit) -> None:
        """Take over the bytes of a clone."""
        self.data.copy_(other.data)
        self.scales.copy_(other.scales)


class Plain:
    """Weights that were brought into 16 (or 32) bits: the same face on numbers.

    Args: data: contiguous, any floating dtype.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data.detach()

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """See `FourBit.read`."""
        out.view(-1).copy_(self.data.view(-1)[start:stop])

    def read_runs(self, runs: Tensor, elements: int, out: Tensor) -> None:
        """See `FourBit.read_runs`."""
        out.view(-1).copy_(self.data.view(-1, elements)[runs].view(-1))

    def clone(self) -> Plain:
        """A copy to write to."""
        return Plain(self.data.clone())

    def write(self, start: int, stop: int, values: Tensor) -> None:
        """Round fp32 values into place."""
        self.data.view(-1)[start:stop] = values.reshape(-1).to(self.data.dtype)

    def take(self, other: Plain) -> None:
        """Take over the numbers of a clone."""
        self.data.copy_(other.data)


def code_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `(rows, in)` and fp32 scales `(rows,)` of fp32 values; a row of zeros has scale zero."""
    values = values.float()
    scales = values.abs().amax(dim=1)
    factor = torch.where(scales > 0, 127 / scales, 0)
    return torch.round(values * factor.unsqueeze(1)).to(torch.int8), scales


def _numel(shape: Any) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
