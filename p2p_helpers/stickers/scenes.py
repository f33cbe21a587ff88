"""What a sticker scene is: the words there are, scenes as data, sampling and counterfactuals."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass

import numpy as np

from ..runtime import closest

__all__ = ["COLORS", "KINDS", "PLACES", "RELATIONS", "SIZES", "STYLES", "TIMES", "WEATHERS", "Kind", "Scene",
           "Thing", "World", "held_out", "known_word", "replace", "sample_scene",
           "tells_color", "world"]


@dataclass(frozen=True)
class Kind:
    """One kind of object: its words and the names of its drawings."""

    name: str                # "cat"; for bowls "bowl of pears"
    plural: str              # "cats"
    noto: str                # icon in Noto Emoji (for bowls: of the fruit)
    fluent: str              # icon in Fluent Emoji
    scale: float = 1.0       # size beside other kinds
    floats: bool = False     # hangs in the air instead of standing on the ground
    colorable: bool = True   # may be given one of COLORS


def _kind(name, icon=None, *, plural=None, **options) -> Kind:
    icon = icon or name.replace(" ", "-")
    return Kind(name, plural or name + "s", icon, icon, **options)


def _bowl(fruit: str, icon: str) -> Kind:
    return _kind(f"bowl of {fruit}", icon, plural=f"bowls of {fruit}", colorable=False)


_CPU_KINDS = (
    _kind("horse", scale=1.08), _kind("zebra", scale=1.08), _kind("cat"), _kind("dog"), _kind("tiger", scale=1.08),
    _kind("bear", "teddy-bear"), _kind("elephant", scale=1.15), _kind("rabbit"),
    _kind("car", "automobile", scale=1.08), _kind("motorcycle", scale=1.08), _kind("bicycle", scale=1.08),
    _kind("bus", plural="buses", scale=1.1),
    _bowl("strawberries", "strawberry"), _bowl("grapes", "grapes"), _bowl("pears", "pear"),
    _kind("castle", scale=1.15), _kind("house", scale=1.12), _kind("tree", "deciduous-tree", scale=1.12),
    _kind("cake", "birthday-cake"), _kind("ball", "soccer-ball", scale=.88),
    _kind("balloon", scale=.9, floats=True), _kind("chair"), _kind("hat", "top-hat", scale=.9),
    _kind("boat", "sailboat", scale=1.08),
)
_MORE_KINDS = (
    _kind("leopard", scale=1.05), _kind("cow", scale=1.08), _kind("pig"), _kind("goat"), _kind("camel", scale=1.1),
    _kind("deer", plural="deer"), _kind("kangaroo"), _kind("giraffe", scale=1.15), _kind("monkey"), _kind("gorilla"),
    _kind("duck"), _kind("rooster"), _kind("penguin"), _kind("owl"), _kind("turtle"), _kind("swan"),
    _kind("flamingo"), _kind("parrot"), _kind("dinosaur", "sauropod", scale=1.1), _kind("hedgehog"), _kind("llama"),
    _kind("butterfly", plural="butterflies", scale=.9, floats=True),
    _kind("truck", "delivery-truck", scale=1.1), _kind("scooter", "motor-scooter"), _kind("tractor", scale=1.08),
    _kind("train", "locomotive", scale=1.1), _kind("taxi", scale=1.05), _kind("ship", scale=1.1),
    _kind("apple", "red-apple", scale=.88), _kind("pear", scale=.88), _kind("lemon", scale=.88),
    _kind("pineapple", scale=.95), _kind("banana", scale=.88), _kind("mushroom", scale=.92),
    _kind("cupcake", scale=.92), _kind("pizza", scale=.92), _kind("burger", "hamburger", scale=.92),
    _kind("donut", "doughnut", scale=.88), _kind("teapot", scale=.95),
    _bowl("apples", "red-apple"), _bowl("lemons", "lemon"), _bowl("cherries", "cherries"),
    _kind("palm tree", scale=1.12), _kind("cactus", plural="cactuses"), _kind("tulip", scale=.95),
    _kind("sunflower"), _kind("tent", scale=1.08), _kind("crown", scale=.9), _kind("umbrella"),
    _kind("backpack"), _kind("guitar"), _kind("robot"), _kind("snowman", plural="snowmen"),
    _kind("pumpkin", "jack-o-lantern", scale=.92), _kind("gift", "wrapped-gift", scale=.92),
    _kind("television", scale=.95), _kind("drum", scale=.95),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _CPU_KINDS + _MORE_KINDS}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
SIZES = ("big", "small")
PLACES = ("on the grass", "on the beach", "in the snow", "in the desert", "on the road", "on the sea", "on a table",
          "in the mountains", "in the forest", "in the city", "next to a river")
TIMES = ("at night", "at sunset", "in the fog", "in the rain")
WEATHERS = ("in the fog", "in the rain")         # the times that have a continuous strength
STYLES = ("photo", "pencil sketch", "watercolor", "children's drawing", "pixel art")
RELATIONS = ("to the left of", "to the right of")


def known_word(name: str, value: str, words, *, optional: bool = False) -> str:
    """Return `value` if it is one of `words` (or empty and optional), else raise with the closest one."""
    if value in words or (optional and value == ""):
        return value
    raise ValueError(f"{name}={value!r} is not in Sticker World; {closest(value, words)}")


@dataclass(frozen=True)
class Thing:
    """One object of a scene, or up to three of the same."""

    kind: str           # a key of KINDS
    color: str = ""     # one of COLORS; "" is the drawing's own
    size: str = ""      # "big", "small" or ""
    count: int = 1      # 1 to 3

    def __post_init__(self):
        known_word("kind", self.kind, KINDS)
        known_word("color", self.color, COLORS, optional=True)
        known_word("size", self.size, SIZES, optional=True)
        if self.count not in (1, 2, 3):
            raise ValueError(f"count={self.count!r}: Sticker World counts from 1 to 3")
        if self.color and not KINDS[self.kind].colorable:
            raise ValueError(f"color={self.color!r}: a {self.kind} has its own colours")


@dataclass(frozen=True)
class Scene:
    """Everything a picture is made from; the seed alone decides on the layout, the words on what fills it."""

    things: tuple[Thing, ...]  # one or two; of two, each counts one
    relation: str = ""         # one of RELATIONS (first thing to second); "": the seed decides
    place: str = ""            # one of PLACES; "": the seed decides
    time: str = ""             # one of TIMES; "": a clear day
    strength: float = .7       # of fog or rain, 0 to 1
    style: str = ""            # one of STYLES; "" looks like a photo
    seed: int = 0
    drawing: int = 0           # 0: Noto Emoji, 1: Fluent Emoji

    def __post_init__(self):
        if len(self.things) not in (1, 2):
            raise ValueError(f"things: a scene holds one or two, not {len(self.things)}")
        if len(self.things) == 2 and any(thing.count > 1 for thing in self.things):
            raise ValueError("count: of two things each counts one")
        known_word("relation", self.relation, RELATIONS if len(self.things) == 2 else (), optional=True)
        known_word("place", self.place, PLACES, optional=True)
        known_word("time", self.time, TIMES, optional=True)
        known_word("style", self.style, STYLES, optional=True)
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength!r} is outside [0, 1]")


def replace(scene: Scene, *, thing: int = 0, **changes) -> Scene:
    """Return the counterfactual: the same scene with some words changed.

    Parameters
    ----------
    scene : Scene
    thing : int
        Which thing `kind`, `color`, `size` and `count` speak of.
    **changes
        Fields of `Scene` or of `Thing`, e.g. ``kind="dog"`` or ``place="on the beach"``.
    """
    thing_fields = {field.name for field in dataclasses.fields(Thing)}
    scene_fields = {field.name for field in dataclasses.fields(Scene)}
    for name in changes:
        known_word("change", name, sorted(thing_fields | scene_fields))
    of_thing = {name: value for name, value in changes.items() if name in thing_fields}
    of_scene = {name: value for name, value in changes.items() if name in scene_fields}
    if of_thing:
        things = list(of_scene.get("things", scene.things))
        things[thing] = dataclasses.replace(things[thing], **of_thing)
        of_scene["things"] = tuple(things)
    return dataclasses.replace(scene, **of_scene)


def tells_color(scene: Scene) -> bool:
    """Whether a picture of the scene can tell the colour of its things: not in grey, not in thick fog."""
    return scene.style != "pencil sketch" and not (scene.time == "in the fog" and scene.strength > .8)


@dataclass(frozen=True)
class World:
    """The part of Sticker World that a model is trained on."""

    kinds: tuple[str, ...]
    drawings: int = 1            # 1: Noto Emoji alone, 2: Fluent Emoji as well
    pair_share: float = .22      # of the scenes have two things
    relation_share: float = .35  # of those say where
    count_share: float = .08     # of the scenes have two or three of a kind
    color_share: float = .5
    size_share: float = .25
    place_share: float = .93
    time_share: float = .4
    style_share: float = .4      # have a style other than photo


def world(name: str) -> World:
    """Return the world of a preset: ``"cpu"`` (24 kinds, one drawing each) or ``"gpu"`` (everything)."""
    known_word("world", name, ("cpu", "gpu"))
    if name == "cpu":
        return World(tuple(kind.name for kind in _CPU_KINDS))
    return World(tuple(KINDS), drawings=2)


def held_out(scene: Scene) -> bool:
    """Tell whether a (kind, colour, place) triple of the scene is one that no model is trained on (1 in 20)."""
    return any(thing.color and scene.place
               and zlib.crc32(f"{thing.kind}|{thing.color}|{scene.place}".encode()) % 20 == 0
               for thing in scene.things)


def sample_scene(rng: np.random.Generator, of: World, *, held_out_only: bool = False) -> Scene:
    """Draw a scene; one with a held-out triple only where `held_out_only` asks for it."""
    while True:
        scene = _draw(rng, of)
        if held_out(scene) == held_out_only:
            return scene


def _draw(rng: np.random.Generator, of: World) -> Scene:
    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def one(words, share: float = 1.) -> str:
        word = str(words[rng.integers(len(words))])      # drawn in any case, so that streams stay aligned
        return word if chance(share) else ""

    pair, many = chance(of.pair_share), chance(of.count_share / (1 - of.pair_share))
    things = []
    for _ in range(1 + pair):
        kind = one(of.kinds)
        color, size = one(COLORS, of.color_share), one(SIZES, of.size_share)
        count = int(rng.integers(2, 4)) if many and not pair else 1
        things.append(Thing(kind, color if KINDS[kind].colorable else "", size, count))
    style = one(STYLES[1:], of.style_share) or one(("photo",), .5)
    place, time = one(PLACES, of.place_share), one(TIMES, of.time_share)
    indoors = place == "on a table" and time in WEATHERS
    return Scene(tuple(things), relation=one(RELATIONS, of.relation_share) if pair else "",
                 place=place, time="" if indoors else time,
                 strength=round(float(rng.uniform(.2, 1)), 3), style=style, seed=int(rng.integers(2 ** 31)),
                 drawing=int(rng.integers(of.drawings)))
