"""Scenes to pictures: layout by seed, objects with shadows, light, weather, style, masks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .backgrounds import draw_background
from .scenes import KINDS, PLACES, RELATIONS, Scene, Thing
from .sprites import place_sprite, sprite
from .styles import apply_style, apply_weather, grade, style_reach

__all__ = ["Picture", "changed_mask", "render"]

_SIZE_SCALES = {"": .52, "big": .70, "small": .32}
_CROWD_SCALES = {1: 1., 2: .74, 3: .58}                       # how much smaller things are in company
_SEATS = {1: (.5,), 2: (.27, .73), 3: (.19, .5, .81)}
_SWAY = {1: .13, 2: .02, 3: .01}                              # how far from its seat a thing may stand


@dataclass(frozen=True)
class Picture:
    """A rendered scene."""

    image: np.ndarray    # uint8 (size, size, 3), RGB
    masks: np.ndarray    # bool (number of things, size, size): what one sees of each thing
    centers: np.ndarray  # float32 (number of single objects, 2): x, y of the middle of each as fractions of the side


@dataclass(frozen=True)
class _Pose:
    """Where a single object stands: keyword arguments of `place_sprite`, and whether it throws a shadow."""

    placement: dict
    shadow: bool


def render(scene: Scene, size: int = 128) -> Picture:
    """Draw a scene.

    Parameters
    ----------
    scene : Scene
    size : int
        Side of the picture in pixels, a multiple of 8 and at least 64.

    Returns
    -------
    Picture
        The same for the same scene in every process and on every machine (up to one grey level of rounding).
    """
    _check_size(size)
    pixels = draw_background(_place(scene), scene.time, _horizon(scene), scene.seed, size)
    masks, centers = np.zeros((len(scene.things), size, size), bool), []
    for index, layer, shade in _layers(scene, size):
        pixels = pixels * (1 - shade[..., None])
        alpha = layer[..., 3:]
        pixels = pixels * (1 - alpha) + grade(layer[..., :3], scene.time)
        visible = alpha[..., 0] > .5
        centers.append([(along.mean() + .5) / size for along in np.nonzero(visible)[::-1]])
        masks &= ~visible
        masks[index] |= visible
    pixels = apply_weather(pixels, scene.time, scene.strength, scene.seed)
    image = apply_style(np.clip(pixels + .5, 0, 255).astype(np.uint8), scene.style, scene.seed)
    return Picture(image, masks, np.float32(centers))


def changed_mask(before: Scene, after: Scene, size: int = 128) -> np.ndarray:
    """Return the pixels that an edit may change, from the scenes alone: bool (size, size).

    Outside this mask the two renders are equal. It holds the old and the new footprint (object and shadow) of
    every thing that differs, all that no object hides where the place differs, and everything where time,
    weather or style do; a style spreads it by its reach.
    """
    _check_size(size)
    if (before.seed, before.drawing) != (after.seed, after.drawing):
        raise ValueError("after: an edit keeps seed and drawing of the scene")
    weather = (before.time, before.strength if before.time else 0) != (after.time, after.strength if after.time else 0)
    if weather or before.style != after.style:
        return np.ones((size, size), bool)
    first, second = _layers(before, size), _layers(after, size)
    mask = np.zeros((size, size), bool)
    if _place(before) != _place(after):
        mask = np.maximum.reduce([layer[..., 3] for _, layer, _ in first]) < 1
    for mine, others in ((first, second), (second, first)):
        for _, layer, shade in mine:
            if not any(np.array_equal(layer, other) for _, other, _ in others):
                mask |= (layer[..., 3] > 0) | (shade > 0)
    return _spread(mask, before.style, size)


def _spread(mask: np.ndarray, style: str, size: int) -> np.ndarray:
    reach = style_reach(style, size)
    if style == "pixel art":
        blocks = mask.reshape(size // reach, reach, size // reach, reach).any((1, 3))    # (rows, columns)
        return blocks.repeat(reach, 0).repeat(reach, 1)
    kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def _check_size(size: int) -> None:
    if size % 8 or size < 64:
        raise ValueError(f"size={size!r}: pictures are squares with a side that is a multiple of 8, at least 64")


def _horizon(scene: Scene) -> float:
    return float(np.random.default_rng([scene.seed, 0]).uniform(.42, .54))


def _place(scene: Scene) -> str:
    outdoors = [place for place in PLACES if place not in ("on a table", "on the sea")]
    return scene.place or outdoors[int(np.random.default_rng([scene.seed, 5]).integers(len(outdoors)))]


def _objects(scene: Scene) -> list[tuple[int, Thing]]:
    """The single objects from left to right, with the index of their thing."""
    objects = [(index, thing) for index, thing in enumerate(scene.things) for _ in range(thing.count)]
    swapped = np.random.default_rng([scene.seed, 6]).random() < .5
    if len(scene.things) == 2 and (scene.relation == RELATIONS[1] or (not scene.relation and swapped)):
        objects.reverse()
    return objects


def _poses(scene: Scene) -> list[_Pose]:
    objects, horizon = _objects(scene), _horizon(scene)
    crowd = len(objects)
    poses = []
    for seat, (_, thing) in enumerate(objects):
        rng = np.random.default_rng([scene.seed, 7, seat])
        sway, depth, height, turn, shear, stretch, flip, hang = rng.uniform(-1, 1, 8)
        kind = KINDS[thing.kind]
        scale = _SIZE_SCALES[thing.size] * _CROWD_SCALES[crowd] * kind.scale * (1 + .07 * height)
        ground = horizon + (1 - horizon) * (.66 + .2 * depth)
        poses.append(_Pose(dict(
            center=_SEATS[crowd][seat] + _SWAY[crowd] * sway, scale=scale, flip=bool(flip < 0),
            bottom=(.62 + .05 * hang) if kind.floats else max(ground, min(.95, scale * .95)),
            angle=3 * turn, shear=.04 * shear, stretch=1 + .05 * stretch), shadow=not kind.floats))
    return poses


def _layers(scene: Scene, size: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per object, far ones first: index of its thing, RGBA layer (size, size, 4), shade (size, size) in [0, 1]."""
    layers = []
    objects = list(zip(_objects(scene), _poses(scene)))
    for (index, thing), pose in sorted(objects, key=lambda item: item[1].placement["bottom"]):
        layer = place_sprite(sprite(thing.kind, thing.color, scene.drawing), size, **pose.placement)
        shade = _shadow(layer[..., 3]) if pose.shadow else np.zeros((size, size), np.float32)
        layers.append((index, layer, shade))
    return layers


def _shadow(alpha: np.ndarray) -> np.ndarray:
    """A soft ellipse under an object, as wide as its lower part."""
    size = alpha.shape[0]
    rows = np.flatnonzero((alpha > .5).any(1))
    bottom, height = rows[-1], rows[-1] - rows[0]
    columns = np.flatnonzero((alpha[bottom - height // 3:bottom + 1] > .5).any(0))
    half = max((columns[-1] - columns[0]) * .54, 2)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    distance = ((x - columns.mean()) / half) ** 2 + ((y - bottom + .01 * size) / max(half * .17, 2)) ** 2
    return np.clip(1.25 - distance, 0, 1) * np.float32(.34)
