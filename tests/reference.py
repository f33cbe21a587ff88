"""Prompt-to-Prompt the slow way: every attention map as an explicit matrix, every edit a loop over tokens.

Nothing here comes from p2p_helpers: alignments are given word by word, steps as sets of integers, layers by their
number of pixels. The tests hold `p2p_helpers.attention.control` against it.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


# ---- alignments, from pairs of word numbers -------------------------------------------------------------------------


def word_tokens(tokenizer, prompt: str) -> list[list[int]]:
    """Positions of the tokens of each space-separated word, each encoded alone; the last entry is the end mark."""
    groups, position = [], 1                # 0 is the start mark
    for word in prompt.split():
        count = len(tokenizer(word, add_special_tokens=False).input_ids)
        groups.append(list(range(position, position + count)))
        position += count
    return groups + [[position]]


def one_by_one(source: list[int], target: list[int]) -> dict[int, list[tuple[int, float]]]:
    """Each target token takes one source token's map."""
    assert len(source) == len(target)
    return {j: [(i, 1.)] for i, j in zip(source, target)}


def average(source: list[int], target: list[int]) -> dict[int, list[tuple[int, float]]]:
    """Each of n target tokens takes 1/n of every source token's map: the mass of the word stays."""
    return {j: [(i, 1 / len(target)) for i in source] for j in target}


def copy(source: list[int], target: list[int]) -> dict[int, list[tuple[int, float]]]:
    """Each target token takes the mean of the source tokens' maps."""
    return {j: [(i, 1 / len(source)) for i in source] for j in target}


def total(source: list[int], target: list[int]) -> dict[int, list[tuple[int, float]]]:
    """Each target token takes the sum of the source tokens' maps."""
    return {j: [(i, 1.) for i in source] for j in target}


# ---- one target prompt ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What each token of a target takes, in which steps, and times what."""

    takes: dict[int, list[tuple[int, float]]]       # target token to (source token, share); tokens without keep theirs
    steps: dict[int, frozenset[int]]                # target token to the steps in which it is injected
    weights: dict[int, float]
    self_steps: frozenset[int]


def describe(tokenizer, source: str, target: str, pairs: Sequence[tuple[int, int]], *, unequal=average, steps=(),
             word_steps=(), weights=(), self_steps=()) -> Target:
    """A target from pairs of word numbers; `word_steps` and `weights` are (word number, value)."""
    before, after = word_tokens(tokenizer, source), word_tokens(tokenizer, target)
    length, takes = tokenizer.model_max_length, {0: [(0, 1.)]}
    for s, t in pairs:
        takes |= (one_by_one if len(before[s]) == len(after[t]) else unequal)(before[s], after[t])
    i, j = before[-1][0], after[-1][0]
    while i < length and j < length:                # end mark with end mark, then padding with padding
        takes[j] = [(i, 1.)]
        i, j = i + 1, j + 1
    token_steps = {token: frozenset(steps) for token in range(length)}
    token_steps |= {token: frozenset(value) for word, value in word_steps for token in after[word]}
    token_weights = {token: value for word, value in weights for token in after[word]}
    return Target(takes, token_steps, token_weights, frozenset(self_steps))


def edited_cross(source: torch.Tensor, own: torch.Tensor, target: Target, step: int) -> torch.Tensor:
    """The cross-attention map (heads, pixels, tokens) of a target, token by token."""
    edited = own.clone()
    for token in range(own.shape[-1]):
        if step not in target.steps[token]:
            continue
        column = own[..., token]
        if token in target.takes:
            column = sum(share * source[..., i] for i, share in target.takes[token])
        edited[..., token] = target.weights.get(token, 1.) * column
    return edited


# ---- local blend ----------------------------------------------------------------------------------------------------


