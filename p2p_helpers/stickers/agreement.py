"""Whether a picture shows what its scene says, by the oracle's reading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .captions import parse
from .oracle import Reading, Seen, read
from .scenes import RELATIONS, Scene, tells_color

__all__ = ["agreement", "knows", "score", "share"]

QUESTIONS = ("object", "pair", "count", "colour", "binding", "position", "place", "time", "style")


def agreement(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Compare a reading with a scene; only what the scene says and a picture can tell is asked.

    Returns
    -------
    dict
        Some of ``object`` (one kind of thing: the right one is seen), ``pair`` (two things: both are), ``count``,
        ``colour`` (every coloured thing has its colour), ``binding`` (the same, for two coloured things),
        ``position``, ``place``, ``time``, ``style``.
    """
    seen = _strongest(reading, sum(thing.count for thing in scene.things))
    by_kind = {kind: [s for s in seen if s.kind == kind] for kind in {thing.kind for thing in scene.things}}
    found = _found(by_kind, scene)
    answers = {"object" if len(scene.things) == 1 else "pair": found, "style": reading.style == (scene.style or "photo")}
    colored = [thing for thing in scene.things if thing.color]
    if colored and tells_color(scene):
        right = all(any(s.color == thing.color for s in by_kind[thing.kind] or seen[:len(scene.things) == 1])
                    for thing in colored)
        answers["colour"] = right
        if len(colored) == 2:
            answers["binding"] = right and found
    if scene.place:
        answers["place"] = reading.place == scene.place
    if scene.time:
        answers["time"] = reading.time == scene.time
    if scene.relation:
        answers["position"] = found and _in_order(by_kind, scene)
    if len(scene.things) == 1:
        answers["count"] = len(reading.things) == scene.things[0].count
    return answers


def share(answers: list[dict[str, bool]], name: str) -> tuple[float, int]:
    """Return the percentage of `name` that is right among those asked, and how many were."""
    asked = [answer[name] for answer in answers if name in answer]
    return (100 * sum(asked) / len(asked) if asked else float("nan")), len(asked)


def knows(pipe) -> bool:
    """Whether a pipeline draws Sticker World, so that the oracle can read its pictures."""
    return (Path(pipe.config._name_or_path) / "card.json").exists()


def score(pipe, images, prompts) -> dict[str, float]:
    """Return by question the percentage of prompts that the oracle sees obeyed.

    Parameters
    ----------
    pipe : the pipeline that made the images.
    images : list of pictures.
    prompts : str or list of str
        One for each picture, or one for all.

    Returns
    -------
    dict
        Of the questions (see `agreement`) that at least one prompt asks; all are nan for a model that does not
        draw Sticker World, whose pictures the oracle does not know.
    """
    prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(prompts) != len(images):
        raise ValueError(f"prompts: {len(prompts)} for {len(images)} images; give one for each, or one for all")
    if not knows(pipe):
        return dict.fromkeys(QUESTIONS, float("nan"))
    answers = [agreement(reading, parse(prompt)) for reading, prompt in zip(read(images), prompts)]
    return {name: share(answers, name)[0] for name in QUESTIONS if share(answers, name)[1]}


def _strongest(reading: Reading, number: int) -> list[Seen]:
    return sorted(reading.things, key=lambda seen: -seen.score)[:number]


def _found(by_kind: dict[str, list[Seen]], scene: Scene) -> bool:
    if len(scene.things) == 1:
        return bool(by_kind[scene.things[0].kind])
    wanted = Counter(thing.kind for thing in scene.things)
    return all(len(by_kind[kind]) >= number for kind, number in wanted.items())


def _in_order(by_kind: dict[str, list[Seen]], scene: Scene) -> bool:
    first, second = (by_kind[thing.kind][0].center[0] for thing in scene.things)
    return scene.things[0].kind == scene.things[1].kind or (first < second) == (scene.relation == RELATIONS[0])
