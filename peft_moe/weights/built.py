"""Weights that are not held in 16 bits: built for each product, lent for that product, or kept.

What all packed storages share. A storage is cut into pieces, each one tensor of the base (and what belongs to it): a
stacked parameter of all experts, or the weight of one linear of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import workspace
from .dense import DENSE_DTYPES

_CHUNK_ELEMENTS = 2**25  # of the fp32 temporary in which codes meet their scales


class Piece(Protocol):
    """One tensor of the base with what belongs to it, and the rows of the projection that it fills.

    `rows`: which rows. `expert`: whose, `None` for a tensor of all experts. `transposed`: held as `(in, out)`.
    """

    rows: slice
    expert: int | None
    transposed: bool

    @property
    def elements(self) -> int:
        """Weights of one expert."""

    @property
    def source(self) -> tuple[Any, str]:
        """The module that holds it, and its name there."""

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors of the base: the weight first, then its scale."""

    def check(self) -> None:
        """Raise `ValueError` for a weight that cannot be read."""

    def dequantize(self, experts: Sequence[int] | slice, wide: torch.dtype) -> Tensor:
        """`(E', rows, cols)` in fp32 or fp64, as stored: not transposed."""

    def dequantize_into(self, out: Tensor) -> bool:
        """Write the weights of all experts into `(E, rows, cols)` by a kernel of their own; False: there is none."""

    def densify(self, dtype: torch.dtype) -> None:
        """Replace the stored tensors by one plain parameter."""


def split_path(module: Any, path: str) -> tuple[Any, str]:
    """The module that holds a parameter at a dotted path, and the parameter's name in it."""
    owner, _, name = path.rpartition(".")
    return (module.get_submodule(owner) if owner else module), name


