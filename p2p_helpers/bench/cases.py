"""Held-out renders, each with an edit and the render that this should lead to."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..stickers.captions import caption
from ..stickers.renderer import changed_mask, render
from ..stickers.scenes import COLORS, KINDS, PLACES, WEATHERS, Scene, replace, sample_scene, tells_color, world

__all__ = ["EDITS", "LEVELS", "Case", "case", "differing"]

EDITS = {"object": "kind", "colour": "color", "place": "place"}     # what the oracle is asked, the field of the scene
LEVELS = 16             # grey levels of 255 by more than which a pixel differs visibly
_VISIBLE = .01          # an edit changes so large a part of the picture at least
_BACKGROUND = .05       # the least part of a picture that an edit leaves alone


@dataclass(frozen=True, eq=False)
class Case:
    """A render, what is to be done to it, and the render that this should lead to."""

    edit: str                       # a key of EDITS
    source: str                     # captions
    target: str
    words: tuple[str, str]          # whose regions may change with a blend: of the source, of the target
    scene: Scene                    # that the edited picture should show
    image: Image.Image
    counterfactual: Image.Image
    changed: np.ndarray             # bool (H, W): pixels that the edit may change


def case(seed: int, index: int, *, edits: Sequence[str] = tuple(EDITS), world_name: str = "cpu",
         size: int = 128) -> Case:
    """The picture of an index, the same however many are measured; the edits take turns.

    Drawn again until the edit can be seen in the picture and leaves some of it alone.
    """
    edit, of = edits[index % len(edits)], world(world_name)
    rng = np.random.default_rng([seed, index])
    while True:
        scene = sample_scene(rng, of, held_out_only=True)
        if len(scene.things) > 1 or scene.things[0].count > 1 or (edit == "colour" and not tells_color(scene)):
            continue
        after = replace(scene, **{EDITS[edit]: str(rng.choice(_choices(scene, edit, of.kinds)))})
        before_image, after_image = (Image.fromarray(render(each, size).image) for each in (scene, after))
        changed = changed_mask(scene, after, size)
        if differing(before_image, after_image).mean() >= _VISIBLE and (~changed).mean() >= _BACKGROUND:
            return Case(edit, caption(scene), caption(after), _words(scene, after, edit), after, before_image,
                        after_image, changed)


def differing(before, after) -> np.ndarray:
    """The pixels of two pictures that differ visibly, in any colour: bool (H, W)."""
    return np.abs(np.asarray(before, int) - np.asarray(after, int)).max(-1) > LEVELS


def _choices(scene: Scene, edit: str, kinds: Sequence[str]) -> list[str]:
    """The words that may take the place of the scene's."""
    (thing,) = scene.things
    if edit == "object":
        return [kind for kind in kinds if kind != thing.kind and (KINDS[kind].colorable or not thing.color)]
    if edit == "colour":
        return [color for color in COLORS if color != thing.color]
    return [place for place in PLACES if place != scene.place
            and not (place == "on a table" and scene.time in WEATHERS)]


def _words(before: Scene, after: Scene, edit: str) -> tuple[str, str]:
    """The object is blended where it is, and where its colour changes; a place by its last word."""
    if edit == "place":
        return before.place.split()[-1], after.place.split()[-1]
    return before.things[0].kind, after.things[0].kind
