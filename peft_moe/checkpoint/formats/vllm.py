"""vLLM: per expert, or stacked for the architectures whose experts it loads as stacks (docs/serving.md)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .. import native as keys
from .foreign import ForeignAdapter
from .native import ExpertsAdapter, NativeAdapter
from .plan import Converted, Format, Planned, planned
from .served_read import note, read_served
from .served_stacks import FACTORS, LINEARS
from .serving import RANKS, Serving
from .stock_layout import to_stock

CONSUMER = "vLLM"


@dataclass(frozen=True)
class Names:
    """What vLLM calls the experts of an architecture.

    Attributes: block: the module of a layer that holds them. leaves: gate, up and down of an expert.
        stacked: it takes them as stacks (`is_3d_moe_weight`), not one by one.
    """

    block: str = "mlp"
    leaves: tuple[str, str, str] = LINEARS
    stacked: bool = False


_MIXTRAL = Names("block_sparse_moe", ("w1", "w3", "w2"))
_STACKED = Names(stacked=True)

#: model_type -> names, of vLLM 0.33.0.
ARCHITECTURES: dict[str, Names] = {
    "qwen2_moe": Names(), "qwen3_moe": Names(), "qwen3_next": Names(), "deepseek_v2": Names(), "deepseek_v3": Names(),
    "glm4_moe": Names(), "glm4_moe_lite": Names(), "olmoe": Names(), "ernie4_5_moe": Names(), "exaone_moe": Names(),
    "afmoe": Names(), "mixtral": _MIXTRAL, "phimoe": _MIXTRAL, "minimax_m2": _MIXTRAL,
    "lfm2_moe": Names("feed_forward", ("w1", "w3", "w2")), "jamba": Names("feed_forward"),
    "gpt_oss": Names(leaves=("w1", "w3", "w2"), stacked=True), "qwen3_vl_moe": _STACKED, "qwen3_5_moe": _STACKED,
}  # fmt: skip


def export(adapter: NativeAdapter, moe_format: str = "auto", rank: int | None = None) -> Converted:
    """An adapter that vLLM serves.

    Args: moe_format: "2d" (one pair of factors an expert and projection), "3d" (stacked), or "auto": as vLLM has the
        architecture. rank: see `Serving`.
    """
    base = adapter.require_base(f"{CONSUMER} names and orders experts as the architecture does")
    kind = adapter.model.config.model_type
    if moe_format not in ("auto", "2d", "3d"):
        raise ValueError(f"moe_format={moe_format!r}: expected 'auto', '2d' or '3d'")
    if moe_format == "auto" and kind not in ARCHITECTURES:
        raise ValueError(
            f"{base.name}: what {CONSUMER} calls the experts of a {kind!r} is not known here (known: "
            f"{', '.join(sorted(ARCHITECTURES))}). If it serves LoRA on them, say how it takes them, `moe_format=`'2d' "
            "or '3d'; names are then those of transformers. Otherwise merge the adapter (`peft_moe.merge_checkpoint`)."
        )
    names = ARCHITECTURES.get(kind, Names(""))
    stacked = names.stacked if moe_format == "auto" else moe_format == "3d"
    serving = Serving(adapter, CONSUMER, stacked, rank)
    _check_linears(serving)
    tensors = serving.linear_tensors()
    for one in adapter.modules:
        tensors += list((_stacked if stacked else _single)(serving, one, _path(one.name, names.block), names))
    targets = {"experts"} if stacked else set(names.leaves)
    return Converted(
        serving.config(targets if adapter.modules else set()), tensors, _usage(adapter, serving, names, stacked),
        serving.facts(), note("vllm", adapter),
    )  # fmt: skip


def _check_linears(serving: Serving) -> None:
    for path in serving.linears:
        if path.endswith(".kv_b_proj"):
            raise ValueError(
                f"adapter {serving.adapter.name!r}: {path} is adapted, whose weight {CONSUMER} splits once when it "
                "loads a model with latent attention: while it decodes the adapter would be left out. Merge it instead "
                "(`peft_moe.merge_checkpoint`)."
            )


def _path(name: str, block: str) -> str:
    """Of the experts in vLLM's model, before its own mapping of prefixes."""
    found = re.fullmatch(r"(.*\.\d+)\.(\w+)\.experts", name)
    if found is None:
        raise ValueError(
            f"{name}: {CONSUMER} has the experts of a layer in a module `experts` of its feed-forward block"
        )
    return f"{found[1]}.{block or found[2]}.experts"


def _single(serving: Serving, one: ExpertsAdapter, path: str, names: Names) -> list[Planned]:
    sizes = serving.sizes(one)
    result = []
    for leaf, served in zip(LINEARS, names.leaves, strict=True):
        out_features, in_features = sizes[leaf]
        for factor in FACTORS:
            shape = (serving.rank, in_features) if factor == "lora_A" else (out_features, serving.rank)
            dtype = serving.dtype(one, leaf, factor)
            result += [
                planned(f"{keys.PREFIX}{path}.{expert}.{served}.{factor}.weight", shape, dtype,
                        partial(_of_expert, serving, one, leaf, factor, expert))
                for expert in range(one.spec.num_experts)
            ]  # fmt: skip
    return result


def _of_expert(serving: Serving, one: ExpertsAdapter, leaf: str, factor: str, expert: int) -> Tensor:
    return serving.stacks(one)[leaf, factor][expert]


def _stacked(serving: Serving, one: ExpertsAdapter, path: str, names: Names) -> list[Planned]:
    """A `(E * r, in)`, expert after expert; B `(out, r * E)`, the expert index fastest; gate and up as `base_layer`."""
    experts = one.spec.num_experts
    result = []
    for leaf, (out_features, in_features) in serving.sizes(one).items():
        name = path if leaf == "down_proj" else f"{path}.base_layer"
        for factor in FACTORS:
            shape = (
                (experts * serving.rank, in_features) if factor == "lora_A" else (out_features, serving.rank * experts)
            )
            make = partial(_as_matrix, serving, one, leaf, factor)
            dtype = serving.dtype(one, leaf, factor)
            result.append(planned(f"{keys.PREFIX}{name}.{factor}.weight", shape, dtype, make))
    return result


def _as_matrix(serving: Serving, one: ExpertsAdapter, leaf: str, factor: str) -> Tensor:
    return to_stock(serving.stacks(one)[leaf, factor], factor, swapped=False)[1].contiguous()


def _usage(adapter: NativeAdapter, serving: Serving, names: Names, stacked: bool) -> list[str]:
    base = adapter.config.base_model_name_or_path or "<base model>"
    rank = next((one for one in RANKS if one >= serving.rank), RANKS[-1])
    extra = []
    if stacked != names.stacked:
        module = json.dumps({"name": "adapter", "path": "<this folder>", "is_3d_lora_weight": stacked})
        extra = [
            "",
            "Its experts are not in the form that vLLM takes by itself: start it with `--enable-mixed-moe-lora-format`",
            f"and `--lora-modules '{module}'`.",
        ]
    return [
        "```console",
        f"$ vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=<this folder>",
        "```",
        *extra,
    ]


def read(adapter: ForeignAdapter) -> Converted:
    """The other way, bit for bit where this package wrote it and the tensors were not changed since."""
    return read_served(adapter, "vllm")


#: No keys are of this format alone: a file is recognised by the note of its export, or named.
FORMAT = Format("vllm", CONSUMER, export=export, read=read)
