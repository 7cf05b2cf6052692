"""The experts in a file of a server's format: one by one, as stacks, or as matrices of all experts.

Shapes: E experts, r the rank in the config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from .. import native as keys
from ..shapes import MOST_EXPERTS
from .foreign import ForeignAdapter
from .served_stacks import Stacks
from .stock_layout import from_stock

_SINGLE = re.compile(r"(?P<path>.+\.experts)\.(?P<expert>\d{1,9})\.(?P<leaf>\w+)\.(?P<factor>lora_[AB])\.weight")
_MATRIX = re.compile(r"(?P<path>.+\.experts)(?P<first>\.base_layer)?\.(?P<factor>lora_[AB])\.weight")
_STACKED = re.compile(r"(?P<path>.+\.experts)\.(?P<leaf>\w+)\.(?P<factor>lora_[AB])\.weight")
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_PADDED = 2**30  # bytes of zeros that may be made for experts that are not there, and as often those that are
_FACTOR = 64
_KNOWN = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_OTHER = {"lora_A": "lora_B", "lora_B": "lora_A"}


@dataclass
class _Module:
    """Attributes: stacks: (leaf, factor) -> key. single: (leaf, factor) -> expert -> key. matrices: what stacks are."""

    stacks: dict[tuple[str, str], str] = field(default_factory=dict)
    single: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    matrices: bool = False


class ServedFile:
    """The experts of a file, module by module.

    Attributes: paths: of its experts modules. joined: gate and up are one, with the rows in the order of the base;
        otherwise they are given apart. others: keys of everything else. rank, scale: of all its factors.

    Raises `ValueError` for keys of experts that are not of a known form.
    """

    def __init__(self, adapter: ForeignAdapter) -> None:
        self.adapter, self.where = adapter, f"adapter {adapter.name!r}"
        self.rank, self.scale = _rank_and_scale(adapter)
        self._modules: dict[str, _Module] = {}
        self.others: list[str] = []
        for key in adapter.tensors.entries:
            self._take(key)
        for path, module in self._modules.items():
            found = set(module.stacks) | set(module.single)
            for leaf, factor in found:
                if (leaf, _OTHER[factor]) not in found:
                    raise ValueError(self._half(f"{path}.{leaf}", factor))
                own, other = (module.single.get((leaf, one), {}).keys() for one in (factor, _OTHER[factor]))
                if own - other:
                    raise ValueError(self._half(f"{path}.{min(own - other)}.{leaf}", factor))
        forms = {module.matrices for module in self._modules.values()}
        if len(forms) > 1:
            raise ValueError(f"{adapter.folder}: some of its experts are matrices of all, some are not")
        self.joined = True in forms
        self._last: tuple[str, Stacks] | None = None

    def _half(self, where: str, factor: str) -> str:
        return (
            f"{self.where}: {where}: found {factor} and no {_OTHER[factor]} beside it, expected both; the file is not "
            "complete: save it again, or get it again"
        )

    @property
    def paths(self) -> list[str]:
        return list(self._modules)

    def load(self, path: str) -> Stacks:
        """(leaf, factor) -> `lora_A (E, r, in)`, `lora_B (E, out, r)`: zeros for single experts that are not there."""
        if self._last is None or self._last[0] != path:
            self._last = None
            self._last = (path, self._load(path))
        return self._last[1]

    def _take(self, key: str) -> None:
        name = keys.full_key(key).removeprefix(keys.PREFIX)
        match = _SINGLE.fullmatch(name) or _MATRIX.fullmatch(name) or _STACKED.fullmatch(name)
        if match is None:
            self.others.append(key)
            return
        found = match.groupdict()
        module = self._modules.setdefault(found["path"], _Module())
        if "leaf" in found:
            leaf = _LEAVES.get(found["leaf"], found["leaf"])
        else:
            leaf, module.matrices = "gate_up_proj" if found["first"] else "down_proj", True
        if leaf not in _KNOWN:
            raise ValueError(
                f"{self.where}: {key}: {leaf!r} is no projection of experts; expected {', '.join(_KNOWN)}, w1, w2 or w3"
            )
        if "expert" in found:
            module.single.setdefault((leaf, found["factor"]), {})[int(found["expert"])] = key
        else:
            module.stacks[leaf, found["factor"]] = key

    def _load(self, path: str) -> Stacks:
        module, found = self._modules[path], {}
        for (leaf, factor), key in module.stacks.items():
            value = self.adapter.tensors.read(key)
            if module.matrices:
                self._check(key, value, 2, value.shape[0 if factor == "lora_A" else -1] % self.rank == 0)
                value = from_stock(value, factor, self.rank, swapped=False)
            self._check(key, value, 3, True)
            found[leaf, factor] = value
        count = 1 + max((max(one) for one in module.single.values()), default=-1)
        entries = self.adapter.tensors.entries
        there = sum(entries[key].nbytes for one in module.single.values() for key in one.values())
        made = sum(count * entries[next(iter(one.values()))].nbytes for one in module.single.values())
        if count > MOST_EXPERTS or made > _FACTOR * there + _PADDED:
            raise ValueError(
                f"{self.where}: {path}: its last expert is {count - 1}, and most of those before it are missing"
            )
        for where, one in module.single.items():
            if where in found:
                raise ValueError(f"{self.where}: {path}.{where[0]}: the file has a stack of experts and single ones")
            first = self.adapter.tensors.read(next(iter(one.values())))
            found[where] = first.new_zeros(count, *first.shape)
            for expert, key in one.items():
                value = self.adapter.tensors.read(key)
                self._check(key, value, 2, value.shape == first.shape)
                found[where][expert] = value
        if not module.matrices and ("gate_up_proj", "lora_A") in found:
            _take_apart(found, self.rank, f"{self.where}: {path}")
        for (leaf, factor), value in found.items():
            if value.shape[1 if factor == "lora_A" else 2] != self.rank:
                raise ValueError(
                    f"{self.where}: {path}.{leaf}.{factor}: found {tuple(value.shape)}, expected the rank {self.rank}"
                )
        experts = max(value.shape[0] for value in found.values())
        for where, value in found.items():
            if value.shape[0] not in (1, experts):
                raise ValueError(
                    f"{self.where}: {path}.{where[0]}.{where[1]}: found {value.shape[0]} experts, others have {experts}"
                )
            found[where] = value.expand(experts, -1, -1)
        return found

    def _check(self, key: str, value: Tensor, dimensions: int, fits: bool) -> None:
        if value.dim() != dimensions or not fits or not value.is_floating_point():
            raise ValueError(
                f"{self.where}: {key}: found {value.dtype} {tuple(value.shape)}, which fits no factor of rank "
                f"{self.rank}"
            )


def _take_apart(found: Stacks, rank: int, path: str) -> None:
    """gate_up as SGLang has it (all gates, then all ups; one A, or one under the other) -> gate and up."""
    a, b = found.pop(("gate_up_proj", "lora_A")), found.pop(("gate_up_proj", "lora_B"))
    if ("gate_proj", "lora_A") in found or b.shape[1] % 2:
        raise ValueError(
            f"{path}.gate_up_proj: found B {tuple(b.shape)}, expected gate and up in it, and not beside it"
        )
    own = a.shape[1] == 2 * rank
    for leaf, rows, half in (("gate_proj", slice(0, rank), 0), ("up_proj", slice(rank, None), 1)):
        found[leaf, "lora_A"] = a[:, rows] if own else a
        found[leaf, "lora_B"] = b.chunk(2, dim=1)[half]


def _rank_and_scale(adapter: ForeignAdapter) -> tuple[int, float]:
    rank, alpha = adapter.config.get("r"), adapter.config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"{adapter.folder}: `r` and `lora_alpha` are {rank!r} and {alpha!r}, expected numbers")
    for option in ("rank_pattern", "alpha_pattern"):
        if adapter.config.get(option):
            raise ValueError(f"{adapter.folder}: `{option}` is set; adapters for servers have one rank and one alpha")
    return rank, alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank)
