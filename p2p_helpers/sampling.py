"""Text-to-image with DDIM, one short function per step; `generate` is the loop that puts them together.

Latents stay in float32 between the steps, whatever the model computes in.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from .images import to_pil, to_tensor
from .models import check_prompt, check_size, prompt_length
from .runtime import generator

__all__ = ["Generation", "encode_prompt", "guide", "to_epsilon", "predict_noise", "Evaluations", "count_evaluations",
           "alpha_bar", "previous_timestep", "sampling_timesteps", "ddim_step", "initial_latents", "decode",
           "encode_image", "generate"]

Callback = Callable[[int, torch.Tensor, torch.Tensor], "torch.Tensor | None"]     # (i, t, latents)


@dataclass(frozen=True)
class Generation:
    """Images and what they were made with."""

    images: list[Image.Image]
    latents: torch.Tensor               # (B, 4, h, w) float32, after the last step
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]         # negative_prompt, steps, guidance_scale, height, width


@torch.no_grad()
def encode_prompt(pipe: DiffusionPipeline, prompts: str | Sequence[str]) -> torch.Tensor:
    """The text encoder's last hidden states (B, L, C); an empty prompt is allowed, one too long is not."""
    prompts = _listed(prompts)
    for prompt in prompts:
        check_prompt(pipe, prompt, allow_empty=True)
    length = prompt_length(pipe)
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
    return pipe.text_encoder(tokens.input_ids.to(pipe._execution_device))[0]    # (B, L, C)


def guide(eps_uncond: torch.Tensor, eps_cond: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598) eq. 6 with guidance_scale = 1 + w."""
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def to_epsilon(scheduler: DDIMScheduler, output: torch.Tensor, latents: torch.Tensor, t) -> torch.Tensor:
    """What the UNet predicts as noise: for v-prediction sqrt(a) v + sqrt(1 - a) x (arXiv:2202.00512)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    if kind == "v_prediction":
        a_t = alpha_bar(scheduler, t)
        return a_t.sqrt() * output + (1 - a_t).sqrt() * latents
    raise ValueError(f"prediction_type {kind!r} is not handled; known: epsilon, v_prediction")


def predict_noise(pipe: DiffusionPipeline, latents: torch.Tensor, t, embeddings: torch.Tensor,
                  guidance_scale: float) -> torch.Tensor:
    """The guided noise in latents at timestep t; keeps gradients unless called under `torch.no_grad()`.

    Parameters
    ----------
    latents : tensor (B, 4, h, w)
    embeddings : tensor (2B, L, C)
        Of the negative prompts, then of the prompts. With guidance_scale 1 the negative half has no effect
        and is not computed; it may be left out.
    """
    guided = guidance_scale != 1
    if guided and len(embeddings) != 2 * len(latents):
        raise ValueError(f"guidance needs 2 x {len(latents)} embeddings (negative prompts, then prompts), "
                         f"not {len(embeddings)}")
    model_input = torch.cat([latents, latents]) if guided else latents          # (2B, 4, h, w)
    embeddings = embeddings[-len(model_input):]                                 # (2B, L, C)
    embeddings = embeddings.to(pipe.unet.dtype)
    output = pipe.unet(model_input.to(pipe.unet.dtype), t, encoder_hidden_states=embeddings).sample.float()
    if guided:
        output = guide(*output.chunk(2), guidance_scale)                        # (B, 4, h, w)
    return to_epsilon(pipe.scheduler, output, latents, t)


@dataclass
class Evaluations:
    """How many latents went through a UNet; see `count_evaluations`."""

    evaluations: int = 0


@contextmanager
def count_evaluations(*unets) -> Iterator[Evaluations]:
    """Count the latents that go through UNets inside the block; a batch of four counts four."""
    counter = Evaluations()

    def count(module, args, kwargs):
        counter.evaluations += len(args[0] if args else kwargs["sample"])

    hooks = [unet.register_forward_pre_hook(count, with_kwargs=True) for unet in set(unets)]
    try:
        yield counter
    finally:
        for hook in hooks:
            hook.remove()


def alpha_bar(scheduler: DDIMScheduler, t) -> torch.Tensor:
    """The share of signal at timestep t: 0 is pure noise; for a negative t the scheduler's final value."""
    return scheduler.alphas_cumprod[int(t)] if t >= 0 else scheduler.final_alpha_cumprod


def previous_timestep(scheduler: DDIMScheduler, t) -> int:
    """The timestep after t in sampling, one stride nearer to the image; negative for the image itself."""
    return int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def sampling_timesteps(scheduler: DDIMScheduler, steps: int, strength: float = 1.) -> torch.Tensor:
    """Set the scheduler to so many steps, and return the timesteps of the last `strength` of them, noise first.

    Raises
    ------
    ValueError
        If the steps are none or more than the model was trained with, or `strength` of them is not one step.
    """
    _check_steps(scheduler, steps)
    count = int(steps * strength + 1e-9)        # as diffusers' img2img, but .7 of 10 is 7
    if not 1 <= count <= steps:
        raise ValueError(f"strength {strength!r} of {steps} steps is {count} steps; it lies in (0, 1], here from "
                         f"{1 / steps:.2g}")
    scheduler.set_timesteps(steps)
    return scheduler.timesteps[steps - count:]


