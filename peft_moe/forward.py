"""The forward of the adapters of one experts module, on the paths that `ops` offers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from .adapter import factors, for_ops, join_and_pad, magnitude
from .layouts import ProjectionSpec
from .ops.backends import choose
from .ops.experts import Projection, expert_mlp, pieces_of
from .ops.linear import frozen_linear, lora_linear, stack_tensor
from .ops.routing import Gather, Routing, combine, has_sentinels, mask_rows, route
from .placement import build_onloaded
from .routed import only_routed, pick

if TYPE_CHECKING:
    from .frozen import FrozenExperts
    from .layer import MoELoraLayer

    Experts: TypeAlias = MoELoraLayer | FrozenExperts


def _without_autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """Autocast off: grouped products do not know it, and mixing plain ones that do would mix dtypes."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _bias(layer: Experts, projection: ProjectionSpec, dtype: torch.dtype) -> Tensor | None:
    if not projection.bias:
        return None
    parts = [getattr(layer.base_layer, name).detach().to(dtype) for name in projection.bias]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _factors(layer: Experts, name: str, projection: ProjectionSpec, scaled: bool = True) -> tuple[Tensor, Tensor]:
    scaling = layer.scaling[name] if scaled else None
    return factors(layer.projections, name, layer.adapters[name], scaling, projection)


def _frozen(layer: Experts, projection: ProjectionSpec, dtype: torch.dtype) -> object:
    store = layer.stores[projection.name]
    stack = build_onloaded(layer, store)
    if (stack.dtype if isinstance(stack, Tensor) else store.dtype) == dtype:
        return stack
    return lambda: stack_tensor(stack).to(dtype)


def activation(layer: Experts, pre: Tensor) -> Tensor:
    """The base's own activation between the two projections, `(S, N)` -> `(S, I)`."""
    assert layer.spec.activation is not None
    return layer.spec.activation(layer.base_layer, pre)


