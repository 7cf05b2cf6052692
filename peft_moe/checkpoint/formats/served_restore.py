"""What this package exported to a server, back bit for bit: the note in the file (`record`) says what it was.

The note is believed where exporting what it says gives the tensors of the file again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...adapter import pack
from ...layouts import ExpertsSpec, ProjectionSpec
from ...patterns import value_of
from ...settings import nominal_scaling, resolve, scaling_of
from .. import native as keys
from ..header import CODES, Entry
from .foreign import config_dict
from .fuse import scaled
from .native import ExpertsAdapter
from .plan import Converted, Planned, planned
from .record import Record
from .served_file import ServedFile
from .served_stacks import FACTORS, Stacks, apart, joined, padded, with_gate_order
from .serving import LINEAR, ratios


class _Disagrees(Exception):
    """The tensors are not what the note says."""


@dataclass(frozen=True)
class _Held:
    """Tensors in memory that read like a `TensorFile`."""

    values: dict[str, Tensor]
    entries: dict[str, Entry]

    def read(self, key: str) -> Tensor:
        return self.values[key]


def restored(file: ServedFile, known: Record) -> Converted | None:
    """The native adapter that a file was made of; `None` if it has been changed since."""
    if not file.scale:  # no export has it, and nothing could be folded out of zeros
        return None
    found = _Restored(file, known)
    try:
        tensors = [*found.experts(), *found.linears()]
    except _Disagrees:
        return None
    return Converted(config_dict(known.config), tensors, [], ["as it was before it was exported"])


def _canonical(path: str) -> str:
    return keys.canonical(f".{path}.")


class _Restored:
    def __init__(self, file: ServedFile, known: Record) -> None:
        self.file, self.known = file, known
        self.paths = {_canonical(path): path for path in file.paths}
        self._last: ExpertsAdapter | None = None

    def experts(self) -> list[Planned]:
        """All expert tensors; each module is made once, and checked."""
        modules: dict[str, dict[tuple[str, str], str]] = {}
        for key in self.known.tensors:
            name, slot, factor = keys.split_expert_key(keys.full_key(key).removeprefix(keys.PREFIX))
            modules.setdefault(name, {})[slot, factor] = key
        if {_canonical(name) for name in modules} != set(self.paths):
            raise _Disagrees
        tensors = []
        for name, mine in modules.items():
            self._module(name, mine)
            for key in mine.values():
                dtype, shape = self.known.tensors[key]
                tensors.append(planned(key, shape, dtype, partial(self._tensor, name, mine, key)))
        return tensors

    def _tensor(self, name: str, mine: dict[tuple[str, str], str], key: str) -> Tensor:
        return self._module(name, mine).tensors.read(key)

    def _module(self, name: str, mine: dict[tuple[str, str], str]) -> ExpertsAdapter:
        if self._last is None or self._last.name != name:
            self._last = None  # two modules are never held at once
            stacks = self.file.load(self.paths[_canonical(name)])
            try:
                one, ratio = self._made(name, mine, stacks)
                again = (joined if self.file.joined else apart)(one, self.file.rank, ratio)
            except (
                ValueError,
                LookupError,
                RuntimeError,
                ArithmeticError,
                StopIteration,
            ) as error:  # a note that fits nothing
                raise _Disagrees from error
            for where, value in stacks.items():
                folded = ratio is not None and where[1] == "lora_B"
                if not (_agree(again[where], value, folded) if where in again else not value.any()):
                    raise _Disagrees
            self._last = one
        return self._last

    def _made(
        self, name: str, mine: dict[tuple[str, str], str], stacks: Stacks
    ) -> tuple[ExpertsAdapter, Tensor | None]:
        shapes = {where: self.known.tensors[key][1] for where, key in mine.items()}
        spec = self._spec(name, shapes)
        settings = resolve(self.known.config, spec, name)
        expected = keys.expected_shapes(name, spec, settings)
        experts = {value.shape[0] for value in stacks.values()}
        if settings.rank > self.file.rank or experts != {spec.num_experts}:  # nothing is made that is not in the file
            raise _Disagrees
        if expected != {keys.full_key(key): shapes[where] for where, key in mine.items()}:
            raise _Disagrees
        entries = {key: Entry(CODES[self.known.tensors[key][0]], shapes[where], 0, 0) for where, key in mine.items()}
        held = _Held({}, entries)
        one = ExpertsAdapter(name, spec, settings, mine, held, nominal_scaling(self.known.config))
        ratio = ratios([one.scaling(position) for position in range(len(one.experts))], self.file.scale)
        for projection, slot in one.slots():
            for factor in FACTORS:
                value = self._value(one, projection, slot, factor, stacks, ratio)
                if value.shape != shapes[slot, factor]:
                    raise _Disagrees
                held.values[mine[slot, factor]] = value
        return one, ratio

    def _spec(self, name: str, shapes: dict[tuple[str, str], tuple[int, ...]]) -> ExpertsSpec:
        """Of the adapted projections."""
        slots = {slot for slot, _ in shapes}
        rows = {slot: shapes[slot, "lora_B"][1] for slot in slots}
        columns = {slot: shapes[slot, "lora_A"][-1] for slot in slots}
        projections = []
        if slots - {"down_proj"}:
            parts = sorted(slots - {"down_proj"})
            out_features, gate = sum(rows[one] for one in parts), self.known.gates[name]
            projections.append(
                ProjectionSpec("gate_up_proj", "gate_up_proj", out_features, columns[parts[0]], (), gate=gate)
            )
        if "down_proj" in slots:
            projections.append(ProjectionSpec("down_proj", "down_proj", rows["down_proj"], columns["down_proj"], ()))
        return ExpertsSpec(self.known.experts[name], tuple(projections), None)

    def _value(
        self,
        one: ExpertsAdapter,
        projection: ProjectionSpec,
        slot: str,
        factor: str,
        stacks: Stacks,
        ratio: Tensor | None,
    ) -> Tensor:
        """A tensor of the native file: put together, or cut out, of those of the served one."""
        rank, first = one.settings.rank, 0
        if slot in ("gate_proj", "up_proj") and self.file.joined:
            value, first = stacks["gate_up_proj", factor], rank if slot == "up_proj" else 0
            if factor == "lora_B":
                value = value[:, projection.gate_rows(up=slot == "up_proj")]
        elif slot == "gate_up_proj" and not self.file.joined:
            gate, up = (stacks[leaf, factor] for leaf in ("gate_proj", "up_proj"))
            value = gate if factor == "lora_A" else with_gate_order(gate, up, projection)
        else:
            value = stacks[slot, factor]
        value = value[torch.tensor(list(one.experts))]
        cut = slice(first, first + rank)
        value = value[:, cut] if factor == "lora_A" else value[:, :, cut]
        if factor == "lora_B":
            value = _unscaled(value, ratio)
        value = value.to(self.known.tensors[one.keys[slot, factor]][0])
        if one.settings.ragged:
            value = pack(value if factor == "lora_A" else value.transpose(1, 2), one.settings)
        elif one.settings.shares(projection, factor[-1]):
            value = value[:1]
        return value.contiguous()

    def linears(self) -> list[Planned]:
        """All other tensors, cut to the ranks they had."""
        tensors = []
        for key in self.file.others:
            match = LINEAR.fullmatch(keys.full_key(key).removeprefix(keys.PREFIX))
            if match is None:
                raise _Disagrees
            make = partial(self._linear, key, *match.groups())
            value = make()
            tensors.append(planned(keys.full_key(key), tuple(value.shape), value.dtype, make))
        return tensors

    def _linear(self, key: str, path: str, factor: str) -> Tensor:
        config, found = self.known.config, self.file.adapter.tensors.read(key)
        partner = self.file.adapter.tensors.entries.get(key.replace(".lora_B.", ".lora_A."))
        if partner is None or found.dim() != 2:
            raise _Disagrees
        rank = value_of(config.rank_pattern, path, config.r)
        alpha = value_of(config.alpha_pattern, path, config.lora_alpha)
        ratio = ratios([scaling_of(config, alpha, rank)], self.file.scale)
        ratio = None if ratio is None or factor == "lora_A" else ratio[0]
        value = found[:rank] if factor == "lora_A" else found[:, :rank]
        # What B was before it was folded into a wider dtype, A still is.
        dtype = partner.dtype or found.dtype
        value = _unscaled(value, ratio).to(dtype if factor == "lora_B" else found.dtype)
        if not _agree(padded(scaled(value, ratio), factor, self.file.rank), found, folded=ratio is not None):
            raise _Disagrees
        return value.contiguous()


def _unscaled(value: Tensor, ratio: Tensor | None) -> Tensor:
    """B without what was folded in, fp64 if anything was; what was multiplied by zero stays zero."""
    return value if ratio is None else torch.where(ratio == 0, 0.0, value.double() / ratio)


def _agree(again: Tensor, found: Tensor, folded: bool) -> bool:
    """Whether a tensor is the one in the file. Args: folded: it was divided and multiplied; the last bit is free."""
    if again.dtype != found.dtype or again.shape != found.shape:
        return False
    return torch.equal(again, found) or (folded and torch.allclose(again.double(), found.double(), rtol=2**-22, atol=0))
