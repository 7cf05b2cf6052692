"""A native adapter, read lazily: its experts module by module, everything else by key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter import pad
from ...config import MoELoraConfig
from ...layouts import ProjectionSpec
from ...settings import nominal_scaling, resolve
from .. import native
from ..merge.binding import AdapterFiles, Targeted, targeted_by
from ..merge.source import adapter_folder
from ..shapes import modules_of, spec_of
from .base import Base, missing_base
from .plan import Planned


@dataclass(frozen=True)
class ExpertsAdapter(Targeted):
    """The adapter of one experts module.

    Attributes, besides those of `Targeted`:
        tensors: the file, or what reads like a `TensorFile`.
        nominal: scaling of the adapter's linears, to which that of the experts is relative.
        module: of the base, on the meta device; `None` without a base. Then `spec` is what shapes tell: experts behind
            the last adapted one, biases, orientation, and where gate and up lie in a fused projection are unknown.
    """

    tensors: Any
    nominal: float
    module: Any = None

    @property
    def experts(self) -> Sequence[int]:
        """The indices of the adapted experts, ascending."""
        return self.settings.adapted(self.spec.num_experts)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each adapted expert."""
        return self.settings.ranks

    def scaling(self, position: int) -> float:
        """Of the adapted expert at a position (not its index), to multiply B A with."""
        return self.settings.expert_scaling(position, self.nominal)

    def slots(self) -> list[tuple[ProjectionSpec, str]]:
        """(projection, slot) of every pair of factors: gate and up apart with `split_gate_up`."""
        return [(one, slot) for one in self.projections() for slot in self.settings.slots(one)]

    def dtype(self, slot: str, factor: str) -> torch.dtype:
        """Of a factor in the file."""
        found = self.tensors.entries[self.keys[slot, factor]].dtype
        if found is None or not found.is_floating_point:
            raise ValueError(f"{self.keys[slot, factor]}: found dtype {found}, expected a floating one")
        return found

    def raw(self, slot: str, factor: str) -> Tensor:
        """A factor as it lies in the file."""
        return self.tensors.read(self.keys[slot, factor])

    def factor(self, slot: str, factor: str) -> Tensor:
        """`lora_A (E', r, in)` or `lora_B (E', out, r)` of the adapted experts, r the largest rank, in its own dtype.

        Lower ranks are padded with zeros; a factor that experts share is repeated (a view). No scaling is in it.
        """
        value = self.raw(slot, factor)
        if self.settings.ragged:
            value = pad(value, self.settings)
            return value if factor == "lora_A" else value.transpose(1, 2)
        return value if value.shape[0] == len(self.experts) else value.expand(len(self.experts), -1, -1)

    def factor_of(self, position: int, slot: str, factor: str) -> Tensor:
        """`lora_A (r, in)` or `lora_B (out, r)` of one adapted expert, r its own rank. Only its rows are read."""
        key, rank = self.keys[slot, factor], self.ranks[position]
        if self.settings.ragged:
            first = sum(self.ranks[:position])
            value = self.tensors.read(key, first, first + rank)
            return value if factor == "lora_A" else value.mT
        row = position if self.tensors.entries[key].shape[0] == len(self.experts) else 0  # 0: of a shared factor
        return self.tensors.read(key, row, row + 1)[0]

    def spread(self, value: Tensor) -> Tensor:
        """`(E', ...)` of the adapted experts -> `(E, ...)` of all, zeros for the others."""
        if self.settings.experts is None:
            return value
        zeros = value.new_zeros(self.spec.num_experts, *value.shape[1:])
        return zeros.index_copy_(0, torch.tensor(self.settings.experts), value)


def bind(config: MoELoraConfig, shapes: dict[str, tuple[int, ...]], model: Any, adapter: str) -> list[Targeted]:
    """The experts modules that a native adapter changes. Raises `ValueError` if any of its tensors does not fit.

    Args: shapes: of its file. model: on the meta device. adapter: its name, for messages.
    """
    found = targeted_by(config, shapes, model, adapter)
    used = {key for one in found for key in one.keys.values()}
    native.check_linears({key: shape for key, shape in shapes.items() if key not in used}, model, config, adapter)
    return found


class NativeAdapter:
    """An adapter in the native format.

    Args: path: a folder, or an adapter in the hub's local cache. find: gives the base, if it is here.

    Attributes:
        folder, name, config, tensors: its files. base: its base, or `None`. model: of the base, on the meta device.
        modules: its experts modules, with the paths of the base's model where there is one.
        others: keys of all other tensors.

    Raises `ValueError` for files that are damaged, or do not fit the base.
    """

    def __init__(self, path: str | Path, base: Base | None) -> None:
        self.files = AdapterFiles(adapter_folder(path), stock=True)
        if not isinstance(self.files.config, MoELoraConfig):
            raise ValueError(
                f"{self.files.folder} is not in the native format of peft-moe (MOELORA), which every export starts "
                "from. Import it first: `peft_moe.import_adapter(src, dst)`, or `peft-moe convert SRC DST`."
            )
        self.folder, self.name, self.tensors = self.files.folder, self.files.name, self.files.tensors
        self.config: MoELoraConfig = self.files.config
        self.base = base
        self.model: Any = None
        if base is None:
            found = [self._from_shapes(name, keys) for name, keys in modules_of(self.files).items()]
            modules = [(one, None) for one in found]
        else:
            self.model, bound = base.first(self._bind)
            modules = [(one, self.model.get_submodule(one.name)) for one in bound]
        nominal = nominal_scaling(self.config)
        self.modules = [
            ExpertsAdapter(one.name, one.spec, one.settings, one.keys, self.tensors, nominal, module)
            for one, module in modules
        ]
        experts = native.expert_keys(self.tensors.entries)
        self.others = [key for key in self.tensors.entries if key not in experts]

    def require_base(self, reason: str) -> Base:
        """The base. Raises `ValueError` with the reason and the option that names it if it is not here."""
        if self.base is None:
            raise missing_base(self.name, self.config.base_model_name_or_path, reason)
        return self.base

    def copied(self, key: str, new: str | None = None) -> Planned:
        """A tensor as it is, under its own name or a new one."""
        entry = self.tensors.entries[key]
        return Planned(new or key, entry.code, entry.shape, lambda: self.tensors.read(key))

    def _bind(self, model: Any) -> list[Targeted]:
        return bind(self.config, self.files.shapes(), model, self.name)

    def _from_shapes(self, name: str, keys: dict[tuple[str, str], str]) -> Targeted:
        spec = spec_of(self.files, name, keys)
        settings = resolve(self.config, spec, name)
        expected = native.expected_shapes(name, spec, settings)
        found = {native.full_key(key): self.tensors.entries[key].shape for key in keys.values()}
        native.check_shapes(found, expected, self.name)
        return Targeted(name, spec, settings, keys)
