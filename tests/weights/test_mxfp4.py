"""Packed FP4: dequantization, training, what it refuses, and loading GPT-OSS with its experts packed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peft_moe.checkpoint.packed import packed_config
from peft_moe.weights import MXFP4Weight, open_modules, open_stacked
from tests.model.tiny import BUILDERS, config, experts_of
from tests.reference import adapter_factors, dense_gradients, expected_gradients, relative, write_deltas
from tests.weights.checkpoints import read, save_shards
from tests.zoo import ENTRIES, first_floating, loss

V5 = int(transformers.__version__.split(".")[0]) >= 5
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(E, rows, cols)` -> blocks `(E, rows, cols / 32, 16)`, scales `(E, rows, cols / 32)`, and exact float64 values.

    Value by value: the nearest of the sixteen, under the power of two that fits the largest of 32.
    """
    experts, rows, cols = weight.shape
    groups = weight.double().reshape(experts, rows, cols // 32, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-30))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    table = torch.tensor(VALUES, dtype=torch.float64)
    number = (scaled.abs()[..., None] - table).abs().argmin(-1)
    exact = table[number] * scaled.sign() * torch.exp2(exponent)[..., None]
    codes = number + 8 * (scaled < 0).long()
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponent + 127).to(torch.uint8), exact.reshape(experts, rows, cols)


def weights(shape: tuple[int, int, int] = (3, 24, 64)) -> Tensor:
    found = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return found * torch.exp(2 * torch.randn(*shape[:2], 1, generator=torch.Generator().manual_seed(1)))


class Holder(nn.Module):
    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


@pytest.mark.parametrize("form", ["blocks", "packed", "int8", "int8 e8m0"])
def test_forms(form: str) -> None:
    blocks, scales, exact = pack(weights())
    flat = blocks.reshape(3, 24, 32)
    holder = {
        "blocks": lambda: Holder(down_proj_blocks=blocks, down_proj_scales=scales),
        "packed": lambda: Holder(down_proj=flat, down_proj_scales=scales),
        "int8": lambda: Holder(down_proj=flat.view(torch.int8), down_proj_scale_inv=torch.exp2(scales.float() - 127)),
        "int8 e8m0": lambda: Holder(
            down_proj=flat.view(torch.int8), down_proj_scale_inv=scales.view(torch.float8_e8m0fnu)
        ),
    }[form]()
    store = open_stacked(holder, [("down_proj", True, False)], (3, 24, 64), "experts")
    assert isinstance(store, MXFP4Weight) and store.packed and store.dtype == torch.bfloat16
    assert torch.equal(store.materialize(None, torch.float64), exact)
    assert torch.equal(store.materialize([2, 0], torch.float32).double(), exact[[2, 0]])
    assert torch.equal(store.frozen()().double(), exact), "bfloat16 holds every value exactly"
    store.keep_built = True
    assert store.frozen()() is store.frozen()()


def test_merging_goes_to_16_bits_or_is_refused() -> None:
    blocks, scales, exact = pack(weights())
    holder = Holder(down_proj_blocks=blocks, down_proj_scales=scales)
    store = open_stacked(holder, [("down_proj", True, False)], (3, 24, 64), "experts")
    before = [tensor.clone() for tensor in holder.parameters()]
    with pytest.raises(ValueError, match=r"experts\.down_proj is stored in MXFP4.*merge_and_unload\(dtype="):
        store.add_([([0], torch.ones(1, 24, 64))])
    assert all(torch.equal(a, b) for a, b in zip(before, holder.parameters(), strict=True))
    store.densify(torch.float32)  # type: ignore[attr-defined]
    assert [name for name, _ in holder.named_parameters()] == ["down_proj"]
    assert torch.equal(holder.down_proj.double(), exact.transpose(1, 2))
    assert not store.packed and torch.equal(store.materialize(None, torch.float64), exact)
    store.add_([([2, 0], torch.ones(2, 24, 64))])
    expected = exact.clone()
    expected[[2, 0]] += 1
    assert torch.allclose(store.materialize(None, torch.float64), expected, rtol=1e-6)


def test_scales_that_do_not_fit_or_are_missing() -> None:
    blocks, scales, _ = pack(weights())
    holder = Holder(down_proj_blocks=blocks, down_proj_scales=scales[:, :-1])
    with pytest.raises(ValueError, match=r"experts\.down_proj: scales of shape \(3, 23, 2\).*expected \(3, 24, 2"):
        open_stacked(holder, [("down_proj", True, False)], (3, 24, 64), "experts")
    with pytest.raises(ValueError, match=r"without its scales: looked for down_proj_scales"):
        open_stacked(Holder(down_proj_blocks=blocks), [("down_proj", True, False)], (3, 24, 64), "experts")


class _Wrapped:
    """As the tensors of Triton kernels: no torch tensor."""

    storage = object()
    shape = (3, 24, 64)