@dataclass
class Blend:
    """LocalBlend of Google's null-text notebook, written out pixel by pixel."""

    words: list[list[int]]                      # tokens per prompt, source first
    subtract: list[list[int]]
    grid: tuple[int, int]                       # of the layers that are read
    threshold: float = .3
    subtract_threshold: float = .3
    first_step: int = 0
    soft: bool = False
    seen: list[torch.Tensor] = field(default_factory=list)      # edited maps of a layer and step, (P, pixels, tokens)
    masks: list[torch.Tensor] = field(default_factory=list)     # one per blended step, (P, H, W)
    margin: float = 1.                          # how near any value came to a threshold

    def apply(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        if step < self.first_step:
            return latents
        maps = sum(self.seen)
        regions = [self.region(maps, p, latents.shape[-2:]) for p in range(len(latents))]
        masks = [[[max(here, there) * (1 - max(less, less_there)) for here, there, less, less_there in zip(*rows)]
                  for rows in zip(region[0], regions[0][0], region[1], regions[0][1])] for region in regions]
        self.masks.append(torch.tensor(masks))
        blended = latents.clone()
        for p in range(len(latents)):
            mask = self.masks[-1][p].to(latents)
            blended[p] = latents[0] * (1 - mask) + latents[p] * mask
        return blended

    def region(self, maps: torch.Tensor, p: int, size) -> tuple[list, list]:
        wanted = self.cut(self.pool(self.image(maps, p, self.words[p])), size, self.threshold)
        return wanted, self.cut(self.image(maps, p, self.subtract[p]), size, self.subtract_threshold)

    def image(self, maps: torch.Tensor, p: int, tokens: list[int]) -> list[list[float]]:
        height, width = self.grid
        return [[float(sum(maps[p, y * width + x, token] for token in tokens)) for x in range(width)]
                for y in range(height)]

    def pool(self, image: list[list[float]]) -> list[list[float]]:
        height, width = self.grid
        return [[max(image[v][u] for v in range(max(y - 1, 0), min(y + 2, height))
                     for u in range(max(x - 1, 0), min(x + 2, width))) for x in range(width)] for y in range(height)]

    def cut(self, image: list[list[float]], size, threshold: float) -> list[list[float]]:
        (height, width), peak = size, max(map(max, image))
        if peak == 0:
            return [[0.] * width for _ in range(height)]
        large = [[image[y * self.grid[0] // height][x * self.grid[1] // width] / peak for x in range(width)]
                 for y in range(height)]
        if self.soft:
            return [[min(max(value / threshold - .5, 0.), 1.) for value in row] for row in large]
        self.margin = min(self.margin, min(abs(value - threshold) for row in large for value in row))
        return [[float(value > threshold) for value in row] for row in large]


# ---- under a pipeline -----------------------------------------------------------------------------------------------


class ReferenceAttention:
    """An attention processor that has the whole map, edits it and multiplies it by V."""

    def __init__(self, name: str, run: Run):
        self.name, self.run, self.calls = name, run, 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        q, k, v = (torch.stack(x.chunk(attn.heads, dim=-1), dim=1)                  # (B, heads, pixels, d)
                   for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        maps = torch.softmax(torch.einsum("bhpd,bhld->bhpl", q, k) / q.shape[-1] ** .5, dim=-1)
        step = self.run.steps_of_calls[self.calls] if self.run.steps_of_calls else self.calls
        self.run.own[self.name, step] = maps[-self.run.count:]
        maps = self.run.edited(maps, cross, step)
        self.calls += 1
        self.run.maps[self.name, step] = maps[-self.run.count:]
        output = torch.cat(list((maps @ v).unbind(1)), dim=-1)                      # (B, pixels, heads d)
        return attn.to_out[1](attn.to_out[0](output))


class Run:
    """One run of a pipeline under the reference; the last rows of a batch are the prompts, source first."""

    def __init__(self, targets: Sequence[Target], self_pixels: int, steps_of_calls, blend: Blend | None):
        self.targets, self.self_pixels, self.blend = targets, self_pixels, blend
        self.steps_of_calls, self.count = steps_of_calls, len(targets) + 1
        self.own: dict[tuple[str, int], torch.Tensor] = {}      # (layer, step) to (P, heads, pixels, tokens or pixels)
        self.maps: dict[tuple[str, int], torch.Tensor] = {}     # the same after the edit

    def edited(self, maps: torch.Tensor, cross: bool, step: int) -> torch.Tensor:
        maps = maps.clone()
        source = len(maps) - self.count
        for row, target in enumerate(self.targets, start=source + 1):
            if cross:
                maps[row] = edited_cross(maps[source], maps[row], target, step)
            elif step in target.self_steps and maps.shape[-1] <= self.self_pixels:
                maps[row] = maps[source]
        if cross and self.blend and maps.shape[2] == self.blend.grid[0] * self.blend.grid[1]:
            self.blend.seen.append(maps[source:].mean(1))
        return maps

    def on_step_end(self, pipe, step: int, timestep, kwargs: dict) -> dict:
        """A pipeline's `callback_on_step_end`."""
        return {"latents": self.blend.apply(step, kwargs["latents"])} if self.blend else {}


@contextmanager
def reference_control(pipe, targets: Sequence[Target], *, self_pixels: int, steps_of_calls=None,
                      blend: Blend | None = None):
    """Run a pipeline inside the block under the reference.

    Parameters
    ----------
    self_pixels : int
        Self-attention is injected where a map has at most that many pixels.
    steps_of_calls : list of int, optional
        The step to which each call of the UNet belongs; by default a step each.
    """
    run, before = Run(targets, self_pixels, steps_of_calls, blend), dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor({name: ReferenceAttention(name, run) for name in before})
    try:
        yield run
    finally:
        pipe.unet.set_attn_processor(before)