def chunks(experts: int, elements: int) -> Iterator[slice]:
    """Slices of the experts, each of about `_CHUNK_ELEMENTS` elements in all."""
    step = max(1, _CHUNK_ELEMENTS // max(1, elements))
    for start in range(0, experts, step):
        yield slice(start, min(start + step, experts))


def stated_dtype(module: Any) -> torch.dtype:
    """The dtype in which a module's config says that the model computes; bfloat16 if it says none."""
    config = getattr(module, "config", None)
    for name in ("dtype", "torch_dtype"):
        found = getattr(config, name, None)
        if found in DENSE_DTYPES:
            return found
    return torch.bfloat16


class JoinedHouse(Protocol):
    """The tensors of a list of linears, housed in one: all experts are read at once."""

    def joined(self) -> Any:
        """All of them as one; `None` if they differ."""

    def fill(self, joined: Any, out: Tensor) -> None:
        """Write the weights of what `joined` gave into a contiguous `(E, out, in)`."""

    def versions(self) -> list[int]:
        """Changes when any of them is written to."""

    def release(self) -> None:
        """Give each tensor a storage of its own again."""

    def abandon(self) -> None:
        """Forget the storage, which others house anew."""


class BuiltWeight:
    """The reading side of a packed store.

    Args:
        pieces: the tensors that hold it. shape: `(E, out, in)`. name: path of the module, for messages.
        dtype: in which the base computes. `activation_dtype` may be set later: the tuner sets it to the dtype of the
            model's activations.

    Raises `ValueError` for a weight that cannot be read.
    """

    house: JoinedHouse | None = None  # of a list of linears

    @property
    def packed(self) -> bool:
        """Whether the weights are codes and scales still: `densify` brings them into 16 bits."""
        return any(len(piece.parameters) > 1 for piece in self.pieces)

    def __init__(self, pieces: Sequence[Any], shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
        self.pieces: list[Any] = list(pieces)
        self.shape, self.name = shape, name
        self.activation_dtype = dtype
        self._keep_built = False
        self._kept: tuple[Any, Tensor] | None = None
        for piece in self.pieces:
            piece.check()

    @property
    def dtype(self) -> torch.dtype:
        return self.activation_dtype

    @property
    def device(self) -> torch.device:
        return self.pieces[0].parameters[0].device

    @property
    def keep_built(self) -> bool:
        """Whether the 16-bit weights are kept after they were built."""
        return self._keep_built

    @keep_built.setter
    def keep_built(self, keep: bool) -> None:
        self._keep_built = keep
        if not keep:
            self._kept = None

    def freeze(self) -> None:
        for piece in self.pieces:
            for tensor in piece.parameters:
                tensor.requires_grad_(False)

    # --- reading -------------------------------------------------------------------------------------------------

    def _check_devices(self) -> None:
        devices = {tensor.device for piece in self.pieces for tensor in piece.parameters}
        if any(device.type == "meta" for device in devices):
            raise ValueError(
                f"{self.name}: expert weights are on the meta device at the time of the call: they are offloaded, and "
                "nothing loaded them. Keep the experts on a device, or offload whole layers."
            )
        if len(devices) > 1:
            raise ValueError(
                f"{self.name}: weights and scales of one projection lie on several devices "
                f"{sorted(map(str, devices))}; expected one."
            )

    @torch.no_grad()
    def _fill(self, out: Tensor, experts: Sequence[int], wide: torch.dtype) -> Tensor:
        """Write the weights of these experts into `(E', out, in)`."""
        everything = len(experts) == self.shape[0] and list(experts) == list(range(self.shape[0]))
        places: dict[int, list[int]] = {}
        for position, expert in enumerate(experts):
            places.setdefault(expert, []).append(position)
        for piece in self.pieces:
            target = out[:, piece.rows]
            target = target.transpose(1, 2) if piece.transposed else target
            if piece.expert is not None:
                for position in places.get(piece.expert, ()):
                    target[position] = piece.dequantize([0], wide)[0]
                continue
            if everything and piece.dequantize_into(target):
                continue
            for chunk in chunks(len(experts), piece.elements):
                target[chunk] = piece.dequantize(chunk if everything else list(experts[chunk]), wide)
        return out

    def materialize(self, experts: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """`(E', out, in)`, summed up in fp32 (fp64 for fp64) and rounded once to `dtype`."""
        self._check_devices()
        chosen, dtype = range(self.shape[0]) if experts is None else experts, dtype or self.dtype
        out = torch.empty(len(chosen), *self.shape[1:], dtype=dtype, device=self.device)
        return self._fill(out, chosen, torch.promote_types(dtype, torch.float32))

    def build(self) -> Tensor:
        """The whole stack in the compute dtype: lent for one product, or kept."""
        return self._build(self._check(), self.dtype)

    def _check(self) -> Any:
        """What all experts are read from at once, or `None`; the tensors are where they have to be."""
        joined = None if self.house is None else self.house.joined()
        if joined is None:
            self._check_devices()
        return joined

    def _build(self, joined: Any, dtype: torch.dtype) -> Tensor:
        if not self.keep_built:
            return self._build_into(self._space(workspace.borrow, dtype), joined)
        if joined is not None:
            assert self.house is not None
            key: tuple[Any, ...] = (dtype, joined, *self.house.versions())
        else:
            key = (dtype, *[(t.data_ptr(), t.dtype, t._version) for p in self.pieces for t in p.parameters])
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # free it before the next one is made
            self._kept = (key, self._build_into(self._space(_empty, dtype), joined))
        return self._kept[1]

    @torch.no_grad()
    def _build_into(self, out: Tensor, joined: Any) -> Tensor:
        if joined is None:
            return self._fill(out, range(self.shape[0]), torch.promote_types(out.dtype, torch.float32))
        assert self.house is not None
        self.house.fill(joined, out)
        return out

    def _space(self, make: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        """A tensor `(E, out, in)`, in the orientation in which the base holds it."""
        experts, rows, cols = self.shape
        if all(piece.transposed for piece in self.pieces):
            return make((experts, cols, rows), dtype, self.device).transpose(1, 2)
        return make(self.shape, dtype, self.device)

    def frozen(self) -> Callable[[], Tensor]:
        """What builds the stack, in forward and again in backward; what can be wrong is looked at here, once."""
        return partial(self._build, self._check(), self.dtype)

    def prepare(self) -> None:
        """House the codes of a list now."""
        if self.house is not None and self.device.type != "meta":
            self.house.joined()

    def release(self) -> None:
        """Give each tensor a storage of its own again, and forget what was built."""
        if self.house is not None:
            self.house.release()
        self._kept = None

    def abandon(self) -> None:
        """See `ExpertWeight.abandon`."""
        if self.house is not None:
            self.house.abandon()
        self._kept = None

    def same_source(self, other: BuiltWeight) -> bool:
        """See `ExpertWeight.same_source`."""
        return [piece.source for piece in self.pieces] == [piece.source for piece in other.pieces]

    @torch.no_grad()
    def snapshot(self) -> list[list[Tensor]]:
        """A copy of all stored bytes: weights and scales."""
        return [[tensor.detach().clone() for tensor in piece.parameters] for piece in self.pieces]

    @torch.no_grad()
    def restore(self, snapshot: list[list[Tensor]]) -> None:
        """Put them back, bit for bit."""
        for piece, saved in zip(self.pieces, snapshot, strict=True):
            if len(saved) != len(piece.parameters):  # decompressed since
                piece.put(saved)
                continue
            for tensor, value in zip(piece.parameters, saved, strict=True):
                tensor.data.copy_(value)
        self._kept = None

    def densify(self, dtype: torch.dtype) -> None:
        """Replace the packed tensors by plain parameters and drop their scales; cast those that are plain already."""
        for piece in self.pieces:
            if len(piece.parameters) > 1:
                piece.densify(dtype)
            else:
                (parameter,) = piece.parameters
                parameter.data = parameter.data.to(dtype)
        self.activation_dtype, self._kept = dtype, None

    def __repr__(self) -> str:
        kinds = sorted({str(piece.parameters[0].dtype).removeprefix("torch.") for piece in self.pieces})
        kept = "kept" if self.keep_built else "for each call"
        return f"{type(self).__name__}({tuple(self.shape)}, {'/'.join(kinds)}, dequantized to {self.dtype} {kept})"


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=device)