def test_other_storages_are_recognised_and_refused() -> None:
    holder = Holder(down_proj=torch.zeros(3, 24, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"model\.experts: its expert weights are torch\.uint8 codes.*packed_config"):
        open_stacked(holder, [("down_proj", False, False)], (3, 24, 64), "model.experts")
    wrapped: Any = nn.Module()
    wrapped.down_proj = _Wrapped()
    with pytest.raises(ValueError, match="layout of a Triton kernel"):
        open_stacked(wrapped, [("down_proj", False, False)], (3, 24, 64), "model.experts")

    class AffineQuantizedTensor(torch.Tensor):
        pass

    AffineQuantizedTensor.__module__ = "torchao.dtypes.affine_quantized_tensor"
    linear: Any = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(AffineQuantizedTensor), requires_grad=False)
    with pytest.raises(ValueError, match=r"torchao tensors \(AffineQuantizedTensor\)"):
        open_modules([[linear]], (1, 4, 4), "model.experts")
    linear = nn.Linear(4, 4, bias=False)
    linear.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"NVFP4"):
        open_modules([[linear]], (1, 4, 4), "model.experts")


class _CodesOnly(nn.Linear):
    """As a linear of compressed-tensors in NVFP4, or in packed int4: it has no `weight`."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows, bias=False)
        del self.weight
        codes = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        self.weight_packed = nn.Parameter(codes, requires_grad=False)
        scale = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def test_linears_without_a_weight() -> None:
    """Among experts they are refused by what they hold; elsewhere they are left to whoever runs them."""
    with pytest.raises(ValueError, match=r"_CodesOnly modules without a `weight`.*weight_packed in torch\.uint8"):
        open_modules([[_CodesOnly(32, 8)]], (1, 8, 32), "model.experts")
    model: Any = BUILDERS["remote_list"]()
    attention = next(name for name, one in model.named_modules() if isinstance(one, nn.Linear) and "expert" not in name)
    parent, _, leaf = attention.rpartition(".")
    plain = model.get_submodule(attention)
    setattr(model.get_submodule(parent), leaf, _CodesOnly(plain.in_features, plain.out_features))
    assert experts_of(get_peft_model(model, config()))
    model = BUILDERS["remote_list"]()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and ".experts." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _CodesOnly(linear.in_features, linear.out_features))
    with pytest.raises(ValueError, match=r"experts: its expert weights are _CodesOnly modules without a `weight`"):
        get_peft_model(model, config())


# --- GPT-OSS ---------------------------------------------------------------------------------------------------------


def write_gpt_oss(folder: Path) -> Any:
    """A GPT-OSS checkpoint with packed experts, and the dense twin: its weights become what the codes stand for."""
    twin: Any = ENTRIES["gpt_oss"].build()
    inner = twin.config.intermediate_size
    if inner % 32:  # FP4 groups 32 values: the catalogue's width is too odd
        settings = copy.deepcopy(twin.config)
        settings.intermediate_size = 96
        twin = type(twin)(settings)
        from tests.zoo.builder import reinitialise

        reinitialise(twin)
        twin = twin.float().eval()
    tensors: dict[str, Tensor] = {}
    for name, parameter in twin.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales, exact = pack(parameter.data.transpose(1, 2))
            parameter.data.copy_(exact.transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    twin.save_pretrained(folder)
    plain = read(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    packed = {name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")}
    save_shards({key: value.contiguous() for key, value in plain.items() if key not in packed} | tensors, folder)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    path.write_text(json.dumps(content))
    return twin


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, config=packed_config(str(folder)), dtype=dtype, attn_implementation="eager"
    ).eval()


def test_gpt_oss_stays_packed(tmp_path: Path) -> None:
    twin = write_gpt_oss(tmp_path / "mx")
    inputs = ENTRIES["gpt_oss"].inputs(twin)
    model = load(tmp_path / "mx")
    packed = {name for name, value in model.named_parameters() if value.dtype == torch.uint8}
    assert len(packed) == 8
    with torch.no_grad():
        assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
    model.save_pretrained(tmp_path / "again")
    before, after = read(tmp_path / "mx"), read(tmp_path / "again")
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize("lost", ["scales", "blocks"])
def test_a_checkpoint_that_lacks_something_raises(lost: str, tmp_path: Path) -> None:
    write_gpt_oss(tmp_path)
    tensors = read(tmp_path)
    del tensors[f"model.layers.1.mlp.experts.down_proj_{lost}"]
    save_shards(tensors, tmp_path)
    with pytest.raises(ValueError, match=f"layers.1.mlp.experts.down_proj_{lost} is missing"):
        load(tmp_path)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("keep", ["recompute", "cache"])
def test_gpt_oss_trains(keep: str, reentrant: bool | None, tmp_path: Path) -> None:
    twin = write_gpt_oss(tmp_path)
    inputs = ENTRIES["gpt_oss"].inputs(twin)
    model = get_peft_model(load(tmp_path), config(dequantize=keep))
    stores = [store for layer in experts_of(model) for store in layer.stores.values()]
    assert all(isinstance(store, MXFP4Weight) and store.dtype == torch.float32 for store in stores)
    factors = adapter_factors(model, twin)
    write_deltas(factors, 2.0)
    twin.requires_grad_(True).train()
    model.train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert relative(first_floating(model(**inputs)), first_floating(twin(**inputs))) < 2e-5
    loss(model, inputs).backward()
    loss(twin, inputs).backward()
    parameters = dict(model.named_parameters())
    for one, (d_a, d_b) in zip(factors, expected_gradients(factors, dense_gradients(twin), 2.0), strict=True):
        assert relative(parameters[one.key].grad, d_a) < 1e-4
        assert relative(parameters[one.key.replace("lora_A", "lora_B")].grad, d_b) < 1e-4


def test_gpt_oss_merges_into_16_bits(tmp_path: Path) -> None:
    twin = write_gpt_oss(tmp_path / "mx")
    inputs = ENTRIES["gpt_oss"].inputs(twin)
    model = get_peft_model(load(tmp_path / "mx"), config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="stored in MXFP4"):
        model.merge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    write_deltas(adapter_factors(model, twin), 2.0)
    with torch.no_grad():
        expected = first_floating(twin(**inputs))
        assert relative(first_floating(model(**inputs)), expected) < 2e-5
        merged = model.merge_and_unload(dtype=torch.float32)
        assert relative(first_floating(merged(**inputs)), expected) < 2e-5
    assert list(dict(merged.named_parameters())) == list(dict(twin.named_parameters())) or set(
        dict(merged.named_parameters())
    ) == set(dict(twin.named_parameters()))
    merged.save_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        assert relative(first_floating(stock.eval()(**inputs)), expected) < 2e-5


@pytest.mark.skipif(not V5, reason="`FP8Experts` is a class of transformers 5")
def test_fp4_in_fp8_experts() -> None:
    """DeepSeek-V4's `expert_dtype="fp4"`: int8 stacks whose shape is half of what they hold."""
    from transformers.integrations.finegrained_fp8 import FP8Experts

    twin: Any = ENTRIES["qwen3_moe"].build()
    settings = copy.deepcopy(twin.config)
    settings.moe_intermediate_size = 96
    twin = type(twin)(settings)
    from tests.zoo.builder import reinitialise

    reinitialise(twin)
    twin = twin.float().eval()
    model = copy.deepcopy(twin)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        experts = FP8Experts(settings, block_size=(1, 32), expert_dtype="fp4", scale_fmt="ue8m0")
        for name in ("gate_up_proj", "down_proj"):
            dense = getattr(other.mlp.experts, name)
            blocks, scales, exact = pack(dense.data)
            dense.data.copy_(exact)
            flat = blocks.reshape(*exact.shape[:2], -1).view(torch.int8)
            setattr(experts, name, nn.Parameter(flat, requires_grad=False))
            setattr(
                experts,
                f"{name}_scale_inv",
                nn.Parameter(scales.view(torch.float8_e8m0fnu), requires_grad=False),
            )
        layer.mlp.experts = experts
    adapted = get_peft_model(model, config())
    assert all(isinstance(store, MXFP4Weight) for layer in experts_of(adapted) for store in layer.stores.values())
    inputs = ENTRIES["qwen3_moe"].inputs(twin)
    with torch.no_grad(), adapted.disable_adapter():
        assert relative(first_floating(adapted(**inputs)), first_floating(twin(**inputs))) < 2e-5
    write_deltas(adapter_factors(adapted, twin), 2.0)
    with torch.no_grad():
        assert relative(first_floating(adapted(**inputs)), first_floating(twin(**inputs))) < 2e-5


def test_the_block_of_stock_mxfp4_does_not_pass_the_adapter_by() -> None:
    """transformers 5 calls its kernels through `forward_routed`, unless the experts say that they are hooked."""
    twin: Any = ENTRIES["gpt_oss"].build()
    block = twin.model.layers[0].mlp
    type_of = type(block.experts)

    class Routed(type_of):  # type: ignore[misc, valid-type]
        def forward_routed(self, *args: Any) -> Tensor:
            raise AssertionError("the adapter was passed by")

    Routed.__name__ = type_of.__name__
    block.experts.__class__ = Routed
    model = get_peft_model(twin, config())
    assert experts_of(model)[0]._is_hooked is True


def test_weights_in_the_layout_of_a_kernel_are_refused() -> None:
    class Mxfp4GptOssExperts(nn.Module):
        """As transformers leaves it on a GPU: no parameters, but the kernel's own tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = _Wrapped(), _Wrapped()

        def forward(self, hidden_states: Tensor, routing_data: Any) -> Tensor:
            return hidden_states

    model: Any = ENTRIES["gpt_oss"].build()
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(ValueError, match=r"mlp\.experts .*layout of a kernel.*packed_config"):
        get_peft_model(model, config())
