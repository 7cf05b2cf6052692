"""Merged on disk, a checkpoint loads in stock transformers with the weights and logits of `merge_and_unload`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from peft_moe import merge_checkpoint
from tests.checkpoint.golden_cases import CASES, HOME, WRITERS, load_base, logits
from tests.checkpoint.merge.cases import assert_same_weights, case, merge, output, write_adapter
from tests.remote_code import RemoteConfig, RemoteForCausalLM
from tests.weights.checkpoints import read, save_shards
from tests.zoo import ENTRIES
from tests.zoo.builder import reinitialise

# Text models that are saved alone; transformers 4 has no type for the config of these.
NO_CONFIG = {"qwen3_omni_moe_text", "Glm4vMoe_text"}
NAMES = [name for name in ENTRIES if name != "doge" and name not in NO_CONFIG]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, tmp_path: Path) -> None:
    base, merged = case(name, tmp_path, target_modules="all-linear")
    result = merge(tmp_path)
    assert result.path == tmp_path / "out" and 0 < result.merged <= result.tensors
    attention = base.config._attn_implementation
    again = type(base).from_pretrained(tmp_path / "out", attn_implementation=attention).eval()
    assert_same_weights(again, merged)
    # The catalogue changes some models after they are built, so both sides of the comparison come from files.
    wanted = type(base).from_pretrained(tmp_path / "base", attn_implementation=attention).eval()
    before = output(wanted, name)
    wanted.load_state_dict(merged.state_dict())
    found = output(again, name)
    torch.testing.assert_close(found, output(wanted, name), rtol=1e-6, atol=1e-6)
    assert (found - before).norm() > 1e-3 * before.norm(), "the adapter does nothing"
    assert set(read(tmp_path / "out")) == set(read(tmp_path / "base"))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", CASES)
def test_adapters_of_either_version(name: str, writer: str, tmp_path: Path) -> None:
    """Between them: DoRA on experts and linears, ranks that differ, gate and up apart, some experts, rsLoRA."""
    home = HOME / name
    merge_checkpoint(home / "base", home / writer, tmp_path / "out", progress=False)
    expected = load_file(home / writer / "logits.safetensors")["adapted"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").float().eval()
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    merged = PeftModel.from_pretrained(load_base(name), home / writer).merge_and_unload()
    assert_same_weights(found, merged, 1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = ENTRIES[name].build().to(dtype)
    base.save_pretrained(tmp_path / "base")
    model = write_adapter(base, tmp_path / "adapter", target_modules=[])
    merge(tmp_path)
    again = type(base).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert_same_weights(again, model.merge_and_unload())


def test_what_is_stored_in_full_is_replaced(tmp_path: Path) -> None:
    """`modules_to_save`, and biases that were trained."""
    base = ENTRIES["gpt_oss"].build()
    base.save_pretrained(tmp_path / "base")
    options = {"modules_to_save": ["lm_head"], "bias": "all", "target_experts": []}
    model = write_adapter(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.requires_grad and "lora_" not in key:
                value.add_(torch.randn_like(value))
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merge(tmp_path)
    again = type(base).from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, merged, 1e-6)
    assert not torch.equal(again.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(again.model.layers[0].self_attn.q_proj.bias, base.model.layers[0].self_attn.q_proj.bias)


def test_embeddings_and_shared_factors(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "share_experts": "outer"}
    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    model = write_adapter(base, tmp_path / "adapter", **options)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_embedding" in key:
                value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path)
    again = type(base).from_pretrained(tmp_path / "out").eval()
    assert_same_weights(again, model.merge_and_unload(), 1e-6)
    assert not torch.equal(again.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_a_plain_lora_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = ENTRIES["qwen3_moe"].build()
    base.save_pretrained(tmp_path / "base")
    pattern = {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"q_proj": 9}, "use_dora": True}
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, **pattern)
    )
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merge(tmp_path)
    assert_same_weights(type(merged).from_pretrained(tmp_path / "out"), merged, 1e-6)


def test_another_dtype(tmp_path: Path) -> None:
    base, merged = case("deepseek_v3", tmp_path)
    merge(tmp_path, dtype="bfloat16")
    found = read(tmp_path / "out")
    correction = [key for key in found if key.endswith("e_score_correction_bias")]
    assert {value.dtype for key, value in found.items() if key not in correction} == {torch.bfloat16}
    again = type(base).from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert again.dtype == torch.bfloat16
    wanted = merged.to(torch.bfloat16).state_dict()
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value.float(), wanted[key].float(), rtol=1e-2, atol=1e-2)


def test_a_checkpoint_without_the_prefix_of_the_model(tmp_path: Path) -> None:
    """Saved from the bare model, adapted as a causal LM."""
    base = ENTRIES["qwen3_moe"].build()
    base.model.save_pretrained(tmp_path / "base")
    merged = write_adapter(base, tmp_path / "adapter").merge_and_unload()
    merge(tmp_path)
    assert not any(key.startswith("model.") for key in read(tmp_path / "out"))
    assert_same_weights(type(base.model).from_pretrained(tmp_path / "out"), merged.model)


def test_a_list_of_experts_in_code_of_its_own(tmp_path: Path) -> None:
    """A model that transformers does not know itself, with experts in a list on either version."""
    AutoConfig.register(RemoteConfig.model_type, RemoteConfig, exist_ok=True)
    AutoModelForCausalLM.register(RemoteConfig, RemoteForCausalLM, exist_ok=True)
    base = RemoteForCausalLM(RemoteConfig(vocab_size=64, hidden_size=64, moe_intermediate_size=40)).float().eval()
    reinitialise(base)
    base.config.save_pretrained(tmp_path / "base")  # its weights are tied in a way that version 4 does not save
    save_shards({key: value for key, value in base.state_dict().items() if key != "lm_head.weight"}, tmp_path / "base")
    merged = write_adapter(base, tmp_path / "adapter", target_modules="all-linear").merge_and_unload()
    result = merge(tmp_path)
    assert result.merged > 2 * 8 * 3
    tensors, wanted = read(tmp_path / "out"), merged.state_dict()
    assert set(tensors) == set(wanted) - {"lm_head.weight"}
    for key, value in tensors.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6)


def test_code_that_is_not_trusted(tmp_path: Path) -> None:
    case("qwen3_moe", tmp_path)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model_type": "somebodys", "auto_map": {"AutoConfig": "code.SomeConfig"}}))
    (tmp_path / "base" / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        merge(tmp_path)


def _qwen_vl() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = _TEXT | {"num_experts": 4, "mlp_only_layers": [], "rope_scaling": rope}
    vision = _VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


def _llama() -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = _TEXT | {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
    sizes = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    vision = _VISION | dict.fromkeys(sizes, 32) | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Llama4Config(text_config=text, vision_config=vision | {"num_attention_heads": 2})
    return Llama4ForConditionalGeneration(config)


_TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_experts_per_tok": 1, "pad_token_id": 0,
}  # fmt: skip
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 64, "num_position_embeddings": 16}


@pytest.mark.parametrize("build", [_qwen_vl, _llama])
def test_models_that_see(build: Any, tmp_path: Path) -> None:
    """Text and vision: other prefixes in the file than in the model."""
    base = build().float().eval()
    reinitialise(base)
    base.save_pretrained(tmp_path / "base")
    merged = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"]).merge_and_unload()
    merge(tmp_path)
    assert_same_weights(type(base).from_pretrained(tmp_path / "out"), merged)


def test_the_text_model_of_one_that_sees(tmp_path: Path) -> None:
    """Saved as a whole, adapted as a causal LM, merged into the whole."""
    whole = _llama().float().eval()
    reinitialise(whole)
    whole.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").float().eval()
    assert type(base) is not type(whole)
    merged = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"]).merge_and_unload()
    merge(tmp_path)
    assert set(read(tmp_path / "out")) == set(read(tmp_path / "base"))
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), merged)
    again, before = type(whole).from_pretrained(tmp_path / "out").state_dict(), whole.state_dict()
    assert all(torch.equal(again[key], value) for key, value in before.items() if "vision" in key)


def test_conversions_that_mix_experts_are_refused() -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    from peft_moe.checkpoint.merge.names import Group

    def group(*operations: Any) -> Group:
        converter = loading.WeightConverter(["e.*.gate.weight", "e.*.up.weight"], "e.gate_up_proj", list(operations))
        return Group(None, {"e.gate_up_proj": "e.gate_up_proj"}, {"e.*.gate.weight": ["e.0.gate.weight"]}, converter)

    group(loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)).check_slices()
    for operations in ((loading.MergeModulelist(dim=0), loading.Concatenate(dim=0)), (loading.MergeModulelist(dim=1),)):
        with pytest.raises(ValueError, match="mixes experts"):
            group(*operations).check_slices()
