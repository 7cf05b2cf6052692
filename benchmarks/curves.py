"""Training loss of the same small model on bases stored in 16 bits, nf4, int8 and FP8: the losses and a picture.

    python benchmarks/curves.py --picture docs/curves.png

A Qwen3-MoE with two layers of 32 experts is trained as a base on the docstrings of Python's standard library, saved in
bf16 (and, encoded here, in FP8 with blocks of 128) and loaded in each storage. Then the same adapter, with the same
start, is trained on each base with the same batches of the library's source code, computing in bf16. The run with
another seed for the start of the adapter is the measure: deviations below its own are nothing that one would notice.
Needs matplotlib and rich, as `examples/quickstart.py` does, from which model and text come.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, set_seed

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from quickstart import byte_tokenizer, documented_code, new_model, pack  # noqa: E402

from peft_moe import BnbExpertsConfig, MoELoraConfig, packed_config  # noqa: E402

BLOCK = 128
#: Label, colour, line style and width: curves that coincide show through each other.
BASES = {
    "bf16": ("16 bits (bf16)", "0.72", "-", 5.0),
    "fp8": (f"FP8, blocks of {BLOCK}", "#2a9d5c", "-", 2.4),
    "int8": ("int8", "#1f3fb4", "--", 1.4),
    "nf4": ("nf4", "#c44e52", "-", 0.9),
}
OTHER_SEED = "bf16, other seed"


def encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes of a `(rows, cols)` weight and the fp32 scale of each block of `BLOCK`², by which they multiply."""
    rows, cols = weight.shape
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.ones(-(-rows // BLOCK), -(-cols // BLOCK))
    for i, band in enumerate(weight.float().split(BLOCK)):
        for j, block in enumerate(band.split(BLOCK, dim=1)):
            if top := block.abs().max().item():
                scales[i, j] = top / torch.finfo(codes.dtype).max
            top, left = i * BLOCK, j * BLOCK
            codes[top : top + len(block), left : left + block.shape[1]] = (block / scales[i, j]).to(codes.dtype)
    return codes, scales


def write_fp8(source: Path, target: Path) -> None:
    """Write the checkpoint in `source` again with the linears of attention and experts in FP8, as on the hub."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    for key in [key for key, value in tensors.items() if "_proj" in key and value.dim() == 2]:
        tensors[key], tensors[f"{key}_scale_inv"] = encode(tensors[key])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    kept = ["lm_head", *[f"model.layers.{layer}.mlp.gate" for layer in range(config["num_hidden_layers"])]]
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))


def load(base: str, folder: Path) -> nn.Module:
    """The base in one of the storages."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if base == "nf4":
        options["quantization_config"] = BnbExpertsConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    elif base == "int8":
        options["quantization_config"] = BnbExpertsConfig(load_in_8bit=True)
    elif base == "fp8":
        options["config"] = packed_config(str(folder / "fp8"))
    return AutoModelForCausalLM.from_pretrained(folder / ("fp8" if base == "fp8" else "bf16"), **options)


def train(model: nn.Module, batches: Tensor, lr: float) -> list[float]:
    """Train what requires a gradient on `(steps, batch, tokens)`; return the loss of every step, before its update."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / max(1, steps // 20), 1 - i / steps))
    losses = []
    model.train()
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def batches_of(texts: list[str], tokenizer: Any, steps: int, batch: int, what: str) -> Tensor:
    """`(steps, batch, 128)` token ids in an order drawn once; text is repeated where there is too little."""
    blocks = pack(texts, tokenizer, 128, steps * batch, what)
    order = torch.cat([torch.randperm(len(blocks)) for _ in range(-(-steps * batch // len(blocks)))])
    return blocks[order[: steps * batch]].view(steps, batch, -1)


def smooth(losses: list[float], width: int) -> list[float]:
    """Mean over the last `width` steps, over as many as there are at the start."""
    return [sum(part) / len(part) for i in range(len(losses)) for part in [losses[max(0, i + 1 - width) : i + 1]]]


def compare(curves: dict[str, list[float]], width: int) -> list[dict[str, Any]]:
    """Of every curve: loss at the end, and deviations from the 16-bit base, of the smoothed curves and of any step."""
    rows, reference = [], curves["bf16"]
    for name, losses in curves.items():
        even = [abs(a - b) for a, b in zip(smooth(losses, width), smooth(reference, width), strict=True)]
        steps = [abs(a - b) for a, b in zip(losses, reference, strict=True)]
        final = smooth(losses, width)[-1]
        rows.append({
            "base": name, "first": losses[0], "final": final, "largest": max(even), "largest_step": max(steps),
            "final_difference": final - smooth(reference, width)[-1],
        })  # fmt: skip
    return rows


def draw(curves: dict[str, list[float]], path: Path, width: int) -> None:
    """Two panels: the smoothed losses, and their distance from the 16-bit base beside that of another seed."""
    figure = Figure(figsize=(10, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    even = {name: smooth(losses, width) for name, losses in curves.items()}
    steps = range(1, len(even["bf16"]) + 1)

    def distance(name: str) -> list[float]:
        return [a - b for a, b in zip(even[name], even["bf16"], strict=True)]

    for name, (label, color, line, thickness) in BASES.items():
        shape = {"color": color, "linestyle": line}
        left.plot(steps, even[name], **shape, linewidth=thickness, label=f"{label}: {even[name][-1]:.3f} at the end")
        right.plot(steps, distance(name), **shape, linewidth=min(thickness, 1.6), label=label)
    right.plot(steps, distance(OTHER_SEED), ":", color="0.3", label="16 bits, adapter started from another seed")
    left.set(title="Training loss", xlabel="fine-tuning step", ylabel="nats per token")
    right.set(title="Difference to the 16-bit base", xlabel="fine-tuning step", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        axes.set_xlim(1, len(steps))
    figure.suptitle(f"One small Qwen3-MoE in four storages, same adapter and data (mean of {width} steps)", fontsize=11)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, print the table, draw; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="fine-tuning steps on each base")
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=10, help="steps that the smoothed curves average")
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of Python code"
    )
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--out", type=Path, help="file for the losses of all steps, JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # products this small gain nothing from more
    docstrings, code = map(list, zip(*documented_code(arguments.text), strict=True))
    tokenizer = byte_tokenizer()
    set_seed(0)
    batches = batches_of(code, tokenizer, arguments.steps, arguments.batch_size, "source code")
    curves: dict[str, list[float]] = {}
    start: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as root:
        model = new_model(tokenizer, 128)
        train(model, batches_of(docstrings, tokenizer, arguments.base_steps, arguments.batch_size, "docstring"), 4e-3)
        model.to(torch.bfloat16).save_pretrained(Path(root, "bf16"))
        write_fp8(Path(root, "bf16"), Path(root, "fp8"))
        for name in (*BASES, OTHER_SEED):
            base = load("bf16" if name == OTHER_SEED else name, Path(root))
            set_seed(2 if name == OTHER_SEED else 1)
            attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
            model = get_peft_model(base, MoELoraConfig(r=8, lora_alpha=16, target_modules=attention))
            trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
            if name != OTHER_SEED:  # PEFT rounds the start of LoRA to the dtype of linears, which int8 hides: copied
                start = start or {key: value.detach().clone() for key, value in trained.items()}
                for key, value in trained.items():
                    value.data.copy_(start[key])
            curves[name] = train(model, batches, lr=3e-3)
            print(f"{name}: first loss {curves[name][0]:.4f}, last {curves[name][-1]:.4f}", file=sys.stderr, flush=True)
    rows = compare(curves, arguments.width)
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")))
    print("| base | loss at the end | difference to 16 bits | largest, smoothed | largest of one step |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['base']} | {row['final']:.4f} | {row['final_difference']:+.4f} | {row['largest']:.4f} | "
            f"{row['largest_step']:.4f} |"
        )
    if arguments.picture is not None:
        draw(curves, arguments.picture, arguments.width)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(curves))
    return rows


if __name__ == "__main__":
    main()
