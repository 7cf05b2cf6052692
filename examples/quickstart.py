"""Per-expert LoRA from the first command to the merged model, in a few minutes on a CPU.

    python examples/quickstart.py

builds a small Qwen3-MoE model and

1. trains it as a base on one kind of real text: the docstrings of Python's standard library,
2. fine-tunes it with per-expert LoRA on another kind: the source code of the same library,
3. saves the adapter, reads it back, merges it, saves the merged model and compares the logits of all of them.

Everything lands in `quickstart_out/`: `base/`, `adapter/`, `merged/`, `loss.png` and `results.json`.
To run steps 2 and 3 on a model and text of your own:

    python examples/quickstart.py --model PATH_OR_ID --data FILE.jsonl

where every line of FILE.jsonl is an object with a field "text". Needs matplotlib and rich.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from peft_moe import MoELoraConfig

transformers_logging.disable_progress_bar()  # one bar at a time, and it is ours
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT asks transformers by an old name

HELD_OUT_BLOCKS = 96  # enough for a loss that is steady to the second digit, few enough to evaluate often
PROMPT = "class Reader:\n    def read(self, "  # continued by the small model; your own continues your held-out text
console = Console(soft_wrap=True)


def documented_code(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (docstrings, source without docstrings) of every documented module below `root`, in the order of paths."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(root.rglob("*.py")):
        if skip.intersection(path.relative_to(root).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template, or a file kept broken on purpose
            continue
        lines, docstrings = source.split("\n"), []
        for node in ast.walk(tree):
            if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
                docstrings.append(docstring)
                statement = node.body[0]
                for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
                    lines[number] = ""
        code = "\n".join(line for line in lines if line.strip())
        if docstrings and code:
            yield "\n\n".join(docstrings), code


def read_jsonl(path: Path) -> list[str]:
    """Return the field "text" of every line of `path`; exit with a message that names the line where there is none."""
    if not path.is_file():
        sys.exit(f'--data {path}: no such file. Expected a JSON-lines file whose objects have a field "text".')
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            sys.exit(f'{path}, line {number}: not JSON ({error}). Expected one object a line, like {{"text": "…"}}.')
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            sys.exit(f'{path}, line {number}: no field "text" that holds a string; found: {found or "nothing"}.')
        texts.append(record["text"])
    if len(texts) < 2:
        sys.exit(f"{path}: found {len(texts)} texts, expected at least 2: one to train on and one to hold out.")
    return texts


def split(texts: list[str], seed: int) -> tuple[list[str], list[str]]:
    """Shuffle and split into (train, held-out), every tenth text held out: no text is in both."""
    texts = random.Random(seed).sample(texts, len(texts))
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


def pack(texts: Iterable[str], tokenizer: Any, block_size: int, limit: int, what: str) -> Tensor:
    """Tokenize `texts` one after the other and cut them into at most `limit` blocks: int64 (blocks, block_size)."""
    ids: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + separator
        if len(ids) >= limit * block_size:
            break
    blocks = min(len(ids) // block_size, limit)
    if not blocks:
        sys.exit(
            f"The {what} text has {len(ids)} tokens, expected {block_size} or more: add text or lower --block-size."
        )
    return torch.tensor(ids[: blocks * block_size]).view(blocks, block_size)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte and one that ends a text: nothing to train, nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end, pad_token=end)


def new_model(tokenizer: PreTrainedTokenizerFast, block_size: int) -> Qwen3MoeForCausalLM:
    """An untrained Qwen3-MoE of 3.3 million parameters: 2 layers of 32 experts, 2 of them active for a token."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=32,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=max(512, block_size),
            tie_word_embeddings=True,
            initializer_range=0.08,  # so narrow a model learns sooner from a wider start
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    """Mean next-token loss in nats over `blocks` (n, block_size)."""
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in blocks.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train(was_training)
    return total / len(blocks)


