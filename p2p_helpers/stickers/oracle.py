"""The oracle: a small network trained on renders alone that tells what a picture of Sticker World shows.

It plays the part that CLIP and an object detector play on photographs: it measures, and takes no part in
generating or training what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from ..images import to_tensor
from ..models import verify_checksums
from ..runtime import data_dir
from .scenes import COLORS, KINDS, PLACES, STYLES, TIMES, WEATHERS

__all__ = ["Oracle", "Reading", "Seen", "load_oracle", "read"]

MAP_STRIDE = 4              # of the maps of kinds, colours and centres; the foreground's is 2
_PEAK = .35                 # a centre is a peak of at least this height


class _Block(nn.Module):
    """Two 3 x 3 convolutions around a residual connection."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Oracle(ModelMixin, ConfigMixin):
    """A U-shaped network with dense heads (kinds, colours, centres, foreground) and global ones.

    `forward` takes pictures (B, 3, H, W) in [-1, 1] and returns a dict of logits: ``kinds`` (B, 1 + kinds, H/4,
    W/4; class 0 is background), ``colors`` (B, 9, H/4, W/4), ``centers`` (B, 1, H/4, W/4), ``foreground`` (B, 1,
    H/2, W/2), ``place`` (B, 11), ``time`` (B, 5; class 0 is a clear day), ``style`` (B, 5) and ``strengths``
    (B, 2: of fog and of rain, to be put through a sigmoid).
    """

    @register_to_config
    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160), neck: int = 64, kinds: int = len(KINDS)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.stages = nn.ModuleList(_Block(width) for width in widths)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.deep = _Block(widths[-1])
        self.laterals = nn.ModuleList(nn.Conv2d(width, neck, 1) for width in widths[1:])
        self.smooth = nn.ModuleList(_Block(neck) for _ in widths[2:])
        self.fine = nn.Sequential(nn.Conv2d(neck + widths[0], 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 1, 3, padding=1))
        self.dense = nn.Conv2d(neck, 1 + kinds + len(COLORS) + 1, 1)
        self.whole = nn.Sequential(nn.Linear(widths[-1] + widths[-2], 128), nn.SiLU(),
                                   nn.Linear(128, len(PLACES) + 1 + len(TIMES) + len(STYLES) + len(WEATHERS)))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        x, levels = self.stem(pictures), []
        for index, stage in enumerate(self.stages):
            x = stage(x if index == 0 else self.downs[index - 1](x))
            levels.append(x)                                                  # strides 2, 4, 8, 16
        x = self.deep(x)
        pooled = torch.cat([x.mean((2, 3)), levels[-2].amax((2, 3))], dim=1)  # (B, 160 + 96)
        up = self.laterals[-1](x)
        for lateral, smooth, level in zip(self.laterals[-2::-1], self.smooth[::-1], levels[-2:0:-1]):
            up = smooth(F.interpolate(up, scale_factor=2.) + lateral(level))
        dense = self.dense(up).split([1 + self.config.kinds, len(COLORS), 1], dim=1)
        fine = self.fine(torch.cat([F.interpolate(up, scale_factor=2., mode="bilinear"), levels[0]], dim=1))
        whole = self.whole(pooled).split([len(PLACES), 1 + len(TIMES), len(STYLES), len(WEATHERS)], dim=1)
        names = ("kinds", "colors", "centers", "foreground", "place", "time", "style", "strengths")
        return dict(zip(names, (*dense, fine, *whole)))


@dataclass(frozen=True)
class Seen:
    """One object that the oracle sees."""

    kind: str
    color: str                   # the nearest of COLORS, whether or not the drawing was coloured
    center: tuple[float, float]  # x, y as fractions of the sides
    score: float                 # height of its peak, 0 to 1


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one picture."""

    things: tuple[Seen, ...]     # from left to right
    place: str
    time: str                    # "" is a clear day
    style: str
    fog: float                   # strengths, 0 to 1
    rain: float
    foreground: np.ndarray       # float32 (H, W) in [0, 1]: how sure it is that a pixel belongs to a thing
    kind_map: np.ndarray         # int (H/4, W/4): index into KINDS + 1; 0 is background

    @property
    def mask(self) -> np.ndarray:
        """The foreground as bool (H, W)."""
        return self.foreground > .5

    def main(self) -> Seen | None:
        """The thing that it is surest of, or None."""
        return max(self.things, key=lambda seen: seen.score, default=None)


@lru_cache(maxsize=2)
def load_oracle(folder: str | None = None) -> Oracle:
    """Load the bundled oracle (or the one in a folder) after checking its checksum."""
    path = data_dir() / "models" / "oracle" if folder is None else folder
    verify_checksums(path)
    return Oracle.from_pretrained(path, local_files_only=True).float().eval()


@torch.no_grad()
def read(images, oracle: Oracle | None = None, batch_size: int = 64) -> list[Reading]:
    """Tell what pictures show.

    Parameters
    ----------
    images : list of PIL images or uint8 arrays (H, W, 3), or a tensor (B, 3, H, W) in [-1, 1].
        All of one size, sides multiples of 16.
    oracle : Oracle, optional
        The bundled one by default.
    batch_size : int
        Pictures per pass.
    """
    oracle = oracle or load_oracle()
    pictures = images if torch.is_tensor(images) else to_tensor(images)
    if pictures.shape[-1] % 16 or pictures.shape[-2] % 16:
        raise ValueError(f"images: the oracle reads sides that are multiples of 16, not {tuple(pictures.shape[-2:])}")
    readings = []
    for batch in pictures.float().cpu().split(batch_size):
        outputs = {name: output.float() for name, output in oracle(batch).items()}
        outputs["foreground"] = F.interpolate(outputs["foreground"], size=batch.shape[-2:], mode="bilinear")
        readings += [_interpret({name: output[i] for name, output in outputs.items()}) for i in range(len(batch))]
    return readings


def _interpret(out: dict[str, torch.Tensor]) -> Reading:
    fog, rain = out["strengths"].sigmoid().tolist()
    return Reading(things=_things(out), place=PLACES[out["place"].argmax()], time=("", *TIMES)[out["time"].argmax()],
                   style=STYLES[out["style"].argmax()], fog=fog, rain=rain,
                   foreground=out["foreground"][0].sigmoid().numpy(), kind_map=out["kinds"].argmax(0).numpy())


def _things(out: dict[str, torch.Tensor]) -> tuple[Seen, ...]:
    """Peaks of the centre map, each named by the votes of the cells around it."""
    height = out["centers"].sigmoid()                                          # (1, H/4, W/4)
    peaks = (height == F.max_pool2d(height, 5, stride=1, padding=2)) & (height > _PEAK)
    votes = F.avg_pool2d(out["kinds"].softmax(0)[1:], 3, stride=1, padding=1, count_include_pad=False)
    hues = F.avg_pool2d(out["colors"].softmax(0), 3, stride=1, padding=1, count_include_pad=False)
    names = list(KINDS)
    rows, columns = height.shape[1:]
    seen = [Seen(names[votes[:, y, x].argmax()], COLORS[hues[:, y, x].argmax()],
                 ((x + .5) / columns, (y + .5) / rows), float(height[0, y, x]))
            for _, y, x in peaks.nonzero().tolist()]
    return tuple(sorted(seen, key=lambda thing: thing.center[0]))
