"""Modules whose weights stay packed (FP8, MXFP4) on any device: their own forward dequantizes for each call.

Linears become `PackedLinear`. Experts keep their class, so that everything a model says of them still holds: a
subclass with the same name holds the packed tensors and lends the dense ones to the original forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..compat import onload_below
from ..weights import open_modules, open_stacked
from ..weights.built import BuiltWeight

PLAIN = "_plain_weights"  # on a module with packed experts: plain name -> (shape, transposed)


class _FrozenProduct(torch.autograd.Function):
    """`x Wᵀ` with W rebuilt in backward: nothing of the size of W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear, ctx.dtype = linear, x.dtype
        return x @ linear.dense(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with onload_below(ctx.linear):  # where its weight is offloaded again since the forward
            return grads[0].to(ctx.dtype) @ ctx.linear.dense(ctx.dtype), None


class PackedLinear(nn.Linear):
    """A linear whose weight is FP8 with a scale, dequantized for each call to the dtype of its input.

    Args:
        in_features, out_features, bias: see `nn.Linear`. scale_name: `weight_scale_inv` or `weight_scale`.
        scale_shape, scale_dtype: of the scale. block: the block size, if the scales are of blocks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scale_name: str,
        scale_shape: tuple[int, ...],
        scale_dtype: torch.dtype,
        block: tuple[int, int] | None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        codes = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=self.weight.device)
        scale = torch.ones(scale_shape, device=codes.device).to(scale_dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter(scale_name, nn.Parameter(scale, requires_grad=False))
        self.block_size = block

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`(out, in)` in `dtype`."""
        store = open_modules([[self]], (1, self.out_features, self.in_features), "this linear")
        return store.materialize(None, dtype)[0]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.element_size() > 1:  # dequantized since
            return nn.functional.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _FrozenProduct.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class PackedExperts:
    """Mixed into the class of an experts module, whose forward then runs on weights built for the call."""


@functools.cache
def _packed_class(cls: Any) -> type:
    @functools.wraps(cls.forward)  # layouts look at the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        with dense_weights(self, hidden.dtype):
            return cls.forward(self, *args, **kwargs)

    # The same name and module: layouts and quantizers know classes by them.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    return type(cls.__name__, (PackedExperts, cls), names)


def pack_experts(module: nn.Module, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Let an experts module hold packed tensors in the place of plain parameters.

    Args: tensors: name of a plain parameter -> the parameters that take its place, which may include its own name.
    """
    transposed = bool(getattr(module, "is_transposed", False))
    plain = {name: (tuple(getattr(module, name).shape), transposed) for name in tensors}
    for name, packed in tensors.items():
        delattr(module, name)
        for key, tensor in packed.items():
            module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
    setattr(module, PLAIN, plain)
    module._is_hf_initialized = True  # type: ignore[assignment]  # nothing here that could be initialised
    cls: Any = type(module)
    module.__class__ = _packed_class(cls)


def unpack_class(module: nn.Module) -> None:
    """Give an experts module, whose weights are plain again, its own class back."""
    if isinstance(module, PackedExperts):
        module.__class__ = type(module).__mro__[2]
        delattr(module, PLAIN)


@contextmanager
def dense_weights(module: Any, dtype: torch.dtype) -> Iterator[None]:
    """Lend the dequantized weights to a module's own forward, under the names of its plain parameters."""
    lent: dict[str, nn.Parameter | None] = {}
    try:
        for name, (shape, transposed) in getattr(module, PLAIN, {}).items():
            stored = module._parameters.get(name)
            if stored is not None and stored.is_floating_point() and stored.element_size() > 1:
                continue
            rows, cols = (shape[2], shape[1]) if transposed else shape[1:]
            store = open_stacked(module, [(name, transposed, False)], (shape[0], rows, cols), type(module).__name__)
            assert isinstance(store, BuiltWeight)
            dense = store.materialize(None, dtype)
            lent[name] = module._parameters.pop(name, None)
            module.__dict__[name] = dense.transpose(1, 2) if transposed else dense
        yield
    finally:
        for name, stored in lent.items():
            module.__dict__.pop(name, None)
            if stored is not None:
                module._parameters[name] = stored
