"""Sticker World: rendered scenes with captions, masks and counterfactuals."""

from .captions import caption, parse
from .renderer import Picture, changed_mask, render
from .scenes import (COLORS, KINDS, PLACES, RELATIONS, SIZES, STYLES, TIMES, WEATHERS, Kind, Scene, Thing, World,
                     held_out, replace, sample_scene, world)

__all__ = ["COLORS", "KINDS", "PLACES", "RELATIONS", "SIZES", "STYLES", "TIMES", "WEATHERS", "Kind", "Picture",
           "Scene", "Thing", "World", "caption", "changed_mask", "held_out", "parse", "render", "replace",
           "sample_scene", "world"]
