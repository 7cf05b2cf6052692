"""A small text that a tiny model learns within a few steps, and a tokenizer for it, both made here."""

from __future__ import annotations

import pytest
import torch

SENTENCES = [
    "the cat sat on the mat and the dog ran to the door",
    "a bird sang in the tree while the rain fell on the roof",
    "the dog sat on the roof and a cat ran in the rain",
    "a tree fell on the door while the bird sat on the mat",
] * 6


def tokenizer() -> object:
    """A word-level tokenizer of the sentences' words, as transformers wraps it; 64 ids or fewer."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for sentence in SENTENCES for word in sentence.split()})
    ids = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class Sentences(torch.utils.data.Dataset):
    """The sentences as ids and labels, for the Trainer."""

    def __init__(self) -> None:
        encode = tokenizer()
        self.rows = [torch.tensor(encode(sentence)["input_ids"][:12]) for sentence in SENTENCES]  # type: ignore[operator]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}