def train(
    model: nn.Module,
    blocks: Tensor,
    held_out: Tensor,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    evals: int,
    title: str,
) -> list[tuple[int, float]]:
    """Train what requires a gradient; return the curve of (step, held-out loss), from step 0 to the last."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 20)

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    every = max(1, steps // evals)
    curve = [(0, held_out_loss(model, held_out, batch_size))]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    model.train()
    with Progress(*columns, TextColumn("held-out loss {task.fields[loss]:.3f}"), console=console) as progress:
        task = progress.add_task(title, total=steps, loss=curve[0][1])
        for step in range(1, steps + 1):
            batch = blocks[torch.randint(len(blocks), (batch_size,))]
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if step % every == 0 or step == steps:
                curve.append((step, held_out_loss(model, held_out, batch_size)))
            progress.update(task, advance=1, loss=curve[-1][1])
    return curve


@torch.no_grad()
def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The model's logits in fp32 on the CPU: (batch, block_size, vocabulary)."""
    return model.eval()(input_ids=batch).logits.float().cpu()


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Tensor, seed: int, length: int = 240) -> str:
    """Continue `prompt` (1, n) by `length` tokens; the same seed gives the same draw."""
    set_seed(seed)
    out = model.eval().generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def draw(curve: list[tuple[int, float]], path: Path, title: str) -> None:
    """Write the picture: held-out loss of the base (a level line) and of the adapter over the steps."""
    steps, losses = zip(*curve, strict=True)
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="tight")
    axes = figure.subplots()
    axes.axhline(losses[0], color="#8a8f98", linestyle="--", linewidth=1.6, label=f"base: {losses[0]:.3f}")
    axes.plot(steps, losses, color="#1f6feb", linewidth=2, marker=".", label=f"adapter: {losses[-1]:.3f}")
    axes.set(title=title, xlabel="fine-tuning step", ylabel="held-out loss (nats per token)")
    axes.set_xlim(0, steps[-1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def load_model(source: str, device: str) -> Any:
    """Read a causal language model, in the dtype it was saved in, as any user would."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto").to(device)
    except (OSError, ValueError) as error:  # not there, not a model, or not one that transformers knows
        sys.exit(f"--model {source}: cannot be read. Expected a folder with a saved model, or a hub id.\n{error}")


def train_base(docstrings: list[str], args: argparse.Namespace, device: str) -> str:
    """Train a base on `docstrings`, save it with its tokenizer, and return the folder."""
    tokenizer = byte_tokenizer()
    model = new_model(tokenizer, args.block_size).to(device)
    train_texts, held_out_texts = split(docstrings, args.seed)
    limit = max(1, args.base_steps) * args.batch_size
    train(
        model,
        pack(train_texts, tokenizer, args.block_size, limit, "docstring").to(device),
        pack(held_out_texts, tokenizer, args.block_size, HELD_OUT_BLOCKS, "held-out docstring").to(device),
        steps=args.base_steps,
        lr=4e-3,
        batch_size=args.batch_size,
        evals=4,
        title="base, on docstrings",
    )
    folder = args.out / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, save, reload, merge, compare; return (and write to results.json) what was measured."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        torch.set_num_threads(1)  # products this small gain little from more, and wait much where cores are shared
        docstrings, texts = map(list, zip(*documented_code(Path(sysconfig.get_paths()["stdlib"])), strict=True))
        source, subject = train_base(docstrings, args, device), "source code"
    else:
        texts, source, subject = read_jsonl(args.data), args.model, args.data.name

    base = load_model(source, device)
    tokenizer = AutoTokenizer.from_pretrained(source)
    train_texts, held_out_texts = split(texts, args.seed)
    limit = max(1, args.steps) * args.batch_size
    blocks = pack(train_texts, tokenizer, args.block_size, limit, "training").to(device)
    held_out = pack(held_out_texts, tokenizer, args.block_size, HELD_OUT_BLOCKS, "held-out").to(device)
    prompt = held_out[:1, : args.block_size // 4]
    if args.model is None:
        prompt = torch.tensor(tokenizer(PROMPT)["input_ids"], device=device).view(1, -1)
    before = sample(base, tokenizer, prompt, args.seed)

    set_seed(args.seed)
    model = get_peft_model(base, MoELoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    trainable, total = model.get_nb_trainable_parameters()
    console.print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.1%})")
    curve = train(
        model,
        blocks,
        held_out,
        steps=args.steps,
        lr=args.lr or (6e-3 if args.model is None else 2e-4),
        batch_size=args.batch_size,
        evals=20,
        title=f"adapter, on {subject}",
    )
    after = sample(model, tokenizer, prompt, args.seed)
    adapter_folder, merged_folder, picture = args.out / "adapter", args.out / "merged", args.out / "loss.png"
    model.save_pretrained(adapter_folder)
    draw(curve, picture, f"Held-out loss on {subject}")

    # One whole model in memory at a time: each is dropped before the next is read.
    batch = held_out[: args.batch_size]
    expected = logits_of(model, batch)
    del base, model
    reloaded = PeftModel.from_pretrained(load_model(source, device), adapter_folder)
    differences = {"reloaded": (logits_of(reloaded, batch) - expected).abs().max().item()}
    merged = reloaded.merge_and_unload()
    differences["merged"] = (logits_of(merged, batch) - expected).abs().max().item()
    merged.save_pretrained(merged_folder)
    tokenizer.save_pretrained(merged_folder)
    del reloaded, merged
    stock = load_model(str(merged_folder), device)
    differences["merged, saved, reloaded"] = (logits_of(stock, batch) - expected).abs().max().item()

    results = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "held_out_loss_before": curve[0][1],
        "held_out_loss_after": curve[-1][1],
        "curve": curve,
        "largest_logit": expected.abs().max().item(),
        "largest_logit_difference": differences,
        "sample_before": before,
        "sample_after": after,
        "seconds": time.perf_counter() - started,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report(results, args.out, given=tokenizer.decode(prompt[0], skip_special_tokens=True))
    return results


def report(results: dict[str, Any], out: Path, given: str) -> None:
    """Print what was measured, the samples first and the numbers last."""
    for name in ("before", "after"):
        written = Text(given, style="dim")
        written.append(results[f"sample_{name}"].removeprefix(given), style="bold")
        console.print(Panel(written, title=f"sample {name} fine-tuning (the prompt is dim)", title_align="left"))
    console.print(f"held-out loss: {results['held_out_loss_before']:.3f} → {results['held_out_loss_after']:.3f}")
    console.print(f"largest logit difference to the trained adapter (logits reach {results['largest_logit']:.1f}):")
    for name, difference in results["largest_logit_difference"].items():
        console.print(f"  {name:<24} {difference:.1e}")
    console.print(f"written to {out} in {results['seconds']:.0f} s")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; exit with a message where it makes no sense."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a Mixture-of-Experts model with per-expert LoRA, save, reload, merge and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", help="folder or hub id of a model to use instead of the small one built here")
    parser.add_argument("--data", type=Path, help='JSON-lines file with a field "text"; goes with --model')
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"), help="output folder")
    parser.add_argument("--steps", type=int, default=450, help="fine-tuning steps")
    parser.add_argument("--base-steps", type=int, default=500, help="training steps of the base built here")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens a block")
    parser.add_argument("--lr", type=float, help="learning rate (6e-3 on the small model, 2e-4 on your own)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together: a model of your own needs text of your own")
    for name, least in {"steps": 1, "base_steps": 0, "batch_size": 1, "block_size": 8}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {least} or more")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the quickstart with the arguments `argv` (the command line's by default) and return its results."""
    return run(parse(argv))


if __name__ == "__main__":
    main()
