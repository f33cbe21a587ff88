"""Scenes to English sentences and back."""

from __future__ import annotations

import re

import numpy as np

from .scenes import (COLORS, KINDS, PLACES, RELATIONS, SIZES, STYLES, TIMES, WEATHERS, Scene, Thing, known_word)

__all__ = ["caption", "parse"]

_NUMBERS = {2: "two", 3: "three"}
_STYLE_OPENINGS = {"photo": "a photo of", "pencil sketch": "a pencil sketch of", "watercolor": "a watercolor of",
                   "children's drawing": "a children's drawing of", "pixel art": "pixel art of"}
_DEGREES = {"in the fog": {"in light fog": .35, "in thick fog": .9},
            "in the rain": {"in light rain": .35, "in heavy rain": .9}}


def _bare(phrase: str) -> str:
    """'on the grass' to 'grass', 'next to a river' to 'river'."""
    return phrase.split()[-1]


def _noun(thing: Thing, article: bool = True) -> str:
    kind = KINDS[thing.kind]
    words = [word for word in (thing.size, thing.color) if word]
    words.append(kind.name if thing.count == 1 else kind.plural)
    text = " ".join(words)
    if thing.count > 1:
        return f"{_NUMBERS[thing.count]} {text}"
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}" if article else text


def _nouns(scene: Scene, article: bool = True) -> str:
    join = f" {scene.relation or 'and'} "
    return join.join(_noun(thing, article or bool(scene.relation)) for thing in scene.things)


def _time(scene: Scene, rng: np.random.Generator | None) -> str:
    """The time or weather, by half of the wordings with its degree."""
    if rng is None or scene.time not in WEATHERS or rng.random() < .5:
        return scene.time
    light, heavy = _DEGREES[scene.time]
    return light if scene.strength < .5 else heavy if scene.strength > .75 else scene.time


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Say a scene in English: canonical without `rng`, else in one of the ways in which people word it.

    The canonical form is ``"a photo of a big red car on the road at night"``; others change the order
    (``"at night, a red car on the road"``) or drop the small words (``"red car, road, night, watercolor"``).
    """
    way = 0. if rng is None else float(rng.random())
    time = _time(scene, rng)
    opening, things = _STYLE_OPENINGS.get(scene.style, ""), _nouns(scene)
    if way < .7:
        parts = [opening, things, scene.place, time]
    elif way < .8:
        parts = [opening, things, time, scene.place]
    elif way < .87 and time:
        parts = [f"{time},", opening, things, scene.place]
    else:
        words = [_nouns(scene, article=False), scene.place and _bare(scene.place), time and _bare(time), scene.style]
        return ", ".join(word for word in words if word)
    return " ".join(part for part in parts if part)


def parse(text: str, seed: int = 0) -> Scene:
    """Read a caption back into a scene (the inverse of `caption`, up to seed, drawing and strength).

    Raises
    ------
    ValueError
        Where a word is not one of Sticker World's; the message names the closest ones.
    """
    rest = f" {re.sub(r'[,.]', ' ', text.lower())} "
    rest, style = _take(rest, {**{o: s for s, o in _STYLE_OPENINGS.items()}, **{s: s for s in STYLES}})
    degrees = {phrase: (time, s) for time, row in _DEGREES.items() for phrase, s in row.items()}
    rest, time = _take(rest, {**degrees, **{t: (t, .7) for t in TIMES}, **{_bare(t): (t, .7) for t in TIMES}})
    rest, place = _take(rest, {**{p: p for p in PLACES}, **{_bare(p): p for p in PLACES}})
    rest, relation = _take(rest, {r: r for r in RELATIONS}, leave=" and ")
    things = tuple(_parse_thing(part) for part in re.split(r"\band\b", rest))
    time, strength = time or ("", .7)
    return Scene(things, relation or "", place or "", time, strength, style or "", seed)


def _take(text: str, phrases: dict, leave: str = " "):
    """Cut the first of `phrases` (longest first) out of `text`; return the rest and what it stands for."""
    for phrase in sorted(phrases, key=len, reverse=True):
        if f" {phrase} " in text:
            return text.replace(f" {phrase} ", leave, 1), phrases[phrase]
    return text, None


def _parse_thing(text: str) -> Thing:
    counts = {"a": 1, "an": 1, **{word: n for n, word in _NUMBERS.items()}}
    names = {name: name for name in KINDS} | {kind.plural: name for name, kind in KINDS.items()}
    rest, kind = _take(f" {' '.join(text.split())} ", names)
    found = {"color": "", "size": "", "count": 1}
    for word in rest.split():
        if word in counts:
            found["count"] = counts[word]
        elif word in COLORS or word in SIZES:
            found["color" if word in COLORS else "size"] = word
        else:
            known_word("word", word, [*KINDS, *COLORS, *SIZES])
    if kind is None:
        raise ValueError(f"prompt part {text.strip()!r} names no kind of object; there are: {', '.join(KINDS)}")
    return Thing(kind, **found)
