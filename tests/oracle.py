"""What every experts module should return, computed slowly in float64 straight from its raw parameters.

Shapes: T tokens, k experts a token, E experts, H width in and out, I inner width, M rows of the first projection
(2I where there is a gate, else I). Nothing here is shared with the package under test. Gates are written out from the
formulas of the architectures, routing is a Python loop over (token, choice).

Deltas are keyed "gate_up_proj" (E, M, H) and "down_proj" (E, H, I), always in (out, in) orientation whatever the base
holds, always float64. The rows of gate_up follow the base: alternating gate and up where the base interleaves them
(GPT-OSS), all gates and then all ups everywhere else, also where the base keeps two tensors (DBRX: w1 then v1; lists of
MLPs: gate then up). Without a gate (Nemotron-H, NLLB, Switch) the first projection still goes by "gate_up_proj".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Deltas = dict[str, Tensor]
# expert index, row (H,) -> row (H,), both float64
ExpertFn = Callable[[int, Tensor], Tensor]

# Stacks held (E, in, out) by classes that do not say so in an `is_transposed` flag.
TRANSPOSED_WITHOUT_FLAG = {"Llama4TextExperts", "GptOssExperts", "Qwen3VLMoeTextExperts"}


def lora_delta(A: Tensor, B: Tensor, scaling: float | Tensor) -> Tensor:
    """The weight change (E, out, in), float64, of A (E, r, in) and B (E, out, r); the scaling is a scalar or (E,)."""
    scale = torch.as_tensor(scaling, dtype=torch.float64).reshape(-1, 1, 1)
    return scale * torch.stack([b.double() @ a.double() for a, b in zip(A, B, strict=True)])


def experts_oracle(module: nn.Module, args: tuple, deltas: Deltas | None = None) -> Tensor:
    """What `module(*args)` should return, float64, in the shape the module returns.

    module: an experts module with parameters for all experts; or a block with `input_linear`/`output_linear` and a
        router (Granite on transformers 4, JetMoe), of which the layer output is returned; or one of those parallel
        linears; or an `nn.ModuleDict` / `nn.ModuleList` subclass of experts with a forward of its own.
    args: what its forward received, positionally. Hidden states come first; the integer tensor is the choice of
        experts; weights may be (T, k) or scattered over (T, E). An index of `num_experts` contributes nothing.
    deltas: as the module docstring says. A single parallel linear takes its change under "weight".
    """
    deltas = deltas or {}
    if isinstance(module, nn.ModuleDict):
        return _module_dict(module, args, deltas)
    if isinstance(module, nn.ModuleList):
        return part_linears_oracle(module, args, deltas)
    if hasattr(module, "down_embed"):
        return _product_keys(module, args[0], deltas)
    if hasattr(module, "input_linear"):
        return _parallel_block(module, args[0], deltas)
    if hasattr(module, "weight") and module.weight.ndim == 3:
        return _per_group(*args, lambda e, row: (module.weight[e].double() + _at(deltas, "weight", e)) @ row)
    expert = _expert_fn(module, deltas)
    if len(args) == 1:  # Llama4: every expert sees its own copy of all tokens, already weighted
        x = args[0].reshape(module.num_experts, -1, args[0].shape[-1])
        return torch.stack([expert(e, row.double()) for e, rows in enumerate(x) for row in rows])
    if hasattr(module, "fc1"):  # Aria on transformers 4: rows sorted by expert, and how many each gets
        return _per_group(args[0], args[1].tolist(), expert)
    x, idx, w = _routing(module, args)
    return route_oracle(x.reshape(-1, x.shape[-1]), idx, w, expert).reshape(x.shape)


def mlp_list_oracle(
    block_experts: nn.ModuleList, x: Tensor, idx: Tensor, w: Tensor, deltas: Deltas | None = None
) -> Tensor:
    """The routed output (T, H), float64, of a `ModuleList` of gated MLPs.

    The leaves are gate_proj/up_proj/down_proj, or w1 (gate), w3 (up), w2 (down). An `nn.Identity` among the experts
    returns its input. x (T, H), idx (T, k) int64, w (T, k).
    """
    deltas = deltas or {}

    def expert(e: int, row: Tensor) -> Tensor:
        mlp = block_experts[e]
        if isinstance(mlp, nn.Identity):
            return row
        names = ("w1", "w3", "w2") if hasattr(mlp, "w1") else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (getattr(mlp, name) for name in names)
        if any(linear.bias is not None for linear in (gate, up, down)):
            raise ValueError(f"{type(mlp).__name__} has a bias; this oracle expects linears without one")
        first = torch.cat([gate.weight, up.weight]).double() + _at(deltas, "gate_up_proj", e)
        second = down.weight.double() + _at(deltas, "down_proj", e)
        gated, linear = (first @ row).chunk(2)
        return second @ (mlp.act_fn(gated) * linear)

    return route_oracle(x, idx, w, expert)


def route_oracle(x: Tensor, idx: Tensor, w: Tensor, expert: ExpertFn) -> Tensor:
    """sum_j w[t, j] * expert(idx[t, j], x[t]), (T, H) float64; what an index past the last means is up to `expert`."""
    rows = []
    for t in range(x.shape[0]):
        row = x[t].double()
        out = torch.zeros_like(row)
        for j in range(idx.shape[1]):
            out = out + w[t, j].double() * expert(int(idx[t, j]), row)
        rows.append(out)
    return torch.stack(rows)


def _at(deltas: Deltas, key: str, e: int) -> Tensor | float:
    return deltas[key][e] if key in deltas else 0.0


def _routing(module: nn.Module, args: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, idx (T, k) and w (T, k), whatever the order and whether the weights are scattered."""
    x, rest = args[0], args[1:]
    idx = next(arg for arg in rest if not arg.is_floating_point())
    weights = [arg for arg in rest if arg.is_floating_point()]
    w = next((arg for arg in weights if arg.shape == idx.shape), None)
    if w is None:
        w = weights[0].gather(1, idx)
    if w.shape != idx.shape or idx.shape[0] != x.numel() // x.shape[-1]:
        raise ValueError(f"{type(module).__name__}: weights {tuple(w.shape)} and indices {tuple(idx.shape)} do not fit")
    return x, idx, w


