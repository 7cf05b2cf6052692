"""How much memory loading takes: a synthetic Qwen3-MoE in bf16 and FP8, loaded in each way in a process of its own.

    python benchmarks/loading.py
    python benchmarks/loading.py --layers 24 --hidden 1024 --ways nf4 fp8-packed

Columns, in MiB, all above what the process held after it had loaded a tiny model in the same way:

    weights        bytes of the model's state dict, statistics of quantized weights included
    resident       memory of the process after loading, pages of checkpoint files that are mapped included
    peak           the most while loading, likewise (`ru_maxrss`)
    own resident   memory of the process after loading, without pages of files (Linux)
    own peak       the most while loading, likewise, sampled: what a machine must have, since the kernel takes pages
                   of files back when memory is short
    GPU            the most that torch's allocator held, and holds after loading (with CUDA, where all is loaded to)
    above weights  by how much own peak, or with CUDA the GPU's, exceeds weights

The processes run with MALLOC_MMAP_THRESHOLD_=262144, unless the variable is set already: otherwise glibc keeps much of
what was freed, and memory shows how the heap is fragmented instead of what is held.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# torch is imported in the children alone: a process starts with the `ru_maxrss` of the one that started it.

MIB = 2**20
WAYS = {
    "bf16": "plain",
    "nf4": "BnbExpertsConfig, nf4",
    "nf4-double": "BnbExpertsConfig, nf4, double quantization",
    "int8": "BnbExpertsConfig, int8",
    "fp8-packed": "FP8 file, config=packed_config(path)",
    "fp8-plain": "FP8 file, plain",
}
BLOCK = 128
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144"}
SMALL = {"layers": 1, "hidden": 128, "inner": 128, "experts": 4}


def write(folder: Path, sizes: dict[str, int], fp8: bool) -> None:
    """Write a checkpoint with random weights, a shard for each layer, with keys as on the hub: an expert a tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    hidden, inner, layers, experts = sizes["hidden"], sizes["inner"], sizes["layers"], sizes["experts"]
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64,
        num_experts=experts, num_experts_per_tok=min(4, experts), tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"], dtype=torch.bfloat16,
    )  # fmt: skip
    config.save_pretrained(folder)
    if fp8:
        path = folder / "config.json"
        kept = ["lm_head", *[f"model.layers.{layer}.mlp.gate" for layer in range(layers)]]
        settings = {
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": kept,
        }  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    torch.manual_seed(0)
    index: dict[str, str] = {}

    def save(name: str, plain: dict[str, Any], linears: dict[str, tuple[int, int]]) -> None:
        tensors = dict(plain)
        for key, shape in linears.items():
            if fp8:
                codes = torch.randint(0, 120, shape, dtype=torch.uint8)  # no sign, no NaN
                tensors[key] = codes.view(torch.float8_e4m3fn)
                tensors[f"{key}_scale_inv"] = torch.full([-(-size // BLOCK) for size in shape], 1e-3)
            else:
                tensors[key] = torch.randn(shape).mul_(0.02).bfloat16()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    def ones(*shape: int) -> Any:
        return torch.ones(shape, dtype=torch.bfloat16)

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        plain = {f"{prefix}.{name}.weight": ones(hidden) for name in ("input_layernorm", "post_attention_layernorm")}
        plain |= {f"{prefix}.self_attn.{name}.weight": ones(64) for name in ("q_norm", "k_norm")}
        plain[f"{prefix}.mlp.gate.weight"] = torch.randn(experts, hidden).bfloat16()
        linears = {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        for expert in range(experts):
            linears |= {f"{prefix}.mlp.experts.{expert}.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            linears[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
        save(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", plain, linears)
    rest = {"model.norm.weight": ones(hidden)}
    rest |= {key: torch.randn(1024, hidden).bfloat16() for key in ("model.embed_tokens.weight", "lm_head.weight")}
    save(f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", rest, {})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def memory(field: str) -> int | None:
    """Bytes that this process holds by a field of Linux's `/proc/self/status`; `None` on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def largest() -> int:
    """Most bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Watch:
    """Samples a field of `memory` in a thread and keeps the most it saw; used as a context."""

    def __init__(self, field: str, every: float = 0.002) -> None:
        self.field, self.every, self.most = field, every, memory(field)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while self.most is not None and not self._stop.wait(self.every):
            self.most = max(self.most, memory(self.field) or 0)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def options(way: str, folder: Path) -> dict[str, Any]:
    """What `from_pretrained` is given for a way of loading."""
    import torch

    from peft_moe import BnbExpertsConfig, packed_config

    found: dict[str, Any] = {"dtype": torch.bfloat16}
    if way.startswith("nf4"):
        found["quantization_config"] = BnbExpertsConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=way == "nf4-double"
        )
    elif way == "int8":
        found["quantization_config"] = BnbExpertsConfig(load_in_8bit=True)
    elif way == "fp8-packed":
        found["config"] = packed_config(str(folder))
    if torch.cuda.is_available():
        found["device_map"] = "cuda"
    return found


def load(way: str, folder: Path, small: Path) -> dict[str, float | str | None]:
    """Load a checkpoint in one way, in this process, and return what that took, in MiB and seconds.

    `small` is loaded before, so that what libraries import and allocate on first use is not counted.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    AutoModelForCausalLM.from_pretrained(small, **options(way, small))
    gc.collect()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start, own = memory("VmRSS") or largest(), memory("RssAnon")
    before = largest()
    began = time.perf_counter()
    with Watch("RssAnon") as watch:
        model = AutoModelForCausalLM.from_pretrained(folder, **options(way, folder))
    seconds = time.perf_counter() - began
    peak = largest()
    gc.collect()
    resident, own_resident = memory("VmRSS"), memory("RssAnon")
    tensors = {id(tensor): tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    stored = next(iter(model.model.layers[0].mlp.experts.parameters())).dtype
    found: dict[str, float | str | None] = {
        "way": way, "experts_stored_as": str(stored).removeprefix("torch."), "weights": weights / MIB,
        "resident": None if resident is None else (resident - start) / MIB,
        "own_resident": None if own is None or own_resident is None else (own_resident - own) / MIB,
        "peak": None if peak == before else (peak - start) / MIB,  # else it was reached earlier and says nothing
        "own_peak": None if own is None or watch.most is None else (watch.most - own) / MIB, "seconds": seconds,
    }  # fmt: skip
    if cuda:
        found["gpu_peak"] = torch.cuda.max_memory_allocated() / MIB
        found["gpu_resident"] = torch.cuda.memory_allocated() / MIB
    return found


def child(*arguments: str) -> str:
    """Run this script in a new process; return the last line that it printed. Ends this one where that failed."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**ALLOCATOR, **os.environ})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip().rpartition("\n")[2]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    gpu = any("gpu_peak" in row for row in rows)
    names = ["loaded", "experts stored as", "weights", "resident", "peak", "own resident", "own peak", "above weights"]
    names += ["seconds", *(["GPU peak", "GPU resident"] if gpu else [])]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        peak = row["gpu_peak"] if gpu else row["own_peak"]
        numbers = [row["weights"], row["resident"], row["peak"], row["own_resident"], row["own_peak"]]
        numbers.append(None if peak is None else peak - row["weights"])
        cells = ["–" if number is None else f"{number:.0f}" for number in numbers] + [f"{row['seconds']:.1f}"]
        if gpu:
            cells += [f"{row['gpu_peak']:.0f}", f"{row['gpu_resident']:.0f}"]
        lines.append([WAYS[row["way"]], row["experts_stored_as"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Write both checkpoints, load them in every way asked for, print the table; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = {name: getattr(arguments, name) for name in ("layers", "hidden", "inner", "experts")}
    if arguments.child is not None:
        task, *folders = arguments.child
        if task.startswith("write"):
            write(Path(folders[0]), sizes, fp8=task == "write-fp8")
            write(Path(folders[1]), SMALL, fp8=task == "write-fp8")
        else:
            print(json.dumps(load(task, Path(folders[0]), Path(folders[1]))))
        return []
    one = 2 * 3 * sizes["hidden"] * sizes["inner"] * sizes["experts"] / MIB
    print(
        f"{', '.join(f'{name} {version(name)}' for name in ('torch', 'transformers', 'bitsandbytes'))}; "
        f"{sizes['layers']} layers of {sizes['experts']} experts, hidden {sizes['hidden']}, inner {sizes['inner']}; "
        f"experts in 16 bits: {one:.0f} MiB a layer, {one * sizes['layers']:.0f} MiB together. MiB and seconds:"
    )
    rows = []
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    with tempfile.TemporaryDirectory() as root:
        for kind in ("bf16", "fp8"):
            folders = [str(Path(root, name)) for name in (kind, f"{kind}-small")]
            ways = [way for way in arguments.ways if way.startswith("fp8") == (kind == "fp8")]
            if ways:
                child(*flags, "--child", f"write-{kind}", *folders)
            for way in ways:
                rows.append(json.loads(child("--child", way, *folders)))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
