"""The places: a sky by time of day, a land by place, drawn in unit coordinates at any size."""

from __future__ import annotations

import cv2
import numpy as np

from .styles import grade

__all__ = ["draw_background"]

_SKIES = {"": ((104, 172, 240), (204, 230, 250)), "at night": ((14, 20, 58), (44, 58, 112)),
          "at sunset": ((96, 92, 168), (255, 168, 92)), "in the fog": ((176, 190, 204), (214, 220, 226)),
          "in the rain": ((108, 122, 142), (158, 170, 184))}
_GROUNDS = {"on the grass": ((120, 192, 84), (74, 146, 54)), "on the beach": ((244, 226, 174), (226, 200, 140)),
            "in the snow": ((246, 249, 253), (216, 228, 242)), "in the desert": ((228, 176, 100), (208, 150, 78)),
            "on the road": ((126, 128, 134), (92, 94, 100)), "on the sea": ((62, 136, 206), (22, 84, 166)),
            "in the mountains": ((136, 166, 98), (96, 134, 74)), "in the forest": ((92, 128, 62), (64, 98, 46)),
            "in the city": ((176, 174, 172), (146, 144, 144)), "next to a river": ((126, 190, 92), (84, 150, 62))}


class Canvas:
    """A uint8 picture (size, size, 3) on which one draws in fractions of its side, antialiased."""

    def __init__(self, size: int):
        self.size = size
        self.pixels = np.zeros((size, size, 3), np.uint8)

    def _points(self, points) -> np.ndarray:
        return np.round(np.asarray(points, np.float64) * self.size * 16).astype(np.int32)

    def polygon(self, points, color) -> None:
        cv2.fillPoly(self.pixels, [self._points(points)], color, cv2.LINE_AA, shift=4)

    def box(self, x0, y0, x1, y1, color) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def ellipse(self, x, y, width, height, color) -> None:
        center, axes = self._points([(x, y), (width, height)])
        cv2.ellipse(self.pixels, center.tolist(), axes.tolist(), 0, 0, 360, color, -1, cv2.LINE_AA, shift=4)

    def wave(self, y, amplitude, cycles, phase, thickness, color) -> None:
        xs = np.linspace(-.02, 1.02, 48)
        ys = y + amplitude * np.sin(2 * np.pi * cycles * xs + phase)
        self.polygon(np.concatenate([np.stack([xs, ys], 1), np.stack([xs, ys + thickness], 1)[::-1]]), color)

    def gradient(self, y0, y1, above, below) -> None:
        rows = slice(round(y0 * self.size), round(y1 * self.size))
        t = np.linspace(0, 1, max(rows.stop - rows.start, 1), dtype=np.float32)[:, None, None]
        self.pixels[rows] = np.round(np.float32(above) * (1 - t) + np.float32(below) * t)[:rows.stop - rows.start]

    def texture(self, rng, y0, y1, cells, strength) -> None:
        """Add soft noise: `cells` (across, down) values, blown up smoothly."""
        rows = slice(round(y0 * self.size), round(y1 * self.size))
        noise = rng.standard_normal((cells[1], cells[0])).astype(np.float32) * strength
        noise = cv2.resize(noise, (self.size, rows.stop - rows.start), interpolation=cv2.INTER_CUBIC)
        self.pixels[rows] = np.clip(self.pixels[rows] + noise[..., None], 0, 255).astype(np.uint8)


def draw_background(place: str, time: str, horizon: float, seed: int, size: int) -> np.ndarray:
    """Draw a place at a time, without objects and weather: float32 (size, size, 3) in [0, 255].

    The layout (clouds, peaks, dunes) depends on `seed` and `horizon` alone; the random streams of sky and
    land are apart, so that another time leaves the land where it is.
    """
    canvas = Canvas(size)
    sky, land = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    if place == "on a table":
        return _table(canvas, time, horizon, sky, land)
    _sky(canvas, time, horizon, sky)
    empty = canvas.pixels.copy()
    _behind(canvas, place, horizon, land)
    canvas.gradient(horizon, 1, *_GROUNDS[place])
    canvas.texture(land, horizon, 1, (16, 10), 4)
    _ground(canvas, place, horizon, land)
    on_sky = (canvas.pixels == empty).all(2, keepdims=True)      # the sky is drawn in its own light already
    return np.where(on_sky, empty, grade(canvas.pixels.astype(np.float32), time))


def _sky(canvas, time, horizon, rng) -> None:
    canvas.gradient(0, 1 if time == "" else max(horizon, .3), *_SKIES[time])
    moon, stars, clouds = rng.uniform(.12, .88, 2), rng.random((16, 2)), rng.random((2, 3))
    if time == "at night":
        for x, y in stars:
            canvas.ellipse(x, y * horizon * .9, .006, .006, (236, 236, 214))
        canvas.ellipse(moon[0], .13, .062, .062, (250, 244, 206))
        canvas.ellipse(moon[0] + .03, .115, .05, .05, (26, 34, 76))
    elif time == "at sunset":
        canvas.ellipse(moon[0], horizon - .05, .1, .1, (255, 214, 110))
        canvas.ellipse(moon[0], horizon - .05, .075, .075, (255, 240, 176))
    cloud = {"": (250, 252, 255), "at sunset": (248, 178, 150), "in the rain": (126, 138, 156)}.get(time)
    for x, y, width in clouds if cloud else ():
        x, y, width = .1 + .8 * x, .07 + y * max(horizon - .26, .04), .07 + .03 * width
        for dx, dy, r in ((-1, .25, .7), (0, 0, .9), (1, .25, .7), (0, .35, .8)):
            canvas.ellipse(x + dx * width, y + dy * width, r * width, r * width * .62, cloud)


