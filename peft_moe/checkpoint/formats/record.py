"""What a native adapter was, noted in the header of the file it is exported to, so that it comes back bit for bit.

Ranks that were padded, experts that were left out, gate and up that had an A each: other formats cannot say so. The
note is believed only where the tensors agree with it; readers of other formats pass it over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...adapter import pack
from ...config import MoELoraConfig
from ...layouts import ExpertsSpec, ProjectionSpec
from ...settings import decomposes, nominal_scaling, resolve
from .. import native
from ..header import DTYPES
from ..shapes import MOST_EXPERTS
from .foreign import ForeignAdapter, config_dict, native_config
from .fuse import full_factor, fused, relative_scaling, same_bits, target_of
from .native import ExpertsAdapter, NativeAdapter
from .plan import Converted, planned

if TYPE_CHECKING:
    from .pairs import Found, Pair

_KEY = "peft_moe_native"


@dataclass(frozen=True)
class Record:
    """Attributes: config: of the native adapter. tensors: key of each expert tensor -> (dtype in a header, shape).
    gates: of each module, as in `ProjectionSpec`. experts: of each module, how many its base has.
    """

    config: MoELoraConfig
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    gates: dict[str, str | None]
    experts: dict[str, int]


def of(adapter: NativeAdapter) -> dict[str, str]:
    """The note, for `Converted.metadata`."""
    entries = {key: adapter.tensors.entries[key] for one in adapter.modules for key in one.keys.values()}
    modules = {}
    for one in adapter.modules:
        name = native.split_expert_key(native.full_key(next(iter(one.keys.values()))).removeprefix(native.PREFIX))[0]
        gates = [projection.gate for projection in one.projections() if projection.gate is not None]
        modules[name] = [next(iter(gates), None), one.spec.num_experts]
    content = {
        "config": config_dict(adapter.config),
        "tensors": {key: [entry.code, list(entry.shape)] for key, entry in entries.items()},
        "modules": modules,
    }
    return {_KEY: json.dumps(content, separators=(",", ":"))}


def read(adapter: ForeignAdapter) -> Record | None:
    """The note of a file, if it has one that can be read; `None` otherwise."""
    try:
        content: Any = json.loads(adapter.tensors.metadata.get(_KEY, "null"))
        if content is None:
            return None
        tensors = {str(key): (DTYPES[code], tuple(shape)) for key, (code, shape) in content["tensors"].items()}
        gates = {str(name): gate for name, (gate, _) in content["modules"].items()}
        experts = {str(name): count for name, (_, count) in content["modules"].items()}
        if not (
            all(type(count) is int and 0 < count <= MOST_EXPERTS for count in experts.values())
            and all(type(size) is int and 0 < size < 2**31 for _, shape in tensors.values() for size in shape)
            and all(gate in (None, "concatenated", "interleaved") for gate in gates.values())
            and native.expert_keys(tensors) == tensors.keys()
        ):
            return None
        config = native_config(content["config"])
        if config.use_dora or decomposes(config.init_lora_weights):  # such an adapter is not exported
            return None
        return Record(config, tensors, gates, experts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def restore(adapter: ForeignAdapter, found: Found) -> Converted | None:
    """The native adapter that the note of a file describes; `None` without one, or if the tensors disagree with it."""
    noted = read(adapter)
    if noted is None or not found.pairs:
        return None
    pairs: dict[str, dict[str, Pair]] = {}
    for pair in found.pairs:
        pairs.setdefault(native.canonical(f".{pair.module}."), {})[pair.slot] = pair
    keys: dict[str, dict[tuple[str, str], str]] = {}
    for key in noted.tensors:
        name, slot, factor = native.split_expert_key(native.full_key(key).removeprefix(native.PREFIX))
        keys.setdefault(name, {})[slot, factor] = key
    if {native.canonical(f".{name}.") for name in keys} != pairs.keys():
        return None
    tensors = [adapter.copied(key) for key in found.others]
    for name, mine in keys.items():
        try:
            restored = _Restored(noted, name, mine, pairs[native.canonical(f".{name}.")], found)
            if not restored.agrees():
                return None
        except (ValueError, LookupError, RuntimeError, ArithmeticError):  # of a note that somebody wrote by hand
            return None
        for key in mine.values():
            dtype, shape = noted.tensors[key]
            tensors.append(planned(key, shape, dtype, partial(restored.read, key)))
    facts = [*found.facts, "as it was before it was exported"]
    return Converted(config_dict(noted.config), tensors, [], facts)


class _Restored:
    """The tensors of one module as they were, from the pairs of a file. Reads like a `TensorFile`.

    Args: keys: `(slot, factor)` -> key, of the native file. pairs: slot -> pair, one a projection.
    """

    def __init__(
        self, noted: Record, name: str, keys: dict[tuple[str, str], str], pairs: dict[str, Pair], found: Found
    ) -> None:
        self.noted, self.where, self.pairs = noted, {key: where for where, key in keys.items()}, pairs
        self.indices, self.folded = found.indices.get(next(iter(pairs.values())).module), found.folded
        projections = tuple(
            ProjectionSpec(
                slot, target_of(slot), pair.out_features, pair.in_features, (),
                gate=noted.gates[name] if slot == "gate_up_proj" else None,
            )
            for slot, pair in sorted(pairs.items(), key=lambda item: item[0] == "down_proj")
        )  # fmt: skip
        spec = ExpertsSpec(noted.experts[name], projections, None)
        settings = resolve(noted.config, spec, name)
        for pair in pairs.values():  # before anything is made that the file does not have
            if settings.rank > pair.rank or (self.folded and spec.num_experts > len(pair.ranks)):
                raise ValueError("its experts and ranks are more than those in the file")
        self.adapter = ExpertsAdapter(name, spec, settings, keys, self, nominal_scaling(noted.config))
        if self.indices not in (None, tuple(self.adapter.experts)):
            raise ValueError("its experts are not those of its config")
        expected = native.expected_shapes(name, spec, settings)
        if {native.full_key(key): noted.tensors[key][1] for key in keys.values()} != expected:
            raise ValueError("its tensors are not those of its config")

    @property
    def entries(self) -> Any:
        """Key -> what has a `dtype`."""
        return {key: _Entry(self.noted.tensors[key][0]) for key in self.where}

    def read(self, key: str) -> Tensor:
        """One native tensor."""
        slot, factor = self.where[key]
        settings = self.adapter.settings
        projection = next(one for one in self.adapter.projections() if slot in settings.slots(one))
        value = self.pairs[projection.name].read(factor)
        ratio = relative_scaling(self.adapter) if factor == "lora_B" and self.folded else None
        if self.indices is None:
            value = value[list(self.adapter.experts)]
        rank = settings.rank
        slots = settings.slots(projection)
        first = rank * slots.index(slot)
        if factor == "lora_A":
            value = value[:, first : first + rank]
        else:
            value = value[:, settings.slot_rows(projection, slot), first : first + rank]
        if ratio is not None:
            value = value.double() / ratio
        value = value.to(self.noted.tensors[key][0])
        if settings.ragged:
            value = pack(value if factor == "lora_A" else value.transpose(1, 2), settings)
        elif settings.shares(projection, factor[-1]):
            value = value[:1]
        return value.contiguous()

    def agrees(self) -> bool:
        """Whether an export of these tensors gives those of the file, scaled as they are there."""
        for projection in self.adapter.projections():
            pair = self.pairs[projection.name]
            for position, expert in enumerate(self.adapter.experts):
                wanted = self.adapter.scaling(0 if self.folded else position)
                found = pair.scalings[expert if self.indices is None else position]
                if abs(found - wanted) > 1e-9 * abs(wanted):
                    return False
            for factor in ("lora_A", "lora_B"):
                if self.folded:
                    made = full_factor(self.adapter, projection, len(pair.ranks), factor)
                else:
                    made = fused(self.adapter, projection, factor)
                value = pair.read(factor)
                if not same_bits(made, value):
                    return False
        return len(self.pairs) == len(self.adapter.projections())


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
