"""One soft mask for every method: how far each latent of a picture may change, and where that was learned from."""
from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from .runtime import closest

__all__ = ["SoftMask", "THRESHOLDS", "as_mask", "threshold_of"]

THRESHOLDS = {"absolute": .5, "quantile": .8, "mean-ratio": 3., "otsu": None}      # with their usual values
_DISTORTION = .05       # by which the shapes of a mask and a picture may differ


@dataclass(frozen=True, eq=False)
class SoftMask:
    """A region of a picture: 1 where it may change, 0 where it must not, anything between for a part.

    `LocalBlend`, `diffedit` and inpainting take one, attention maps, differences of predictions and drawings give one.

    Parameters
    ----------
    values : array or tensor (h, w)
        In [0, 1] or bool, at the latents' resolution; kept as float32 on the CPU.
    origin : str
        Where it came from, in words.

    Raises
    ------
    ValueError
        If the values are no map, or lie outside [0, 1].
    """

    values: torch.Tensor
    origin: str = "given"

    def __post_init__(self):
        values = torch.as_tensor(self.values).detach().float().cpu()
        if values.ndim != 2 or not values.numel():
            raise ValueError(f"values of a mask are (h, w), not {tuple(values.shape)}")
        if not (values.isfinite().all() and 0 <= values.min() and values.max() <= 1):
            raise ValueError(f"values of a mask lie in [0, 1], not from {values.min():.3g} to {values.max():.3g}; "
                             "SoftMask.scaled brings a map there")
        object.__setattr__(self, "values", values)

    @classmethod
    def scaled(cls, heat, origin: str, *, clip: float | None = None) -> SoftMask:
        """A map (h, w) of any scale, from 0 upwards, divided by its greatest value.

        Parameters
        ----------
        clip : float, optional
            First cut what exceeds so many times the mean: outliers, as DiffEdit does (arXiv:2210.11427, section 3.2).

        Raises
        ------
        ValueError
            If the map is 0 everywhere: there is nothing to see in it.
        """
        heat = torch.as_tensor(heat).detach().float().cpu()
        if not heat.max() > 0:
            raise ValueError(f"the map of {origin} is 0 everywhere: there is nothing to make a mask of")
        heat = heat if clip is None else heat.clamp(max=clip * heat.mean())
        return cls(heat / heat.max(), origin)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in latents."""
        return tuple(self.values.shape)

    @property
    def share(self) -> float:
        """The part of the picture that it covers, between 0 and 1."""
        return self.values.mean().item()

    # ---- harder, softer, larger, smaller ----

    def threshold(self, value: float | None = None, method: str = "absolute") -> SoftMask:
        """1 above a level, else 0.

        Parameters
        ----------
        value : float, optional
            absolute: the level itself, by default .5. quantile: the part of the picture that is left out, .8.
            mean-ratio: as in diffusers' DiffEdit pipeline, half of so many times the mean, 3. otsu: none, the level
            that parts the values best into two (Otsu 1979).
        """
        level = threshold_of(self.values, value, method)
        return self._new((self.values > level).float(), f"{method} {level:.2f}")

    def smooth(self, sigma: float = 1.) -> SoftMask:
        """Gaussian smoothing; sigma in latents, 0 for none."""
        if sigma < 0:
            raise ValueError(f"sigma {sigma!r} must be 0 or more")
        if sigma == 0:
            return self
        return self._filtered(lambda v: cv2.GaussianBlur(v, (0, 0), sigma), f"smoothed {sigma:g}")

    def grow(self, latents: int = 1) -> SoftMask:
        """Every latent takes the greatest value within so many around it; negative: the least, so that it shrinks."""
        kernel = _disc(abs(latents))
        change = cv2.dilate if latents > 0 else cv2.erode
        border = dict(borderType=cv2.BORDER_REPLICATE)
        return self._filtered(lambda v: change(v, kernel, **border), f"grown {latents}")

    def close(self, latents: int = 1) -> SoftMask:
        """Fill holes and gaps narrower than about twice so many latents."""
        return replace(self.grow(latents).grow(-latents), origin=f"{self.origin}, closed {latents}")

    def open(self, latents: int = 1) -> SoftMask:
        """Remove specks narrower than about twice so many latents."""
        return replace(self.grow(-latents).grow(latents), origin=f"{self.origin}, opened {latents}")

    # ---- together with others ----

    def __or__(self, other: SoftMask) -> SoftMask:
        return self._with(other, torch.maximum, "or")

    def __and__(self, other: SoftMask) -> SoftMask:
        return self._with(other, torch.minimum, "and")

    def __sub__(self, other: SoftMask) -> SoftMask:
        return self._with(other, lambda a, b: torch.minimum(a, 1 - b), "without")

    def __invert__(self) -> SoftMask:
        return SoftMask(1 - self.values, f"all but {self.origin}")

    # ---- to other sizes and formats ----

    @property
    def is_hard(self) -> bool:
        """Whether it holds 0 and 1 alone."""
        return bool(((self.values == 0) | (self.values == 1)).all())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """The mask as figures and metrics take it: bool if it is hard, else float32, (h, w)."""
        values = (self.values.bool() if self.is_hard else self.values.clone()).numpy()
        return values if dtype is None else values.astype(dtype)

    def at(self, size: tuple[int, int]) -> SoftMask:
        """The same mask with another number of latents (or pixels): areas averaged to make it smaller, else repeated.

        Raises
        ------
        ValueError
            If that would distort it: it is of another picture.
        """
        if size == self.size:
            return self
        (height, width), (h, w) = size, self.size
        if abs(h * width / (w * height) - 1) > _DISTORTION:
            raise ValueError(f"mask ({self.origin}): {h} x {w} has not the shape of the picture, whose latents are "
                             f"{height} x {width}; give one made for this picture, of any scale")
        mode = "area" if height < h else "nearest"
        return replace(self, values=interpolate(self.values[None, None], size=size, mode=mode)[0, 0])

    def to_pil(self, scale: int = 8) -> Image.Image:
        """A grey picture, `scale` pixels a latent, white where the picture may change."""
        grey = (self.values * 255).round().byte().numpy()
        return Image.fromarray(grey.repeat(scale, 0).repeat(scale, 1))

    @classmethod
    def from_pil(cls, image: Image.Image, origin: str = "a picture") -> SoftMask:
        """A picture as a mask with a value for each pixel, 1 where it is white."""
        return cls(np.asarray(image.convert("L"), np.float32) / 255, origin)

    def check(self, advice: str) -> SoftMask:
        """Return the mask; warn, with advice, if it is empty or covers nearly everything."""
        if self.share == 0 or self.share > .95:
            extent = "is empty" if self.share == 0 else f"covers {self.share:.0%} of the picture"
            warnings.warn(f"the mask from {self.origin} {extent}: {advice}", stacklevel=3)
        return self

    def _new(self, values: torch.Tensor, what: str) -> SoftMask:
        return SoftMask(values, f"{self.origin}, {what}")

    def _filtered(self, change: Callable[[np.ndarray], np.ndarray], what: str) -> SoftMask:
        return self._new(torch.from_numpy(change(self.values.numpy())).clamp(0, 1), what)

    def _with(self, other: SoftMask, combine, word: str) -> SoftMask:
        return SoftMask(combine(self.values, other.at(self.size).values), f"{self.origin} {word} {other.origin}")


def threshold_of(values: torch.Tensor, value: float | None = None, method: str = "absolute") -> float:
    """The level of `SoftMask.threshold` in a map (h, w)."""
    if method not in THRESHOLDS:
        raise ValueError(f"method {method!r} is unknown; {closest(method, THRESHOLDS)}")
    value = THRESHOLDS[method] if value is None else value
    if method == "otsu":
        grey = (values * 255).round().byte().numpy()
        return (cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0] + .5) / 255
    limit = 1. if method in ("absolute", "quantile") else math.inf
    if not 0 <= value <= limit:
        raise ValueError(f"value {value!r} of a threshold by {method} lies outside [0, {limit:g}]")
    return {"absolute": lambda: value, "quantile": lambda: values.quantile(value).item(),
            "mean-ratio": lambda: value / 2 * values.mean().item()}[method]()


def as_mask(mask, size: tuple[int, int]) -> SoftMask:
    """A SoftMask, a picture, an array or a tensor (h, w) as a mask of `size` latents; a hard one stays hard.

    Raises
    ------
    ValueError
        If it is no mask, or one of a picture of another shape.
    """
    if isinstance(mask, Image.Image):
        mask = SoftMask.from_pil(mask)
    mask = mask if isinstance(mask, SoftMask) else SoftMask(mask)
    resized = mask.at(size)
    return replace(resized, values=(resized.values >= .5)) if mask.is_hard else resized


def _disc(radius: int) -> np.ndarray:
    """The offsets within a radius, (2 r + 1, 2 r + 1)."""
    y, x = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    return (x**2 + y**2 <= (radius + .5) ** 2).astype(np.uint8)
