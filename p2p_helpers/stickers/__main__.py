"""Draw captions: one row per caption, one column per seed.

    python -m p2p_helpers.stickers "a red car on the road" "a blue car on the road" --seeds 8 --out sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..images import save_image
from .captions import parse
from .renderer import render
from .sheets import tile


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m p2p_helpers.stickers", description=__doc__.splitlines()[0])
    parser.add_argument("captions", nargs="+", help='such as "a photo of a cat on the grass"')
    parser.add_argument("--seeds", type=int, default=8, help="columns (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of a picture in pixels (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args(arguments)
    try:
        rows = [[render(parse(text, seed), options.size).image for seed in range(options.seeds)]
                for text in options.captions]
    except ValueError as error:
        parser.error(str(error))
    save_image(tile(rows), options.out)
    print(f"{len(rows)} x {options.seeds} pictures in {options.out}")


if __name__ == "__main__":
    main()
