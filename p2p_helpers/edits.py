"""Edits of Prompt-to-Prompt as one triple (M, u, v). No model is needed.

At a cross-attention layer let P_s and P_t be the probability maps of source and target. Every edit of Hertz et al.
2022 (arXiv:2208.01626) is A = P_s M diag(u) + P_t diag(v), with M from the alignment of the prompts and

    u = a c g                   a: the target token has a source partner
    v = (1 - a) c g + (1 - g)   c: the token's weight;  g: 1 while its attention is injected, then 0
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from . import prompts as _prompts
from .prompts import Alignment, Prompt, read_prompt

__all__ = ["DEFAULT", "Edit", "Explanation", "empty", "explain", "explain_edit", "mix", "refine", "reweight", "swap"]

DEFAULT = "default_"        # the key, in a dict of cross_replace_steps, of all words that it does not name
Window = float | tuple[float, float]


@dataclass(frozen=True, eq=False)
class Edit:
    """What one target prompt takes from the source, and when; build it with `swap`, `refine`, `mix` or `empty`."""

    source: Prompt
    target: Prompt
    alignment: Alignment
    windows: torch.Tensor           # (L, 2) of target tokens: first and last moment of injection, in [0, 1]
    self_window: tuple[float, float]
    weights: torch.Tensor           # c, (L,) of target tokens

    def gains(self, moment: float) -> tuple[torch.Tensor, torch.Tensor]:
        """u and v, both (L,), at a moment of the run: 0 is its start, 1 its end; step i of n is at (i + 1/2) / n."""
        a, c = self.alignment.partnered, self.weights
        g = ((self.windows[:, 0] <= moment) & (moment < self.windows[:, 1])).float()
        return a * c * g, (1 - a) * c * g + (1 - g)

    def injects_self(self, moment: float) -> bool:
        """Whether the source's self-attention replaces the target's at that moment."""
        return self.self_window[0] <= moment < self.self_window[1]


def swap(model, source: str, target: str, *, cross_replace_steps: Window | Mapping[str, Window] = .8,
         self_replace_steps: Window = .4, mode: str = "average", legacy: bool = False) -> Edit:
    """Replace words one for one, keeping the source's attention maps: "a cat on the grass" to "a dog on the grass".

    Parameters
    ----------
    model : a pipeline, or its tokenizer
    source, target : str
        Prompts of equally many words.
    cross_replace_steps : float, (start, end) or dict
        The part of the steps, of 1, during which cross-attention is injected. A dict gives it for some words of
        the target, and under "default_" (else all steps) for the others.
    self_replace_steps : float or (start, end)
        The same for self-attention.
    mode : {"average", "copy", "sum"}
        For words of unequal numbers of tokens, see `prompts.align`.
    legacy : bool
        Align as Google's code does, errors included, for comparison.

    Raises
    ------
    ValueError
        If the numbers of words differ, a word is not in the target, or a part lies outside [0, 1].
    """
    before, after = read_prompt(model, source), read_prompt(model, target)
    alignment = (_prompts.legacy_swap(before, after) if legacy else
                 _prompts.align(before, after, _prompts.positional_pairs(before, after), mode))
    return _edit(before, after, alignment, cross_replace_steps, self_replace_steps)


def refine(model, source: str, target: str, *, cross_replace_steps: Window | Mapping[str, Window] = .8,
           self_replace_steps: Window = .4, legacy: bool = False) -> Edit:
    """Add or delete words, keeping the attention maps of those that stay; parameters as in `swap`.

    A word that stands in another's place counts as deleted and added: its map is its own.
    """
    before, after = read_prompt(model, source), read_prompt(model, target)
    alignment = (_prompts.legacy_refine(before, after) if legacy else
                 _prompts.align(before, after, _prompts.common_pairs(before, after)))
    return _edit(before, after, alignment, cross_replace_steps, self_replace_steps)


def mix(model, source: str, target: str, *, cross_replace_steps: Window | Mapping[str, Window] = .8,
        self_replace_steps: Window = .4, mode: str = "average") -> Edit:
    """Swap, add and delete at once, as the two prompts differ; parameters as in `swap`."""
    before, after = read_prompt(model, source), read_prompt(model, target)
    alignment = _prompts.align(before, after, _prompts.mixed_pairs(before, after), mode)
    return _edit(before, after, alignment, cross_replace_steps, self_replace_steps)


def empty(model, source: str, target: str | None = None) -> Edit:
    """An edit that injects nothing: the target (by default the source again) is generated on its own."""
    return mix(model, source, target or source, cross_replace_steps=0., self_replace_steps=0.)


def reweight(edit: Edit, weights: Mapping[str, float]) -> Edit:
    """Multiply the attention that words of the target receive; 1 leaves them, 0 mutes, below 0 turns them round.

    Works while the words' attention is injected (cross_replace_steps), on words with a partner in the source and
    on new ones, and composes with any edit: ``reweight(refine(pipe, source, target), {"snow": 2})``.

    Raises
    ------
    ValueError
        If a word is not in the target, or a weight is not finite.
    """
    changed = edit.weights.clone()
    for word, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"weight {weight!r} of {word!r} is not finite; 1 leaves a word as it is")
        changed[list(edit.target.positions(word))] = weight
    return dataclasses.replace(edit, weights=changed)


def _edit(source: Prompt, target: Prompt, alignment: Alignment, cross_replace_steps, self_replace_steps) -> Edit:
    length = len(target.tokens)
    given = cross_replace_steps if isinstance(cross_replace_steps, Mapping) else {DEFAULT: cross_replace_steps}
    windows = torch.tensor(_window("cross_replace_steps", given.get(DEFAULT, 1.))).repeat(length, 1)    # (L, 2)
    for word, window in given.items():
        if word != DEFAULT:
            windows[list(target.positions(word))] = torch.tensor(_window("cross_replace_steps", window))
    return Edit(source, target, alignment, windows, _window("self_replace_steps", self_replace_steps),
                torch.ones(length))


def _window(name: str, value: Window) -> tuple[float, float]:
    """A part of the steps as (start, end)."""
    start, end = value if isinstance(value, Sequence) else (0., value)
    if not 0 <= start <= end <= 1:
        raise ValueError(f"{name} {value!r} is no part of the steps: give an end, or (start, end), with "
                         "0 <= start <= end <= 1")
    return float(start), float(end)


# ---- said to a person -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """An edit as a table of the target's tokens; printed, or shown by a notebook."""

    headline: str
    rows: tuple[tuple[str, ...], ...]
    COLUMNS = ("position", "token", "takes from", "injected", "weight")

    def __str__(self) -> str:
        table = [self.COLUMNS, *self.rows]
        widths = [max(len(line[i]) for line in table) for i in range(len(self.COLUMNS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([self.headline, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        head, *body = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line)
                       for tag, line in [("th", self.COLUMNS), *(("td", row) for row in self.rows)])
        rows = "".join(f"<tr>{line}</tr>" for line in [head, *body])
        return f"<p>{escape(self.headline).replace(chr(10), '<br>')}</p><table>{rows}</table>"


def explain(edit: Edit) -> Explanation:
    """Say of every token of the target what it takes from the source, when, and with which weight."""
    used = {i for word in edit.source.words for i in word.tokens if edit.alignment.matrix[i].any()}
    gone = [word.text for word in edit.source.words if not used.intersection(word.tokens)]
    headline = [f"source: {edit.source.text}", f"target: {edit.target.text}",
                f"self-attention injected: {_percent(edit.self_window)}"]
    headline += [f"gone from the source: {', '.join(gone)}"] if gone else []
    rows = [(str(j), _label(edit.target, j), _partners(edit, j), _percent(edit.windows[j].tolist()),
             f"{edit.weights[j]:g}") for j in range(min(edit.target.end + 2, len(edit.target.tokens)))]
    return Explanation("\n".join(headline), tuple(rows))


def explain_edit(model, source: str, target: str, *, weights: Mapping[str, float] | None = None,
                 **options) -> Explanation:
    """`explain` the edit that `edit_prompt` makes of two prompts; options as in `mix`."""
    return explain(reweight(mix(model, source, target, **options), weights or {}))


def _partners(edit: Edit, j: int) -> str:
    column = edit.alignment.matrix[:, j]
    parts = [f"{'' if column[i] == 1 else f'{column[i]:.3g} x '}{i} {_label(edit.source, i)}"
             for i in column.nonzero().flatten().tolist()]
    return " + ".join(parts) or "itself"


def _label(prompt: Prompt, i: int) -> str:
    return prompt.tokens[i] if i <= prompt.end else "(padding)"


def _percent(window: Sequence[float]) -> str:
    return "never" if window[0] == window[1] else f"{100 * window[0]:.0f}-{100 * window[1]:.0f} %"
