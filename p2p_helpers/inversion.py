"""From a picture to the noise that makes it: DDIM inversion and its better kin, with one result type for all.

Trajectories run from the picture's latents (index 0) to noise (index N). Every method walks them on the timesteps
of the pipeline's DDIM scheduler, so that step i of sampling undoes step N - i of the inversion.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .images import to_array, to_pil
from .metrics import psnr
from .models import check_prompt, model_key
from .runtime import atomic_folder, closest, measure, memory_advice
from .sampling import (alpha_bar, count_evaluations, ddim_step, decode, encode_image, encode_prompt, generate, guide,
                       predict_noise, previous_timestep, sampling_timesteps)

__all__ = ["Inversion", "METHODS", "NullText", "Reconstruction", "ddim_trajectory", "derive", "invert",
           "load_inversion", "picture_key", "reconstruct"]

METHODS = ("ddim", "fixed-point", "negative-prompt", "null-text", "direct")
_DERIVED = ("negative-prompt", "null-text", "direct")           # from the trajectory of "ddim"
_GRADIENT_SCALE = 2.**12        # keeps gradients of a float16 UNet above its smallest number


@dataclass(frozen=True)
class NullText:
    """Settings of null-text optimisation, as in Mokady et al. 2022 (arXiv:2211.09794) and Google's notebook."""

    inner_steps: int = 10               # at most, per timestep
    learning_rate: float = 1e-2         # falls by 1 % of it with every timestep, and no further than to 1 %
    stop_at: float = 1e-5               # loss; rises by 2e-5 with every timestep


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture as something that the sampler can start from.

    Feed it to `prompt_to_prompt.edit_prompt`; sampling with its prompt gives the picture again, as well as the method
    can.
    """

    method: str
    prompt: str
    trajectory: torch.Tensor                # (N + 1, 4, h, w) float32: [0] is the picture's latents, [N] noise
    unconditional: torch.Tensor | None      # (N, L, C) float32, in the order of sampling; None: of the empty prompt
    settings: Mapping[str, Any]             # picture, model, steps, guidance_scale ...: what must agree to use it again
    cost: Mapping[str, float | None]        # seconds, unet_evaluations, peak_bytes (see `runtime.measure`)

    @property
    def latents(self) -> torch.Tensor:
        """Where sampling starts: (1, 4, h, w)."""
        return self.trajectory[-1:]

    @property
    def steps(self) -> int:
        return len(self.trajectory) - 1

    def after(self, i: int) -> torch.Tensor:
        """The picture's latents as noisy as those after step i of sampling: (1, 4, h, w)."""
        return self.trajectory[self.steps - 1 - i][None]

    def put_back(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents (P, 4, h, w) after step i of sampling, the source (row 0) on its trajectory again if direct."""
        if self.method != "direct":
            return latents
        return torch.cat([self.after(i).to(latents), latents[1:]])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``inversion.safetensors`` and ``settings.json``; see `load_inversion`."""
        tensors = {"trajectory": self.trajectory.contiguous().cpu()}
        if self.unconditional is not None:
            tensors["unconditional"] = self.unconditional.contiguous().cpu()
        described = {"method": self.method, "prompt": self.prompt,
                     "settings": dict(self.settings), "cost": dict(self.cost)}
        with atomic_folder(folder) as new:
            save_file(tensors, new / "inversion.safetensors")
            (new / "settings.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        return Path(folder)


def load_inversion(folder: str | os.PathLike, **expected) -> Inversion:
    """Read what `Inversion.save` wrote, and refuse it where it was made of something else.

    Parameters
    ----------
    folder : path
    **expected
        Any of ``method``, ``prompt`` and the entries of `Inversion.settings`: what it must have been made with.

    Raises
    ------
    FileNotFoundError
        If the folder holds no inversion.
    ValueError
        If one of `expected` differs, which the message names, or the tensors are damaged.
    """
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(f"{folder.name!r} holds no settings.json: it is no folder that Inversion.save wrote")
    described = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    known = {**described["settings"], "method": described["method"], "prompt": described["prompt"]}
    for name, value in expected.items():
        if name not in known:
            raise ValueError(f"an inversion has no setting {name!r}; {closest(name, known)}")
        if known[name] != value:
            raise ValueError(f"the inversion in {folder.name!r} was made with {name} {known[name]!r}, not {value!r}; "
                             "invert the picture again")
    try:
        tensors = load_file(folder / "inversion.safetensors")
    except SafetensorError as error:
        raise ValueError(f"inversion.safetensors in {folder.name!r} is damaged ({error}); "
                         "invert the picture again") from error
    return Inversion(described["method"], described["prompt"], tensors["trajectory"], tensors.get("unconditional"),
                     described["settings"], described["cost"])


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What sampling makes of an inversion, beside the best that it could have made."""

    image: Image.Image
    latents: torch.Tensor           # (1, 4, h, w) float32
    reachable: Image.Image          # the picture after the autoencoder alone
    psnr: float                     # dB of image against reachable: the inversion's own error, infinite for none
    bound: float | None             # dB of reachable against the picture itself: what no inversion gets beyond


@memory_advice()
def reconstruct(pipe, inversion: Inversion, guidance_scale: float | None = None, picture=None) -> Reconstruction:
    """Sample from an inversion with its own prompt, and compare with the picture as the autoencoder decodes it.

    Parameters
    ----------
    pipe : StableDiffusionPipeline with a DDIM scheduler
        The one that inverted the picture.
    inversion : Inversion
    guidance_scale : float, optional
        By default the one that the inversion was made for.
    picture : optional
        The picture that was inverted: then `Reconstruction.bound` is measured as well.

    Raises
    ------
    ValueError
        If the picture is another one.
    """
    if picture is not None and (key := picture_key(picture)) != inversion.settings["picture"]:
        raise ValueError(f"picture: the inversion was made of picture {inversion.settings['picture']}, this is {key}; "
                         "give the picture as it was given to invert")
    guidance_scale = inversion.settings["guidance_scale"] if guidance_scale is None else guidance_scale
    made = generate(pipe, inversion.prompt, latents=inversion.latents, unconditional=inversion.unconditional,
                    steps=inversion.steps, guidance_scale=guidance_scale,
                    callback=lambda i, t, latents: inversion.put_back(i, latents))
    (reachable,) = to_pil(decode(pipe, inversion.trajectory[:1].to(made.latents.device)))
    bound = None if picture is None else psnr(reachable, to_pil(picture))
    return Reconstruction(made.images[0], made.latents, reachable, psnr(made.images[0], reachable), bound)


def picture_key(image) -> str:
    """A short name for a picture, from its pixels."""
    pixels = to_array(image)
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]


# ---- the methods ----------------------------------------------------------------------------------------------------


@memory_advice()
def invert(pipe, image, prompt: str, method: str = "direct", *, steps: int = 50, guidance_scale: float = 7.5,
           inversion_guidance_scale: float = 1., fixed_point_steps: int = 5,
           null_text: NullText = NullText()) -> Inversion:
    """Find the noise from which sampling with a prompt gives a picture.

    Parameters
    ----------
    pipe : StableDiffusionPipeline with a DDIM scheduler
    image : picture of a size that the model can make
    prompt : str
        What the picture shows; it becomes the source of edits.
    method : {"ddim", "fixed-point", "negative-prompt", "null-text", "direct"}
        ddim: Song et al. 2021 (arXiv:2010.02502) eq. 12 run backwards, with the noise predicted at the destination's
        timestep on the latents it starts from. fixed-point: the same equation solved for the destination by
        iteration. negative-prompt: ddim, and sampling takes the prompt as negative prompt (arXiv:2305.16807).
        null-text: ddim, and the empty prompt's embedding is optimised at each step (arXiv:2211.09794). direct: ddim,
        and the source's latents are put back after each step (arXiv:2310.01506).
    guidance_scale : float
        Of the sampling to come; null-text optimises for it.
    inversion_guidance_scale : float
        Of the inversion itself; only 1 follows the model's own equation.
    fixed_point_steps : int
        Evaluations a step of "fixed-point".

    Raises
    ------
    ValueError
        If the method is unknown, the prompt empty or too long, or the picture of a size that the model cannot make.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; {closest(method, METHODS)}")
    check_prompt(pipe, prompt)
    settings = {"picture": picture_key(image), "model": model_key(pipe), "steps": steps,
                "guidance_scale": guidance_scale, "inversion_guidance_scale": inversion_guidance_scale}
    if method == "fixed-point":
        settings["fixed_point_steps"] = fixed_point_steps
    with _cost_of(pipe) as cost:
        trajectory = ddim_trajectory(pipe, encode_image(pipe, [image]), encode_prompt(pipe, ["", prompt]), steps,
                                     guidance_scale=inversion_guidance_scale,
                                     iterations=fixed_point_steps if method == "fixed-point" else 1)[:, 0]
    walked = Inversion("ddim" if method in _DERIVED else method, prompt, trajectory, None, settings, cost)
    return walked if walked.method == method else derive(pipe, walked, method, null_text=null_text)


@memory_advice()
def derive(pipe, inversion: Inversion, method: str, *, null_text: NullText = NullText()) -> Inversion:
    """Make another method's inversion of a "ddim" one, whose trajectory it shares: what `invert` would have made.

    Parameters
    ----------
    pipe : StableDiffusionPipeline with a DDIM scheduler
        The one that inverted the picture.
    inversion : Inversion
        By the method "ddim".
    method : {"negative-prompt", "null-text", "direct"}
        See `invert`. null-text optimises for the guidance_scale that the inversion was made for.

    Returns
    -------
    Inversion
        Its cost is that of both together.

    Raises
    ------
    ValueError
        If the method does not begin with DDIM inversion, or the inversion given is of another one.
    """
    if method not in _DERIVED:
        raise ValueError(f"method {method!r} is not derived from another; {closest(method, _DERIVED)}")
    if inversion.method != "ddim":
        raise ValueError(f"inversion: {method} is derived from an inversion by 'ddim', not by {inversion.method!r}")
    with _cost_of(pipe) as own:
        unconditional = _unconditional(pipe, method, inversion, null_text)
    options = dataclasses.asdict(null_text) if method == "null-text" else {}
    return dataclasses.replace(inversion, method=method, unconditional=unconditional,
                               settings={**inversion.settings, **options}, cost=_together(inversion.cost, own))


@torch.no_grad()
def ddim_trajectory(pipe, latents: torch.Tensor, embeddings: torch.Tensor, steps: int, *, strength: float = 1.,
                    guidance_scale: float = 1., iterations: int = 1) -> torch.Tensor:
    """Walk from pictures towards noise by DDIM inversion, Song et al. 2021 (arXiv:2010.02502) eq. 12 backwards.

    Parameters
    ----------
    latents : tensor (B, 4, h, w)
    embeddings : tensor (2B, L, C)
        See `sampling.predict_noise`.
    steps, strength
        Of the sampling to come; only its last `strength` is inverted.
    iterations : int
        Evaluations a step; more than one solves each step for its own end (fixed point).

    Returns
    -------
    tensor (K + 1, B, 4, h, w)
        The pictures' latents first, after K inverted steps the noisiest last.
    """
    trajectory = [latents]
    for t in pipe.progress_bar(sampling_timesteps(pipe.scheduler, steps, strength).flip(0)):
        a_from, a_to = (alpha_bar(pipe.scheduler, s) for s in (previous_timestep(pipe.scheduler, t), t))
        end = latents
        for _ in range(iterations):
            eps = predict_noise(pipe, end, t, embeddings, guidance_scale)
            end = ddim_step(latents, eps, a_from, a_to)
        latents = end
        trajectory.append(latents)
    return torch.stack(trajectory)


def _unconditional(pipe, method: str, inversion: Inversion, settings: NullText) -> torch.Tensor | None:
    """The embeddings that take the negative prompt's place in sampling, (N, L, C), or None."""
    if method == "negative-prompt":
        return encode_prompt(pipe, inversion.prompt).float().repeat(inversion.steps, 1, 1)
    if method == "null-text":
        return _null_text(pipe, inversion, settings)
    return None


def _null_text(pipe, inversion: Inversion, settings: NullText) -> torch.Tensor:
    """Optimise the empty prompt's embedding step by step, each from the one before: (N, L, C) float32."""
    conditional = encode_prompt(pipe, inversion.prompt)                                         # (1, L, C)
    latents, embedding = inversion.latents, encode_prompt(pipe, "").float()
    found, failed = [], []
    with _frozen(pipe.unet):
        for i, t in enumerate(pipe.progress_bar(sampling_timesteps(pipe.scheduler, inversion.steps))):
            goal = inversion.after(i)
            step = _guided_step(pipe, latents, t, conditional, inversion.settings["guidance_scale"])
            embedding, improved = _optimise(lambda e: (step(e) - goal).square().mean(), embedding,
                                            settings.learning_rate * max(1 - i / 100, .01), settings.stop_at + i * 2e-5,
                                            settings.inner_steps)
            failed += [] if improved else [i]
            with torch.no_grad():
                latents = step(embedding)
            found.append(embedding)
    if failed:
        warnings.warn(f"null-text optimisation did not lower the loss at steps {failed}; the best embedding was kept. "
                      "Lower NullText.learning_rate", stacklevel=5)
    return torch.cat(found)


def _guided_step(pipe, latents: torch.Tensor, t, conditional: torch.Tensor,
                 guidance_scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The DDIM step from `latents` as a function of the unconditional embedding (1, L, C) alone."""
    a_t, a_prev = (alpha_bar(pipe.scheduler, s) for s in (t, previous_timestep(pipe.scheduler, t)))
    with torch.no_grad():
        eps_cond = predict_noise(pipe, latents, t, conditional, 1.)

    def step(embedding: torch.Tensor) -> torch.Tensor:
        eps = guide(predict_noise(pipe, latents, t, embedding, 1.), eps_cond, guidance_scale)
        return ddim_step(latents, eps, a_t, a_prev)
    return step


def _optimise(loss_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, learning_rate: float,
              stop_at: float, steps: int) -> tuple[torch.Tensor, bool]:
    """Adam on an embedding in float32; return the best one seen, and whether the loss fell or was low already."""
    embedding = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([embedding], lr=learning_rate)
    best, lowest, first = start, float("inf"), None
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            loss = loss_of(embedding)
        value = loss.item()
        first = value if first is None else first
        if value < lowest:
            best, lowest = embedding.detach().clone(), value
        if value < stop_at or step == steps or not math.isfinite(value):
            break
        (embedding.grad,) = torch.autograd.grad(loss * _GRADIENT_SCALE, embedding)
        embedding.grad /= _GRADIENT_SCALE
        optimiser.step()
    return best, lowest < first or lowest < stop_at


@contextmanager
def _cost_of(pipe) -> Iterator[dict[str, float | None]]:
    """Seconds, evaluations and peak of memory of the block, filled in when it ends."""
    cost: dict[str, float | None] = {}
    with measure(str(pipe._execution_device)) as measurement, count_evaluations(pipe.unet) as count:
        yield cost
    cost |= {"seconds": measurement.seconds, "unet_evaluations": count.evaluations,
             "peak_bytes": measurement.peak_bytes}


def _together(first: Mapping, second: Mapping) -> dict[str, float | None]:
    """The cost of two pieces of work one after the other; what is not known of one is not known of both."""
    peaks = (first["peak_bytes"], second["peak_bytes"])
    return {"seconds": first["seconds"] + second["seconds"],
            "unet_evaluations": first["unet_evaluations"] + second["unet_evaluations"],
            "peak_bytes": None if None in peaks else max(peaks)}


@contextmanager
def _frozen(model) -> Iterator[None]:
    """No parameter of the model takes a gradient inside the block."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
