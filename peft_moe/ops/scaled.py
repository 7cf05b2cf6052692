"""Frozen stacks held as 8-bit codes with scales, which a kernel may multiply as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScaledStack:
    """`weight[e, n, k] = codes[e, n, k] * scales[e, n // rows, k // columns]`, nothing of it built.

    Attributes:
        codes: `(E, N, K)` FP8, any strides. scales: `(E, r, c)` fp32, any strides (0 for one of all experts).
        rows, columns: that one scale covers.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    columns: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def mT(self) -> ScaledStack:  # noqa: N802 - as of a tensor
        """`(E, K, N)`, a view."""
        return ScaledStack(self.codes.mT, self.scales.mT, self.columns, self.rows)


@dataclass(frozen=True, eq=False)
class CodedStack:
    """What stands for a frozen stack of a packed store in forward and backward.

    Attributes: build: makes the `(E, N, K)` tensor in 16 bits. codes: gives its codes; `None` where they have no scales
    that a kernel reads.
    """

    build: Callable[[], Tensor]
    codes: Callable[[], ScaledStack | None]

    def __call__(self) -> Tensor:
        return self.build()
