"""How expert adapters start: the initialisations of LoRA, one expert at a time.

`True` and `"gaussian"`: Hu et al., LoRA (arXiv 2106.09685). `"pissa"`: Meng et al. (arXiv 2404.02948). `"olora"`:
Büyükakyüz (arXiv 2406.01775). `"orthogonal"`: A and B in orthogonal subspaces, so that BA = 0 with neither zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .settings import AdapterSettings
from .weights import ExpertWeight


def fill(a: Tensor, b: Tensor, init: bool | str, ranks: Sequence[int], name: str) -> None:
    """Fill A `(E', r, in)` and B `(E', out, r)` in place; what is beyond an expert's rank stays zero.

    Raises `ValueError` for an odd rank with `"orthogonal"`, naming the module.
    """
    kind = init.lower() if isinstance(init, str) else init
    with torch.no_grad():
        if kind == "orthogonal":
            _orthogonal(a, b, ranks, name)
        elif kind == "gaussian":
            for expert in range(a.shape[0]):
                a[expert].normal_(std=1 / ranks[expert if len(ranks) == a.shape[0] else 0])
            b.zero_()
        else:
            _kaiming(a, a.shape[2])
            if kind is True:
                b.zero_()
            else:  # False: both factors random, so that tests see an adapter that does something
                _kaiming(b, b.shape[2])
        clear_padding(a, b, ranks)


def _kaiming(tensor: Tensor, fan_in: int) -> None:
    """The default of `nn.Linear`: uniform in ±1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    tensor.uniform_(-bound, bound)


def clear_padding(a: Tensor, b: Tensor, ranks: Sequence[int]) -> None:
    """Zero what lies beyond each expert's rank."""
    for expert, rank in enumerate(ranks):
        if rank < a.shape[1] and a.shape[0] > expert:
            a[expert, rank:].zero_()
        if rank < b.shape[2] and b.shape[0] > expert:
            b[expert, :, rank:].zero_()


def _orthogonal(a: Tensor, b: Tensor, ranks: Sequence[int], name: str) -> None:
    odd = sorted({rank for rank in ranks if rank % 2})
    if odd:
        raise ValueError(f"{name}: orthogonal initialisation needs even ranks, found {odd}")
    a.zero_()
    b.zero_()
    shared = a.shape[0] != b.shape[0]  # then every expert's factor has to be orthogonal to the one that all share
    q = torch.empty(0)
    for expert in range(max(a.shape[0], b.shape[0])):
        rank = ranks[expert if len(ranks) > 1 else 0]
        if expert == 0 or not shared:
            q, _ = torch.linalg.qr(torch.randn(rank, rank))
        if expert < a.shape[0]:
            a[expert, :rank] = (q[0::2].T @ torch.randn(rank // 2, a.shape[2]) / 10).to(a)
        if expert < b.shape[0]:
            b[expert, :, :rank] = (torch.randn(b.shape[1], rank // 2) @ q[1::2] / 10).to(b)


def decompose(weight: Tensor, init: str, rank: int, scaling: float, name: str) -> tuple[Tensor, Tensor]:
    """A `(rank, in)` and B `(out, rank)` taken out of one expert's `(out, in)` fp32 weight.

    Raises `ValueError` where the rank exceeds the smaller side of the weight.
    """
    if rank > min(weight.shape):
        raise ValueError(
            f"{name}: init_lora_weights={init!r} needs a rank of at most {min(weight.shape)} for a weight of shape "
            f"{tuple(weight.shape)}, found {rank}"
        )
    kind = init.lower()
    if kind == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, rank, niter=int(kind.rpartition("_")[2]))
        vh = v.T
    root = torch.sqrt(s / scaling)
    return root[:, None] * vh, u * root


def take_out(
    store: ExpertWeight,
    experts: Sequence[int],
    rows: slice,
    a: Tensor,
    b: Tensor,
    init: str,
    settings: AdapterSettings,
    nominal: float,
    name: str,
) -> None:
    """Initialise A `(E', r, in)` and B `(E', out, r)` from rows of each expert's weight; the base keeps the rest."""

    def residuals() -> Iterator[tuple[list[int], Tensor]]:
        for position, expert in enumerate(experts):
            rank, scaling = settings.ranks[position], settings.expert_scaling(position, nominal)
            weight = store.materialize([expert], torch.float32)[0]
            part_a, part_b = decompose(weight[rows], init, rank, scaling, name)
            a[position, :rank] = part_a.to(a)
            b[position, :, :rank] = part_b.to(b)
            delta = torch.zeros_like(weight)
            delta[rows] = -scaling * (part_b @ part_a)
            yield [expert], delta.unsqueeze(0)

    with torch.no_grad():
        store.add_(residuals())


def magnitudes(
    store: ExpertWeight,
    experts: Sequence[int],
    rows: slice,
    a: Tensor,
    b: Tensor,
    settings: AdapterSettings,
    nominal: float,
) -> Tensor:
    """DoRA's first magnitudes `(E', out)`: the row norms of `W + scaling B A`, so that the adapter starts neutral."""
    norms = []
    with torch.no_grad():
        for position, expert in enumerate(experts):
            weight = store.materialize([expert], torch.float32)[0][rows]
            low_a, low_b = (factor[position if factor.shape[0] > 1 else 0].to(weight) for factor in (a, b))
            norms.append((weight + settings.expert_scaling(position, nominal) * (low_b @ low_a)).norm(dim=1))
        return torch.stack(norms)
