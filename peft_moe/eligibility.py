"""When frozen experts can run grouped: what is looked at, and how a change of it is noticed cheaply.

`reason_against` looks at every expert and every projection. It is asked again when a `Watch` says that something has
changed, which takes no loop in Python over the experts and no word from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn

from .compat import BaseTunerLayer
from .layouts import ExpertsSpec
from .weights import DENSE_DTYPES
from .weights.house import pointers

# Linears whose forward multiplies with what a store reads, and does nothing else that counts.
_LINEARS = {
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "transformers.integrations.finegrained_fp8.FP8Linear",
    "compressed_tensors.linear.compressed_linear.CompressedLinear",
}
_TENSORS = ("Parameter", "Tensor", "Params4bit", "Int8Params")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What may be set on a module anew under the name it has already: a count of attributes does not tell.
_SETTINGS = {name: methodcaller("get", name) for name in ("forward", "_old_forward", "_hf_hook", "compute_dtype")}
_requires_grad = attrgetter("requires_grad")
_values_of = methodcaller("values")
# Looked up each time: tools put another dict of parameters in the place of a module's.
_parameters_of, _children_of = itemgetter("_parameters"), itemgetter("_modules")


def class_path(value: object) -> str:
    """Module and name of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def expert_linears(container: Any, spec: ExpertsSpec) -> list[tuple[str, Any]]:
    """(path below the container, linear) of every projection of every expert of a list."""
    paths = [f"{expert}.{part.path}" for one in spec.projections for expert in spec.experts for part in one.parts]
    return [(path, container.get_submodule(path.rstrip("."))) for path in paths]


def stacked_parameters(module: Any, spec: ExpertsSpec) -> list[tuple[str, Any]]:
    """(path below the module, parameter) of every stack and bias of stacked experts."""
    paths = [part.path for one in spec.projections for part in one.parts]
    paths += [bias for one in spec.projections for bias in one.bias]
    found = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        found.append((path, (module.get_submodule(owner) if owner else module)._parameters.get(name)))
    return found


def reason_against(container: Any, spec: ExpertsSpec) -> str | None:
    """Why these experts cannot run grouped as they stand; `None` if they can.

    Weights that require a gradient are no reason here: without gradients they run grouped, see `trains`.
    """
    if not spec.experts:
        return _against_stack(container, spec)
    if not isinstance(container, (nn.ModuleList, nn.ModuleDict)):
        return f"its experts are held by a {class_path(container)}"
    for name, module in container.named_modules():
        reason = _against_module(module)
        if reason is not None:
            return f"{name or 'the list of experts'} {reason}"
    linears = expert_linears(container, spec)
    for path, linear in linears:
        if type(linear).forward is not nn.Linear.forward and class_path(linear) not in _LINEARS:
            return f"{path} is a {class_path(linear)}, whose forward may do more than multiply"
        if "weight" not in linear._parameters:
            return f"{path} has no parameter `weight`"
        if linear.bias is not None:
            return f"{path} has a bias"
    return _against_tensors([(path, linear.weight) for path, linear in linears]) or _one_kind(linears)


def _against_stack(module: Any, spec: ExpertsSpec) -> str | None:
    parameters = stacked_parameters(module, spec)
    for path, parameter in parameters:
        if parameter is None:
            return f"{path} is computed (a parametrization, or an adapter that changes weights)"
    return _against_tensors(parameters)


def _against_module(module: Any) -> str | None:
    """Why calling a module is more than its class's forward; `None` if it is not."""
    if isinstance(module, BaseTunerLayer):
        return "carries an adapter"
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "has hooks"
    if vars(module).get("_is_fsdp_managed_module"):  # its weights are whole for the length of a call alone
        return "is sharded by FSDP"
    hook = vars(module).get("_hf_hook")
    if hook is not None and not all(_only_moves_inputs(one) for one in getattr(hook, "hooks", (hook,))):
        return f"is offloaded or has a hook of accelerate ({type(hook).__name__})"
    forward = vars(module).get("_old_forward" if hook is not None else "forward")
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return None
    if hasattr(module, "quantization_scheme"):  # compressed-tensors; its weights are read by their scales
        return None
    return "has a forward of its own"


