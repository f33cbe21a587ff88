"""DiffEdit: a mask from where two captions disagree, and an edit inside it alone; and its fast variant.

Couairon et al. 2022 (arXiv:2210.11427). The mask's three methods differ in what they compare under the two captions:

- ``one_step``, the paper's: the guided noise predicted in the noised picture, 4 UNet evaluations a noise;
- ``fast``: the same without the unconditional predictions, which cancel, 2 evaluations a noise;
- ``denoised``: the pictures that are denoised from it, 4 evaluations a noise and step.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .images import to_array, to_pil, to_tensor
from .inversion import ddim_trajectory
from .masks import SoftMask, as_mask
from .models import check_prompt
from .runtime import closest, generator, memory_advice
from .sampling import (alpha_bar, count_evaluations, ddim_step, decode, encode_image, encode_prompt, generate,
                       initial_latents, predict_noise, previous_timestep, sampling_timesteps)

if TYPE_CHECKING:
    from diffusers import StableDiffusionInpaintPipeline

__all__ = ["Cut", "DiffEdit", "Difference", "METHODS", "diffedit", "estimate_mask", "fast_diffedit", "inpaint",
           "paste_outside"]

METHODS = ("one_step", "fast", "denoised")
_ADVICE = ("lower or raise the threshold of the cut, and see whether the source names what the picture shows and the "
           "target what shall take its place")


@dataclass(frozen=True)
class Difference:
    """How the map of where two captions disagree is made."""

    method: str = "one_step"        # of METHODS
    noises: int = 10                # that it is averaged over
    strength: float = .5            # of the noise: the part of the steps that would remove it
    steps: int = 50                 # of the whole schedule
    guidance_scale: float = 7.5     # has no effect on `fast`
    clip: float | None = 3.         # cut what exceeds so many times the mean
    seed: int = 0                   # of the first noise
    batch_size: int = 64            # latents in one call of the UNet, halved where memory does not suffice

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is unknown; {closest(self.method, METHODS)}")
        if self.noises < 1:
            raise ValueError(f"noises {self.noises!r} must be 1 or more")
        if not 0 < self.strength < 1:
            raise ValueError(f"strength {self.strength!r} of the mask must lie between 0 and 1: without noise there is "
                             "nothing to predict, in noise alone nothing of the picture; .5 is usual")
        if self.guidance_scale == 0 and self.method != "fast":
            raise ValueError("guidance_scale 0 of the mask leaves both captions out, so that nothing differs; 7.5 is "
                             "usual")


@dataclass(frozen=True)
class Cut:
    """How a map becomes a mask: smoothed, cut at a threshold, then grown."""

    value: float | None = None      # see `SoftMask.threshold`
    method: str = "absolute"
    smooth: float = 0.              # sigma of the Gaussian, in latents
    grow: int = 0                   # latents

    def __call__(self, heat: SoftMask) -> SoftMask:
        mask = heat.smooth(self.smooth).threshold(self.value, self.method)
        return mask.grow(self.grow) if self.grow else mask


@dataclass(frozen=True, eq=False)
class DiffEdit:
    """Edited pictures with the masks that they were edited in."""

    images: list[Image.Image]
    masks: list[SoftMask]               # that were used
    maps: list[SoftMask]                # that they were cut from; none if the masks were given
    latents: torch.Tensor               # (B, 4, h, w) float32, after the last step
    settings: Mapping[str, Any]
    cost: Mapping[str, float] = field(default_factory=dict)     # seconds, unet_evaluations

    @property
    def edited(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def mask(self) -> SoftMask:
        """The first mask."""
        return self.masks[0]


# ---- step 1: where the captions disagree ----------------------------------------------------------------------------


@memory_advice()
@torch.no_grad()
def estimate_mask(pipe, image, source: str, target: str, settings: Difference = Difference()) -> SoftMask:
    """Where two captions of a picture lead to different predictions (section 3.2, step 1).

    Parameters
    ----------
    pipe : StableDiffusionPipeline with a DDIM scheduler
    image : picture
    source : str
        What the picture shows; an empty one is allowed.
    target : str
        What it should show.

    Returns
    -------
    SoftMask
        The mean of abs(target - source) over noises and channels, cut at `clip` times its mean and divided by its
        greatest value; `SoftMask.threshold` makes a mask of it.

    Raises
    ------
    ValueError
        If the captions lead to the same prediction, the target is empty, or a prompt too long.
    """
    check_prompt(pipe, source, allow_empty=True)
    check_prompt(pipe, target)
    latents = encode_image(pipe, [image])                                               # (1, 4, h, w)
    noise = initial_latents(pipe, range(settings.seed, settings.seed + settings.noises),
                            *to_tensor(image).shape[-2:])                               # (n, 4, h, w)
    timesteps = sampling_timesteps(pipe.scheduler, settings.steps, settings.strength)
    a_t = alpha_bar(pipe.scheduler, timesteps[0])
    noisy = a_t.sqrt() * latents + (1 - a_t).sqrt() * noise                             # (n, 4, h, w)
    captions = encode_prompt(pipe, ["", source, target])                                # (3, L, C)
    heat = _difference(pipe, noisy, timesteps, captions, settings)
    if not heat.max() > 0:
        raise ValueError(f"source {source!r} and target {target!r} lead to the same prediction, so that there is no "
                         "mask; name what the picture shows and what it should show")
    return SoftMask.scaled(heat, f"{source!r} against {target!r}", clip=settings.clip)


def _difference(pipe, noisy: torch.Tensor, timesteps: torch.Tensor, captions: torch.Tensor,
                settings: Difference) -> torch.Tensor:
    """The mean of abs(target - source) over noisy latents (n, 4, h, w) and channels, in as few batches as fit."""
    rows = 2 if settings.method == "fast" else 4        # in the UNet, for one noise
    size, done, total = max(settings.batch_size // rows, 1), 0, 0.
    while done < len(noisy):
        try:
            source, target = _compared(pipe, noisy[done:done + size], timesteps, captions, settings).chunk(2)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = size // 2
            continue
        total = total + (target - source).abs().mean(1).sum(0)                          # (h, w)
        done += size
    return total / len(noisy)


def _compared(pipe, noisy: torch.Tensor, timesteps: torch.Tensor, captions: torch.Tensor,
              settings: Difference) -> torch.Tensor:
    """What the captions make of noisy latents (n, 4, h, w): (2 n, 4, h, w), under the source and then the target."""
    count, scale = len(noisy), 1. if settings.method == "fast" else settings.guidance_scale
    embeddings = captions.repeat_interleave(torch.tensor([2 * count, count, count], device=captions.device), 0)
    latents = noisy.repeat(2, 1, 1, 1)                                                  # (2 n, 4, h, w)
    if settings.method != "denoised":
        return predict_noise(pipe, latents, timesteps[0], embeddings, scale)
    for t in pipe.progress_bar(timesteps):
        eps = predict_noise(pipe, latents, t, embeddings, scale)
        a_t, a_prev = (alpha_bar(pipe.scheduler, s) for s in (t, previous_timestep(pipe.scheduler, t)))
        latents = ddim_step(latents, eps, a_t, a_prev)
    return latents


# ---- steps 2 and 3: encode, and decode inside the mask --------------------------------------------------------------


@memory_advice()
def diffedit(pipe, image, source: str | Sequence[str], target: str | Sequence[str], *, mask=None,
             difference: Difference = Difference(), cut: Cut | Sequence[Cut] = Cut(), encode_with: str = "source",
             strength: float = .8, steps: int = 50, guidance_scale: float = 7.5, negative_prompt: str = "",
             paste: bool = True) -> DiffEdit:
    """Edit pictures where their captions disagree: estimate the mask, encode by DDIM, decode inside the mask.

    Parameters
    ----------
    pipe : StableDiffusionPipeline with a DDIM scheduler
    image : picture, or a list of several of one size
    source, target : str, or one for each picture
        What it shows, and what it should show.
    mask : SoftMask, picture, array or tensor, or a list of one for each picture, optional
        Instead of the estimated one.
    difference, cut : settings of the mask
        `cut` may be one for each picture.
    encode_with : {"source", "empty"}
        The caption of the encoding.
    strength : float
        The part of the steps that are encoded and decoded again: how much may change inside the mask.
    paste : bool
        Put the picture's own pixels back outside the mask, see `paste_outside`. The latents there are its own anyway.

    Raises
    ------
    ValueError
        If the numbers of pictures, captions and masks differ, the strength is not one step, or a mask is that of
        another picture.
    """
    started, images = time.perf_counter(), _listed(image)
    sources, targets = (_one_each(name, given, images) for name, given in (("source", source), ("target", target)))
    if encode_with not in ("source", "empty"):
        raise ValueError(f"encode_with {encode_with!r} is unknown; {closest(encode_with, ('source', 'empty'))}")
    sampling_timesteps(pipe.scheduler, steps, strength)     # a wrong strength is found before the work
    with count_evaluations(pipe.unet) as counter:
        latents = encode_image(pipe, images)                                            # (B, 4, h, w)
        maps, masks = _masks(pipe, images, sources, targets, mask, difference, cut, tuple(latents.shape[-2:]))
        captions = sources if encode_with == "source" else [""] * len(images)
        trajectory = ddim_trajectory(pipe, latents, encode_prompt(pipe, captions), steps, strength=strength)
        made = generate(pipe, targets, latents=trajectory[-1], strength=strength, steps=steps,
                        guidance_scale=guidance_scale, negative_prompt=negative_prompt,
                        callback=_keeping(trajectory, masks))
    settings = {"source": sources, "target": targets, "encode_with": encode_with, "strength": strength, "steps": steps,
                "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "paste": paste,
                "mask": _described(mask, difference, cut, images)}
    cost = {"seconds": time.perf_counter() - started, "unet_evaluations": counter.evaluations}
    return DiffEdit(_pasted(made.images, images, masks, paste), masks, maps, made.latents, settings, cost)


def _keeping(trajectory: torch.Tensor, masks: Sequence[SoftMask]):
    """A callback of `generate` that puts the encoded background (K + 1, B, 4, h, w) back at the level of each step.

    After step i the latents are as noisy as those K - 1 - i steps from the picture. (diffusers' pipeline blends with
    those of the step before, so that its background stays one level too noisy.)
    """
    inside = torch.stack([mask.values for mask in masks])[:, None].to(trajectory)       # (B, 1, h, w)

    def keep(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        background = trajectory[len(trajectory) - 2 - i]                                # (B, 4, h, w)
        return background + inside * (latents - background)
    return keep


def _masks(pipe, images, sources, targets, given, difference, cut, size) -> tuple[list[SoftMask], list[SoftMask]]:
    """The maps (none for masks that are given) and the masks of all pictures."""
    if given is not None:
        return [], [as_mask(one, size) for one in _one_each("mask", given, images)]
    maps = [estimate_mask(pipe, *one, difference) for one in zip(images, sources, targets)]
    masks = [cut_one(heat) for cut_one, heat in zip(_one_each("cut", cut, images), maps)]
    return maps, [mask.check(_ADVICE) for mask in masks]


def paste_outside(edited: Image.Image, picture, mask: SoftMask) -> Image.Image:
    """An edited picture in and around a mask, the picture itself outside it; the seam is 8 pixels off, and soft.

    Latents that are kept are not pixels that are kept: the decoder's normalisation sees the whole picture, so that a
    change inside the mask shifts colours everywhere.
    """
    width, height = edited.size
    near = mask.grow(1).at((height, width)).smooth(3.)
    return Image.composite(edited, to_pil(to_array(picture)), near.to_pil(scale=1))


def _pasted(edited: Sequence[Image.Image], pictures: Sequence, masks: Sequence[SoftMask], wanted: bool) -> list:
    return [paste_outside(*one) for one in zip(edited, pictures, masks)] if wanted else list(edited)


# ---- fast: mask in one batch, then inpainting -----------------------------------------------------------------------


@memory_advice()
def fast_diffedit(pipe, image, source: str | Sequence[str], target: str | Sequence[str], *, mask=None,
                  difference: Difference = Difference(method="fast", noises=20),
                  cut: Cut | Sequence[Cut] = Cut(smooth=1.),
                  inpainting: StableDiffusionInpaintPipeline | None = None, strength: float = 1., steps: int = 50,
                  guidance_scale: float = 7.5, negative_prompt: str = "", seed: int = 0,
                  paste: bool = True) -> DiffEdit:
    """Edit pictures by the fast mask and stock inpainting.

    Parameters
    ----------
    inpainting : StableDiffusionInpaintPipeline, optional
        With a UNet of 9 channels, made for inpainting, or of 4; by default made from `pipe`.
    strength : float
        Of the inpainting; 1 forgets what was inside the mask.
    seed : int
        Of the inpainting's noise.

    The others are those of `diffedit`.
    """
    from diffusers import StableDiffusionInpaintPipeline

    started, images = time.perf_counter(), _listed(image)
    sources, targets = (_one_each(name, given, images) for name, given in (("source", source), ("target", target)))
    if inpainting is None:
        inpainting = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
        inpainting.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    size = tuple(side // pipe.vae_scale_factor for side in to_tensor(images).shape[-2:])
    with count_evaluations(pipe.unet, inpainting.unet) as counter:
        maps, masks = _masks(pipe, images, sources, targets, mask, difference, cut, size)
        latents = inpaint(inpainting, images, targets, masks, strength=strength, steps=steps, seed=seed,
                          guidance_scale=guidance_scale, negative_prompt=negative_prompt)
    settings = {"source": sources, "target": targets, "strength": strength, "steps": steps, "seed": seed,
                "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "paste": paste,
                "mask": _described(mask, difference, cut, images)}
    cost = {"seconds": time.perf_counter() - started, "unet_evaluations": counter.evaluations}
    edited = to_pil(decode(inpainting, latents))
    return DiffEdit(_pasted(edited, images, masks, paste), masks, maps, latents, settings, cost)


@torch.no_grad()
def inpaint(pipe: StableDiffusionInpaintPipeline, images: Sequence, prompts: Sequence[str],
            masks: Sequence[SoftMask], *, strength: float = 1., steps: int = 50, guidance_scale: float = 7.5,
            negative_prompt: str = "", seed: int = 0) -> torch.Tensor:
    """Fill masks by the stock inpainting pipeline: latents (B, 4, h, w) float32.

    A UNet of 9 channels sees mask and masked picture; under one of 4, what lies outside the mask is put back after each
    step, from the picture's mean latents instead of the pipeline's random sample of them.
    """
    height, width = to_tensor(images[0]).shape[-2:]
    pictures = {"image": list(images)}
    if pipe.unet.config.in_channels == 4:
        latents = encode_image(pipe, images).to(pipe.unet.dtype)                        # (B, 4, h, w)
        pictures = {"image": latents, "masked_image_latents": latents}
    made = pipe(list(prompts), mask_image=[mask.to_pil(pipe.vae_scale_factor) for mask in masks], height=height,
                width=width, strength=strength, num_inference_steps=steps, guidance_scale=guidance_scale,
                negative_prompt=[negative_prompt] * len(prompts), output_type="latent",
                generator=[generator(seed + i) for i in range(len(prompts))], **pictures)
    return made.images.float()


def _listed(image) -> list:
    return list(image) if isinstance(image, list | tuple) else [image]


def _one_each(name: str, given, images: Sequence) -> list:
    """One entry for each picture, from one for all or a list."""
    entries = list(given) if isinstance(given, list | tuple) else [given] * len(images)
    if len(entries) != len(images):
        raise ValueError(f"{name}: {len(entries)} entries for {len(images)} pictures; give one, or one for each")
    return entries


def _described(mask, difference: Difference, cut: Cut | Sequence[Cut], images: Sequence) -> str | dict:
    """The mask's settings as JSON takes them."""
    if mask is not None:
        return "given"
    return asdict(difference) | {"cut": [asdict(one) for one in _one_each("cut", cut, images)]}
