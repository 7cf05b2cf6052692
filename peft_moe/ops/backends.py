"""Which backend runs the experts, and what it asks of ranks.

"triton": the kernels of `ops/triton`. "grouped_mm": torch's grouped product. "loop": one product an expert. "auto"
takes the first of them that runs, and is right, on this device and dtype. `PEFT_MOE_GROUPED=0` leaves the loop alone.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

from .grouped import log_once

BACKENDS = ("auto", "triton", "grouped_mm", "loop")
MAX_KERNEL_RANK = 256  # measured up to here
MAX_KERNEL_EXPERTS = 1024  # a program looks for its expert among so many at most
SWITCH = "PEFT_MOE_GROUPED"  # environment: 0 turns every grouped path off
_ALIGNMENT = 16  # bytes


def grouped_is_off() -> bool:
    """Whether the environment turns grouped products off: frozen experts run by themselves, adapted ones in a loop."""
    return os.environ.get(SWITCH, "1").lower() in ("0", "false", "off")


@cache
def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this device and dtype: 16-bit tensors on GPUs of compute capability 8.0 and later."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def choose(requested: str, device: torch.device, dtype: torch.dtype, rank: int, experts: int) -> str:
    """The backend of a whole expert MLP. "grouped_mm" may still fall back to a loop for shapes it cannot take.

    Args: rank: of all active adapters together; 0 without one.

    Raises `ValueError` if "triton" is asked for and cannot run.
    """
    if grouped_is_off():
        return "loop"
    if requested == "triton":
        if find_spec("triton") is None:
            raise ValueError("experts_backend='triton' needs the package triton: pip install 'peft-moe[triton]'")
        if not triton_runs(device, dtype):
            raise ValueError(
                f"experts_backend='triton' cannot run on {device} with {dtype}; expected a GPU and 16-bit weights. Use "
                "'auto'."
            )
        return "triton"
    if requested != "auto":
        return requested
    # Under torch.compile the torch path is used: its operators are opaque to the compiler.
    if torch.compiler.is_compiling() or not triton_runs(device, dtype):
        return "grouped_mm"
    if rank > MAX_KERNEL_RANK or experts > MAX_KERNEL_EXPERTS:
        log_once(
            f"ranks that add up to {rank} on {experts} experts: the kernels take {MAX_KERNEL_RANK} on "
            f"{MAX_KERNEL_EXPERTS}; these experts run by torch's grouped products, which is slower"
        )
        return "grouped_mm"
    return "triton"


def padded_rank(rank: int, dtype: torch.dtype, backend: str) -> int:
    """The rank to which factors are zero-padded inside the ops: what the backend can address."""
    if backend == "triton":
        return rank  # the kernels mask what is missing to a power of two
    multiple = max(1, _ALIGNMENT // dtype.itemsize)  # rows of `(E, N, R)` start at 16-byte addresses
    return -(-rank // multiple) * multiple
