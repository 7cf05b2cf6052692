"""What a checkpoint holds of experts, from its headers and the model's own classes; no weight is read."""

from __future__ import annotations

from typing import Any

from ..checkpoint.merge.names import match_names
from ..checkpoint.merge.plan import check_readable, quantization_of
from ..checkpoint.merge.skeleton import skeletons
from ..checkpoint.merge.source import Source
from ..checkpoint.merge.stored import open_stored
from ..layouts import ExpertsSpec, ProjectionSpec, find_experts


def describe_model(path: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Everything `peft-moe inspect` shows of a model. Raises `ValueError` for what cannot be read."""
    source = Source(path)
    quantization = quantization_of(source.config)
    stored = open_stored(source, check_readable(quantization, source.folder))
    model = next(skeletons(source.folder, trust_remote_code))
    groups = match_names(model, list(stored))
    experts: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    expert_keys: set[str] = set()
    for name, spec in find_experts(model).items():
        if spec.refused is not None:
            refused[name] = spec.refused
            continue
        for projection in spec.projections:
            sources = _sources(name, spec, projection, groups)
            for one in sources:
                expert_keys.update((stored[one].key, *stored[one].companions))
            experts.append(
                {
                    "module": name,
                    "class": type(model.get_submodule(name)).__name__,
                    "held_as": "list" if spec.experts else "stack",
                    "in_files": "one by one" if len(sources) >= spec.num_experts > 1 else "stacked",
                    "experts": spec.num_experts,
                    "projection": projection.name,
                    "shape": [projection.out_features, projection.in_features],
                    "orientation": "in x out" if projection.parts[0].transposed else "out x in",
                    "gate": projection.gate,
                    "bias": bool(projection.bias),
                    "stored_as": sorted({stored[one].code for one in sources}),
                }
            )
    sizes = {key: source.entry(key).nbytes for key in source.owner}
    return {
        "kind": "model",
        "path": path,
        "model_type": source.config.get("model_type"),
        "architectures": source.config.get("architectures") or [],
        "quantization": None if quantization is None else quantization.get("quant_method"),
        "files": len(source.shards),
        "tensors": len(sizes),
        "bytes": sum(sizes.values()),
        "expert_bytes": sum(sizes[key] for key in expert_keys),
        "experts": experts,
        "refused": refused,
    }


def _sources(name: str, spec: ExpertsSpec, projection: ProjectionSpec, groups: dict[str, Any]) -> list[str]:
    """The checkpoint's tensors that hold a projection."""
    found: list[str] = []
    for part in projection.parts:
        paths = [f"{name}.{one}.{part.path}.weight" for one in spec.experts] or [f"{name}.{part.path}"]
        for path in paths:
            if path in groups:
                found += [one for names in groups[path].sources.values() for one in names]
    return found
