"""Inversions compared on renders whose edits are known: how well each gives the picture back, and what edits it allows.

A picture's figures are kept in a work file line by line, a line for each piece of work, so that a run can be cut off
and taken up again. Their means are what is reported.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attention import control
from ..blending import LocalBlend
from ..edits import empty, mix
from ..images import to_pil
from ..inversion import METHODS, Inversion, derive, invert, reconstruct
from ..metrics import background_psnr, psnr, ssim
from ..sampling import Generation, count_evaluations, decode, encode_image, generate
from ..stickers.agreement import agreement
from ..stickers.oracle import read
from .cases import EDITS, Case, case
from .timing import clock_of
from .work import append, fingerprints, open_work

__all__ = ["BARS", "EDITORS", "Settings", "bars", "edit_all", "jobs", "means", "measure", "summary", "table"]

KEY = ("picture", "method", "job")
EDITORS = ("p2p", "p2p+blend", "direct sampling")
WITHOUT_GUIDANCE = ("ddim", "fixed-point")      # also reconstructed at guidance 1; the others do what ddim does there
BARS = {"fixed_point_over_ddim_db": 0., "null_text_over_ddim_db": -3.}
EQUAL = 100.        # dB that equal pictures count as; a single byte that is off by one makes 95 dB of 128 x 128 pixels
FIGURES = ("psnr", "ssim", "background_psnr", "counterfactual_rmse", "oracle_success", "seconds", "unet_evaluations")


@dataclass(frozen=True)
class Settings:
    """What every figure of a work file depends on."""

    steps: int = 50
    guidance_scale: float = 7.5
    seed: int = 2026                # of the scenes
    world: str = "cpu"


# ---- one piece of work ----


def edit_all(pipe, inversion: Inversion, asked: Case, guidance_scale: float) -> Generation:
    """Sample the source and what every editor makes of it in one batch: 1 + editors pictures.

    Row by row what `edit_prompt` gives without and with a blend, and what the target's prompt alone gives from the
    inverted noise.
    """
    swap, alone = mix(pipe, asked.source, asked.target), empty(pipe, asked.source, asked.target)
    before, after = asked.words
    with control(pipe, [swap, swap, alone], blend=LocalBlend(words=[before, after, after, after])) as controller:
        def after_step(i: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            latents = inversion.put_back(i, latents)
            return torch.cat([latents[:2], controller.blend(latents)[2:3], latents[3:]])

        return generate(pipe, [asked.source] + [asked.target] * len(EDITORS), latents=inversion.latents,
                        unconditional=inversion.unconditional, steps=inversion.steps, guidance_scale=guidance_scale,
                        callback=after_step)


class _Work:
    """A picture with what its pieces of work share: what the autoencoder makes of it, and the inversions."""

    def __init__(self, pipe, settings: Settings, index: int):
        self.pipe, self.settings = pipe, settings
        self.case = case(settings.seed, index, world_name=settings.world)
        _, self._clock = clock_of(str(pipe.unet.device))
        pair = [self.case.image, self.case.counterfactual]
        self.reachable, self.counterfactual = to_pil(decode(pipe, encode_image(pipe, pair)))
        self.inversion = cache(self._invert)

    def timed(self, job: Callable[[], Any]) -> tuple[Any, float]:
        start = self._clock()
        return job(), self._clock() - start

    def _invert(self, method: str) -> tuple[Inversion, float]:
        """An inversion and the seconds that it takes from the picture on, shared trajectory included."""
        if method in WITHOUT_GUIDANCE:
            return self.timed(lambda: invert(self.pipe, self.case.image, self.case.source, method,
                                             steps=self.settings.steps, guidance_scale=self.settings.guidance_scale))
        shared, before = self.inversion("ddim")
        made, own = self.timed(lambda: derive(self.pipe, shared, method))
        return made, before + own

    def reference(self) -> list[dict]:
        """What the autoencoder alone makes of both renders: the picture left as it is, and the edit as it should be."""
        bound = {"psnr": _db(psnr(self.reachable, self.case.image)), "ssim": ssim(self.reachable, self.case.image)}
        return [{"editor": "unchanged", **bound, **self._judged(self.reachable)},
                {"editor": "counterfactual", **self._judged(self.counterfactual)}]

    def without_guidance(self, method: str) -> list[dict]:
        """The reconstruction at guidance 1."""
        inversion, before = self.inversion(method)
        with count_evaluations(self.pipe.unet) as count:
            made, own = self.timed(lambda: reconstruct(self.pipe, inversion, 1.))
        return [{"editor": "none, guidance 1", **self._returned(made.image), "seconds": before + own,
                 "unet_evaluations": inversion.cost["unet_evaluations"] + count.evaluations}]

    def edits(self, method: str) -> list[dict]:
        """The reconstruction under guidance, and every editor's picture; the batch's cost is shared out by its rows."""
        inversion, before = self.inversion(method)
        with count_evaluations(self.pipe.unet) as count:
            sampled, own = self.timed(lambda: edit_all(self.pipe, inversion, self.case, self.settings.guidance_scale))
        source, *edited = sampled.images
        made = [{"editor": "none", **self._returned(source)},
                *({"editor": name, **self._judged(image)} for name, image in zip(EDITORS, edited, strict=True))]
        needed = {"none": 1, "p2p": 2, "p2p+blend": 2, "direct sampling": 1}        # rows: Prompt-to-Prompt takes two
        shares = [needed[row["editor"]] / len(sampled.images) for row in made]
        return [row | {"seconds": before + share * own,
                       "unet_evaluations": inversion.cost["unet_evaluations"] + share * count.evaluations}
                for row, share in zip(made, shares)]

    def _returned(self, image: Image.Image) -> dict:
        return {"psnr": _db(psnr(image, self.reachable)), "ssim": ssim(image, self.reachable)}

    def _judged(self, image: Image.Image) -> dict:
        apart = np.asarray(image, float) - np.asarray(self.counterfactual, float)
        answers = agreement(read([image])[0], self.case.scene)
        return {"background_psnr": _db(background_psnr(image, self.reachable, self.case.changed)),
                "counterfactual_rmse": float(np.sqrt(np.mean(apart**2))),
                "oracle_success": float(answers[self.case.edit])}


def _db(value: float) -> float:
    return min(value, EQUAL)


# ---- all of it ----


def jobs(index: int, methods: Sequence[str], with_edits: bool) -> Iterator[tuple[str, str]]:
    """The pieces of work (method, job) that a picture is asked for."""
    yield "", "reference"
    for method in methods:
        if method in WITHOUT_GUIDANCE:
            yield method, "without_guidance"
        if with_edits:
            yield method, "edits"


def measure(pipe, work: Path, settings: Settings, *, pictures: int, edit_pictures: int, null_text_pictures: int,
            methods: Sequence[str] = METHODS, say: Callable[[str], object] = lambda line: None) -> list[dict]:
    """Do what the work file does not hold yet, and return the rows that were asked for.

    Parameters
    ----------
    work : path
        Of the work file; it is made, or taken up again.
    pictures : int
        The first so many are inverted and reconstructed.
    edit_pictures, null_text_pictures : int
        The first so many of them are edited, and are inverted by null-text.

    Raises
    ------
    ValueError
        If the work file was made with other settings or another model.
    """
    done = open_work(work, {**asdict(settings), **fingerprints(pipe)}, KEY)
    rows = []
    for index in range(pictures):
        asked = [method for method in methods if method != "null-text" or index < null_text_pictures]
        picture = None
        for method, job in jobs(index, asked, index < edit_pictures):
            if (index, method, job) not in done:
                picture = picture or _Work(pipe, settings, index)
                found, seconds = picture.timed(lambda: getattr(picture, job)(*[method] if method else []))
                done[index, method, job] = {"picture": index, "edit": picture.case.edit, "method": method, "job": job,
                                            "rows": found}
                append(work, done[index, method, job])
                say(" ".join([f"picture {index + 1}/{pictures}:", *filter(None, (method, job)), f"{seconds:.1f} s"]))
            line = done[index, method, job]
            rows += [{"picture": index, "edit": line["edit"], "method": method, **row} for row in line["rows"]]
    return rows


# ---- what is reported ----


def means(rows: Sequence[Mapping]) -> list[dict]:
    """The mean of every figure by method and editor, and of how many pictures, in the order of first appearance."""
    groups: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["editor"]), []).append(row)
    found = []
    for (method, editor), members in groups.items():
        figures = {name: round(fmean(row[name] for row in members), 4) for name in FIGURES if name in members[0]}
        found.append({"method": method, "editor": editor, "pictures": len(members), **figures})
    return sorted(found, key=lambda row: (METHODS.index(row["method"]) if row["method"] else -1))


def bars(rows: Sequence[Mapping]) -> dict[str, dict]:
    """What is promised of reconstructions, in dB over ddim at guidance 1 on the same pictures.

    null-text at the guidance of the settings. A bar that nothing was measured for is left out.
    """
    of = {(row["method"], row["editor"], row["picture"]): row["psnr"] for row in rows if "psnr" in row}
    found = {}
    for name, method, editor in (("fixed_point_over_ddim_db", "fixed-point", "none, guidance 1"),
                                 ("null_text_over_ddim_db", "null-text", "none")):
        gains = [value - of["ddim", "none, guidance 1", picture] for (m, e, picture), value in of.items()
                 if (m, e) == (method, editor) and ("ddim", "none, guidance 1", picture) in of]
        if gains:
            value = round(fmean(gains), 4)
            found[name] = {"value": value, "at_least": BARS[name], "pictures": len(gains),
                           "held": value >= BARS[name]}
    return found


def summary(rows: Sequence[Mapping]) -> dict:
    """The means over all edits and by kind of edit, and the bars."""
    by_edit = {edit: means([row for row in rows if row["edit"] == edit]) for edit in EDITS}
    return {"rows": means(rows), "by_edit": by_edit, "bars": bars(rows)}


def table(found: Mapping) -> str:
    """A summary as text; where there is no figure there is a dash."""
    heads = ("PSNR", "SSIM", "backgr.", "to c.f.", "oracle %", "s", "UNet")
    scales = dict.fromkeys(FIGURES, 1) | {"oracle_success": 100}
    digits = dict(zip(FIGURES, (2, 4, 2, 2, 1, 2, 0)))
    lines = [f"{'method':16}{'editor':18}{'n':>4}" + "".join(f"{head:>9}" for head in heads)]
    for row in found["rows"]:
        cells = [f"{scales[name] * row[name]:9.{digits[name]}f}" if name in row else f"{'-':>9}" for name in FIGURES]
        lines.append(f"{row['method']:16}{row['editor']:18}{row['pictures']:4}" + "".join(cells))
    lines += ["PSNR, SSIM: of the reconstruction to the autoencoder's picture (of that one itself: to the render)",
              "backgr.: PSNR to it where the edit changes nothing; to c.f.: RMSE in grey levels to the decoded "
              "counterfactual",
              "s, UNet: seconds and evaluations of a picture, inversion and editor together (a backward pass is no "
              "evaluation)"]
    for name, bar in found["bars"].items():
        lines.append(f"{name} >= {bar['at_least']:g}: {bar['value']:.2f} on {bar['pictures']} pictures, "
                     + ("held" if bar["held"] else "MISSED"))
    return "\n".join(lines)
