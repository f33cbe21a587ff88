"""Attention maps, collected while a pipeline runs: averaged on the fly, within a limit of memory."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from .prompts import Prompt
from .runtime import closest

__all__ = ["AttentionMaps", "Layer", "Record"]

PLACES = ("down", "mid", "up")
KEEP = ("step", "head")


@dataclass(frozen=True)
class Layer:
    """An attention layer of a UNet."""

    name: str           # "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    place: str          # "down", "mid" or "up"
    cross: bool
    resolution: int     # side of its grid for images of the model's own size
    scale: int          # how many times smaller than the latents its grid is


@dataclass(frozen=True)
class Record:
    """What to record; all that is not kept apart is averaged as it comes. Layers always stay apart.

    Parameters
    ----------
    cross, self_attention : bool
    resolution : int, optional
        The finest layers to record, named as in `control`.
    keep : subset of ("step", "head")
    edited : bool
        The maps that the layers work with, after the edit (as Google's AttentionStore has them), or those that
        every prompt has of its own.
    max_bytes : int
        What would go beyond is dropped, with a warning that says what.
    """

    cross: bool = True
    self_attention: bool = False
    resolution: int | None = None
    keep: tuple[str, ...] = ()
    edited: bool = True
    max_bytes: int = 2**29

    def __post_init__(self):
        for name in (self.keep,) if isinstance(self.keep, str) else self.keep:
            if isinstance(self.keep, str) or name not in KEEP:
                raise ValueError(f"keep {self.keep!r} is a tuple with some of {KEEP}")


class AttentionMaps:
    """What was recorded, for the prompts of a batch, source first."""

    def __init__(self, prompts: Sequence[Prompt], settings: Record):
        self.prompts, self.settings = tuple(prompts), settings
        self.dropped: list[str] = []        # what the limit of memory left out
        self._means: dict[tuple[Layer, int | None], torch.Tensor] = {}    # (P, heads or 1, pixels, tokens or pixels)
        self._counts: dict[tuple[Layer, int | None], int] = {}
        self._grids: dict[Layer, tuple[int, int]] = {}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers recorded, in the order of their calls."""
        return tuple(dict.fromkeys(layer for layer, _ in self._means))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps kept apart."""
        return tuple(sorted({step for _, step in self._means if step is not None}))

    @property
    def bytes(self) -> int:
        return sum(mean.numel() * mean.element_size() for mean in self._means.values())

    def add(self, layer: Layer, step: int, grid: tuple[int, int], maps: torch.Tensor) -> None:
        """Take in the maps (P, heads, pixels, tokens) of one call."""
        maps = maps.detach().float()
        maps = maps if "head" in self.settings.keep else maps.mean(1, keepdim=True)
        key = (layer, step if "step" in self.settings.keep else None)
        if key not in self._means:
            if self.bytes + maps.numel() * maps.element_size() > self.settings.max_bytes:
                self._drop(layer, key[1])
                return
            self._means[key], self._counts[key] = torch.zeros_like(maps), 0
        self._counts[key] += 1
        self._means[key].lerp_(maps, 1 / self._counts[key])
        self._grids[layer] = grid

    def _drop(self, layer: Layer, step: int | None) -> None:
        what = layer.name if step is None else f"{layer.name}, step {step}"
        if what in self.dropped:
            return
        if not self.dropped:
            warnings.warn(f"attention maps fill the {self.settings.max_bytes / 2**20:.0f} MiB of max_bytes; dropped: "
                          f"{what} and what follows (all in .dropped). Record a lower resolution, keep fewer axes or "
                          "raise max_bytes", stacklevel=2)
        self.dropped.append(what)

    def cross(self, prompt: int = -1, **where) -> torch.Tensor:
        """Cross-attention of one prompt as (h, w, L tokens); `where` as in `of`."""
        mean, grid = self._average(True, prompt, **where)
        return mean.reshape(*grid, -1)                  # (pixels, L) to (h, w, L)

    def self_attention(self, prompt: int = -1, **where) -> torch.Tensor:
        """Self-attention of one prompt as (pixels, pixels); `where` as in `of`."""
        return self._average(False, prompt, **where)[0]

    def of(self, words: str, prompt: int = -1, **where) -> torch.Tensor:
        """The map of a word (of several: their sum) as (h, w).

        Parameters
        ----------
        words : str
        prompt : int
            Which of the batch; by default the last.
        place : {"down", "mid", "up"}, optional
        resolution : int, optional
            By default the finest that was recorded.
        layer, step, head : str, int, int, optional
            One alone, where it was kept apart; by default the average.
        """
        positions = list(self.prompts[prompt].positions(words))
        return self.cross(prompt, **where)[..., positions].sum(-1)

    def _average(self, cross: bool, prompt: int, *, place: str | None = None, resolution: int | None = None,
                 layer: str | None = None, step: int | None = None, head: int | None = None):
        """The mean of all maps that fit, (pixels, tokens), and their grid."""
        found = [entry for entry in self.layers if entry.cross == cross and place in (None, entry.place)
                 and layer in (None, entry.name)]
        resolution = resolution or max((entry.resolution for entry in found), default=None)
        found = [entry for entry in found if entry.resolution == resolution]
        for name, value in (("step", step), ("head", head)):
            if value is not None and name not in self.settings.keep:
                raise ValueError(f"{name} {value}: {name}s were averaged; record with keep=({name!r},)")
        means = [mean for (entry, at), mean in self._means.items() if entry in found and step in (None, at)]
        if not means:
            raise ValueError(self._nothing(cross, place=place, resolution=resolution, layer=layer, step=step))
        heads = slice(None) if head is None else [head]
        return torch.stack([mean[prompt, heads].mean(0) for mean in means]).mean(0), self._grids[found[0]]

    def state(self) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """Tensors by number, and what each is: to save next to one another; see `restored`."""
        entries = [{"layer": asdict(layer), "step": step, "grid": self._grids[layer]} for layer, step in self._means]
        return {f"maps.{i}": mean.contiguous().cpu() for i, mean in enumerate(self._means.values())}, entries

    @classmethod
    def restored(cls, prompts: Sequence[Prompt], settings: Record, tensors: dict, entries: list[dict]) -> AttentionMaps:
        """The inverse of `state`."""
        maps = cls(prompts, settings)
        for i, entry in enumerate(entries):
            layer = Layer(**entry["layer"])
            maps._means[layer, entry["step"]] = tensors[f"maps.{i}"]
            maps._grids[layer] = tuple(entry["grid"])
        return maps

    def _nothing(self, cross: bool, **asked) -> str:
        if asked["layer"] not in (None, *(entry.name for entry in self.layers)):
            names = [entry.name for entry in self.layers]
            return f"layer {asked['layer']!r} was not recorded; {closest(asked['layer'], names)}"
        asked = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
        have = sorted({f"{entry.place} {entry.resolution}" for entry in self.layers if entry.cross == cross})
        return (f"no {'cross' if cross else 'self'}-attention was recorded for {asked or 'anything'}; "
                f"there is: {', '.join(have) or 'nothing'}; steps: {self.steps or 'averaged'}")
