"""Weights in 16, 32 or 64 bit: stacked 3-D parameters, and lists of expert modules re-housed in one stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.grouped import log_once
from ..ops.linear import FrozenStack
from .house import CannotBeHoused, WeightHouse

DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def parameter_at(module: nn.Module, path: str) -> Any:
    """The parameter at a dotted path below a module, `mlp.w1`."""
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner) if owner else module, name)


def check_dense(tensor: Tensor, path: str) -> None:
    """Raise `ValueError` unless the tensor holds plain floating-point weights of at least 16 bits.

    Packed or scaled codes (bitsandbytes, FP8, MXFP4) are never cast: without their scales that is silent corruption.
    """
    if tensor.dtype not in DENSE_DTYPES:
        raise ValueError(
            f"{path}: expert weights are stored as {tensor.dtype}, which this version cannot adapt; expected one of "
            f"{', '.join(str(dtype) for dtype in DENSE_DTYPES)}. Load the model dequantized, for example with "
            "`dtype=torch.bfloat16` and without a quantization config."
        )


def _add_rounded_once(target: Tensor, delta: Tensor) -> None:
    wide = torch.promote_types(target.dtype, torch.float32)
    target.copy_(target.to(wide) + delta.to(device=target.device, dtype=wide))


class _Dense:
    """What both dense stores share, given `_rows(expert)`: the views `(rows, in)` of one expert that fill its out."""

    shape: tuple[int, int, int]
    packed = False
    keep_built = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    def _tensors(self) -> list[Tensor]:
        raise NotImplementedError

    def prepare(self) -> None:
        """See `ExpertWeight.prepare`: nothing to do."""

    def release(self) -> None:
        """See `ExpertWeight.release`: nothing was made."""

    def abandon(self) -> None:
        """See `ExpertWeight.abandon`: nothing was made."""

    def _rows(self, expert: int) -> list[Tensor]:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    def freeze(self) -> None:
        for tensor in self._tensors():
            tensor.requires_grad_(False)

    @torch.no_grad()
    def materialize(self, experts: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        chosen = range(self.shape[0]) if experts is None else experts
        return torch.stack([torch.cat(self._rows(expert)) for expert in chosen]).to(dtype or self.dtype)

    @torch.no_grad()
    def add_(self, deltas: Iterable[tuple[Sequence[int], Tensor]]) -> None:
        for experts, delta in deltas:
            for value, expert in zip(delta, experts, strict=True):
                start = 0
                for rows in self._rows(expert):
                    _add_rounded_once(rows, value[start : start + rows.shape[0]])
                    start += rows.shape[0]

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        for tensor, saved in zip(self._tensors(), snapshot, strict=True):
            tensor.copy_(saved)


class DenseStack(_Dense):
    """One or more stacked parameters whose rows follow each other.

    Args:
        module: the experts module. parts: `(path, transposed, flat)` of each tensor, see `layouts.spec.Part`.
        shape: `(E, out, in)`. A tensor may hold more experts than E (identity experts): the first E count.
    """

    def __init__(
        self, module: nn.Module, parts: Sequence[tuple[str, bool, bool]], shape: tuple[int, int, int], name: str
    ) -> None:
        self.module, self.parts, self.shape = module, tuple(parts), shape
        for path, _, _ in self.parts:
            check_dense(parameter_at(module, path), f"{name}.{path}")

    def _tensors(self) -> list[Tensor]:
        return [parameter_at(self.module, path).data for path, _, _ in self.parts]

    def freeze(self) -> None:
        for path, _, _ in self.parts:
            parameter_at(self.module, path).requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return parameter_at(self.module, self.parts[0][0]).dtype

    @property
    def device(self) -> torch.device:
        return parameter_at(self.module, self.parts[0][0]).device

    def _stacks(self) -> list[Tensor]:
        """Views `(E, rows, in)`."""
        found = []
        for path, transposed, flat in self.parts:
            tensor = parameter_at(self.module, path).detach()
            if flat:
                tensor = tensor.view(self.shape[0], -1, tensor.shape[-1])
            if tensor.shape[0] != self.shape[0]:
                tensor = tensor[: self.shape[0]]
            found.append(tensor.transpose(1, 2) if transposed else tensor)
        return found

    def _rows(self, expert: int) -> list[Tensor]:
        return [stack[expert] for stack in self._stacks()]

    def same_source(self, other: DenseStack) -> bool:
        """See `ExpertWeight.same_source`."""
        return self.module is other.module and self.parts == other.parts

    def build(self) -> Tensor:
        """The `(E, out, in)` tensor; a view where one parameter holds it all."""
        stacks = self._stacks()
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks, dim=1)

    def frozen(self) -> FrozenStack:
        return self.build() if len(self.parts) == 1 else self.build


class ModuleStack(_Dense):
    """The linears of a list of expert modules, housed in one `(E, out, in)` tensor; see `house`.

    Args:
        linears: for each expert its linears, in the order in which their rows follow each other.
        shape: `(E, out, in)`. path: of the experts module, for errors.
    """

    def __init__(self, linears: Sequence[Sequence[Any]], shape: tuple[int, int, int], path: str) -> None:
        self.linears, self.shape, self.path = [list(expert) for expert in linears], shape, path
        self._handed_out = False
        self.house = WeightHouse([linear for expert in self.linears for linear in expert])
        for expert, modules in enumerate(self.linears):
            for linear in modules:
                check_dense(linear.weight, f"{path}.{expert}")

    def _tensors(self) -> list[Tensor]:
        return [linear.weight.data for modules in self.linears for linear in modules]

    def freeze(self) -> None:
        for modules in self.linears:
            for linear in modules:
                linear.weight.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.linears[0][0].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.linears[0][0].weight.device

    def _rows(self, expert: int) -> list[Tensor]:
        return [linear.weight.data for linear in self.linears[expert]]

    def prepare(self) -> None:
        """House the weights now."""
        if self.device.type != "meta":
            self._flat()

    def release(self) -> None:
        """Give each module's weight a storage of its own again."""
        self.house.release()

    def abandon(self) -> None:
        """See `ExpertWeight.abandon`."""
        self.house.abandon()

    def same_source(self, other: ModuleStack) -> bool:
        """See `ExpertWeight.same_source`."""
        return self.linears == other.linears

    def _flat(self) -> Tensor | None:
        if self._handed_out:
            return None
        try:
            if not torch.compiler.is_compiling():
                return self.house.move_in()
            if torch.compiler.is_dynamo_compiling():  # the weights are tensors still, and may have moved
                self.house.settle()
            return self.house.flat
        except CannotBeHoused as reason:
            self._handed_out = True
            log_once(f"{self.path}: {reason}, so they are gathered in each call")
            return None

    def frozen(self) -> FrozenStack:
        """The `(E, out, in)` stack, which the modules' weights are views of."""
        flat = self._flat()
        return self.materialize if flat is None else flat.view(self.shape)
