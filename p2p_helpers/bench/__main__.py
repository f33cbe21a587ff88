"""What the methods cost against plain generation.

    python -m p2p_helpers.bench control
    python -m p2p_helpers.bench control --model sd15 --rounds 5 --json out.json
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import diffusers
import torch

from ..runtime import atomic_write, detect
from .control import LATENT_SCALE, MODELS, VARIANTS, measure_model, measure_peak, table
from .timing import clock_of


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
    options = parser.parse_args(arguments)
    options.call(options)


def _print_peak(options: argparse.Namespace) -> None:
    print(json.dumps(measure_peak(options.model, options.variant, options.size)))


def _compare(options: argparse.Namespace) -> None:
    models = MODELS if options.model == "all" else (options.model,)
    figures = {model: measure_model(model, options.steps, options.rounds, options.size,
                                    lambda line: print(line, file=sys.stderr, flush=True)) for model in models}
    print(table(figures))
    if options.json:
        with atomic_write(options.json) as path:
            path.write_text(json.dumps({**figures, "settings": _settings(options.rounds)}, indent=1) + "\n")


def _settings(rounds: int) -> dict:
    device = detect().device
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"device": name, "threads": torch.get_num_threads(), "clock": clock_of(device)[0], "rounds": rounds,
            "prompts": 2, "batch": 4, "memory": "peak of one step above the loaded model, each in a process of its own",
            "torch": torch.__version__, "diffusers": diffusers.__version__}


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _pixels(text: str) -> int:
    if (number := int(text)) < 1 or number % LATENT_SCALE:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {LATENT_SCALE}")
    return number


if __name__ == "__main__":
    main()
