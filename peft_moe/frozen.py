"""The experts of one module as they are, without adapters: what the grouped forward of frozen experts runs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import forward
from .layouts import ExpertsSpec
from .layouts.blocks_common import linear_output_dtype
from .stores import open_store
from .weights import ExpertWeight


class FrozenExperts(forward.RunsExperts):
    """Runs the experts of one module grouped. No module itself, so that the model's own names stay as they are.

    Args:
        base_layer: the experts module. spec: what `layouts.describe` says of it. name: its path, for messages.
        backend: see `ops.backends`. keep_built: keep the 16-bit weights of packed experts after they were built.
        stores: those of a layer that adapts the same experts and is idle; `None`: stores of its own.

    Raises `ValueError` for weights that no store can read.
    """

    adapters: ClassVar[dict[str, Any]] = {}
    projections: ClassVar[dict[str, Any]] = {}
    scaling: ClassVar[dict[str, Any]] = {}
    active: ClassVar[list[str]] = []
    mixed_batch = None
    training = False

    def __init__(
        self,
        base_layer: nn.Module,
        spec: ExpertsSpec,
        name: str,
        backend: str = "auto",
        keep_built: bool = False,
        stores: dict[str, ExpertWeight] | None = None,
    ) -> None:
        self.base_layer, self.spec, self.name, self.backend = base_layer, spec, name, backend
        self.owns_stores = stores is None
        self.stores = stores or {one.name: open_store(base_layer, spec, one, name) for one in spec.projections}
        for store in self.stores.values() if self.owns_stores else ():
            store.keep_built = keep_built

    def run_experts(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `RunsExperts.run_experts`. Packed experts compute in the dtype of x, where they state none."""
        for store in self.stores.values():
            if store.packed:
                store.activation_dtype = linear_output_dtype(x)  # type: ignore[attr-defined]
        return super().run_experts(x, *args, **kwargs)

    def reason_against(self, x: Tensor) -> str | None:
        """Why the base itself has to run on this input: only it knows what to do, or to raise. `None`: no reason."""
        store = next(iter(self.stores.values()))
        if x.device != store.device:
            return f"its experts lie on {store.device}, its input on {x.device}"
        if store.packed and x.device.type == "cpu" and self.spec.experts and not torch.is_grad_enabled():
            return "packed experts on a CPU, without gradients: their own linears dequantize only what is routed to"
        follows_autocast = torch.is_autocast_enabled(x.device.type)
        if self.spec.experts and not store.packed and not follows_autocast and x.dtype != store.dtype:
            return f"its experts are held in {store.dtype}, its input comes in {x.dtype}"
        return None

    def holds_the_same(self, other: FrozenExperts) -> bool:
        """Whether the stores of both read the same modules in the same way."""
        return (
            self.owns_stores
            and self.spec == other.spec
            and all(
                type(store) is type(theirs) and store.same_source(theirs)
                for store, theirs in zip(self.stores.values(), other.stores.values(), strict=True)
            )
        )

    def prepare(self) -> None:
        """Do now what the next call would do first: house the weights of a list."""
        for store in self.stores.values():
            store.prepare()

    def abandon(self) -> None:
        """Forget what was made of the weights: others house them anew."""
        for store in self.stores.values() if self.owns_stores else ():
            store.abandon()

    def release(self) -> None:
        """Give each weight a storage of its own again."""
        for store in self.stores.values() if self.owns_stores else ():
            store.release()