def _expert_fn(module: nn.Module, deltas: Deltas) -> ExpertFn:
    """The whole MLP of one expert of `module`, biases, gate and norm included."""
    first, second = _stacks(module)
    gate = _gate(module)
    first_bias = getattr(module, "gate_up_proj_bias", None)
    second_bias = getattr(module, "down_proj_bias", None)
    norm = getattr(module, "post_expert_norm", None)
    count = second.shape[0]
    has_identities = hasattr(module, "zero_expert_num")

    def expert(e: int, row: Tensor) -> Tensor:
        if e >= count:
            return row if has_identities else torch.zeros_like(row)
        hidden = (first[e] + _at(deltas, "gate_up_proj", e)) @ row
        hidden = gate(hidden if first_bias is None else hidden + first_bias[e].double())
        out = (second[e] + _at(deltas, "down_proj", e)) @ hidden
        out = out if second_bias is None else out + second_bias[e].double()
        if norm is not None:
            out = out * (1.0 + norm.weight.double())
            out = out / torch.sqrt(out.square().mean() + norm.eps)
        return out

    return expert


def _stacks(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Both stacks of `module` as float64 (E, out, in)."""
    if hasattr(module, "mlp") and hasattr(module.mlp, "v1"):  # DBRX: flat, and w2 is (in, out) for each expert
        glu = module.mlp
        w1, v1, w2 = (p.double().view(-1, glu.ffn_hidden_size, glu.hidden_size) for p in (glu.w1, glu.v1, glu.w2))
        return torch.cat([w1, v1], dim=1), w2.transpose(1, 2)
    if hasattr(module, "fc1"):
        return module.fc1.weight.double().transpose(1, 2), module.fc2.weight.double().transpose(1, 2)
    first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    second = module.down_proj
    if getattr(module, "is_transposed", type(module).__name__ in TRANSPOSED_WITHOUT_FLAG):
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    return first.double(), second.double()


def _gate(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """From the first projection's row (M,) to the inner row (I,), by the formula of the architecture."""
    name = type(module).__name__
    if name == "GptOssExperts":
        return lambda h: _swish_plus_one(h[0::2], h[1::2], module.alpha, module.limit)
    if name == "OpenAIPrivacyFilterExperts":
        return lambda h: _swish_plus_one(*h.chunk(2), module.alpha, module.limit)
    if name == "MiniMaxM3VLExperts":
        return lambda h: _swish_plus_one(*h.chunk(2), module.swiglu_alpha, module.swiglu_limit)
    if name == "DeepseekV4Experts":
        return lambda h: _clamped_swiglu(*h.chunk(2), module.limit)
    if name in {"Glm5NextTextExperts", "HYV4Experts"}:
        return lambda h: _clamped_swiglu(*h.chunk(2), module.swiglu_limit)
    if name == "Step3p7Experts":
        return lambda h: _swiglu_clamped_after(*h.chunk(2), module.limit)
    if name == "Inkling2Experts":
        caps = module.act_fn.gate_softcap.softcap, module.act_fn.up_softcap.softcap
        return lambda h: _softcapped_swiglu(*h.chunk(2), *caps)
    if name == "DbrxExperts":
        return lambda h: module.mlp.activation_fn(h.chunk(2)[0]) * h.chunk(2)[1]
    if name == "AriaGroupedExpertsMLP":
        return lambda h: F.silu(h.chunk(2)[0]) * h.chunk(2)[1]
    if not hasattr(module, "gate_up_proj"):
        return module.act_fn
    return lambda h: module.act_fn(h.chunk(2)[0]) * h.chunk(2)[1]


def _swish_plus_one(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1.0) * gate / (1.0 + torch.exp(-alpha * gate))


def _clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1.0 + torch.exp(-gate)) * up


