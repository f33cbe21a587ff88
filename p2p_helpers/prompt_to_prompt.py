"""Prompt-to-Prompt in one call, and its result as something to keep."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .attention import Controller, control
from .blending import LocalBlend
from .edits import Edit, Window, mix, reweight
from .images import load_image, save_image, to_pil
from .inversion import Inversion
from .models import check_prompt
from .prompts import Prompt, Word
from .recording import AttentionMaps, Record
from .runtime import atomic_folder, memory_advice
from .sampling import decode, generate, initial_latents

__all__ = ["EditResult", "edit_prompt", "load_result"]


@dataclass(frozen=True, eq=False)
class EditResult:
    """Images of a source and of its edits, and everything needed to make them again."""

    images: list[Image.Image]           # the source's, then an edit each
    latents: torch.Tensor               # (P, 4, h, w) float32, after the last step
    edits: tuple[Edit, ...]             # none in a result that was loaded
    attention: AttentionMaps | None
    mask: torch.Tensor | None           # (P, 1, h, w): of the last local blend
    settings: Mapping[str, Any]         # the arguments, as JSON takes them

    @property
    def source(self) -> Image.Image:
        return self.images[0]

    @property
    def edited(self) -> Image.Image:
        """The picture of the first target."""
        return self.images[1]

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``source.png``, ``edit-1.png`` ..., ``settings.json`` and ``result.safetensors``; see `load_result`."""
        tensors, described = {"latents": self.latents.contiguous().cpu()}, {"settings": dict(self.settings)}
        if self.mask is not None:
            tensors["mask"] = self.mask.contiguous().cpu()
        if self.attention is not None:
            maps, described["maps"] = self.attention.state()
            described["record"] = asdict(self.attention.settings)
            described["prompts"] = [asdict(prompt) for prompt in self.attention.prompts]
            tensors |= maps
        with atomic_folder(folder) as new:
            for i, image in enumerate(self.images):
                save_image(image, new / _image_name(i))
            (new / "settings.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            save_file(tensors, new / "result.safetensors")
        return Path(folder)


def _image_name(i: int) -> str:
    return f"edit-{i}.png" if i else "source.png"


def load_result(folder: str | os.PathLike) -> EditResult:
    """Read what `EditResult.save` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder holds no result.
    """
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise FileNotFoundError(f"{folder.name!r} holds no settings.json: it is no folder that EditResult.save wrote")
    described = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    tensors, maps = load_file(folder / "result.safetensors"), None
    if "maps" in described:
        record = Record(**described["record"] | {"keep": tuple(described["record"]["keep"])})
        prompts = [_prompt(fields) for fields in described["prompts"]]
        maps = AttentionMaps.restored(prompts, record, tensors, described["maps"])
    images = [load_image(folder / _image_name(i)) for i in range(len(tensors["latents"]))]
    return EditResult(images, tensors["latents"], (), maps, tensors.get("mask"), described["settings"])


def _prompt(fields: dict) -> Prompt:
    words = tuple(Word(word["text"], tuple(word["tokens"])) for word in fields["words"])
    return Prompt(fields["text"], tuple(fields["tokens"]), words, tuple(map(tuple, fields["spans"])))


@memory_advice()
def edit_prompt(pipe, source: str, target: str | Edit | Sequence[str | Edit] | None = None, *,
                seed: int | None = None, inversion: Inversion | None = None, restore: bool = False,
                weights: Mapping[str, float] | None = None,
                cross_replace_steps: Window | Mapping[str, Window] = .8, self_replace_steps: Window = .4,
                mode: str = "average", blend: str | Sequence[str] | LocalBlend | None = None,
                steps: int = 50, guidance_scale: float = 7.5, negative_prompt: str = "",
                height: int | None = None, width: int | None = None, record: Record | None = Record(),
                self_resolution: int | None = None, low_memory: bool = False) -> EditResult:
    """Generate a picture, or take an inverted one, and make edits of it that keep its structure.

    Parameters
    ----------
    pipe : StableDiffusionPipeline or StableDiffusionXLPipeline
        With any scheduler.
    source : str
    target : str, Edit or several, optional
        Prompts, aligned with the source by `edits.mix`, or edits built by hand. By default the source again, for
        `weights` to work on.
    seed : int
        Of the picture to generate.
    inversion : Inversion, instead of a seed
        A picture that nobody generated, see `inversion.invert`; it has been inverted with `source`, and says how many
        steps are taken. Its pipeline has a DDIM scheduler.
    restore : bool
        With an inversion and a blend: outside the region every image, the source's too, keeps the latents of the
        inverted picture itself, where the source's own may have drifted from it (arXiv:2208.01626, "real image
        editing": the mask from attention maps that restores what an inaccurate inversion has lost).
    weights : dict, optional
        Word to weight, see `edits.reweight`; a word counts in every target that has it.
    cross_replace_steps, self_replace_steps, mode
        As in `edits.swap`, for the targets given as prompts.
    blend : word, words or LocalBlend, optional
        Only where these words of the source, or those that take their place, are attended to does the picture change.
    record : Record, optional
        None saves the time and memory of recording.
    self_resolution, low_memory
        As in `attention.control`.

    Returns
    -------
    EditResult

    Raises
    ------
    ValueError
        If a word is in none of the prompts, a part of the steps lies outside [0, 1], a prompt is empty or too long, or
        the inversion is of another prompt, or brings its own negative prompts beside the one given.
    """
    if (seed is None) == (inversion is None):
        raise ValueError("edit_prompt takes either the seed of a picture to generate, or an inversion")
    if negative_prompt and inversion is not None and inversion.unconditional is not None:
        raise ValueError(f"negative_prompt {negative_prompt!r}: an inversion by {inversion.method} brings its own; take "
                         "another method")
    if restore and (inversion is None or blend is None):
        raise ValueError("restore puts an inverted picture back outside a blend's region: give inversion and blend")
    if inversion is not None and inversion.prompt != source:
        raise ValueError(f"the inversion was made with {inversion.prompt!r}, not with the source {source!r}")
    options = dict(cross_replace_steps=cross_replace_steps, self_replace_steps=self_replace_steps, mode=mode)
    given = [target if target is not None else source] if target is None or isinstance(target, str | Edit) else target
    edits = [entry if isinstance(entry, Edit) else mix(pipe, source, entry, **options) for entry in given]
    if any(edit.source.text != source for edit in edits):
        raise ValueError(f"target: an edit was built from another source than {source!r}")
    edits = _weighted(edits, weights or {})
    local = blend if isinstance(blend, LocalBlend | None) else _blend_of(edits, blend)
    prompts = [source, *(edit.target.text for edit in edits)]
    check_prompt(pipe, negative_prompt, allow_empty=True)
    with control(pipe, edits, record=record, blend=local, self_resolution=self_resolution,
                 low_memory=low_memory) as controller:
        if inversion is None:
            noise = initial_latents(pipe, [seed] * len(prompts), height, width)     # (P, 4, h, w), all the same
            latents = pipe(prompts, negative_prompt=[negative_prompt] * len(prompts), latents=noise.to(pipe.unet.dtype),
                           num_inference_steps=steps, guidance_scale=guidance_scale, height=height, width=width,
                           output_type="latent").images
        else:
            latents = _from_inversion(pipe, prompts, inversion, controller, restore, guidance_scale, negative_prompt)
    settings = {"source": source, "targets": prompts[1:], "seed": seed, "inversion": inversion and inversion.method,
                "restore": restore, "steps": inversion.steps if inversion else steps, "weights": dict(weights or {}),
                "guidance_scale": guidance_scale, "negative_prompt": negative_prompt, "height": height, "width": width,
                "cross_replace_steps": cross_replace_steps, "self_replace_steps": self_replace_steps, "mode": mode,
                "self_resolution": controller.self_resolution, "blend": _described(local)}
    images = to_pil(decode(pipe, latents))
    return EditResult(images, latents.float(), tuple(edits), controller.maps, controller.mask, settings)


def _from_inversion(pipe, prompts: list[str], inversion: Inversion, controller: Controller, restore: bool,
                    guidance_scale: float, negative_prompt: str) -> torch.Tensor:
    """Sample from an inverted picture: latents (P, 4, h, w)."""
    def after_step(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return controller.blend(inversion.put_back(i, latents), inversion.after(i) if restore else None)

    return generate(pipe, prompts, latents=inversion.latents, unconditional=inversion.unconditional,
                    steps=inversion.steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt,
                    callback=after_step).latents


def _weighted(edits: list[Edit], weights: Mapping[str, float]) -> list[Edit]:
    """Give every edit the weights of the words that its target has."""
    for word in weights:
        if not any(_has(edit.target, word) for edit in edits):
            edits[0].target.positions(word)         # raises, and names the closest word
    return [reweight(edit, {word: weight for word, weight in weights.items() if _has(edit.target, word)})
            for edit in edits]


def _has(prompt: Prompt, word: str) -> bool:
    try:
        return bool(prompt.positions(word))
    except ValueError:
        return False


def _blend_of(edits: list[Edit], words: str | Sequence[str]) -> LocalBlend:
    """A local blend by words of the source, and in each target by those words or what takes their place."""
    words = [words] if isinstance(words, str) else list(words)
    source = edits[0].source
    for word in words:
        if not any(_has(prompt, word) for prompt in (source, *(edit.target for edit in edits))):
            source.positions(word)                  # raises, and names the closest word
    entries = [[word for word in words if _has(edit.target, word)] + _replacements(edit, words) for edit in edits]
    return LocalBlend(words=[[word for word in words if _has(source, word)], *entries])


def _described(local: LocalBlend | None) -> dict | None:
    """A local blend's settings as JSON takes them; of a mask given, only that there was one."""
    return local and {**vars(local), "mask": "given" if local.mask is not None else None}


def _replacements(edit: Edit, words: Sequence[str]) -> list[str]:
    """The target's words that take the place of some of the source's."""
    positions = [i for word in words if _has(edit.source, word) for i in edit.source.positions(word)]
    taken = set(edit.alignment.matrix[positions].any(0).nonzero().flatten().tolist())
    return [word.text for word in edit.target.words if taken.intersection(word.tokens) and word.text not in words]
