"""Local blend: outside the words' region the target keeps the source's latents."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .masks import SoftMask, as_mask
from .prompts import Prompt

__all__ = ["Blender", "LocalBlend", "blend", "blend_mask", "given_mask", "word_selectors"]


@dataclass(frozen=True, eq=False)
class LocalBlend:
    """Where an edit may change the picture: Hertz et al. 2022 (arXiv:2208.01626), section 4, "local editing".

    Parameters
    ----------
    words : str, or one entry per prompt, source first: a str or several
        Whose region may change. A single str must stand in every prompt.
    subtract : likewise, optional
        Whose region must not, even inside the other; an empty entry for a prompt that names none.
    threshold, subtract_threshold : float
        On maps divided by their greatest value; between 0 and 1.
    start_blend : float
        The part of the steps before the first blend.
    soft : bool
        Ramp from 0 at half of the threshold to 1 at one and a half, instead of cutting at it.
    mask : SoftMask, picture, array or tensor (H, W), or one for each prompt, optional
        In [0, 1] or bool; used instead of words.
    resolution : int, optional
        Which layers are read, named as in `control`.
    """

    words: str | Sequence[str | Sequence[str]] = ()
    subtract: str | Sequence[str | Sequence[str]] = ()
    threshold: float = .3
    subtract_threshold: float = .3
    start_blend: float = .2
    soft: bool = False
    mask: object = None
    resolution: int | None = None

    def __post_init__(self):
        if bool(self.words) == (self.mask is not None):
            raise ValueError("LocalBlend: give either words or a mask")
        for name in ("threshold", "subtract_threshold", "start_blend"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)!r} lies outside [0, 1]")


def word_selectors(settings: LocalBlend, prompts: Sequence[Prompt]) -> torch.Tensor:
    """Which tokens are blended, and which subtracted: (P, L, 2) of 0 and 1."""
    selectors = torch.zeros(len(prompts), len(prompts[0].tokens), 2)
    for column, (name, given) in enumerate([("words", settings.words), ("subtract", settings.subtract)]):
        entries = [given] * len(prompts) if isinstance(given, str) or not given else list(given)
        if len(entries) != len(prompts):
            raise ValueError(f"LocalBlend {name} has {len(entries)} entries for {len(prompts)} prompts; give one for "
                             f"each: {[prompt.text for prompt in prompts]}")
        for p, entry in enumerate(entries):
            if name == "words" and not entry:
                raise ValueError(f"LocalBlend words has no word for the prompt {prompts[p].text!r}")
            for word in [entry] if isinstance(entry, str) and entry else entry:
                selectors[p, list(prompts[p].positions(word)), column] = 1
    return selectors


def blend_mask(maps: torch.Tensor, size: tuple[int, int], settings: LocalBlend) -> torch.Tensor:
    """The region of every prompt from its words' maps.

    As LocalBlend in Google's null-text notebook: maps of words to blend are max-pooled 3 x 3, enlarged, divided by
    their greatest value and cut at the threshold; the source's region is joined to each target's.

    Parameters
    ----------
    maps : (P, 2, h, w)
        Attention of the words to blend and of those to subtract, source first.
    size : (H, W) of the latents.

    Returns
    -------
    mask : (P, 1, H, W) in [0, 1]
    """
    wanted = _region(F.max_pool2d(maps[:, :1], 3, stride=1, padding=1), size, settings.threshold, settings.soft)
    unwanted = _region(maps[:, 1:], size, settings.subtract_threshold, settings.soft)
    return wanted * (1 - unwanted)


def _region(maps: torch.Tensor, size: tuple[int, int], threshold: float, soft: bool) -> torch.Tensor:
    maps = F.interpolate(maps.float(), size=size, mode="nearest")                       # (P, 1, H, W)
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    ramp = ((maps - threshold / 2) / max(threshold, 1e-6)).clamp(0, 1)
    region = ramp * (maps > 0) if soft else (maps > threshold).float()
    return torch.maximum(region, region[:1])


def given_mask(settings: LocalBlend, count: int, size: tuple[int, int]) -> torch.Tensor:
    """The mask of the settings for `count` prompts at the latents' size: (P, 1, H, W), hard ones cut at a half."""
    one = isinstance(settings.mask, SoftMask | Image.Image) or np.ndim(settings.mask) == 2
    masks = [settings.mask] if one else settings.mask
    if len(masks) not in (1, count):
        raise ValueError(f"LocalBlend mask: {len(masks)} masks for {count} prompts; give one, or one for each")
    values = torch.stack([as_mask(mask, size).values for mask in masks])                # (1 or P, H, W)
    return values[:, None].expand(count, -1, -1, -1)


def blend(latents: torch.Tensor, mask: torch.Tensor, source: torch.Tensor | None = None) -> torch.Tensor:
    """Keep the source outside the mask: x_source + mask (x - x_source), for latents (P, C, H, W).

    The source is row 0 of the latents, or (1, C, H, W) at the same noise level.
    """
    source = latents[:1] if source is None else source.to(latents)
    return source + mask.to(latents) * (latents - source)


class Blender:
    """A local blend during a run: sums the words' maps as the layers give them, blends after each step."""

    def __init__(self, settings: LocalBlend, prompts: Sequence[Prompt], resolution: int):
        self.settings, self.count = settings, len(prompts)
        self.resolution = settings.resolution or resolution
        self.selectors = word_selectors(settings, prompts) if settings.words else None     # (P, L, 2)
        self.mask: torch.Tensor | None = None           # (P, 1, H, W), of the last blend
        self.was_asked = False
        self._maps: torch.Tensor | None = None          # (P, 2, h, w), summed over layers and steps

    def restart(self) -> None:
        """Forget the maps of a run that is over."""
        self._maps = None

    def add(self, maps: torch.Tensor) -> None:
        """Take in the maps (P, 2, h, w) of one layer at one step."""
        self._maps = maps if self._maps is None else self._maps + maps

    def __call__(self, latents: torch.Tensor, moment: float, source: torch.Tensor | None = None) -> torch.Tensor:
        """Blend latents (P, C, H, W) at a moment of the run in [0, 1], once start_blend is over; see `blend`."""
        self.was_asked = True
        if moment < self.settings.start_blend:
            return latents
        size = tuple(latents.shape[-2:])
        if self.selectors is None:
            self.mask = given_mask(self.settings, self.count, size).to(latents.device)
        else:
            self.mask = blend_mask(self._maps, size, self.settings)
        return blend(latents, self.mask, source)
