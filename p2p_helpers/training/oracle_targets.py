"""What the oracle is asked about a render, and the loss of its answers."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from ..stickers.oracle import MAP_STRIDE
from ..stickers.renderer import Picture
from ..stickers.scenes import COLORS, KINDS, PLACES, STYLES, TIMES, WEATHERS, Scene, tells_color

__all__ = ["UNASKED", "oracle_loss", "targets"]

UNASKED = -100              # the label that cross-entropy ignores
_KIND_INDEX = {name: 1 + i for i, name in enumerate(KINDS)}


def targets(scene: Scene, picture: Picture) -> dict[str, np.ndarray]:
    """Return the right answers about a render, by the names of `Oracle.forward`.

    ``kinds`` and ``colors`` int64 (H/4, W/4), ``centers`` float32 (1, H/4, W/4), ``foreground`` float32 (1, H/2,
    W/2), ``place``, ``time``, ``style`` int64 (), ``strengths`` float32 (2,).
    """
    size = picture.image.shape[0]
    cells = size // MAP_STRIDE
    kinds, colors = np.zeros((cells, cells), np.int64), np.full((cells, cells), UNASKED, np.int64)
    for thing, mask in zip(scene.things, picture.masks):
        inside = cv2.resize(mask.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA) > .5
        kinds[inside] = _KIND_INDEX[thing.kind]
        if thing.color and tells_color(scene):
            colors[inside] = COLORS.index(thing.color)
    foreground = cv2.resize(picture.masks.any(0).astype(np.float32), (size // 2, size // 2),
                            interpolation=cv2.INTER_AREA)
    return dict(kinds=kinds, colors=colors, centers=_bumps(picture.centers, cells)[None], foreground=foreground[None],
                place=np.int64(PLACES.index(scene.place) if scene.place else UNASKED),
                time=np.int64(("", *TIMES).index(scene.time)),
                style=np.int64(STYLES.index(scene.style or "photo")),
                strengths=np.float32([scene.strength * (scene.time == weather) for weather in WEATHERS]))


def _bumps(centers: np.ndarray, cells: int) -> np.ndarray:
    """A Gaussian of two cells around every centre (x, y as fractions): float32 (cells, cells)."""
    grid = (np.arange(cells, dtype=np.float32) + .5) / cells
    bumps = [np.exp(-((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2) / (2 * (1.5 / cells) ** 2))
             for x, y in centers]
    return np.maximum.reduce(bumps).astype(np.float32)


def oracle_loss(out: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Return the summed loss of all answers, and each alone for the log."""
    background = torch.ones(out["kinds"].shape[1], device=out["kinds"].device)
    background[0] = .25                                        # most cells are background
    strengths = out["strengths"].float().sigmoid()
    parts = dict(
        kinds=F.cross_entropy(out["kinds"].float(), wanted["kinds"], background),
        colors=_asked(out["colors"], wanted["colors"]), place=_asked(out["place"], wanted["place"]),
        time=F.cross_entropy(out["time"].float(), wanted["time"]),
        style=F.cross_entropy(out["style"].float(), wanted["style"]),
        centers=_focal(out["centers"].float(), wanted["centers"]),
        foreground=2 * F.binary_cross_entropy_with_logits(out["foreground"].float(), wanted["foreground"]),
        strengths=10 * F.mse_loss(strengths, wanted["strengths"]))
    return sum(parts.values()), {name: part.item() for name, part in parts.items()}


def _asked(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the labels that are asked; 0 where none is."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNASKED, reduction="sum")
    return total / (labels != UNASKED).sum().clamp(min=1)


def _focal(logits: torch.Tensor, bumps: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy that looks where it is wrong (quality focal loss, arXiv 2006.04388 eq. 6)."""
    error = F.binary_cross_entropy_with_logits(logits, bumps, reduction="none")
    return 10 * (error * (logits.sigmoid() - bumps).abs() ** 2).mean()
