"""The drawings: loading, colouring, bowls of fruit, and placing them on a canvas."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from ..runtime import data_dir
from .scenes import KINDS

__all__ = ["PALETTE", "place_sprite", "sprite"]

PALETTE = {"red": (222, 32, 38), "orange": (250, 130, 20), "yellow": (250, 214, 40), "green": (44, 160, 62),
           "blue": (34, 104, 222), "purple": (128, 58, 186), "pink": (250, 134, 190), "black": (50, 50, 56),
           "white": (240, 240, 243)}
_FOLDERS = ("noto", "fluent")                   # by Scene.drawing
_BOWL_SEATS = ((-.28, .12, .95), (.28, .1, .95), (-.54, .42, .9), (.54, .42, .9), (0, .46, 1.))   # x, y, size


@lru_cache(maxsize=None)
def _icon(folder: str, name: str) -> np.ndarray:
    path = data_dir() / "stickers" / folder / f"{name}.png"
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise FileNotFoundError(f"the sprite {folder}/{name}.png is missing from data/stickers")
    return _premultiply(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA).astype(np.float32))


def _premultiply(rgba: np.ndarray) -> np.ndarray:
    rgba[..., 3:] /= 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


@lru_cache(maxsize=None)
def sprite(kind: str, color: str = "", drawing: int = 0) -> np.ndarray:
    """Return a drawing as float32 (H, W, 4): premultiplied RGB in [0, 255], alpha in [0, 1]; H or W is about 190."""
    folder = _FOLDERS[drawing]
    icon = _icon(folder, getattr(KINDS[kind], folder))
    if kind.startswith("bowl of"):
        icon = _bowl(icon)
    return _colored(icon, PALETTE[color]) if color else icon


def _colored(rgba: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Paint a drawing in one colour: its shading becomes a ramp from dark over the colour to light.

    Of a drawing that is vivid for the most part, the grey rest (tyres, windows) keeps its own colours.
    """
    alpha = rgba[..., 3:]
    own = rgba[..., :3] / np.maximum(alpha, 1e-3)
    solid = alpha[..., 0] > .5
    saturation = 1 - own.min(2) / np.maximum(own.max(2), 1)
    share = np.clip((saturation - .2) / .2, 0, 1)
    if (saturation[solid] > .45).mean() < .5:
        share = np.ones_like(share)
    light = own @ np.array([.299, .587, .114], np.float32)
    typical = float(np.clip(np.median(light[solid & (share > .5)]), 60, 225))
    below = np.clip(light / typical, 0, 1)[..., None]
    above = np.clip((light - typical) / (255 - typical), 0, 1)[..., None]
    base = np.array(color, np.float32)
    gleam = .3 if max(color) < 100 else .7
    painted = base * (.12 + .88 * below) + (255 - base) * gleam * above
    painted = own + (painted - own) * share[..., None]
    return np.concatenate([painted * alpha, alpha], axis=-1).astype(np.float32)


def _bowl(fruit: np.ndarray) -> np.ndarray:
    """Heap five fruits and draw a bowl in front of them."""
    canvas = np.zeros((150, 192, 4), np.float32)
    for x, y, scale in _BOWL_SEATS:
        side = 92 * scale
        factor = side / max(fruit.shape[:2])
        matrix = np.float32([[factor, 0, 96 + 78 * x - fruit.shape[1] * factor / 2],
                             [0, factor, 40 + 80 * y - fruit.shape[0] * factor / 2]])
        layer = cv2.warpAffine(fruit, matrix, (192, 150), flags=cv2.INTER_AREA)
        canvas = layer + canvas * (1 - layer[..., 3:])
    bowl = np.zeros((150, 192, 4), np.uint8)
    cv2.ellipse(bowl, (96, 88), (88, 60), 0, 0, 180, (232, 222, 206, 255), -1, cv2.LINE_AA)
    cv2.ellipse(bowl, (96, 88), (88, 60), 0, 20, 75, (204, 188, 168, 255), 10, cv2.LINE_AA)
    cv2.rectangle(bowl, (4, 82), (188, 93), (250, 244, 234, 255), -1)
    cv2.rectangle(bowl, (66, 138), (126, 149), (204, 188, 168, 255), -1)
    front = _premultiply(bowl.astype(np.float32))
    return front + canvas * (1 - front[..., 3:])


def place_sprite(rgba: np.ndarray, size: int, *, center: float, bottom: float, scale: float, flip: bool,
                 angle: float, shear: float, stretch: float, top: float = .02) -> np.ndarray:
    """Put a drawing on an empty canvas (size, size, 4), wholly inside it.

    Parameters
    ----------
    rgba : ndarray (H, W, 4), premultiplied.
    size : int, pixels; the other lengths are fractions of it.
    center, bottom : where the middle of the lower edge stands.
    scale : square root of the area that the drawing's box takes, before `stretch` (width over height).
    flip, angle (degrees), shear : the slight variations by which no two pictures are the same.
    top : the highest the drawing may reach.
    """
    aspect = rgba.shape[1] / rgba.shape[0] * stretch
    turn = np.deg2rad(angle)
    lean = abs(np.sin(turn) + shear)                            # how far the top moves sideways, in heights
    height = min(scale / aspect ** .5, bottom - top, .92 / (aspect + 2 * lean))
    width, margin = height * aspect, .03 + height * (aspect / 2 + lean)
    center = float(np.clip(center, margin, 1 - margin)) if margin < .5 else .5
    box = (max(2, round(width * size)), max(2, round(height * size)))
    small = cv2.resize(rgba, box, interpolation=cv2.INTER_AREA)
    if flip:
        small = small[:, ::-1]
    linear = np.float32([[np.cos(turn), np.sin(turn) + shear], [-np.sin(turn), np.cos(turn)]])
    foot = np.float32([box[0] / 2, box[1]])
    shift = np.float32([center, bottom]) * size - linear @ foot
    layer = cv2.warpAffine(small, np.column_stack([linear, shift]), (size, size), flags=cv2.INTER_LINEAR)
    solid = layer[..., 3] > .98
    layer[solid] /= layer[solid, 3:]                            # what is meant to hide the place hides it wholly
    return layer
