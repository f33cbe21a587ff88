"""Words and tokens of prompts, and which tokens of two prompts stand for each other. No model is needed."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import torch

from .models import check_prompt, prompt_length
from .runtime import closest

__all__ = ["Alignment", "Prompt", "Word", "align", "common_pairs", "legacy_refine", "legacy_swap", "mixed_pairs",
           "positional_pairs", "read_prompt"]

MODES = ("average", "copy", "sum")
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")    # "children's" and "t-shirt" are words, "," is a mark


@dataclass(frozen=True)
class Word:
    """A word or a punctuation mark of a prompt."""

    text: str                   # lower case, without the marks around it
    tokens: tuple[int, ...]     # positions in the prompt's tokens

    @property
    def is_mark(self) -> bool:
        return not any(character.isalnum() for character in self.text)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the text encoder reads it: L tokens, of which start mark, end mark and padding are no words."""

    text: str
    tokens: tuple[str, ...]                             # L printable pieces
    words: tuple[Word, ...]                             # words and marks in order
    spans: tuple[tuple[int, int], ...] = field(repr=False)    # where in the text each token up to the end mark stands

    @property
    def end(self) -> int:
        """Position of the end mark."""
        return len(self.spans) - 1

    def positions(self, words: str) -> tuple[int, ...]:
        """The tokens of a word, or of several in a row, wherever they occur; case and punctuation do not matter.

        Raises
        ------
        ValueError
            If the prompt does not hold it; the message lists its words and names the closest.
        """
        own = [word for word in self.words if not word.is_mark]
        wanted = [text.lower() for text in _WORD.findall(words) if any(c.isalnum() for c in text)]
        starts = [i for i in range(len(own)) if wanted and [w.text for w in own[i:i + len(wanted)]] == wanted]
        if not starts:
            known = list(dict.fromkeys(word.text for word in own))
            raise ValueError(f"word {words!r} is not in the prompt {self.text!r}; {closest(words.lower(), known)}")
        return tuple(sorted({t for i in starts for word in own[i:i + len(wanted)] for t in word.tokens}))


def read_prompt(model, text: str) -> Prompt:
    """Split a prompt into words and tokens.

    Parameters
    ----------
    model : a pipeline, or its tokenizer of CLIP's kind
    text : str

    Raises
    ------
    ValueError
        If the prompt is empty or longer than the model reads.
    """
    check_prompt(model, text)
    tokenizer, length = getattr(model, "tokenizer", model), prompt_length(model)
    encoded = tokenizer(text, padding="max_length", max_length=length, return_offsets_mapping=True)
    tokens = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(encoded.input_ids)]
    count = len(tokenizer(text).input_ids)                              # start and end mark included
    spans = tuple(map(tuple, encoded.offset_mapping[:count]))
    words = tuple(Word(match[0].lower(), _tokens_within(spans, *match.span())) for match in _WORD.finditer(text))
    return Prompt(text, tuple(tokens), words, spans)


def _tokens_within(spans: Iterable[tuple[int, int]], start: int, stop: int) -> tuple[int, ...]:
    return tuple(i for i, (left, right) in enumerate(spans) if start <= left < right <= stop)


# ---- which words stand for each other -------------------------------------------------------------------------------


def positional_pairs(source: Prompt, target: Prompt) -> list[tuple[Word, Word]]:
    """Pair the words of two prompts one by one, as a word swap does; marks where they follow the same word.

    Raises
    ------
    ValueError
        If one prompt has more words than the other.
    """
    before, after = ([w for w in prompt.words if not w.is_mark] for prompt in (source, target))
    if len(before) != len(after):
        raise ValueError(f"a swap needs as many words in both prompts: source {source.text!r} has {len(before)}, "
                         f"target {target.text!r} has {len(after)}; use refine, or edit_prompt, which aligns both")
    known = _marks(source)
    return [*zip(before, after)] + [(known[key], mark) for key, mark in _marks(target).items() if key in known]


def _marks(prompt: Prompt) -> dict[tuple[int, str], Word]:
    """Punctuation by (number of words before it, text)."""
    found, count = {}, 0
    for word in prompt.words:
        if word.is_mark:
            found[count, word.text] = word
        count += not word.is_mark
    return found


def common_pairs(source: Prompt, target: Prompt) -> list[tuple[Word, Word]]:
    """Pair the words that both prompts share, in order (`difflib`); what was added, replaced or deleted has no pair."""
    return _pairs(source, target, replaced=False)


def mixed_pairs(source: Prompt, target: Prompt) -> list[tuple[Word, Word]]:
    """`common_pairs`, and words replaced by others pair as well.

    Where several words take the place of another number of words, the last ones pair: in English the noun comes
    last, so that "a car" and "a red motorcycle" pair car with motorcycle.
    """
    return _pairs(source, target, replaced=True)


