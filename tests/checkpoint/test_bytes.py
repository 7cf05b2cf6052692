"""The bytes of a tensor, however it lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_moe.checkpoint.tensor_file import bytes_of

NUMBERS = torch.arange(12, dtype=torch.float32).view(3, 4).bfloat16()


@pytest.mark.parametrize(
    "tensor",
    [
        NUMBERS,
        NUMBERS.t(),
        NUMBERS[:, ::2],
        NUMBERS[1:2, :1],
        NUMBERS[1:, 1:2].expand(2, 3),
        NUMBERS[:0],
        NUMBERS[0, 1],
    ],
    ids=["whole", "transposed", "strided", "one of a column", "expanded", "empty", "scalar"],
)
def test_bytes_of(tensor: Tensor) -> None:
    assert bytes_of(tensor).view(torch.bfloat16).tolist() == tensor.flatten().tolist()
    assert bytes_of(tensor).shape == (2 * tensor.numel(),)
