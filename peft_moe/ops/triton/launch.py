"""Launching a kernel without asking Triton which of its compiled versions is meant.

`kernel[grid](...)` binds the arguments, specializes each of them and looks the version up: about 60 microseconds of
Python, more than most of these kernels run for on a small batch. Most of that depends on shapes alone: they make a
`Launch`, once, and a call of it looks at nothing but dtypes and addresses.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_CHECKED = ((3, 4), (3, 9))  # versions of Triton whose compiled kernels are called as `_run` does
_BY_SIZE = torch.version.hip is not None  # AMD's compiler addresses memory of less than 2 GB by 32 bits
_versions: dict[tuple[Any, ...], Any] = {}
once_a_shape = lru_cache(4096)  # for functions that make a `Launch`


class Launch:
    """A kernel with all of a launch that shapes decide: the grid, the numbers among the arguments, the constants.

    Args:
        kernel: a `triton.jit` function of tensors, then numbers, then `tl.constexpr` parameters.
        grid: of programs. numbers: integers and floats. constants: the constexprs in the kernel's order, then options
            of the compiler.
    """

    __slots__ = ("_after_tensors", "_found", "constants", "grid", "kernel", "numbers")

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], **constants: Any) -> None:
        self.kernel, self.grid, self.numbers, self.constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        values = [value for name, value in constants.items() if name not in _OPTIONS]
        self._after_tensors = (*numbers, *values)
        self._found: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Any) -> None:
        """Run it on the device of the first tensor. Args: tensors, descriptors of tensors, and `None`."""
        device = tensors[0].device
        current = torch.cuda.current_device() if device.type == "cuda" else None
        if device.index != current:
            with torch.cuda.device(device):
                self(*tensors)
            return
        kinds: list[Any] = [current]
        addresses = 0
        for one in tensors:
            if one is None:
                kinds.append(None)
            elif isinstance(one, Tensor):
                addresses |= one.data_ptr()
                kinds.append(one.dtype)
            else:
                kinds.append(tuple(one.block_shape))
        if addresses % 16:
            kinds += [one.data_ptr() % 16 for one in tensors if isinstance(one, Tensor)]
        if _BY_SIZE:
            kinds += [one.untyped_storage().size() < 2**31 for one in tensors if isinstance(one, Tensor)]
        key = tuple(kinds)
        version = self._found.get(key)
        if version is None:
            version = self._version(key, tensors)
            if version is None:
                return
        _run(version, self.grid, current, tensors + self._after_tensors)

    def _version(self, key: tuple[Any, ...], tensors: tuple[Any, ...]) -> Any:
        """The compiled version; `None` where Triton chose it, and ran it."""
        kinds = [(n % 16 == 0, n == 1, -(2**31) <= n < 2**31) for n in self.numbers if isinstance(n, int)]
        known = (self.kernel, *self.constants.values(), *kinds, *key)
        version = _versions.get(known)
        if version is None:
            version = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
            if hasattr(version, "packed_metadata"):  # not what the interpreter returns
                _versions[known] = self._found[key] = version
            return None
        self._found[key] = version
        return version


TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_DIRECT = knobs is not None and _CHECKED[0] <= TRITON <= _CHECKED[1]


def _run(version: Any, grid: tuple[int, ...], device: int | None, arguments: tuple[Any, ...]) -> None:
    """`version[grid](*arguments)`; where nobody hooked into launches, without what is prepared for hooks."""
    stream = None if device is None else driver.active.get_current_stream(device)
    if _DIRECT and not (_hooked(knobs.runtime.launch_enter_hook) or _hooked(knobs.runtime.launch_exit_hook)):
        version.run(*grid, stream, version.function, version.packed_metadata, None, None, None, *arguments)
    else:
        version[grid](*arguments, stream=stream)


def _hooked(hooks: Any) -> bool:
    """Whether a profiler listens: hooks are `None`, a function, or a chain of them."""
    return hooks is not None and bool(getattr(hooks, "calls", True))
