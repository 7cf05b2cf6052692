"""What a format is, and what a conversion is before a byte of it is written.

Every conversion starts or ends at the native folder. A format is one module of this package with up to three
functions, put together in a `Format` and listed in `registry.py`:

`export(adapter: NativeAdapter, **options) -> Converted`
    From the native adapter. `adapter.modules` are its experts modules: each knows its path, its slots, and gives
    the factors of a slot as `(E', r, in)` and `(E', out, r)` in the dtype of the file, with `scaling(position)` and
    `ranks[position]` of each adapted expert; `fuse.py` gives them by projection or by linear. `adapter.others` are the
    keys of everything else (attention, saved modules), which usually pass through unchanged with
    `adapter.copied(key)`. Where the format depends on the architecture, `adapter.require_base(reason)` makes sure
    that `adapter.model` and `one.module` are there (without weights). `refusals.check_plain` refuses what only merging
    keeps; what else the format cannot hold is a `ValueError` that says why and what to do instead.
`read(adapter: ForeignAdapter, **options) -> Converted`
    The other way: raw config and tensors of a foreign folder to a native config (`native_config` takes over what
    holds) and native tensors. Options that it does not declare are not passed to it.
`recognises(adapter: ForeignAdapter) -> str | None`
    Why `format="auto"` takes a folder for this format, in words for a message; `None`: it is not. From config and
    keys alone.

A tensor is planned with its key, shape and dtype and made when its turn in the file comes; what `make` holds on to
lives as long as the plan, so it should close over keys, not tensors. Values are written as `make` returns them: a
shape or dtype other than planned is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..merge.produce import Output, buffer, code_of

if TYPE_CHECKING:
    from .foreign import ForeignAdapter


@dataclass(eq=False)
class Planned(Output):
    """One tensor of the result, made when it is written."""

    make: Callable[[], Tensor]

    def parts(self, device: torch.device) -> Iterator[Any]:
        value = self.make()
        if tuple(value.shape) != tuple(self.shape) or code_of(value.dtype) != self.code:
            raise RuntimeError(
                f"{self.key}: made {tuple(value.shape)} {value.dtype}, planned {tuple(self.shape)} {self.code}"
            )
        yield buffer(value)


def planned(key: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Planned:
    """One tensor of the result. Args: make: returns it, `shape` and `dtype`, each time it is called."""
    return Planned(key, code_of(dtype), tuple(shape), make)


@dataclass
class Converted:
    """An adapter in another format.

    Attributes:
        config: the whole of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`, in any order.
        usage: lines of Markdown for the model card: how its consumer loads it.
        facts: more lines for the list of the card: ranks, experts, what was padded or folded.
        metadata: for the header of the file, besides `format: pt`.
    """

    config: dict[str, Any]
    tensors: list[Planned]
    usage: list[str]
    facts: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A format that adapters are converted from or to. See the module.

    Attributes: name: as `format=` and the command line spell it. consumer: who reads it, for messages and cards.
    """

    name: str
    consumer: str
    export: Callable[..., Converted] | None = None
    read: Callable[..., Converted] | None = None
    recognises: Callable[[ForeignAdapter], str | None] | None = None
