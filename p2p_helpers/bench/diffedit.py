"""DiffEdit's masks against the pixels that an edit should change, what they cost, and the background of the edits.

The pictures and their edits are those of the bench of inversions, of objects and colours alone; a map is kept in a work
file as soon as it is made. The cut of each method is chosen on pictures of other seeds.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from ..diffedit import Cut, Difference, diffedit, estimate_mask
from ..images import to_pil
from ..masks import SoftMask
from ..metrics import background_psnr, mask_iou
from ..sampling import decode, encode_image
from .cases import Case, case, differing
from .timing import clock_of, interleaved, ratio
from .work import append, fingerprints, open_work

__all__ = ["BARS", "METHODS", "Counts", "Settings", "best_cut", "changed_cells", "grid_limit", "measure",
           "measure_times", "summary", "table"]

BARS = {"mask_iou_full": (">=", .60), "mask_iou_fast": (">=", .55), "time_fast_over_full": ("<=", 1 / 15),
        "time_fast_over_sequential": ("<=", .6), "background_gap_db": ("<=", .5)}
METHODS = {"full": Difference("denoised", noises=10, clip=None), "fast": Difference("fast", noises=20, clip=None),
           "sequential": Difference("one_step", noises=20, clip=None, batch_size=1)}
CUTS = [Cut(value, method, smooth=smooth) for smooth in (0., .6, 1.)
        for method, values in (("absolute", (.2, .25, .3, .35, .4, .45, .5)), ("otsu", (None,)))
        for value in values]
EDITS = ("object", "colour")
KEY = ("calibrating", "picture", "method")
CHANGED = .25                   # a cell is changed where so many of its pixels differ visibly
SCALE = 8                       # pixels of a cell's side
EQUAL = 100.                    # dB that equal pixels count as
MARGIN = 2                      # latents by which a mask is grown before the background is measured: 16 pixels


@dataclass(frozen=True)
class Counts:
    """How many pictures; these may grow from run to run."""

    pictures: int = 100             # get a fast mask and are edited in it
    full_pictures: int = 100        # the first so many of them get a full mask as well
    calibration: int = 12           # of the other seed

    def of(self, method: str) -> int:
        return self.full_pictures if method == "full" else self.pictures


@dataclass(frozen=True)
class Settings:
    """What every figure of a work file depends on."""

    seed: int = 2027
    calibration_seed: int = 77      # of the pictures that cuts are chosen on
    strength: float = .8            # of the edit
    steps: int = 50
    guidance_scale: float = 7.5


# ---- what should change ----


def _shares(before, after) -> np.ndarray:
    """The share of each cell's pixels that differ, (h, w)."""
    pixels = differing(before, after)
    height, width = (side // SCALE for side in pixels.shape)
    return pixels.reshape(height, SCALE, width, SCALE).mean((1, 3))                     # (h, SCALE, w, SCALE)


def changed_cells(before, after) -> np.ndarray:
    """The latents that an edit should change: bool (h, w)."""
    return _shares(before, after) >= CHANGED


def grid_limit(before, after) -> float:
    """The best IoU with the pixels that differ which a mask made of whole cells can reach.

    Cells are worth taking in the order of their shares, so that the best mask is a threshold on them.
    """
    shares, pixels = _shares(before, after), differing(before, after)
    masks = ((shares >= level).repeat(SCALE, 0).repeat(SCALE, 1) for level in np.unique(shares[shares > 0]))
    return max((mask_iou(mask, pixels) for mask in masks), default=1.)


def best_cut(maps: Sequence[SoftMask], truths: Sequence[np.ndarray]) -> Cut:
    """The cut of `CUTS` with the highest median IoU."""
    return max(CUTS, key=lambda cut: median(mask_iou(cut(heat), truth) for heat, truth in zip(maps, truths)))


# ---- measuring ----


def _case(settings: Settings, index: int, calibrating: bool) -> Case:
    seed = settings.calibration_seed if calibrating else settings.seed
    return case(seed, index, edits=EDITS)


def _maps(pipe, done: dict, work: Path, settings: Settings, counts: Counts,
          say) -> dict[tuple[bool, int, str], SoftMask]:
    """The map of every picture, for calibration (True) and for the measurement, by both methods."""
    wanted = [(True, index, method) for method in ("fast", "full") for index in range(counts.calibration)]
    wanted += [(False, index, method) for method in ("fast", "full") for index in range(counts.of(method))]
    for key in wanted:
        calibrating, index, method = key
        if key not in done:
            asked = _case(settings, index, calibrating)
            heat = estimate_mask(pipe, asked.image, asked.source, asked.target, METHODS[method])
            done[key] = dict(zip(KEY, key), map=[[round(value, 4) for value in row] for row in heat.values.tolist()])
            append(work, done[key])
            say(f"{'calibration, ' * calibrating}picture {index + 1}: {method}")
    return {key: SoftMask(done[key]["map"], key[-1]) for key in wanted}


def measure(pipe, work: Path, settings: Settings, counts: Counts,
            say: Callable[[str], object] = lambda line: None) -> dict:
    """Masks and edits of all pictures: IoU by method, the limit of the grid, and the gap of the background in dB."""
    done = open_work(work, {**asdict(settings), **fingerprints(pipe)}, KEY)
    maps = _maps(pipe, done, work, settings, counts, say)
    chosen = [_case(settings, index, True) for index in range(counts.calibration)]
    truths = [changed_cells(one.image, one.counterfactual) for one in chosen]
    cuts = {method: best_cut([maps[True, index, method] for index in range(counts.calibration)], truths)
            for method in ("fast", "full")}
    rows = []
    for index in range(counts.pictures):
        asked = _case(settings, index, False)
        truth = changed_cells(asked.image, asked.counterfactual)
        masks = {method: cut(maps[False, index, method]) for method, cut in cuts.items() if index < counts.of(method)}
        rows.append({"edit": asked.edit, "limit": grid_limit(asked.image, asked.counterfactual),
                     **{method: mask_iou(mask, truth) for method, mask in masks.items()},
                     **_kept(done, work, index, cuts["fast"],
                             lambda: _background_gaps(pipe, asked, masks["fast"], settings))})
        say(f"picture {index + 1}/{counts.pictures}: " + ", ".join(
            f"{name} {value:.2f}" for name, value in rows[-1].items() if name != "edit"))
    return {"rows": rows, "cuts": {method: asdict(cut) for method, cut in cuts.items()}}


def _kept(done: dict, work: Path, index: int, cut: Cut, measure_gaps: Callable[[], dict]) -> dict[str, float]:
    """The gaps of a picture edited in the mask of a cut: from the work file, or else measured and kept."""
    key = (False, index, "edited")
    if key not in done or done[key]["cut"] != asdict(cut):
        done[key] = dict(zip(KEY, key), cut=asdict(cut), gaps=measure_gaps())
        append(work, done[key])
    return done[key]["gaps"]


def _background_gaps(pipe, asked: Case, mask: SoftMask, settings: Settings) -> dict[str, float]:
    """The autoencoder's PSNR outside the mask, grown by 16 pixels, less that of the edited picture, in dB.

    Of the picture as `diffedit` returns it, and as it was decoded; of none if nothing lies outside.
    """
    region = np.asarray(mask.grow(MARGIN).at(asked.changed.shape))
    if region.all():
        return {}
    made = diffedit(pipe, asked.image, asked.source, asked.target, mask=mask, strength=settings.strength,
                    steps=settings.steps, guidance_scale=settings.guidance_scale)
    pictures = torch.cat([encode_image(pipe, [asked.image]), made.latents])             # (2, 4, h, w)
    reachable, decoded = to_pil(decode(pipe, pictures))
    bound, as_returned, as_decoded = (min(background_psnr(image, asked.image, region), EQUAL)
                                      for image in (reachable, made.edited, decoded))
    return {"gap": bound - as_returned, "gap_decoded": bound - as_decoded}


def measure_times(pipe, settings: Settings, rounds: int, say: Callable[[str], object]) -> dict[str, list[float]]:
    """Seconds of each method's map of one picture in every round, in turns."""
    _, clock = clock_of(str(pipe.unet.device))
    asked = _case(settings, 0, False)
    jobs = {name: lambda how=how: estimate_mask(pipe, asked.image, asked.source, asked.target, how)
            for name, how in METHODS.items()}
    estimate_mask(pipe, asked.image, asked.source, asked.target, replace(METHODS["fast"], noises=2))     # warms up
    return interleaved(jobs, rounds, clock, say)


# ---- what is reported ----


def summary(measured: Mapping, seconds: Mapping[str, Sequence[float]]) -> dict:
    """The figures, their bars, and figures by kind of edit."""
    rows = measured["rows"]

    def gap(name: str) -> float:
        return round(fmean(row[name] for row in rows if name in row), 3)

    def middle(name: str, edit: str | None = None) -> float:
        return round(median(row[name] for row in rows if name in row and edit in (None, row["edit"])), 3)

    figures = {"mask_iou_full": middle("full"), "mask_iou_fast": middle("fast"), "mask_iou_grid_limit": middle("limit"),
               "time_fast_over_full": round(ratio(seconds["fast"], seconds["full"]), 4),
               "time_fast_over_sequential": round(ratio(seconds["fast"], seconds["sequential"]), 3),
               "background_gap_db": gap("gap"), "background_gap_decoded_db": gap("gap_decoded")}
    by_edit = {edit: {name: middle(name, edit) for name in ("full", "fast", "limit")}
               for edit in dict.fromkeys(row["edit"] for row in rows)}
    held = {name: bool(figures[name] >= bar if sign == ">=" else figures[name] <= bar)
            for name, (sign, bar) in BARS.items()}
    return {**figures, "held": held, "by_edit": by_edit, "cuts": measured["cuts"], "pictures": len(rows),
            "full_pictures": sum("full" in row for row in rows),
            "seconds": {name: round(median(found), 3) for name, found in seconds.items()}}


def table(found: Mapping) -> str:
    """The figures as text."""
    lines = [f"{name:28}{found[name]:8.3f}   " + (f"bar {BARS[name][0]} {BARS[name][1]:.3g}, "
             f"{'held' if found['held'][name] else 'MISSED'}" if name in BARS else "") for name in
             ("mask_iou_full", "mask_iou_fast", "mask_iou_grid_limit", *list(BARS)[2:], "background_gap_decoded_db")]
    lines += [f"{edit:28}" + ", ".join(f"{name} {value:.3f}" for name, value in ious.items())
              for edit, ious in found["by_edit"].items()]
    return "\n".join(lines)
