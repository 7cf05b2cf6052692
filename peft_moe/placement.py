"""Where the tensors of one experts module lie at the time of a call: brought there by accelerate's hooks, or refused.

accelerate leaves offloaded tensors on the meta device and puts hooks around the forward of whatever holds them: of a
stack, of each linear in a list, of each dict of an adapter's factors. A layer calls none of these forwards, so it runs
the hooks itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compat import onload_below
from .ops.linear import FrozenStack
from .ops.scaled import CodedStack

if TYPE_CHECKING:
    from .forward import Experts
    from .layer import MoELoraLayer


def _factors(layer: MoELoraLayer) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for child in layer.projections.values():
        found += child.factors()
    return found


def run(layer: MoELoraLayer, forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`forward(x, *args, **kwargs)` where weights and adapters lie where x does, or once hooks have brought them there.

    Raises `ValueError` where they lie on another device: see `run_onloaded` and `check`.
    """
    if not _is_on(layer, x.device):
        if is_offloaded(layer):
            return run_onloaded(layer, forward, x, *args, **kwargs)
        check(layer, x.device)
    return forward(x, *args, **kwargs)


def _is_on(layer: MoELoraLayer, device: torch.device) -> bool:
    """Whether all weights and adapters of a layer lie on a device that holds values."""
    if device.type == "meta":
        return False
    holders: list[Any] = [*_factors(layer), *layer.stores.values()]
    return all([one.device == device for one in holders])  # a list: a generator takes twice as long


def is_offloaded(layer: MoELoraLayer) -> bool:
    """Whether weights or adapters of a layer lie on the meta device."""
    if any(store.device.type == "meta" for store in layer.stores.values()):
        return True
    return any(factor.device.type == "meta" for factor in _factors(layer))


def check(layer: MoELoraLayer, device: torch.device) -> None:
    """Raise `ValueError` unless weights and adapters lie where the hidden states are."""
    _refuse(layer, device, [(f"weights ({name})", store.device) for name, store in layer.stores.items()])
    check_adapters(layer, device)


def check_adapters(layer: MoELoraLayer, device: torch.device) -> None:
    """Raise `ValueError` unless the adapters lie where the hidden states are."""
    _refuse(layer, device, [("adapters", factor.device) for factor in _factors(layer)])


def _refuse(layer: MoELoraLayer, device: torch.device, found: list[tuple[str, torch.device]]) -> None:
    wrong = {name: place for name, place in found if place != device}
    if not wrong or device.type == "meta":
        return
    where = ", ".join(f"{name} on {place}" for name, place in wrong.items())
    advice = (
        "They are offloaded, and no hook of accelerate loads them: put them on a device, or dispatch the model again."
        if any(place.type == "meta" for place in wrong.values())
        else "Move them together, or dispatch the model with a `device_map` that does not divide an experts module."
    )
    raise ValueError(f"{layer.name}: the hidden states are on {device}, but {where}. {advice}")


@contextmanager
def onloaded(layer: Experts) -> Iterator[None]:
    """Bring everything that is offloaded to its device. Raises `ValueError` for what a hook cannot load again."""
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(onload_below(layer.base_layer, *layer.projections.values()))
            except NotImplementedError as error:
                raise ValueError(
                    f"{layer.name}: accelerate cannot load its offloaded weights again ({error}). Linears of "
                    "bitsandbytes lose their statistics when they are offloaded: keep them on a device. Stacked "
                    "experts can be offloaded."
                ) from error
            yield
    finally:
        for store in layer.stores.values():
            if store.device.type == "meta":
                store.abandon()  # or the list would stay on the device after all


def run_onloaded(layer: MoELoraLayer, run: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`run(x, *args)` with everything that is offloaded brought to its device for the length of the call.

    Raises `ValueError` for what no hook loads, and for offloaded adapters in training: a hook makes new parameters in
    each call, so gradients and updates would be lost.
    """
    if torch.is_grad_enabled() and any(one.requires_grad and one.device.type == "meta" for one in _factors(layer)):
        raise ValueError(
            f"{layer.name}: its adapters are offloaded, so they cannot train: gradients would be lost. Keep the "
            "adapters on a device (attach them after the model was dispatched), or run under `torch.no_grad()`."
        )
    if x.device.type == "meta":
        return run(x, *args, **kwargs)
    with onloaded(layer):
        check(layer, x.device)
        return run(x, *args, **kwargs)


def build_onloaded(layer: Experts, store: Any) -> FrozenStack:
    """What a store's `frozen` gives; what builds weights then finds them in the backward pass, too."""
    stack = store.frozen()
    if isinstance(stack, Tensor):
        return stack

    def build() -> Tensor:
        if store.device.type != "meta":
            return stack()
        with onloaded(layer):
            return stack()

    if not isinstance(stack, CodedStack):
        return build
    return CodedStack(build, lambda: None if store.device.type == "meta" else stack.codes())


def _offloads(modules: Iterable[nn.Module]) -> bool:
    return any(getattr(getattr(one, "_hf_hook", None), "offload", False) for one in modules)


def check_merge(layer: MoELoraLayer) -> None:
    """Raise `ValueError` where a merge would be lost: into weights that hooks load anew for each call.

    Of the hook of the experts module itself PEFT takes care around a merge.
    """
    below = [one for one in layer.base_layer.modules() if one is not layer.base_layer]
    if _offloads(below) or any(store.device.type == "meta" for store in layer.stores.values()):
        raise ValueError(
            f"{layer.name}: its weights are offloaded, and what is merged into them would be lost. Put the model on a "
            "device before merging (load it without offloading)."
        )


def check_start(layer: MoELoraLayer, init: Any) -> None:
    """Raise `ValueError` where the residual that a start leaves (PiSSA, OLoRA) would be lost."""
    if _offloads(layer.base_layer.modules()):
        raise ValueError(
            f"{layer.name}: `init_lora_weights={init!r}` changes the base weights, and these are offloaded: the change "
            "would be lost. Put the model on a device first, or start with `True`."
        )
