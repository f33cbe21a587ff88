"""What the methods cost against plain generation, and how well inversions and masks do.

    python -m p2p_helpers.bench control
    python -m p2p_helpers.bench control --model sd15 --rounds 5 --json out.json
    python -m p2p_helpers.bench inversion --limit 3
    python -m p2p_helpers.bench inversion --json data/measured/inversion.json
    python -m p2p_helpers.bench diffedit --json data/measured/diffedit.json
"""
from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch

from .. import models
from ..inversion import METHODS
from ..runtime import atomic_write, detect, setup
from . import diffedit, inversion
from .control import LATENT_SCALE, MODELS, VARIANTS, measure_model, measure_peak, table
from .timing import clock_of
from .work import fingerprints


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m p2p_helpers.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    compare = commands.add_parser("control", help="time and memory of Prompt-to-Prompt by step of the UNet")
    compare.add_argument("--model", choices=(*MODELS, "all"), default="all",
                         help="sd15 is a random UNet of Stable Diffusion 1.x's size (%(default)s)")
    compare.add_argument("--steps", type=_positive, help="of each run (on a CPU 2 of sd15, else 20; on a GPU 50)")
    compare.add_argument("--rounds", type=_positive, default=3, help="runs of each variant, in turns (%(default)s)")
    compare.add_argument("--size", type=_pixels, help="side of the images (the model's own)")
    compare.add_argument("--json", type=Path, help="where the figures go")
    compare.set_defaults(call=_compare)
    peak = commands.add_parser("memory", help="one peak of `control`'s table: print the bytes above the loaded model")
    peak.add_argument("--model", choices=MODELS, required=True)
    peak.add_argument("--variant", choices=VARIANTS, required=True)
    peak.add_argument("--size", type=_pixels)
    peak.set_defaults(call=_print_peak)
    _add_inversion(commands)
    _add_diffedit(commands)
    options = parser.parse_args(arguments)
    options.call(options)


def _add_inversion(commands) -> None:
    given = inversion.Settings()
    invert = commands.add_parser("inversion", help="inversions and editors, on renders whose edits are known")
    invert.add_argument("--model", help="name or folder of a model of Sticker World (the bundled one)")
    invert.add_argument("--limit", type=_positive, default=100, help="pictures (%(default)s)")
    invert.add_argument("--edit-pictures", type=_whole, help="how many of them are edited as well (all)")
    invert.add_argument("--null-text-pictures", type=_whole, help="how many of them go through null-text (all)")
    invert.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD",
                        help=f"some of {', '.join(METHODS)} (all)")
    invert.add_argument("--steps", type=_positive, default=given.steps, help="(%(default)s)")
    invert.add_argument("--guidance-scale", type=float, default=given.guidance_scale, help="(%(default)s)")
    invert.add_argument("--seed", type=int, default=given.seed, help="of the scenes (%(default)s)")
    invert.add_argument("--work", type=Path, default=Path("runs/bench-inversion.jsonl"),
                        help="where every figure is kept, to go on from (%(default)s)")
    invert.add_argument("--json", type=Path, help="where the means go")
    invert.set_defaults(call=_compare_inversions, name="inversion")


def _compare_inversions(options: argparse.Namespace) -> None:
    pipe = models.load(options.model, runtime=setup())
    pipe.set_progress_bar_config(disable=True)
    settings = inversion.Settings(options.steps, options.guidance_scale, options.seed)
    counts = {"pictures": options.limit,
              "edit_pictures": options.limit if options.edit_pictures is None else options.edit_pictures,
              "null_text_pictures": (options.limit if options.null_text_pictures is None
                                     else options.null_text_pictures)}
    rows = inversion.measure(pipe, options.work, settings, **counts, methods=options.methods,
                             say=lambda line: print(line, file=sys.stderr, flush=True))
    found = inversion.summary(rows)
    print(inversion.table(found))
    about = {"command": _command(options), **asdict(settings), **counts, "methods": list(options.methods),
             "equal_pictures_count_as_db": inversion.EQUAL, **fingerprints(pipe), **_machine()}
    _write(options.json, {**found, "settings": about})


def _add_diffedit(commands) -> None:
    given, counts = diffedit.Settings(), diffedit.Counts()
    masks = commands.add_parser("diffedit", help="DiffEdit's masks and edits, on renders whose edits are known")
    masks.add_argument("--model", help="name or folder of a model of Sticker World (the bundled one)")
    for name, what in (("pictures", "with a fast mask, and edited"), ("full_pictures", "of them with a full mask too"),
                       ("calibration", "of another seed, that the cuts are chosen on")):
        masks.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=getattr(counts, name),
                           help=f"{what} (%(default)s)")
    masks.add_argument("--steps", type=_positive, default=given.steps, help="of the edits (%(default)s)")
    masks.add_argument("--rounds", type=_positive, default=3, help="of the timing (%(default)s)")
    masks.add_argument("--work", type=Path, default=Path("runs/bench-diffedit.jsonl"),
                       help="where every figure is kept, to go on from (%(default)s)")
    masks.add_argument("--json", type=Path, help="where the figures go")
    masks.set_defaults(call=_compare_masks, name="diffedit")


def _compare_masks(options: argparse.Namespace) -> None:
    pipe = models.load(options.model, runtime=setup())
    pipe.set_progress_bar_config(disable=True)
    settings = diffedit.Settings(steps=options.steps)
    counts = diffedit.Counts(options.pictures, options.full_pictures, options.calibration)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = diffedit.summary(diffedit.measure(pipe, options.work, settings, counts, say),
                             diffedit.measure_times(pipe, settings, options.rounds, say))
    print(diffedit.table(found))
    about = {"command": _command(options), **asdict(settings), **asdict(counts), "rounds": options.rounds,
             **fingerprints(pipe), **_machine()}
    _write(options.json, {**found, "settings": about})


def _write(path: Path | None, found: dict) -> None:
    if path:
        with atomic_write(path) as file:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _command(options: argparse.Namespace) -> str:
    """What was asked for, without the names of files of this machine."""
    words = ["python", "-m", "p2p_helpers.bench", options.name]
    for name, value in vars(options).items():
        if isinstance(value, int | float):
            words += [f"--{name.replace('_', '-')}", str(value)]
    methods = getattr(options, "methods", METHODS)
    return shlex.join(words + (["--methods", *methods] if tuple(methods) != METHODS else []))


def _print_peak(options: argparse.Namespace) -> None:
    print(json.dumps(measure_peak(options.model, options.variant, options.size)))


def _compare(options: argparse.Namespace) -> None:
    models = MODELS if options.model == "all" else (options.model,)
    figures = {model: measure_model(model, options.steps, options.rounds, options.size,
                                    lambda line: print(line, file=sys.stderr, flush=True)) for model in models}
    print(table(figures))
    _write(options.json, {**figures, "settings": _settings(options.rounds)})


def _settings(rounds: int) -> dict:
    return {**_machine(), "rounds": rounds, "prompts": 2, "batch": 4,
            "memory": "peak of one step above the loaded model, each in a process of its own"}


def _machine() -> dict:
    device = detect().device
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"device": name, "threads": torch.get_num_threads(), "clock": clock_of(device)[0],
            "torch": torch.__version__, "diffusers": diffusers.__version__}


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _whole(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def _pixels(text: str) -> int:
    if (number := int(text)) < 1 or number % LATENT_SCALE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {LATENT_SCALE}")
    return number


if __name__ == "__main__":
    main()
