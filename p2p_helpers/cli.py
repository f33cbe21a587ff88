"""The command line: ``python -m p2p_helpers edit --help``."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

from .runtime import is_out_of_memory, memory_advice

EXAMPLES = """examples:
  python -m p2p_helpers edit --source "a big red car" --target "a big blue motorcycle" --seed 3 --out out/
  python -m p2p_helpers edit --source "a house in the fog" --reweight fog=3 --reweight house=-1 --out out/
  python -m p2p_helpers edit --source "a cat on the grass" --target "a dog on the grass" \\
      --target "a tiger on the grass" --blend cat --cross 0.6 --self 0.2 --out out/
  python -m p2p_helpers edit --model sd15 --source "a squirrel eating a burger" \\
      --target "a lion eating a burger" --out out/
  python -m p2p_helpers edit --model sd15 --real data/photos/chelsea.jpg --source "a photo of a cat" \\
      --target "a photo of a tiger" --inversion null-text --blend cat --restore --out out/
"""
INVERSIONS = ("ddim", "fixed-point", "negative-prompt", "null-text", "direct")      # inversion.METHODS, without PyTorch


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    top = argparse.ArgumentParser(prog="python -m p2p_helpers", description="Text-driven image editing.")
    commands = top.add_subparsers(dest="command", required=True)
    edit = commands.add_parser("edit", help="Prompt-to-Prompt: edit a generated picture, or your own, by its words",
                               epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    edit.add_argument("--source", required=True, help="prompt of the picture to edit; with --real, what it shows")
    edit.add_argument("--target", action="append", help="prompt of an edit; may be given several times")
    edit.add_argument("--reweight", action="append", type=_weight, default=[], metavar="WORD=C",
                      help="multiply a word's attention")
    edit.add_argument("--blend", action="append", metavar="WORD", help="change the picture only where this word is")
    edit.add_argument("--real", metavar="PICTURE", help="a file or URL: edit this picture instead of generating one")
    edit.add_argument("--inversion", choices=INVERSIONS, help="how the noise that makes --real is found (direct)")
    edit.add_argument("--restore", action="store_true", help="with --real and --blend: keep the picture's own latents "
                      "outside the region")
    edit.add_argument("--cross", type=float, default=.8,
                      help="part of the steps with the source's cross-attention (%(default)s)")
    edit.add_argument("--self", type=float, default=.4, dest="self_", help="the same for self-attention (%(default)s)")
    edit.add_argument("--model", help="a name such as sd15, a folder, or owner/name on the hub (the bundled one)")
    edit.add_argument("--steps", type=int, default=50)
    edit.add_argument("--guidance", type=float, default=7.5)
    edit.add_argument("--seed", type=int, help="of a generated picture (0)")
    edit.add_argument("--negative", default="", help="negative prompt")
    edit.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(None, None),
                      help="multiples of 8 (the model's own; with --real about that, in the picture's shape)")
    edit.add_argument("--low-memory", action="store_true", help="slower, for small GPUs")
    edit.add_argument("--out", type=Path, required=True, help="folder for images, maps and settings")
    edit.set_defaults(run=run_edit)
    return top


def _weight(text: str) -> tuple[str, float]:
    word, separator, value = text.rpartition("=")
    try:
        return word, float(value if separator and word else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WORD=NUMBER, for example fog=3") from None


def run_edit(options: argparse.Namespace) -> None:
    """Make the edit, write everything into the folder, and say what was done."""
    _check_combination(options)
    from .edits import explain
    from .models import load
    from .prompt_to_prompt import edit_prompt
    from .runtime import measure, setup

    runtime = setup(options.seed or 0)
    pipe = load(options.model, runtime=runtime, low_memory=options.low_memory)
    picture = _fitted(pipe, options) if options.real else None
    height, width = (picture.height, picture.width) if picture else options.size
    with measure(runtime.device) as cost:
        inversion = _inverted(pipe, picture, options) if picture else None
        result = edit_prompt(pipe, options.source, options.target, seed=None if picture else options.seed or 0,
                             inversion=inversion, restore=options.restore, weights=dict(options.reweight),
                             cross_replace_steps=options.cross, self_replace_steps=options.self_, blend=options.blend,
                             steps=options.steps, guidance_scale=options.guidance, negative_prompt=options.negative,
                             height=height, width=width, low_memory=options.low_memory)
    _save(options.out, result, pipe, picture, inversion)
    print("\n\n".join(str(explain(edit)) for edit in result.edits))
    print(f"\n{cost.report()}\nwrote to {options.out}: {', '.join(sorted(os.listdir(options.out)))}")


def _check_combination(options: argparse.Namespace) -> None:
    """Refuse options that do not go together before a model is loaded."""
    if not options.target and not options.reweight:
        raise ValueError("nothing to edit: give --target or --reweight")
    if options.real and options.seed is not None:
        raise ValueError("--seed is of a picture to generate, --real is one that exists: give one of them")
    if options.inversion and not options.real:
        raise ValueError(f"--inversion {options.inversion} needs the picture to invert: give --real")
    if options.restore and not (options.real and options.blend):
        raise ValueError("--restore keeps a picture outside the region of words: give --real and --blend")


def _fitted(pipe, options: argparse.Namespace):
    """The picture of --real at --size, or at about the model's own size in its own shape."""
    from .images import fit, load_image, size_for
    from .models import image_size

    picture = load_image(options.real)
    halvings = len(pipe.unet.config.block_out_channels) - 1
    height, width = options.size
    if height is None:
        height, width = size_for(picture, image_size(pipe), multiple=pipe.vae_scale_factor * 2**halvings)
    return fit(picture, (height, width), multiple=pipe.vae_scale_factor)


