"""Light, weather and styles: whole-picture operations of known reach."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["BLOCK", "apply_style", "apply_weather", "grade", "style_reach"]

BLOCK = 4           # side of a block of pixel art at 128 pixels
_TINTS = {"at night": (.46, .50, .70), "at sunset": (1.0, .80, .66), "in the rain": (.80, .84, .88)}


def grade(pixels: np.ndarray, time: str) -> np.ndarray:
    """Multiply float32 (H, W, 3) by the light of the time; a pixel depends on itself alone."""
    return pixels * np.float32(_TINTS[time]) if time in _TINTS else pixels


def apply_weather(pixels: np.ndarray, time: str, strength: float, seed: int) -> np.ndarray:
    """Lay fog or rain of a strength in [0, 1] over float32 (H, W, 3); a pixel depends on itself alone."""
    size = pixels.shape[0]
    rng = np.random.default_rng([seed, 3])
    if time == "in the fog":
        swirl = cv2.resize(rng.standard_normal((5, 4)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
        cover = np.clip(strength * (.8 + .06 * swirl), 0, .92)[..., None]
        return pixels * (1 - cover) + np.float32((218, 223, 228)) * cover
    if time == "in the rain":
        drops = np.zeros((size, size), np.uint8)
        for x, y, length in rng.random((170, 3))[:round(20 + 150 * strength)]:
            start = np.float64([x * 1.2, y * 1.1 - .1]) * size * 16
            end = start + np.float64([-.016, .06 + .04 * length]) * size * 16
            cv2.line(drops, start.astype(int).tolist(), end.astype(int).tolist(), 255, max(1, size // 128),
                     cv2.LINE_AA, shift=4)
        cover = drops[..., None] / np.float32(255) * np.float32(.35 + .3 * strength)
        return pixels * (1 - .25 * strength) * (1 - cover) + np.float32((206, 218, 232)) * cover
    return pixels


def style_reach(style: str, size: int) -> int:
    """Return how many pixels away a style carries a change (for pixel art: its block, to align to)."""
    radius = max(1, round(size / 128))
    return {"pencil sketch": 5 * radius, "watercolor": 6 * radius, "children's drawing": 6 * radius,
            "pixel art": BLOCK * radius}.get(style, 0)


def apply_style(pixels: np.ndarray, style: str, seed: int) -> np.ndarray:
    """Draw uint8 (H, W, 3) again in a style; what changes spreads by at most `style_reach`."""
    painters = {"pencil sketch": _sketch, "watercolor": _watercolor, "children's drawing": _crayon,
                "pixel art": _pixel_art}
    return painters[style](pixels, np.random.default_rng([seed, 4])) if style in painters else pixels


def _blur(pixels: np.ndarray, radius: int) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (2 * radius + 1, 2 * radius + 1), radius / 2)


def _noise(rng, size: int, cells: int) -> np.ndarray:
    noise = rng.standard_normal((cells, cells)).astype(np.float32)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def _lines(pixels: np.ndarray, radius: int, gain: float) -> np.ndarray:
    """Outlines as float32 (H, W) in [0, 1]: where the colour changes fast."""
    smooth = _blur(pixels.astype(np.float32), radius)
    across, down = (np.abs(cv2.Sobel(smooth, cv2.CV_32F, dx, 1 - dx, ksize=3)).max(2) for dx in (1, 0))
    return np.clip((cv2.magnitude(across, down) * radius - 60) * gain, 0, 1)


def _sketch(pixels: np.ndarray, rng) -> np.ndarray:
    """Graphite on paper: outlines, and hatching where the picture is dark."""
    size = pixels.shape[0]
    unit = max(1, round(size / 128))
    tone = _blur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float32), unit) / 255
    y, x = np.mgrid[:size, :size].astype(np.float32) * (128 / size)
    hatch = .5 + .5 * np.sin((x + y + 1.2 * _noise(rng, size, 7)[..., 0]) * .95)
    shade = np.clip((.82 - tone) * .9, 0, .62) * (.72 + .28 * hatch)
    lines = _lines(pixels, unit, .005)
    paper = 247 + 2 * _noise(rng, size, 48)[..., 0]
    gray = np.clip(paper * (1 - shade) * (1 - .6 * lines), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _watercolor(pixels: np.ndarray, rng) -> np.ndarray:
    """Thin paint: flat washes, darker rims, grain, paper shining through."""
    size = pixels.shape[0]
    unit = max(1, round(size / 128))
    wash = _blur(cv2.medianBlur(pixels, 2 * min(unit, 2) + 1).astype(np.float32), 2 * unit)
    rim = np.abs(wash - _blur(wash, 3 * unit)).mean(2, keepdims=True)
    wash = 255 - (255 - wash) * (.74 + .06 * _noise(rng, size, 12) + .015 * _noise(rng, size, 60))
    return np.clip(wash - 3.2 * rim, 0, 255).astype(np.uint8)


def _crayon(pixels: np.ndarray, rng) -> np.ndarray:
    """A child's wax crayons: a shaky hand, bright flat fills with paper between strokes, thick outlines."""
    size = pixels.shape[0]
    unit = max(1, round(size / 128))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    shake = np.clip(np.concatenate([_noise(rng, size, 14), _noise(rng, size, 14)], 2), -2, 2) * .8 * unit
    shaky = cv2.remap(pixels, x + shake[..., 0], y + shake[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    flat = cv2.medianBlur(shaky, 3).astype(np.float32)
    gray = flat.mean(2, keepdims=True)
    bright = np.clip(gray + (flat - gray) * 1.35 + 14, 0, 255)
    wax = cv2.resize(rng.random((size // unit, max(2, size // unit // 5))).astype(np.float32), (size, size))
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), 35, 1.5)
    wax = cv2.warpAffine(wax, matrix, (size, size), flags=cv2.INTER_LINEAR)[..., None]
    filled = bright + (255 - bright) * (.12 + .42 * wax)
    lines = _lines(shaky, unit, .008)[..., None]
    return np.clip(filled * (1 - .58 * lines) + 44 * .58 * lines, 0, 255).astype(np.uint8)


def _pixel_art(pixels: np.ndarray, rng) -> np.ndarray:
    """Blocks of BLOCK pixels in few colours."""
    size = pixels.shape[0]
    blocks = size // (BLOCK * max(1, round(size / 128)))
    small = cv2.resize(pixels, (blocks, blocks), interpolation=cv2.INTER_AREA).astype(np.float32)
    gray = small.mean(2, keepdims=True)
    few = np.round(np.clip(gray + (small - gray) * 1.1, 0, 255) / 25.5) * 25.5
    return cv2.resize(np.clip(few, 0, 255).astype(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)
