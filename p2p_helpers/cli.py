"""The command line: ``python -m p2p_helpers edit --help``."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

EXAMPLES = """examples:
  python -m p2p_helpers edit --source "a big red car" --target "a big blue motorcycle" --seed 3 --out out/
  python -m p2p_helpers edit --source "a house in the fog" --reweight fog=3 --reweight house=-1 --out out/
  python -m p2p_helpers edit --source "a cat on the grass" --target "a dog on the grass" \\
      --target "a tiger on the grass" --blend cat --cross 0.6 --self 0.2 --out out/
  python -m p2p_helpers edit --model sd15 --source "a squirrel eating a burger" \\
      --target "a lion eating a burger" --out out/
"""


def parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    top = argparse.ArgumentParser(prog="python -m p2p_helpers", description="Text-driven image editing.")
    commands = top.add_subparsers(dest="command", required=True)
    edit = commands.add_parser("edit", help="Prompt-to-Prompt: edit a generated picture by its words", epilog=EXAMPLES,
                               formatter_class=argparse.RawDescriptionHelpFormatter)
    edit.add_argument("--source", required=True, help="prompt of the picture to edit")
    edit.add_argument("--target", action="append", help="prompt of an edit; may be given several times")
    edit.add_argument("--reweight", action="append", type=_weight, default=[], metavar="WORD=C",
                      help="multiply a word's attention")
    edit.add_argument("--blend", action="append", metavar="WORD", help="change the picture only where this word is")
    edit.add_argument("--cross", type=float, default=.8,
                      help="part of the steps with the source's cross-attention (%(default)s)")
    edit.add_argument("--self", type=float, default=.4, dest="self_", help="the same for self-attention (%(default)s)")
    edit.add_argument("--model", help="a name such as sd15, a folder, or owner/name on the hub (the bundled one)")
    edit.add_argument("--steps", type=int, default=50)
    edit.add_argument("--guidance", type=float, default=7.5)
    edit.add_argument("--seed", type=int, default=0)
    edit.add_argument("--negative", default="", help="negative prompt")
    edit.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), default=(None, None))
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
    from .edits import explain
    from .models import load
    from .prompt_to_prompt import edit_prompt
    from .runtime import atomic_write, measure, setup
    from .viz import png

    if not options.target and not options.reweight:
        raise ValueError("nothing to edit: give --target or --reweight")
    runtime = setup(options.seed)
    pipe = load(options.model, runtime=runtime, low_memory=options.low_memory)
    with measure(runtime.device) as cost:
        result = edit_prompt(pipe, options.source, options.target, seed=options.seed, weights=dict(options.reweight),
                             cross_replace_steps=options.cross, self_replace_steps=options.self_, blend=options.blend,
                             steps=options.steps, guidance_scale=options.guidance, negative_prompt=options.negative,
                             height=options.size[0], width=options.size[1], low_memory=options.low_memory)
    result.save(options.out)
    with atomic_write(options.out / "maps.png") as file:
        file.write_bytes(png(maps_figure(result)))
    print("\n\n".join(str(explain(edit)) for edit in result.edits))
    print(f"\n{cost.report()}\nwrote to {options.out}: {', '.join(sorted(os.listdir(options.out)))}")


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
        options.run(options)
    except (ValueError, TypeError, OSError) as error:
        top.exit(2, f"error: {error}\n")