def ddim_step(latents: torch.Tensor, eps: torch.Tensor, a_t: torch.Tensor,
              a_prev: torch.Tensor) -> torch.Tensor:
    """Move latents from noise level a_t to a_prev: Song et al. 2021 (arXiv:2010.02502) eq. 12.

    Without new noise (eta = 0). With a_prev < a_t the same formula goes back towards noise: DDIM inversion.
    """
    predicted_x0 = (latents - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    return a_prev.sqrt() * predicted_x0 + (1 - a_prev).sqrt() * eps


def initial_latents(pipe: DiffusionPipeline, seeds: int | Sequence[int], height: int | None = None,
                    width: int | None = None) -> torch.Tensor:
    """Standard normal latents (B, 4, h, w), a generator per seed: an image does not depend on its batch.

    Drawn on the CPU in float32: the same seed gives the same latents on every device.
    """
    height, width = check_size(pipe, height, width)
    channels = pipe.vae.config.latent_channels
    shape = (channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    seeds = [seeds] if isinstance(seeds, Integral) else seeds
    noise = [torch.randn(shape, generator=generator(seed)) for seed in seeds]   # each (4, h, w)
    return torch.stack(noise).to(pipe._execution_device)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, h, w) to images (B, 3, H, W), about [-1, 1]; `images.to_pil` makes pictures of them."""
    return pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample.float()


@torch.no_grad()
def encode_image(pipe: DiffusionPipeline, images) -> torch.Tensor:
    """Pictures, or a tensor (B, 3, H, W) in [-1, 1], as latents (B, 4, h, w): the posterior mean, scaled."""
    pixels = images if isinstance(images, torch.Tensor) else to_tensor(images)
    check_size(pipe, *pixels.shape[-2:])
    posterior = pipe.vae.encode(pixels.to(pipe._execution_device, pipe.vae.dtype)).latent_dist
    return posterior.mean.float() * pipe.vae.config.scaling_factor


@torch.no_grad()
def generate(pipe: DiffusionPipeline, prompts: str | Sequence[str], *, negative_prompt: str = "",
             steps: int = 50, guidance_scale: float = 7.5, seeds: int | Sequence[int] = (),
             latents: torch.Tensor | None = None, strength: float = 1.,
             unconditional: torch.Tensor | None = None, height: int | None = None, width: int | None = None,
             callback: Callback | None = None) -> Generation:
    """Generate an image for each prompt and seed by DDIM: the stock pipeline's result, step by step.

    Parameters
    ----------
    prompts, seeds : one or several
        Paired; a single one serves all of the other. One seed for several prompts starts all from the same
        noise.
    latents : tensor (1 or B, 4, h, w), optional
        Where to start instead of noise from seeds, for example an inverted picture's.
    strength : float
        Only the last so many of the steps are run; the latents given are as noisy as those steps expect.
    unconditional : tensor (steps that are run, L, C), optional
        Embeddings that take the negative prompt's place, one for each step.
    guidance_scale : float
        1 runs the conditional branch alone, 0 ignores the prompt.
    height, width : int, optional
        In pixels, multiples of 8; by default the model's own size.
    callback : function (i, t, latents) -> latents or None
        Called after step i at timestep t; what it returns replaces the latents.

    Raises
    ------
    ValueError
        For an empty or too long prompt, a size that the model cannot make, a strength of no step, or unequal numbers
        of prompts and seeds.
    """
    prompts, seeds = _pair(prompts, seeds) if latents is None else (_listed(prompts), [])
    for prompt in prompts:
        check_prompt(pipe, prompt)
    timesteps = sampling_timesteps(pipe.scheduler, steps, strength)
    embeddings = encode_prompt(pipe, [negative_prompt] * len(prompts) + prompts)            # (2B, L, C)
    latents = initial_latents(pipe, seeds, height, width) if latents is None else latents
    latents = latents.to(pipe._execution_device, torch.float32).expand(len(prompts), -1, -1, -1)    # (B, 4, h, w)
    for i, t in enumerate(pipe.progress_bar(timesteps)):
        if unconditional is not None:
            embeddings = _with_unconditional(embeddings, unconditional[i])
        eps = predict_noise(pipe, latents, t, embeddings, guidance_scale)
        a_t, a_prev = (alpha_bar(pipe.scheduler, s) for s in (t, previous_timestep(pipe.scheduler, t)))
        latents = ddim_step(latents, eps, a_t, a_prev)
        if callback is not None:
            changed = callback(i, t, latents)
            latents = latents if changed is None else changed
    images = to_pil(decode(pipe, latents))
    width, height = images[0].size
    pipe.maybe_free_model_hooks()
    settings = {"negative_prompt": negative_prompt, "steps": steps, "guidance_scale": guidance_scale,
                "height": height, "width": width}
    return Generation(images, latents, tuple(prompts), tuple(seeds), settings)


def _with_unconditional(embeddings: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Embeddings (2B, L, C) with (L, C) in place of the first half."""
    count = len(embeddings) // 2
    return torch.cat([embedding.to(embeddings).expand(count, -1, -1), embeddings[count:]])


def _listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _pair(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    prompts = _listed(prompts)
    seeds = [seeds] if isinstance(seeds, Integral) else list(seeds)
    count = max(len(prompts), len(seeds))
    prompts = prompts * count if len(prompts) == 1 else prompts
    seeds = seeds * count if len(seeds) == 1 else seeds
    if not count or len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair; give as many seeds as "
                         "prompts, or one of either")
    return prompts, seeds


def _check_steps(scheduler, steps: int) -> None:
    config = scheduler.config
    if not isinstance(scheduler, DDIMScheduler) or config.clip_sample or config.thresholding:
        raise TypeError("generate is the loop of DDIM without clipping, this pipeline has "
                        f"{type(scheduler).__name__}; p2p_helpers.models.load sets the right one, "
                        "or call pipe(...) itself")
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"steps {steps} must lie between 1 and {config.num_train_timesteps}")
