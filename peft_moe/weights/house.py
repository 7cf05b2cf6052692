"""Tensors of many modules, re-housed side by side in one flat tensor that each of them becomes a view of.

Names, state dicts and saving stay as they were, and nothing is held twice. Each tensor keeps a storage object of its
own, which begins where the tensor does: tools that save take tensors of one storage for tied ones, and drop all but
one. Whatever replaces the memory of a tensor (a move, a cast, a hook) is noticed by the next call, which houses them
anew. Every call asks that question, so functions of C answer it: no loop in Python over the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

_version = attrgetter("_version")


class CannotBeHoused(ValueError):
    """The tensors stay where they are; they can be read one by one."""


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    """Where tensors lie. Subclasses of tensors (those of bitsandbytes) are not asked, which would call Python."""
    with torch._C.DisableTorchFunctionSubclass():
        return list(map(Tensor.data_ptr, tensors))


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory under a storage object that ends where the view ends; it keeps the memory alive."""
    return from_dlpack(to_dlpack(view.view(-1).view(torch.uint8))).view(view.dtype).view(view.shape)


class House:
    """What houses tensors have in common; subclasses say which tensors, and how one is replaced by its view.

    Attributes: flat: all of them, one after the other; `None` before the first call and after `release`.
    """

    def __init__(self) -> None:
        self.flat: Tensor | None = None
        self._pointers: list[int] = []

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now, in the order in which they lie."""
        raise NotImplementedError

    def put(self, number: int, value: Tensor) -> None:
        """Give a tensor another storage: a view of `flat`, or one of its own."""
        self.tensors()[number].data = value

    def is_current(self) -> bool:
        """Whether all of them are still views of `flat`."""
        if self.flat is None:
            return False
        try:
            return pointers(self.tensors()) == self._pointers
        except (KeyError, AttributeError):  # a scale that has gone with its codes
            return False

    def versions(self) -> list[int]:
        """A number for each tensor that changes when it is written to."""
        return list(map(_version, self.tensors()))

    def check(self, tensors: list[Tensor]) -> None:
        """Raise `ValueError` for tensors that cannot lie in one."""
        if any(tensor.device.type == "meta" for tensor in tensors):
            raise ValueError(
                "expert weights are on the meta device at the time of the call: they are offloaded, and nothing "
                "loaded them. Keep the experts on a device, or offload whole layers."
            )
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(f"the experts of one module lie on several devices {sorted(map(str, devices))}")
        if len(set(pointers(tensors))) < len(tensors):
            raise ValueError("several experts of one module share one weight: they cannot be housed side by side")
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise ValueError(f"the experts of one module are held in several dtypes {sorted(map(str, dtypes))}")

    @torch.inference_mode(False)  # the storage outlives this call, and training may follow
    @torch.no_grad()
    def move_in(self) -> Tensor:
        """House the tensors, if they are not housed already. Returns `flat`."""
        if self.is_current():
            assert self.flat is not None
            return self.flat
        tensors = self.tensors()
        self.check(tensors)
        self.flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors)).as_subclass(Tensor)
        start, places = 0, []
        for number, tensor in enumerate(tensors):
            view = self.flat[start : start + tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            self.put(number, _with_own_storage(view))
            places.append(view.data_ptr())
            start += tensor.numel()
        self._pointers = pointers(self.tensors())
        if self._pointers != places:  # the modules hand out copies, as those that compressed-tensors may offload
            self.flat = None
            raise CannotBeHoused("the modules of the experts do not take another storage for their tensors")
        return self.flat

    @torch.compiler.assume_constant_result
    def settle(self) -> None:
        """House the tensors while a graph is traced, where they can be; `flat` is `None` where they cannot."""
        if any(tensor.device.type == "meta" for tensor in self.tensors()):
            self.flat = None
            return
        try:
            self.move_in()
        except CannotBeHoused:
            self.flat = None

    @torch.no_grad()
    def release(self) -> None:
        """Give each tensor a storage of its own again."""
        if self.is_current():
            for number, tensor in enumerate(self.tensors()):
                self.put(number, tensor.data.clone())
        self.abandon()

    def abandon(self) -> None:
        """Forget the storage, which others house anew."""
        self.flat = None

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and files: their tensors have other storages, and `flat` would only double them."""
        return vars(self) | {"flat": None}


class NamedHouse(House):
    """The tensors of one name, parameters or buffers, of many modules, in the order given."""

    def __init__(self, modules: Sequence[Any], name: str) -> None:
        super().__init__()
        self._owners = [module.get_base_layer() if hasattr(module, "get_base_layer") else module for module in modules]
        # Not the dict of parameters: tools put another in its place.
        self._of_kind = attrgetter("_parameters" if name in self._owners[0]._parameters else "_buffers")
        self._of_name = itemgetter(name)

    def tensors(self) -> list[Tensor]:
        return list(map(self._of_name, map(self._of_kind, self._owners)))

    def check(self, tensors: list[Tensor]) -> None:
        """See `House.check`. FSDP fills the storage that it gave its parameters: another would hold old weights."""
        if any(getattr(owner, "_is_fsdp_managed_module", False) for owner in self._owners):
            self.flat = None
            raise CannotBeHoused("FSDP shards the weights of the experts")
        super().check(tensors)


class WeightHouse(NamedHouse):
    """The weights of linears."""

    def __init__(self, linears: Sequence[Any]) -> None:
        super().__init__(linears, "weight")
