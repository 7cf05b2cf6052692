"""How stock PEFT holds the adapters of stacked experts (`target_parameters`), on tensors and modules.

Of a parameter `(E, x, y)` it holds a pair of matrices: A has E times r rows, expert after expert; B has r times E
columns, the expert index fastest. Which of x and y A belongs to depends on PEFT's version and on a flag of the module:

| version | A lies on |
|---|---|
| up to 0.18.1 | x, always |
| 0.19.0 | y where the module says `is_transposed`, else x |
| 0.19.1 and later | x where the module says `is_transposed`, else y |

For a base that holds `(out, in)` A on y is what LoRA means by A. Where A lies on the output the roles are swapped: the
stored A is B transposed, and the other way round; the product is the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...layouts import ExpertsSpec, ProjectionSpec

#: Names of the three layouts, as `assume_layout` takes them.
LAYOUTS = ("peft<=0.18.1", "peft==0.19.0", "peft>=0.19.1")
CURRENT = LAYOUTS[2]


@dataclass(frozen=True)
class Stack:
    """A stacked parameter of the base that holds one projection.

    Attributes: name: below its module. shape: `(E, x, y)`; E counts experts that have no weights of their own too.
        transposed: it holds `(in, out)`. flagged: its module says `is_transposed`.
    """

    projection: ProjectionSpec
    name: str
    shape: tuple[int, ...]
    transposed: bool
    flagged: bool

    def swapped(self, layout: str) -> bool:
        """Whether A lies on the output in a layout of `LAYOUTS`."""
        on_y = {LAYOUTS[0]: False, LAYOUTS[1]: self.flagged, LAYOUTS[2]: not self.flagged}[layout]
        return on_y == self.transposed


def stacks(name: str, spec: ExpertsSpec, module: Any) -> list[Stack]:
    """The parameters of an experts module that stock PEFT can target, in the order in which it wraps them.

    The first is the innermost wrapper. Raises `ValueError` where it cannot target the experts of this module.
    """
    if spec.experts:
        raise ValueError(
            f"{name} holds its experts as a list in this version of transformers: stock PEFT adapts them as linears, "
            "not through `target_parameters`. Use the format 'peft-per-expert', or convert where the base has stacks "
            "(transformers 5)."
        )
    found = {}
    for projection in spec.projections:
        part = projection.parts[0]
        if len(projection.parts) > 1 or part.flat or "." in part.path:
            raise ValueError(
                f"{name}.{projection.name} lies in {', '.join(one.path for one in projection.parts)}, all experts in "
                "one matrix: a low-rank matrix of stock PEFT would mix the experts."
            )
        shape = tuple(module.get_parameter(part.path).shape)
        flagged = bool(getattr(module, "is_transposed", False))
        found[part.path] = Stack(projection, part.path, shape, part.transposed, flagged)
        if shape[0] == 1:
            raise ValueError(f"{name}.{part.path} has one expert, which stock PEFT adapts as a plain matrix")
    return [found[one] for one, _ in module.named_parameters(recurse=False) if one in found]


def to_stock(value: Tensor, factor: str, swapped: bool, contiguous_r: bool = False) -> tuple[str, Tensor]:
    """`lora_A (E, r, in)` or `lora_B (E, out, r)` -> (factor of stock PEFT, matrix): see the module.

    Args: contiguous_r: let the columns of B lie expert after expert.
    """
    if swapped:
        value, factor = value.mT, "lora_B" if factor == "lora_A" else "lora_A"
    if factor == "lora_A":
        return factor, value.reshape(-1, value.shape[2])
    if contiguous_r:
        return factor, value.transpose(0, 1).reshape(value.shape[1], -1)
    return factor, value.permute(1, 2, 0).reshape(value.shape[1], -1)


def from_stock(matrix: Tensor, factor: str, rank: int, swapped: bool, contiguous_r: bool = False) -> Tensor:
    """The inverse: a matrix that stock PEFT calls `factor` -> `(E, r, in)` or, of what is B to us, `(E, out, r)`.

    Args: contiguous_r: the columns of B lie expert after expert.
    """
    if factor == "lora_A":
        value = matrix.view(-1, rank, matrix.shape[1])
    elif contiguous_r:
        value = matrix.view(matrix.shape[0], -1, rank).permute(1, 0, 2)
    else:
        value = matrix.view(matrix.shape[0], rank, -1).permute(2, 0, 1)
    return (value.mT if swapped else value).contiguous()


def layout_of_version(version: Any) -> str | None:
    """The layout that a `peft_version` of a config writes; `None` if it says nothing."""
    if not isinstance(version, str):
        return None
    found = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(.*)", version.partition("@")[0])
    if found is None:
        return None
    release = tuple(int(one) for one in found.groups()[:3])
    if found.group(4) and (0, 18, 1) <= release <= (0, 19, 1):
        return None  # a development version, before or after a change
    if release < (0, 19, 0):
        return LAYOUTS[0]
    return LAYOUTS[1] if release == (0, 19, 0) else LAYOUTS[2]