def _swiglu_clamped_after(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return (gate / (1.0 + torch.exp(-gate))).clamp(max=limit) * up.clamp(-limit, limit)


def _softcapped_swiglu(gate: Tensor, up: Tensor, gate_cap: float, up_cap: float) -> Tensor:
    capped = gate_cap * torch.tanh(gate / gate_cap)
    return capped / (1.0 + torch.exp(-gate)) * up_cap * torch.tanh(up / up_cap)


def _per_group(x: Tensor, sizes: Sequence[int], expert: ExpertFn) -> Tensor:
    """Rows sorted by expert, `sizes[e]` of them for expert e."""
    owners = [e for e, size in enumerate(sizes) for _ in range(size)]
    return torch.stack([expert(e, row.double()) for e, row in zip(owners, x, strict=True)])


def _parallel_block(block: nn.Module, x: Tensor, deltas: Deltas) -> Tensor:
    """Granite (transformers 4) and JetMoe: softmax over the chosen logits, two parallel linears, maybe one bias."""
    flat = x.reshape(-1, x.shape[-1])
    logits, idx = (flat.double() @ block.router.layer.weight.double().T).topk(block.router.top_k, dim=-1)

    def expert(e: int, row: Tensor) -> Tensor:
        gate, up = ((block.input_linear.weight[e].double() + _at(deltas, "gate_up_proj", e)) @ row).chunk(2)
        return (block.output_linear.weight[e].double() + _at(deltas, "down_proj", e)) @ (block.activation(gate) * up)

    out = route_oracle(flat, idx, logits.softmax(-1), expert)
    bias = getattr(block, "bias", None)
    return (out if bias is None else out + bias.double()).reshape(x.shape)


def _module_dict(experts: nn.ModuleDict, args: tuple, deltas: Deltas) -> Tensor:
    """NLLB (fc1/fc2 with biases) and Switch (wi/wo); `args` = hidden (T, H), mask, weights.

    Switch: a one-hot mask (T, 1, E) and weights (T, 1). NLLB on transformers 5: the mask (T, E) of zeros and ones of
    the first choice is read as expert *indices*, with weights (T, E): only experts 0 and 1 ever run. That is what it
    returns, so that is what is computed here. In eval mode NLLB also scales down by its token dropout.
    """
    x, mask, w = args
    expert = dict_expert(experts, deltas)
    if mask.ndim == 2:
        return route_oracle(x, mask, w * (1.0 - experts.moe_token_dropout), expert)
    chosen = mask[:, 0].sum(-1) > 0  # beyond its capacity a token is sent nowhere
    return route_oracle(x, mask[:, 0].argmax(-1, keepdim=True), w * chosen[:, None], expert)


def dict_expert(experts: nn.ModuleDict, deltas: Deltas) -> ExpertFn:
    """One ungated MLP of a dictionary `expert_0`, `expert_1`, ..., biases included."""

    def expert(e: int, row: Tensor) -> Tensor:
        mlp = experts[f"expert_{e}"]
        first, second = (mlp.fc1, mlp.fc2) if hasattr(mlp, "fc1") else (mlp.wi, mlp.wo)
        hidden = (first.weight.double() + _at(deltas, "gate_up_proj", e)) @ row + _bias(first)
        return (second.weight.double() + _at(deltas, "down_proj", e)) @ mlp.act(hidden) + _bias(second)

    return expert


def part_linears_oracle(experts: nn.ModuleList, args: tuple, deltas: Deltas | None = None) -> Tensor:
    """VitPose: `args` = hidden (B, T, in), indices (B, 1, 1); a picture's expert maps all its tokens to (B, T, out).

    The delta (E, out, in) is keyed "down_proj": these linears are one part of a block's second projection.
    """
    deltas = deltas or {}
    x, indices = args
    pictures = []
    for rows, e in zip(x, indices.flatten().tolist(), strict=True):
        weight = experts[e].weight.double() + _at(deltas, "down_proj", e)
        pictures.append(rows.double() @ weight.T + _bias(experts[e]))
    return torch.stack(pictures)


def _bias(linear: nn.Linear) -> Tensor | float:
    return 0.0 if linear.bias is None else linear.bias.double()


def _product_keys(block: nn.Module, x: Tensor, deltas: Deltas) -> Tensor:
    """Doge: a dense MLP plus rank-one experts, each a row of two embeddings, found by a product of two key halves."""
    if deltas:
        raise ValueError("Doge's experts are rows of two embeddings: there is no weight matrix to change")
    rows = x.reshape(-1, x.shape[-1]).double()
    weights = {name: parameter.double() for name, parameter in block.named_parameters()}
    # The router's output is cut in two over the whole batch, not token by token: upstream's way.
    halves = (rows.view(x.shape) @ weights["router_gate.weight"].T).view(2, rows.shape[0], -1)
    out = []
    for t, row in enumerate(rows):
        scores = halves[0, t][:, None] + halves[1, t][None, :]
        best, chosen = scores.flatten().topk(block.top_k)
        mixed = torch.zeros_like(row)
        for share, e in zip(best.softmax(-1), chosen.tolist(), strict=True):
            mixed = mixed + share * block.act_fn(weights["down_embed.weight"][e] @ row) * weights["up_embed.weight"][e]
        inner = block.act_fn(weights["gate_proj.weight"] @ row) * (weights["up_proj.weight"] @ row)
        out.append(weights["down_proj.weight"] @ inner + mixed)
    return torch.stack(out).view(x.shape)