def _behind(canvas, place, horizon, rng) -> None:
    """What stands on the horizon: peaks, trees, houses, dunes."""
    jitter = rng.random((9, 3))
    if place == "in the mountains":
        for k, (dx, dy, dw) in enumerate(jitter[:3]):
            x, top, width = .12 + .38 * k + .1 * (dx - .5), horizon - .26 - .12 * dy, .28 + .08 * dw
            canvas.polygon([(x - width, horizon), (x, top), (x + width, horizon)], (122, 128, 150))
            cap = .36
            canvas.polygon([(x - width * cap, top + (horizon - top) * cap), (x, top),
                            (x + width * cap, top + (horizon - top) * cap)], (246, 249, 253))
    elif place == "in the forest":
        for k, (dx, dy, dw) in enumerate(jitter):
            x, height, width = k / 8 + .05 * (dx - .5), .27 + .12 * dy, .075 + .02 * dw
            green = (34 + int(14 * dw), 92 + int(26 * dx), 52)
            for step in range(3):
                y = horizon - height * step / 3.6
                canvas.polygon([(x - width * (1 - step * .22), y), (x, y - height * .46),
                                (x + width * (1 - step * .22), y)], green)
    elif place == "in the city":
        for k, (dx, dy, dw) in enumerate(jitter[:7]):
            x, height = k / 6.5 - .02, .18 + .2 * dy
            wall = ((150, 158, 176), (176, 152, 140), (132, 142, 166))[k % 3]
            canvas.box(x - .068, horizon - height, x + .068, horizon, wall)
            for row in range(int(height / .07)):
                for column in (-.038, 0, .038):
                    y = horizon - height + .03 + row * .07
                    canvas.box(x + column - .011, y, x + column + .011, y + .034, (248, 232, 168))
    elif place == "in the desert":
        canvas.wave(horizon - .045, .022, 1.2, 6 * jitter[0, 0], .2, (238, 194, 122))
        canvas.wave(horizon - .012, .014, 1.9, 6 * jitter[1, 0], .2, (226, 176, 104))


def _ground(canvas, place, horizon, rng) -> None:
    """What lies on the ground: surf, lane marks, waves, flowers, flakes, a river."""
    jitter = rng.random((14, 2))
    depth = 1 - horizon
    if place == "on the beach":
        canvas.gradient(horizon, horizon + .17 * depth, (44, 132, 200), (96, 190, 220))
        canvas.wave(horizon + .165 * depth, .006, 2.5, 6 * jitter[0, 0], .02, (250, 252, 252))
    elif place == "on the road":
        canvas.box(0, horizon, 1, horizon + .09 * depth, (106, 168, 80))
        for k in range(-1, 5):
            x = k * .26 + .26 * jitter[0, 0]
            canvas.box(x, horizon + .66 * depth, x + .13, horizon + .71 * depth, (244, 232, 150))
    elif place == "on the sea":
        for k in range(5):
            canvas.wave(horizon + (.1 + .2 * k) * depth, .009, 4, 6 * jitter[k, 0], .012, (150, 202, 238))
    elif place == "in the snow":
        for x, y in jitter:
            canvas.ellipse(x, horizon + y * depth, .02, .008, (255, 255, 255))
    elif place == "on the grass":
        for x, y in jitter[:9]:
            canvas.ellipse(x, horizon + (.1 + .85 * y) * depth, .011, .011, (252, 244, 214))
    elif place == "next to a river":
        phase, top = 6 * jitter[0, 0], horizon + (.1 + .06 * jitter[0, 1]) * depth
        canvas.wave(top - .012, .012, 1.1, phase, .034 + .32 * depth, (206, 190, 140))
        canvas.wave(top, .012, 1.1, phase, .01 + .32 * depth, (64, 146, 216))
        for x, y in jitter[1:9]:
            canvas.box(x - .05, top + (.05 + .24 * y) * depth, x + .05, top + (.05 + .24 * y) * depth + .012,
                       (164, 212, 242))
    elif place == "in the city":
        canvas.box(0, horizon + .34 * depth, 1, 1, (108, 110, 118))
        canvas.box(0, horizon + .3 * depth, 1, horizon + .34 * depth, (206, 204, 200))


def _table(canvas, time, horizon, sky, land) -> np.ndarray:
    """A room: wall, a window through which the time shows, a wooden table."""
    _sky(canvas, time, horizon, sky)
    window = .64 if land.random() < .5 else .08
    wall = Canvas(canvas.size)
    wall.gradient(0, horizon, (236, 220, 196), (226, 208, 182))
    wall.gradient(horizon, 1, (168, 112, 66), (196, 138, 88))
    wall.texture(land, horizon, 1, (3, 22), 7)
    wall.box(0, horizon, 1, horizon + .02, (132, 86, 50))
    wall.box(window - .025, .035, window + .305, horizon - .055, (250, 248, 244))
    hole = Canvas(canvas.size)
    for x in (window, window + .15):
        hole.box(x, .06, x + .13, horizon - .08, (255, 255, 255))
    through = hole.pixels / np.float32(255)
    return canvas.pixels * through + grade(wall.pixels.astype(np.float32), time) * (1 - through)