def _only_moves_inputs(hook: Any) -> bool:
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def _against_tensors(named: Sequence[tuple[str, Any]]) -> str | None:
    if len({id(tensor) for _, tensor in named}) < len(named):
        return "several of its experts share one weight"
    for path, tensor in named:
        if type(tensor).__name__ not in _TENSORS:
            return f"{path} is a {class_path(tensor)}, which no store reads"
        if tensor.device.type == "meta":
            return f"{path} is on the meta device (offloaded, or not loaded)"
        if type(tensor.data).__name__ not in _TENSORS:
            return f"{path} holds a {class_path(tensor.data)}: it is sharded, or quantized in a way no store reads"
    devices = sorted({str(tensor.device) for _, tensor in named})
    return f"its experts lie on several devices: {', '.join(devices)}" if len(devices) > 1 else None


def _one_kind(linears: Sequence[tuple[str, Any]]) -> str | None:
    dense = {linear.weight.dtype for _, linear in linears if linear.weight.dtype in DENSE_DTYPES}
    if len(dense) > 1:
        return f"its experts are held in several dtypes: {', '.join(sorted(map(str, dense)))}"
    compute = {getattr(linear, "compute_dtype", None) for _, linear in linears} - {None}  # taken from the first input
    if len(compute) > 1:
        return f"its experts compute in several dtypes: {', '.join(sorted(map(str, compute)))}"
    return None


class Watch:
    """Remembers what experts are made of, and says whether that is still so.

    Noticed: another module or parameter in the place of one, another storage of a weight, a weight that begins or
    ceases to require a gradient, hooks, attributes set on a module (a forward, an offload hook, a compute dtype).

    Args: container: of the experts. everything: all modules below it too.

    Attributes: trains: whether a weight requires a gradient.
    """

    def __init__(self, container: Any, everything: bool = True) -> None:
        modules = list(container.modules()) if everything else [container]
        self._modules, self._classes = modules, list(map(type, modules))
        self._forwards: list[tuple[Any, Any]] = [(kind, _forward_of(kind)) for kind in set(self._classes)]
        self._attributes = [vars(module) for module in modules]
        self._hooks = [vars(module)[hooks] for module in modules for hooks in _HOOKS if hooks in vars(module)]
        self._children = list(_values(map(_children_of, self._attributes)))
        self._held = list(_values(map(_parameters_of, self._attributes)))
        self._tensors = [tensor for tensor in self._held if tensor is not None]
        self._sizes, self._places = self._count(), pointers(self._tensors)
        self._having = {get: [one for one in self._attributes if name in one] for name, get in _SETTINGS.items()}
        self._settings = list(self._set())
        self._hooked = any(self._hooks)
        self.trains = self._any_trains()

    def _count(self) -> list[list[int]]:
        everything = self._attributes
        dicts: Any = (everything, map(_children_of, everything), map(_parameters_of, everything))
        return [list(map(len, found)) for found in dicts]

    def _set(self) -> Iterator[Any]:
        return chain.from_iterable(map(get, having) for get, having in self._having.items())

    def _any_trains(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return any(map(_requires_grad, self._tensors))

    def unchanged(self) -> bool:
        """Whether all is as it was when the watch was made."""
        return (
            self._count() == self._sizes
            and any(self._hooks) == self._hooked
            and all(map(is_, self._set(), self._settings))
            and all(map(is_, map(type, self._modules), self._classes))
            and all(_forward_of(kind) is forward for kind, forward in self._forwards)
            and all(map(is_, _values(map(_children_of, self._attributes)), self._children))
            and all(map(is_, _values(map(_parameters_of, self._attributes)), self._held))
            and pointers(self._tensors) == self._places
            and self._any_trains() == self.trains
        )


def _forward_of(kind: Any) -> Any:
    return kind.forward


def _values(dicts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(_values_of, dicts))  # compressed-tensors holds parameters in a mapping of its own
