"""How good a model of Sticker World is: round trips of held-out renders, and generated pictures read by the oracle.

    python -m p2p_helpers.stickers.benchmark
    python -m p2p_helpers.stickers.benchmark --model runs/t2i/pipeline --json out.json --sheet out.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..images import save_image, to_pil, to_tensor
from ..metrics import mask_iou, psnr
from ..models import load
from ..runtime import atomic_write, data_dir, setup
from ..sampling import decode, encode_image, generate
from .agreement import agreement, share
from .captions import caption
from .oracle import read
from .renderer import render
from .scenes import (COLORS, KINDS, PLACES, RELATIONS, STYLES, TIMES, WEATHERS, Scene, Thing, held_out, sample_scene,
                     world)
from .sheets import tile

__all__ = ["Settings", "measure_generation", "measure_renders", "prompt_sets"]

_BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    prompts: int = 160           # in each of the sets of prompts
    renders: int = 500           # held-out renders
    steps: int = 30              # of DDIM
    guidance_scale: float = 5.
    seed: int = 2026             # of prompts, renders and starting noise
    world: str = "cpu"           # the kinds that are asked for


def prompt_sets(settings: Settings) -> dict[str, list[Scene]]:
    """Return scenes to ask for, by what they are about; coloured ones are (kind, colour, place) never trained on."""
    rng = np.random.default_rng([settings.seed, 1])
    of = world(settings.world)

    def one(words) -> str:
        return str(words[rng.integers(len(words))])

    def thing(color: str = "") -> Thing:
        kinds = [kind for kind in of.kinds if KINDS[kind].colorable] if color else of.kinds
        return Thing(one(kinds), color)

    def held(count: int) -> Scene:
        while True:
            scene = Scene(tuple(thing(one(COLORS)) for _ in range(count)), place=one(PLACES))
            if held_out(scene):
                return scene

    def weather() -> Scene:
        time = one(TIMES)
        places = [place for place in PLACES if not (place == "on a table" and time in WEATHERS)]
        return Scene((thing(),), place=one(places), time=time)

    makers = {"single": lambda: held(1), "weather": weather,
              "styled": lambda: Scene((thing(),), place=one(PLACES), style=one(STYLES)),
              "pair": lambda: held(2),
              "position": lambda: Scene((thing(), thing()), one(RELATIONS), place=one(PLACES)),
              "count": lambda: Scene((Thing(one(of.kinds), count=int(rng.integers(2, 4))),), place=one(PLACES))}
    return {name: [dataclasses.replace(make(), seed=i) for i in range(settings.prompts)]
            for name, make in makers.items()}


def measure_renders(pipe, settings: Settings) -> dict[str, dict]:
    """Read held-out renders before and after the autoencoder."""
    rng = np.random.default_rng([settings.seed, 2])
    scenes = [sample_scene(rng, world(settings.world), held_out_only=True) for _ in range(settings.renders)]
    pictures = [render(scene) for scene in scenes]
    figures, quality = {}, []
    passes = {"oracle": [picture.image for picture in pictures], "roundtrip": []}
    for start in tqdm(range(0, len(scenes), _BATCH), desc="round trips"):
        batch = passes["oracle"][start:start + _BATCH]
        again = to_pil(decode(pipe, encode_image(pipe, to_tensor(batch))))
        passes["roundtrip"] += again
        quality += [psnr(before, np.asarray(after)) for before, after in zip(batch, again)]
    for name, images in passes.items():
        readings = read(images)
        answers = [agreement(reading, scene) for reading, scene in zip(readings, scenes)]
        for key in ("object", "pair", "colour", "place", "time", "style", "count"):
            figures[f"{name}_{key}"] = _figure(*share(answers, key))
        ious = [mask_iou(reading.mask, picture.masks.any(0)) for reading, picture in zip(readings, pictures)]
        figures[f"{name}_foreground_iou"] = _figure(float(np.mean(ious)), len(ious), 3)
        figures[f"{name}_strength_error"] = _figure(*_strength_error(readings, scenes), 3)
    return {"autoencoder_psnr_db": _figure(float(np.mean(quality)), len(quality), 2), **figures}


def _strength_error(readings, scenes) -> tuple[float, int]:
    """Mean absolute error of the strengths of fog and rain where there is one."""
    errors = [abs({"in the fog": reading.fog, "in the rain": reading.rain}[scene.time] - scene.strength)
              for reading, scene in zip(readings, scenes) if scene.time in WEATHERS]
    return float(np.mean(errors)), len(errors)


def measure_generation(pipe, settings: Settings) -> tuple[dict[str, dict], dict[str, list]]:
    """Generate every set of prompts and read it; return figures by name and the pictures by set."""
    asked = {"single": ("object", "colour", "place"), "weather": ("object", "place", "time"),
             "styled": ("object", "place", "style"), "pair": ("pair", "binding"), "position": ("position",),
             "count": ("count",)}
    answers: dict[str, list] = {}
    pictures = {}
    for name, scenes in prompt_sets(settings).items():
        pictures[name] = _generate(pipe, scenes, settings, name)
        for reading, scene in zip(read(pictures[name]), scenes):
            for key, answer in agreement(reading, scene).items():
                if key in asked[name]:
                    answers.setdefault(key, []).append({key: answer})
    return {key: _figure(*share(found, key)) for key, found in answers.items()}, pictures


def _generate(pipe, scenes, settings: Settings, name: str) -> list:
    images = []
    for start in tqdm(range(0, len(scenes), _BATCH), desc=f"generating: {name}"):
        batch = scenes[start:start + _BATCH]
        images += generate(pipe, [caption(scene) for scene in batch], steps=settings.steps,
                           guidance_scale=settings.guidance_scale,
                           seeds=[settings.seed + scene.seed for scene in batch]).images
    return images


def _figure(value: float, number: int, digits: int = 1) -> dict:
    return {"value": round(value, digits), "number": number}


def table(figures: dict[str, dict]) -> str:
    """Return the figures as text."""
    return "\n".join(f"{name:28s} {figure['value']:8} {figure['number']:6d}" for name, figure in figures.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder; by default the bundled model")
    parser.add_argument("--json", type=Path, help="where the figures go; by default beside the bundled model")
    parser.add_argument("--sheet", type=Path, help="where a sheet of samples goes (PNG)")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    model, out, sheet = (options.pop(name) for name in ("model", "json", "sheet"))
    settings, bundled = Settings(**options), data_dir() / "models" / "sticker-world"
    pipe = load(model, runtime=setup())
    pipe.set_progress_bar_config(disable=True)
    figures = measure_renders(pipe, settings)
    generated, pictures = measure_generation(pipe, settings)
    figures |= generated
    print(table(figures))
    with atomic_write(out or bundled / "benchmark.json") as path:
        path.write_text(json.dumps({"settings": dataclasses.asdict(settings), "figures": figures}, indent=1) + "\n")
    save_image(tile([images[:10] for images in pictures.values()]), sheet or bundled / "samples.png")


if __name__ == "__main__":
    main()
