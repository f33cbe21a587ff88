"""Render the sprites of Sticker World from the npm packages of the emoji sets (needed by nobody but maintainers).

    npm install @iconify-json/noto@1.2.9 @iconify-json/fluent-emoji@1.2.7 && pip install resvg_py==0.5.0
    python -m p2p_helpers.stickers.make_sprites node_modules/@iconify-json data/stickers
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from .scenes import KINDS

SETS = {"noto": "noto", "fluent": "fluent-emoji"}       # our folder, the npm package
HEIGHT = 192


def draw_icon(icons: dict, name: str) -> Image.Image:
    """Render one icon of an Iconify set, cropped to what is drawn, straight alpha."""
    import resvg_py

    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>')
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=HEIGHT, height=HEIGHT))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    rows, columns = np.where(np.asarray(image)[..., 3] > 8)
    return image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", type=Path, help="the folder node_modules/@iconify-json")
    parser.add_argument("out", type=Path, help="data/stickers")
    args = parser.parse_args()
    for folder, package in SETS.items():
        icons = json.loads((args.packages / package / "icons.json").read_text())
        (args.out / folder).mkdir(parents=True, exist_ok=True)
        for name in sorted({getattr(kind, folder) for kind in KINDS.values()}):
            image = draw_icon(icons, name)
            image.quantize(256, method=Image.Quantize.FASTOCTREE).save(args.out / folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
