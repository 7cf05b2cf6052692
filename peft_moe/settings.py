"""What a config asks of one experts module, resolved against its layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from torch import Tensor

from .config import MoELoraConfig
from .layouts import ExpertsSpec, ProjectionSpec
from .patterns import matches, value_of
from .ranks import check_rank


@dataclass
class AdapterSettings:
    """What one adapter asks of one experts module.

    Attributes:
        projections: names of the adapted projections.
        experts: indices of the adapted experts, ascending; `None`: all.
        ranks: of each adapted expert. Where they differ nothing is padded: the ranks of all experts lie in one axis.
        rank: the largest of them. ragged: whether they differ.
        factor: scaling of the first adapted expert, relative to `lora_alpha / r`, the nominal scaling of the adapter
            (which PEFT's tools read and rescale on every LoRA layer).
        scaling: of each adapted expert, relative to the first; `None` where all are equal.
        dropout, use_dora, split_gate_up, share_experts: as in `MoELoraConfig`.
    """

    projections: tuple[str, ...]
    experts: tuple[int, ...] | None
    ranks: tuple[int, ...]
    factor: float
    scaling: tuple[float, ...] | None
    dropout: float
    use_dora: bool
    split_gate_up: bool
    share_experts: str | None
    rank: int = field(init=False, repr=False, compare=False)
    ragged: bool = field(init=False, repr=False, compare=False)
    _constants: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.rank, self.ragged = max(self.ranks), len(set(self.ranks)) > 1

    def expert_scaling(self, position: int, nominal: float) -> float:
        """Scaling of the adapted expert at a position, given the nominal scaling of the adapter."""
        return nominal * self.factor * (1.0 if self.scaling is None else self.scaling[position])

    def slots(self, projection: ProjectionSpec) -> tuple[str, ...]:
        """The parameter groups of a projection: itself, or gate and up apart."""
        if self.split_gate_up and projection.gate is not None:
            return ("gate_proj", "up_proj")
        return (projection.name,)

    def slot_rows(self, projection: ProjectionSpec, slot: str) -> slice:
        """The output rows of a projection that a slot adapts."""
        if len(self.slots(projection)) == 1:
            return slice(None)
        return projection.gate_rows(up=slot == "up_proj")

    def slot_out_features(self, projection: ProjectionSpec, slot: str) -> int:
        """How many output rows a slot adapts."""
        return len(range(projection.out_features)[self.slot_rows(projection, slot)])

    def adapted(self, num_experts: int) -> Sequence[int]:
        """The indices of the adapted experts."""
        return range(num_experts) if self.experts is None else self.experts

    def shares(self, projection: ProjectionSpec, factor: str) -> bool:
        """Whether a factor ("A" or "B") of a projection is one for all experts."""
        if self.share_experts is None:
            return False
        return factor == ("B" if projection.target == "down_proj" else "A")

    def shapes(self, projection: ProjectionSpec, slot: str, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of a slot, in memory and on disk.

        `lora_A (E', r, in)` and `lora_B (E', out, r)`; where experts differ in rank `lora_A (sum of r, in)` and
        `lora_B (sum of r, out)`; `lora_magnitude_vector (E', out)` with DoRA.
        """
        experts = len(self.adapted(num_experts))
        out_features = self.slot_out_features(projection, slot)
        found: dict[str, tuple[int, ...]]
        if self.ragged:
            found = {
                "lora_A": (sum(self.ranks), projection.in_features),
                "lora_B": (sum(self.ranks), out_features),
            }
        else:
            found = {
                "lora_A": (1 if self.shares(projection, "A") else experts, self.rank, projection.in_features),
                "lora_B": (1 if self.shares(projection, "B") else experts, out_features, self.rank),
            }
        if self.use_dora:
            found["lora_magnitude_vector"] = (experts, out_features)
        return found

    def constant(self, name: str, device: torch.device) -> Tensor:
        """A setting as a tensor on a device, made once a device.

        `experts` int64 `(E',)`; `scaling` fp32 `(E', 1, 1)`; `rows` int64 `(sum of r,)`, where the ranks of ragged
        experts lie once they are padded to `(E' * rank)`.
        """
        key = (name, device)
        if key not in self._constants:
            make = {"experts": self._experts, "scaling": self._relative_scaling, "rows": self._padded_rows}[name]
            if torch.compiler.is_compiling():  # a graph that changed what its guards look at would compile again
                return make().to(device)
            with torch.inference_mode(False):  # it outlives this call, and training may follow
                self._constants[key] = make().to(device)
        return self._constants[key]

    def _experts(self) -> Tensor:
        return torch.tensor(self.experts, dtype=torch.int64)

    def _relative_scaling(self) -> Tensor:
        return torch.tensor(self.scaling, dtype=torch.float32)[:, None, None]

    def _padded_rows(self) -> Tensor:
        positions = [expert * self.rank + row for expert, rank in enumerate(self.ranks) for row in range(rank)]
        return torch.tensor(positions, dtype=torch.int64)


def layer_number(name: str) -> int | None:
    """The layer of a module path, its first number: `model.layers.3.mlp.experts` -> 3."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def nominal_scaling(config: MoELoraConfig) -> float:
    """`lora_alpha / r`, or over the square root of r: what the linears of the adapter scale by."""
    return scaling_of(config, config.lora_alpha, config.r)


def scaling_of(config: LoraConfig, alpha: float, rank: int) -> float:
    """Alpha over the rank, or over its square root (rsLoRA)."""
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def adapted_experts(config: MoELoraConfig, spec: ExpertsSpec, name: str) -> tuple[int, ...] | None:
    """Which experts of a module get an adapter; `None`: all. Raises `ValueError` for an index out of range."""
    indices: Iterable[int] | None
    if isinstance(config.expert_indices, dict):
        number = layer_number(name)
        indices = config.expert_indices.get(number, ()) if number is not None else ()
    else:
        indices = config.expert_indices
    if indices is None:
        return None
    chosen = tuple(indices)
    if chosen and chosen[-1] >= spec.num_experts:
        raise ValueError(
            f"MoELoraConfig: `expert_indices` asks for expert {chosen[-1]} of {name}, which has {spec.num_experts} "
            f"experts; expected indices from 0 to {spec.num_experts - 1}."
        )
    return chosen


def targeted_projections(config: MoELoraConfig, spec: ExpertsSpec) -> tuple[str, ...]:
    """The names of the projections of a module that a config targets."""
    return tuple(projection.name for projection in spec.projections if projection.target in config.expert_targets)


def resolve(config: MoELoraConfig, spec: ExpertsSpec, name: str) -> AdapterSettings:
    """The settings of a config's adapter on one experts module.

    Args: name: path of the module, against which patterns and layers are matched.
    """
    experts = adapted_experts(config, spec, name)
    ranks, alphas = [], []
    for expert in range(spec.num_experts) if experts is None else experts:
        key = f"{name}.{expert}"
        ranks.append(value_of(config.expert_rank_pattern, key, config.expert_r or config.r))
        default_alpha = config.lora_alpha if config.expert_alpha is None else config.expert_alpha
        alphas.append(value_of(config.expert_alpha_pattern, key, default_alpha))
    scaling = [scaling_of(config, alpha, rank) for alpha, rank in zip(alphas, ranks, strict=True)]
    if config.share_experts and (len(set(ranks)) > 1 or experts is not None):
        raise ValueError(
            f"MoELoraConfig: `share_experts={config.share_experts!r}` needs one rank for all experts of {name}; "
            "it cannot hold with `expert_rank_pattern` or `expert_indices` there."
        )
    uniform = len(set(scaling)) == 1
    if not uniform and 0 in scaling:
        raise ValueError(
            f"MoELoraConfig: the alphas of {name} mix zero with other values; leave those experts out with "
            "`expert_indices` instead."
        )
    nominal = nominal_scaling(config)
    if not nominal and scaling[0]:
        raise ValueError("MoELoraConfig: `lora_alpha=0` leaves nothing to scale experts by; set `expert_alpha=0` too.")
    return AdapterSettings(
        projections=targeted_projections(config, spec),
        experts=experts,
        ranks=tuple(ranks),
        factor=scaling[0] / nominal if nominal else 1.0,
        scaling=None if uniform else tuple(value / scaling[0] for value in scaling),
        dropout=config.lora_dropout,
        use_dora=config.use_dora,
        split_gate_up=config.split_gate_up,
        share_experts=config.share_experts,
    )


def check_against_model(config: MoELoraConfig, targets: dict[str, ExpertsSpec]) -> None:
    """Raise `ValueError` for what a config says of experts that no targeted module has.

    Everything is checked here, before the first module is touched.
    """
    for name, spec in targets.items():
        _check_start(config, spec, resolve(config, spec, name), name)
        for option in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, option) or {}:
                if matches(pattern, name):
                    raise ValueError(
                        f"MoELoraConfig: `{option}` has the pattern {pattern!r}, which matches the experts {name}; it "
                        f"holds on linears. Use `expert_{option}`, which matches names such as '{name}.0'."
                    )
    keys = [f"{name}.{expert}" for name, spec in targets.items() for expert in range(spec.num_experts)]
    for option in ("expert_rank_pattern", "expert_alpha_pattern"):
        for pattern in getattr(config, option) or {}:
            if not any(matches(pattern, key) for key in keys):
                raise ValueError(
                    f"MoELoraConfig: `{option}` has the pattern {pattern!r}, which matches no expert; expected a regex "
                    f"of a name such as {keys[0] if keys else '<experts module>.<index>'!r}."
                )


def decomposes(init: bool | str) -> bool:
    """Whether an initialisation starts from the base weight and leaves its residual there."""
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


def keeps_base(init: bool | str) -> bool:
    """Whether an initialisation is known to leave the base as it is. On linears PEFT has more that do not."""
    return not isinstance(init, str) or init.lower() in ("gaussian", "orthogonal", "eva")


def _check_start(config: MoELoraConfig, spec: ExpertsSpec, settings: AdapterSettings, name: str) -> None:
    """Raise `ValueError` for ranks with which an initialisation cannot start."""
    for projection in spec.projections if settings.ranks else ():
        check_rank(settings.rank, projection.in_features, projection.out_features, f"{name}.{projection.name}")
    init = config.init_lora_weights
    odd = sorted({rank for rank in settings.ranks if rank % 2})
    if init == "orthogonal" and odd:
        raise ValueError(f"{name}: orthogonal initialisation needs even ranks, found {odd}")
    for projection in spec.projections:
        for slot in settings.slots(projection) if projection.name in settings.projections else ():
            rows = settings.slot_out_features(projection, slot)
            if decomposes(init) and settings.rank > min(rows, projection.in_features):
                raise ValueError(
                    f"{name}.{slot}: init_lora_weights={init!r} needs a rank of at most "
                    f"{min(rows, projection.in_features)} for weights of {rows} x {projection.in_features}, found "
                    f"{settings.rank}"
                )