def _pairs(source: Prompt, target: Prompt, replaced: bool) -> list[tuple[Word, Word]]:
    before, after = ([word.text for word in prompt.words] for prompt in (source, target))
    pairs = []
    for kind, i, i_end, j, j_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and replaced):
            last = list(zip(reversed(source.words[i:i_end]), reversed(target.words[j:j_end])))
            pairs += [(s, t) for s, t in reversed(last) if s.is_mark == t.is_mark]
    return pairs


# ---- which tokens stand for each other ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """M of the one formula: what each target token takes from the source's attention."""

    matrix: torch.Tensor        # M, float32 (L source tokens, L target tokens)
    partnered: torch.Tensor     # a, float32 (L,): 1 for target tokens that have a source partner


def align(source: Prompt, target: Prompt, pairs: Iterable[tuple[Word, Word]], mode: str = "average") -> Alignment:
    """Align the tokens of paired words, of the start marks, and of end mark and padding by their distance from it.

    Parameters
    ----------
    source, target : Prompt
    pairs : (source word, target word)
    mode : {"average", "copy", "sum"}
        What a target token of an n-token word that stands for an m-token word takes of each of the m maps: 1/n
        (the word keeps its mass; Google's seq_aligner.py), 1/m (each token gets the mean map), or 1. Words of
        equally many tokens align token by token.

    Notes
    -----
    Target tokens without a partner have a column of zeros: inserted words, and padding that the source is too
    short to have.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown; {closest(mode, MODES)}")
    length = len(source.tokens)
    matrix = torch.zeros(length, length)
    for s, t in ((s.tokens, t.tokens) for s, t in pairs):
        if len(s) == len(t):
            matrix[s, t] = 1
        else:
            mass = {"average": 1 / len(t), "copy": 1 / len(s), "sum": 1.}[mode]
            matrix[torch.tensor(s)[:, None], torch.tensor(t)] = mass
    matrix[0, 0] = 1
    for j in range(target.end, length):
        if (i := source.end + j - target.end) < length:
            matrix[i, j] = 1
    return Alignment(matrix, (matrix != 0).any(0).float())


def legacy_swap(source: Prompt, target: Prompt) -> Alignment:
    """What Google's `get_replacement_mapper` gives (seq_aligner.py L152-185), its bug included, for comparison.

    Behind the last replaced word it aligns by position instead of by word, so that every later word takes a
    neighbour's map if the words swapped have unequal numbers of tokens.
    """
    before, after = source.text.split(), target.text.split()
    if len(before) != len(after):
        raise ValueError(f"a swap needs as many words in both prompts: source has {len(before)}, target {len(after)}")
    chunks = [[m.span() for m in re.finditer(r"\S+", prompt.text)] for prompt in (source, target)]
    changed = [(_tokens_within(source.spans, *chunks[0][k]), _tokens_within(target.spans, *chunks[1][k]))
               for k in range(len(before)) if before[k] != after[k]]
    length = len(source.tokens)
    matrix, i, j = torch.zeros(length, length), 0, 0
    while i < length and j < length:
        if changed and changed[0][0][0] == i:
            s, t = changed.pop(0)
            matrix[torch.tensor(s)[:, None], torch.tensor(t)] = torch.eye(len(s)) if len(s) == len(t) else 1 / len(t)
            i, j = i + len(s), j + len(t)
        else:
            matrix[i if changed else j, j] = 1      # the bug: [j, j] where [i, j] is right
            i, j = i + 1, j + 1
    return Alignment(matrix, torch.ones(length))


def legacy_refine(source: Prompt, target: Prompt) -> Alignment:
    """What Google's `get_refinement_mapper` gives (seq_aligner.py L61-118), its leak included, for comparison.

    Padding takes the map of the source token at its own position: after a deletion that is a deleted word.
    """
    length, count = len(source.tokens), target.end + 1
    columns = _needleman_wunsch(source.tokens[:source.end + 1], target.tokens[:count]) + list(range(count, length))
    matrix, partnered = torch.zeros(length, length), torch.zeros(length)
    for j, i in enumerate(columns):
        if i >= 0:
            matrix[i, j] = partnered[j] = 1
    return Alignment(matrix, partnered)


def _needleman_wunsch(source: tuple[str, ...], target: tuple[str, ...]) -> list[int]:
    """For each target token the source token it is aligned with, or -1: gap 0, match 1, mismatch -1.

    Of equally good ways a gap in the source wins over one in the target, and that over a pair.
    """
    score = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]

    def choices(i: int, j: int) -> list[tuple[int, tuple[int, int]]]:
        pair = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
        return [(score[i][j - 1], (i, j - 1)), (score[i - 1][j], (i - 1, j)), (pair, (i - 1, j - 1))]

    for i in range(1, len(source) + 1):
        for j in range(1, len(target) + 1):
            score[i][j] = max(value for value, _ in choices(i, j))
    partners, i, j = [-1] * len(target), len(source), len(target)
    while i and j:
        step = next(step for value, step in choices(i, j) if value == score[i][j])
        if step == (i - 1, j - 1):
            partners[j - 1] = i - 1
        i, j = step
    return partners