def _inverted(pipe, picture, options: argparse.Namespace):
    """The inversion kept in the folder if it is of this picture and these settings, else a new one, kept at once."""
    from .inversion import invert, load_inversion, picture_key
    from .models import model_key

    method, folder = options.inversion or "direct", options.out / "inversion"
    settings = {"steps": options.steps, "guidance_scale": options.guidance, "inversion_guidance_scale": 1.}
    if folder.is_dir():
        try:
            kept = load_inversion(folder, picture=picture_key(picture), prompt=options.source, method=method,
                                  model=model_key(pipe), **settings)
            print(f"the inversion in {folder} fits and is used again\n")
            return kept
        except (ValueError, FileNotFoundError) as error:
            print(f"inverting anew: {error}\n")
    inversion = invert(pipe, picture, options.source, method, **settings)
    inversion.save(folder)      # before the edit, which may fail on a misspelt word
    return inversion


def _save(folder: Path, result, pipe, picture, inversion) -> None:
    """Write everything about an edit into a folder, complete or not at all."""
    from .images import save_image, to_pil
    from .runtime import atomic_folder
    from .sampling import decode, encode_image
    from .viz import png

    with atomic_folder(folder) as new:
        result.save(new)
        (new / "maps.png").write_bytes(png(maps_figure(result), colors=None))
        if picture is not None:
            inversion.save(new / "inversion")
            save_image(picture, new / "original.png")
            save_image(to_pil(decode(pipe, encode_image(pipe, [picture])))[0], new / "autoencoder.png")


def maps_figure(result):
    """A row for each prompt: its picture, and the attention map of each of its words."""
    from .viz import grid, overlay

    rows, labels = [], []
    for i, (image, prompt) in enumerate(zip(result.images, result.attention.prompts)):
        words = list(dict.fromkeys(word.text for word in prompt.words if not word.is_mark))
        rows.append([image, *(overlay(image, result.attention.of(word, i)) for word in words)])
        labels.append(["picture", *words])
    widest = max(map(len, labels))
    captions = [line + [""] * (widest - len(line)) for line in labels]
    return grid([line + [None] * (widest - len(line)) for line in rows], captions=captions, size=128)


def main(argv: list[str] | None = None) -> None:
    """Run a command; what is wrong with its arguments is said without a traceback."""
    top = parser()
    options = top.parse_args(argv)
    try:
        with memory_advice():
            options.run(options)
    except (ValueError, TypeError, OSError) as error:
        top.exit(2, f"error: {error}\n")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        top.exit(2, f"error: {error}\nOn the command line these are --low-memory and --size.\n")