class RunsExperts:
    """What a layout may ask of a layer, see `layouts.calls.Runner`."""

    def run_experts(
        self,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        accumulate_dtype: torch.dtype | None = None,
        copies: int = 1,
    ) -> Tensor:
        """The routed experts with their adapters: `out[t] = sum_k w[t, k] expert(x[t])`.

        Args:
            x: `(T, H)`. index: `(T, k)` integers, `num_experts` for none. weights: `(T, k)` routing weights.
            accumulate_dtype: of the result; `None`: that of x. copies: how often each token stands in x.

        Returns: `(T, H)`.
        """
        return run_experts(self, x, index, weights, accumulate_dtype, copies)  # type: ignore[arg-type]

    def run_projection(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """The only projection of this module: `(S, in)` rows sorted by expert, `(E,)` int32 ends -> `(S, out)`."""
        return run_projection(self, rows, offsets)  # type: ignore[arg-type]


def _compute_dtype(layer: Experts, x: Tensor) -> torch.dtype:
    """In which the base multiplies: stacks in the dtype of their weights, linears of a list as autocast tells them."""
    store = next(iter(layer.stores.values()))
    if layer.spec.experts and not store.packed and layer.spec.compute_dtype is None and store.dtype != torch.float64:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
    return layer.spec.compute_dtype or store.dtype


def run_experts(
    layer: Experts, x: Tensor, index: Tensor, weights: Tensor, accumulate_dtype: torch.dtype | None, copies: int
) -> Tensor:
    """See `RunsExperts.run_experts`."""
    spec = layer.spec
    dtype = _compute_dtype(layer, x)
    out_dtype = accumulate_dtype or x.dtype
    with _without_autocast(x.device):
        x = x.to(dtype)
        sentinels = spec.sentinels or bool(getattr(layer.base_layer, "_is_expert_parallel", False))
        if not sentinels and x.device.type == "cpu" and not torch.compiler.is_compiling():
            sentinels = has_sentinels(index, spec.num_experts)
        names = _taking_part(layer)
        if _whole_mlp(layer, names):
            rank = max([_rank(layer, projection, names) for projection in spec.projections])  # a list: Dynamo
            backend = choose(layer.backend, x.device, dtype, rank, spec.num_experts)
            routing = pieces_of(backend).route(index, spec.num_experts, sentinels)
            routing, slots = only_routed(layer, routing, dtype, backend)

            def joined(projection: ProjectionSpec) -> Projection:
                one = _joined(layer, projection, names, dtype, backend)
                return one if slots is None else pick(one, layer.stores[projection.name], slots, dtype)

            up, down = spec.projections
            gate = spec.closed_form if spec.closed_form else lambda pre: activation(layer, pre)
            return expert_mlp(x, weights, routing, joined(up), lambda: joined(down), gate, backend, out_dtype)
        routing = route(index, spec.num_experts, sentinels)
        rows = Gather.apply(x, routing.source, routing.inverse, routing.top_k, routing.valid)
        row_adapter = _row_adapter(layer, names, x.shape[0], routing, copies)
        up, down = spec.projections
        hidden = activation(layer, _project(layer, up, rows, routing, names, row_adapter, dtype))
        out = _project(layer, down, hidden, routing, names, row_adapter, dtype)
        if spec.post_norm is not None:
            out = getattr(layer.base_layer, spec.post_norm)(out)
        return combine(out, weights, routing, out_dtype)


def run_projection(layer: Experts, rows: Tensor, offsets: Tensor) -> Tensor:
    """See `RunsExperts.run_projection`."""
    (projection,) = layer.spec.projections
    dtype = layer.stores[projection.name].dtype
    if layer.mixed_batch is not None:
        check_mixed_batch(layer, layer.mixed_batch)
    out_dtype = rows.dtype
    with _without_autocast(rows.device):
        rows = rows.to(dtype)
        positions = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        experts = torch.searchsorted(offsets, positions, right=True).clamp(max=layer.spec.num_experts - 1)
        routing = Routing(positions, positions, positions, experts, offsets, 1, None)
        return _project(layer, projection, rows, routing, layer.active, None, dtype).to(out_dtype)


def check_mixed_batch(layer: MoELoraLayer, names: Sequence[str]) -> None:
    """Raise `ValueError` if a batch whose samples name these adapters (`adapter_names`) cannot run on a layer."""
    if layer.merged_adapters:
        raise ValueError(
            f"{layer.name}: cannot pass `adapter_names` when there are merged adapters, found "
            f"{', '.join(layer.merged_adapters)}. Call `unmerge_adapter` first."
        )
    found = sorted({name for name in names if name in layer.adapters})
    if found and (layer.spec.one_by_one or len(layer.spec.projections) == 1):
        kind = "this block calls its experts itself" if layer.spec.one_by_one else "its rows arrive sorted by expert"
        raise ValueError(
            f"{layer.name}: {kind}, so which sample a row belongs to is unknown: a batch that mixes adapters "
            f"(`adapter_names` with {', '.join(found)}) cannot run here. Run one adapter at a time."
        )


def _taking_part(layer: Experts) -> list[str]:
    """The adapters of this call: the active ones, or those that a mixed batch names."""
    if layer.mixed_batch is None:
        return layer.active
    return sorted({name for name in layer.mixed_batch if name in layer.adapters})


def _whole_mlp(layer: Experts, names: list[str]) -> bool:
    """Whether the one-function path applies; under `torch.compile` it needs a closed form of the activation."""
    if len(layer.spec.projections) != 2 or layer.spec.post_norm is not None or layer.mixed_batch is not None:
        return False
    if torch.compiler.is_compiling() and layer.spec.closed_form is None:
        return False
    settings = [layer.adapters[name] for name in names]
    return not any(one.use_dora or (one.dropout > 0 and layer.training) for one in settings)


def _rank(layer: Experts, projection: ProjectionSpec, names: list[str]) -> int:
    """The ranks of all adapters of a projection together."""
    return sum(
        layer.adapters[name].rank * len(layer.adapters[name].slots(projection))
        for name in names
        if projection.name in layer.adapters[name].projections
    )


def _joined(
    layer: Experts, projection: ProjectionSpec, names: list[str], dtype: torch.dtype, backend: str
) -> Projection:
    """Several adapters of one projection as one, ranks side by side."""
    names = [name for name in names if projection.name in layer.adapters[name].projections]
    scale = _common_scale(layer, names)
    pairs = [
        for_ops(*_factors(layer, name, projection, scaled=scale is None), layer.adapters[name], layer.spec, dtype)
        for name in names
    ]
    a, b = join_and_pad(pairs, backend) if pairs else (None, None)
    frozen, bias = _frozen(layer, projection, dtype), _bias(layer, projection, dtype)
    return Projection(frozen, bias, a, b, 1.0 if scale is None else scale)  # type: ignore[arg-type]


def _common_scale(layer: Experts, names: list[str]) -> float | None:
    """The scaling, if one number scales all experts of all adapters: then no pass over B is needed for it."""
    scales = {
        layer.scaling[name] * layer.adapters[name].factor
        if layer.adapters[name].scaling is None and not isinstance(layer.scaling[name], Tensor)
        else None
        for name in names
    }
    return scales.pop() if len(scales) == 1 else None


def _row_adapter(layer: Experts, names: list[str], tokens: int, routing: Routing, copies: int) -> Tensor | None:
    """`(S, 1)` number in `names` of each sorted row's adapter, -1 for the base; `None` unless the batch is mixed."""
    if layer.mixed_batch is None:
        return None
    samples = len(layer.mixed_batch)
    if tokens % (samples * copies):
        raise ValueError(
            f"{layer.name}: {tokens} tokens cannot be told apart into the {samples} samples of `adapter_names`; "
            "expected as many tokens for each sample."
        )
    numbers = torch.tensor(
        [names.index(n) if n in names else -1 for n in layer.mixed_batch], device=routing.order.device
    )
    per_token = numbers.repeat_interleave(tokens // (samples * copies)).repeat(copies)
    return per_token[routing.source].unsqueeze(-1)


def _project(
    layer: Experts,
    projection: ProjectionSpec,
    rows: Tensor,
    routing: Routing,
    names: list[str],
    row_adapter: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One projection with its adapters, one after the other: `(S, in)` -> `(S, out)`."""
    rows = rows.to(dtype)
    offsets, backend = routing.offsets, layer.backend
    out = mask_rows(frozen_linear(rows, _frozen(layer, projection, dtype), offsets, backend), routing.valid)  # type: ignore[arg-type]
    for number, name in enumerate(names):
        settings = layer.adapters[name]
        if projection.name not in settings.projections:
            continue
        a, b = _factors(layer, name, projection)
        dropped = nn.functional.dropout(rows, settings.dropout, layer.training) if settings.dropout else rows
        joined = join_and_pad([for_ops(a, b, settings, layer.spec, dtype)], backend)
        adapted = out + mask_rows(lora_linear(dropped, *joined, offsets, backend), routing.valid)
        if settings.use_dora:
            scale = _dora_scale(layer, name, projection, a, b)[routing.experts].to(dtype)
            adapted = mask_rows(adapted * scale, routing.valid)  # again: what flows back to the scale is masked here
        out = adapted if row_adapter is None else torch.where(row_adapter == number, adapted, out)
    bias = _bias(layer, projection, dtype)
    return out if bias is None else out + bias[routing.experts]


def _dora_scale(layer: Experts, name: str, projection: ProjectionSpec, a: Tensor, b: Tensor) -> Tensor:
    """`(E, out)`: magnitude over the row norm of `W + B A`, one where an expert has no adapter.

    The norm is not differentiated (DoRA, arXiv 2402.09353, section 4.3) and taken expert by expert in fp32.
    """
    settings = layer.adapters[name]
    experts = settings.adapted(layer.spec.num_experts)
    scale = magnitude(layer.projections, name, settings, projection).float()
    scale = scale / _row_norms(layer, projection, experts, a.detach(), b.detach())
    if settings.experts is None:
        return scale
    ones = scale.new_ones(layer.spec.num_experts, scale.shape[1])
    return ones.index_copy(0, settings.constant("experts", scale.device), scale)


@torch.no_grad()
def _row_norms(layer: Experts, projection: ProjectionSpec, experts: object, a: Tensor, b: Tensor) -> Tensor:
    store = layer.stores[projection.name]
    norms = []
    for position, expert in enumerate(experts):  # type: ignore[arg-type, var-annotated]
        weight = store.materialize([expert], torch.float32)[0]
        norms.append((weight + b[position].float() @ a[position].float()).norm(dim=1))
    return torch.stack(norms)


def adapt_linear(
    layer: MoELoraLayer, projection: ProjectionSpec, expert: int, rows: slice, x: Tensor, out: Tensor
) -> Tensor:
    """The output of one expert's own linear, adapted: the path of blocks that run themselves.

    Args: rows: of the projection's output, which this linear computes. x: `(..., in)`. out: `(..., rows)`, with bias.
    """
    if layer.mixed_batch is not None:
        check_mixed_batch(layer, layer.mixed_batch)
    for name in layer.active:
        settings = layer.adapters[name]
        experts = settings.adapted(layer.spec.num_experts)
        if projection.name not in settings.projections or expert not in experts:
            continue
        position = list(experts).index(expert)
        a, b = (factor[position].to(x.dtype) for factor in _factors(layer, name, projection))
        dropped = nn.functional.dropout(x, settings.dropout, layer.training) if settings.dropout else x
        linear = nn.functional.linear
        adapted = out + linear(linear(dropped, a), b[rows]).to(out.dtype)
        if settings.use_dora:
            norm = _row_norms(layer, projection, [expert], a.detach()[None], b.detach()[None])[0]
            scale = (magnitude(layer.projections, name, settings, projection)[position].float() / norm)[rows]
            bias = layer.expert_bias(projection, expert, rows)
            adapted = adapted * scale.to(out.dtype)
            if bias is not None:
                adapted = adapted + bias * (1 - scale).to(out.dtype)
        out = adapted
    return out
