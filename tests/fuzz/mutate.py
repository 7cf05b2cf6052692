"""Mutations of bytes, of JSON and of safetensors headers, all drawn from one `random.Random`."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

_DEEP = "[" * 100_000
RAW = [_DEEP, '{"a":' * 100_000, "1" * 5000, "-1", "1e400", "NaN", "Infinity", "nul", '"\\ud800"', "{", '"', ""]
NUMBERS = [0, -1, 1, 2, 3, 4, 2.5, 1e308, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, True, None]
PATTERNS = ["(a+)+$", r"(\w+\.?)+x", ".*.*.*.*.*x", "(.|.|.|.)" * 30, "(", "a{99999999999}", r"(.*)\1", "(?:.?)" * 40]
TEXTS = [
    "", "x", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "\x00", "\x1b[2J", "é", "x" * 5000, "all", "all-linear",
    "q_proj", "o_proj", "lm_head", "experts", "down_proj", "gate_up_proj", "MOELORA", "LORA", "XLORA", "LOHA", "F32",
    "outer", "loop", "pissa", "pissa_niter_1000000000", "olora", "eva", "corda", "loftq", "gaussian", "orthogonal",
    "CAUSAL_LM", "antigravity", "os", "Trainer", "contiguous_r",
]  # fmt: skip
CODES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I64", "I32", "I8", "U8",
         "BOOL", "C64", "F128", "f32", "", 7]  # fmt: skip
OPTIONS = [
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "auto_mapping", "runtime_config", "layer_replication", "target_parameters", "use_dora",
    "use_rslora",
    "trainable_token_indices", "init_lora_weights", "expert_r", "expert_alpha", "expert_rank_pattern", "target_experts",
    "expert_alpha_pattern", "expert_indices", "split_gate_up", "share_experts", "experts_backend", "format_version",
    "layout", "peft_type", "task_type", "bias", "fan_in_fan_out", "base_model_name_or_path", "ensure_weight_tying",
    "_custom_modules", "auto_map", "inference_mode", "revision", "peft_version", "monteclora_config", "use_bdlora",
]  # fmt: skip


def some_bytes(rng: random.Random, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """A few bytes between two places changed, put in or taken out."""
    out, last = bytearray(data), len(data) if last is None else last
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(first, max(first + 1, min(last, len(out))))
        kind = rng.randrange(6)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(out):
            out[place] = rng.choice(b'\x00\xff{}[]",:0129-.\\aA\xc3')
        elif kind == 2:
            out[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            del out[place : place + rng.randrange(1, 9)]
        elif kind == 4 and place < len(out):
            out[place] = rng.randrange(256)
        else:
            start = rng.randrange(first, max(first + 1, last))
            out[place:place] = out[start : start + rng.randrange(1, 33)]
    return bytes(out)


def cut_or_grown(rng: random.Random, data: bytes) -> bytes:
    """The file ends early or goes on."""
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data[: -rng.randrange(1, 9)]
    if kind == 2:
        return data + bytes(rng.randrange(1, 65))
    return data + data[: rng.randrange(1, len(data))]


def json_text(rng: random.Random, value: Any) -> bytes:
    """A JSON value changed in one to three places, as text; now and then with text that is no JSON in one."""
    found = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(rng, found)
    text = json.dumps(found)
    if rng.random() < 0.08:
        marks = [at for at in range(len(text)) if text[at] in ",:[{"]
        place = rng.choice(marks) + 1
        text = text[:place] + rng.choice(RAW) + text[place + rng.randrange(4) :]
    return text.encode()


def header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else; its length fits, mostly."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    names = [name for name in content if name != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_header(rng, content, names)
    text = json.dumps(content).encode() if rng.random() < 0.8 else json_text(rng, content)
    if rng.random() < 0.1:  # a name that stands there twice
        text = text[:-1] + b"," + json.dumps({names[0]: content.get(names[0])}).encode()[1:]
    text += b" " * (-len(text) % 8)
    said = (
        len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, len(text) + 8, 2**31, 2**63, 2**64 - 1))
    )
    return said.to_bytes(8, "little") + text + data[8 + length :]


def note(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header notes something else of the adapter that it was made of."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    metadata = content["__metadata__"]
    said = json.loads(metadata["peft_moe_native"])
    kind = rng.random()
    if kind < 0.2:  # how many experts a module has
        said["modules"][rng.choice([*said["modules"]])] = [rng.choice((*TEXTS, None)), rng.choice(NUMBERS)]
    elif kind < 0.4:
        said["config"][rng.choice(OPTIONS)] = _value(rng)
    metadata["peft_moe_native"] = json.dumps(said) if kind < 0.4 else json_text(rng, said).decode()
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _change_header(rng: random.Random, content: dict[str, Any], names: list[str]) -> None:
    name, other = rng.choice(names), rng.choice(names)
    one, two = content.get(name), content.get(other)
    if not isinstance(one, dict) or not isinstance(two, dict) or {"shape", "data_offsets", "dtype"} - {*one} - {*two}:
        return
    kind = rng.randrange(10)
    if kind == 0:
        one["dtype"] = rng.choice(CODES)
    elif kind == 1 and one["shape"]:
        one["shape"][rng.randrange(len(one["shape"]))] = rng.choice(NUMBERS)
    elif kind == 2:
        one["shape"] = rng.sample(one["shape"], len(one["shape"]))
    elif kind == 3:
        one["shape"] = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 20)))]
    elif kind == 4:
        one["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif kind == 5:
        one["data_offsets"] = [(at or 0) + rng.choice((-8, -4, -1, 1, 4, 8)) for at in one["data_offsets"]]
    elif kind == 6:  # each other's bytes
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    elif kind == 7:  # each other's names
        content[name], content[other] = two, one
    elif kind == 8:
        expert = rng.choice((0, 1, 3, 4095, 4096, 10**9 - 1, 10**9, 10**20))
        number = re.sub(r"(.*)\.\d+\.", rf"\1.{expert}.", name)  # the last one in it
        others = (rng.choice(TEXTS), name + ".x", name.replace("lora_A", "lora_B"), name[:-1], number, number)
        content[rng.choice(others)] = one
        content.pop(name, None)
    else:
        content["__metadata__"] = rng.choice(({"format": "pt"}, {"a": 1}, [], {"x": "y" * 1000}, None, {}))


def _change(rng: random.Random, root: Any) -> None:
    """Change one place of a JSON value that has at least one."""
    places = list(_places(root))
    where, key = rng.choice(places) if rng.random() < 0.6 or not isinstance(root, dict) else (root, rng.choice([*root]))
    kind = rng.randrange(8)
    if kind == 0:
        del where[key]
    elif kind == 1 and isinstance(where, dict):
        where[rng.choice(OPTIONS + TEXTS)] = _value(rng)
    elif kind == 2 and isinstance(where, dict):
        where[rng.choice(OPTIONS)] = where.pop(key)
    elif kind == 3 and isinstance(where[key], str):
        where[key] = some_bytes(rng, where[key].encode()).decode("utf-8", "replace")
    elif kind == 4:
        other, place = rng.choice(places)
        if other is not where:
            where[key] = copy.deepcopy(
                other.get(place) if isinstance(other, dict) else other[place % max(1, len(other))]
            )
    else:
        where[key] = _value(rng)
    if isinstance(root, dict) and not root:
        root["r"] = 1


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return rng.choice(PATTERNS)
    if kind == 5:
        return [_value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 3)))]
    if kind == 6:
        return {rng.choice(TEXTS + PATTERNS): _value(rng, depth + 1) for _ in range(rng.choice((0, 1, 2)))}
    return list(range(rng.choice((1, 3, 4, 2000))))


def _places(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
