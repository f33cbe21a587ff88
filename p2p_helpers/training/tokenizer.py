"""A byte-level BPE tokenizer with CLIP's conventions, learned from captions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..runtime import quiet_libraries

__all__ = ["LONGEST_TOKEN", "learn_tokenizer"]

LONGEST_TOKEN = 8       # letters: longer words stay several tokens
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_tokenizer(captions: Iterable[str], length: int = 32):
    """Learn the merges from captions and return a `transformers.CLIPTokenizer`.

    Every word of up to `LONGEST_TOKEN` letters that occurs becomes one token; a longer one (strawberries, motorcycle,
    watercolor) stays two or three, and so does one with an apostrophe (children's), as in CLIP. The vocabulary starts
    with the 512 byte units, plain and at the end of a word, and ends with the start and end marks; padding is the
    end mark.

    Parameters
    ----------
    captions : iterable of str
    length : int
        Tokens of a prompt, marks included.
    """
    quiet_libraries()
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = _learn_merges(sorted(captions))
    units = sorted(ByteLevel.alphabet())
    tokens = [*units, *(unit + "</w>" for unit in units), *map("".join, merges), START, END]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": START, "eos_token": END,
                "unk_token": END, "pad_token": END}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *map(" ".join, merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder)


def _learn_merges(captions: list[str]) -> list[tuple[str, str]]:
    """Run BPE training behind CLIP's own normaliser and word splitter."""
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2**15, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return [pair for pair in merges if len("".join(pair).removesuffix("</w>")) <= LONGEST_TOKEN]
