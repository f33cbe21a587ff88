"""From a picture to the noise that makes it: DDIM inversion and its better kin, with one result type for all.

Trajectories run from the picture's latents (index 0) to noise (index N). Every method walks them on the timesteps
of the pipeline's DDIM scheduler, so that step i of sampling undoes step N - i of the inversion.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .metrics import psnr
from .models import check_prompt
from .runtime import atomic_folder, closest
from .sampling import alpha_bar, ddim_step, decode, encode_image, encode_prompt, predict_noise, previous_timestep

__all__ = ["Inversion", "METHODS", "NullText", "invert", "load_inversion", "picture_key"]


@dataclass(frozen=True)
class NullText:
    """Settings of null-text optimisation, as in Mokady et al. 2022 (arXiv:2211.09794) and Google's notebook."""

    inner_steps: int = 10               # at most, per timestep
    learning_rate: float = 1e-2         # falls by 1 % of itself with every timestep
    stop_at: float = 1e-5               # loss; rises by 2e-5 with every timestep


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture as something that the sampler can start from.

    Feed it to `prompt_to_prompt.edit_prompt`; sampling with its prompt gives the picture again, as well as the method can.
    """

    method: str
    prompt: str
    trajectory: torch.Tensor                # (N + 1, 4, h, w) float32: [0] is the picture's latents, [N] noise
    unconditional: torch.Tensor | None      # (N, L, C) float32, in the order of sampling; None: of the empty prompt
    puts_back: bool                         # the source's latents are put back after each step (direct inversion)
    settings: Mapping[str, Any]             # picture, model, steps, guidance_scale ...: what must agree to use it again
    cost: Mapping[str, float]               # seconds, unet_evaluations

    @property
    def latents(self) -> torch.Tensor:
        """Where sampling starts: (1, 4, h, w)."""
        return self.trajectory[-1:]

    @property
    def steps(self) -> int:
        return len(self.trajectory) - 1

    def put_back(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        """The latents (P, 4, h, w) after step i of sampling, the source (row 0) on its trajectory again if so wanted."""
        if not self.puts_back:
            return latents
        return torch.cat([self.trajectory[self.steps - 1 - i][None].to(latents), latents[1:]])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``inversion.safetensors`` and ``settings.json``; see `load_inversion`."""
        tensors = {"trajectory": self.trajectory.contiguous().cpu()}
        if self.unconditional is not None:
            tensors["unconditional"] = self.unconditional.contiguous().cpu()
        described = {"method": self.method, "prompt": self.prompt, "puts_back": self.puts_back,
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
        If one of `expected` differs; the message names it.
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
    tensors = load_file(folder / "inversion.safetensors")
    return Inversion(described["method"], described["prompt"], tensors["trajectory"], tensors.get("unconditional"),
                     described["puts_back"], described["settings"], described["cost"])


def picture_key(latents: torch.Tensor) -> str:
    """A short name for a picture: of the bytes of its latents, rounded to hundredths."""
    rounded = (latents.float() * 100).round().to(torch.int16).cpu().contiguous()
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()[:16]
