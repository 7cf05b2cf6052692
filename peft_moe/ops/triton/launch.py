"""Launching a kernel without asking Triton which of its compiled versions is meant.

`kernel[grid](...)` binds the arguments, specializes each of them and looks the version up: about 60 microseconds of
Python, more than most of these kernels run for on a small batch. The version depends on little: dtypes, constants,
and of pointers and integers whether they are multiples of 16 (or an integer is one). So it is remembered by that.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_CHECKED = ((3, 4), (3, 9))  # versions of Triton whose compiled kernels are called as `_call` does
_versions: dict[tuple[Any, ...], Any] = {}
_lately: dict[tuple[Any, ...], Any] = {}  # the same by the very numbers, which most steps repeat
_MANY = 4096


def _kind(value: Any) -> Any:
    """What of an argument a compiled version depends on."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value % 16 == 0, value == 1, -(2**31) <= value < 2**31
    return getattr(value, "block_shape", None) and tuple(value.block_shape), type(value)  # of a descriptor


def _numbers(arguments: tuple[Any, ...]) -> list[Any]:
    """Finer than the kinds of all arguments, and faster to make."""
    found: list[Any] = []
    addresses = 0
    for value in arguments:
        if isinstance(value, Tensor):
            addresses |= value.data_ptr()
            found.append(value.dtype)
        elif value is None or isinstance(value, (int, float)):
            found.append(value)
        else:
            found.append(_kind(value))
    if addresses % 16:
        found.append(tuple(value.data_ptr() % 16 for value in arguments if isinstance(value, Tensor)))
    return found


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of its first tensor.

    Args:
        kernel: a `triton.jit` function whose `tl.constexpr` parameters come last.
        arguments: tensors, integers, floats and `None`. constants: the constexprs in the kernel's order, then
            options of the compiler.
    """
    device = arguments[0].device
    current = torch.cuda.current_device() if device.type == "cuda" else None
    if device.index != current:
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, **constants)
        return
    lately = (id(kernel), current, *constants.values(), *_numbers(arguments))
    found = _lately.get(lately)
    if found is None:
        key = (kernel, device, *constants.values(), *map(_kind, arguments))
        version = _versions.get(key)
        if version is None:
            version = kernel[grid](*arguments, **constants)
            if hasattr(version, "packed_metadata"):  # not what the interpreter returns
                _versions[key] = version
            return
        if len(_lately) >= _MANY:
            _lately.clear()
        values = tuple(value for name, value in constants.items() if name not in _OPTIONS)
        found = _lately[lately] = version, values
    version, values = found
    _call(version, (*grid, 1, 1)[:3], current, arguments + values)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


_DIRECT = knobs is not None and _CHECKED[0] <= _version(triton.__version__) <= _CHECKED[1]


def _call(version: Any, grid: tuple[int, ...], device: int | None, arguments: tuple[Any, ...]) -> None:
    """`version[grid](*arguments)`; where nobody hooked into launches, without what is prepared for hooks."""
    stream = None if device is None else driver.active.get_current_stream(device)
    if _DIRECT and not (_hooked(knobs.runtime.launch_enter_hook) or _hooked(knobs.runtime.launch_exit_hook)):
        version.run(*grid, stream, version.function, version.packed_metadata, None, None, None, *arguments)
    else:
        version[grid](*arguments, stream=stream)


def _hooked(hooks: Any) -> bool:
    """Whether a profiler listens: hooks are `None`, a function, or a chain of them."""
    return hooks is not None and bool(getattr(hooks, "calls", True))
