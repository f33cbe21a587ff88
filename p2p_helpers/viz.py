"""Figures: rows and grids of pictures with titles and captions, overlays, heat maps and curves.

Figures belong to no pyplot state, so nothing is shown twice or left open. `show` displays
one in a notebook, as PNG alone.
"""
from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from .images import to_array

__all__ = ["row", "grid", "contact_sheet", "overlay", "heatmap", "curve", "show", "png", "COLORS"]

DPI = 100
TILE = 256              # pixels that the longer side of a picture is brought near
GAP = 8                 # pixels between pictures
FONT = 9                # points
LINE = 16               # pixels of one line of text
CHARACTER = 7.3         # pixels of one character, generously
TEXT, FAINT = "#333333", "#777777"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")     # Okabe & Ito: for all eyes


def row(images: Sequence, titles: Sequence[str] | None = None, captions: Sequence[str] | None = None, *,
        size: int = TILE) -> Figure:
    """Pictures side by side, with a title above and a caption (its metrics) below each; see `grid`."""
    return grid([images], column_labels=titles, captions=None if captions is None else [captions], size=size)


def grid(rows: Sequence[Sequence], row_labels: Sequence[str] | None = None,
         column_labels: Sequence[str] | None = None, captions: Sequence[Sequence[str]] | None = None, *,
         size: int = TILE) -> Figure:
    """Rows of pictures of one size, with labels left of the rows and above the columns.

    Parameters
    ----------
    rows : list of lists
        Anything that `images.to_array` takes, masks (H, W) of bool, or maps (H, W) of float, drawn from
        their least value to their greatest. Rows may be shorter than the longest; None leaves a place empty.
    captions : list of lists of str, optional
        Under each picture.
    size : int
        Pixels of the longer side of a picture in the figure, about: small pictures are enlarged by a whole
        factor, pixel by pixel, large ones are made smaller.
    """
    tiles = [[None if image is None else _resize(_picture(image), size) for image in images]
             for images in rows]
    columns = max((len(images) for images in tiles), default=0)
    if not columns:
        raise ValueError("there is no picture to draw")
    _check_count("row_labels", row_labels, len(tiles), "rows")
    _check_count("column_labels (titles)", column_labels, columns, "columns")
    _check_count("captions", captions, len(tiles), "rows")
    shapes = [tile.shape for images in tiles for tile in images if tile is not None]
    height, width = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    characters = int(width / CHARACTER)
    titles = [_wrap(label, characters) for label in column_labels or [""]]
    notes = [[_wrap(note, characters) for note in line] for line in captions or [[""]] * len(tiles)]
    sides = [_wrap(label, 18) for label in row_labels or [""] * len(tiles)]
    page = _Page(top=_text_height(titles), left=_text_width(sides), cell_height=height, cell_width=width,
                 below=[_text_height(line) for line in notes], columns=columns)
    for r, images in enumerate(tiles):
        page.text(page.left - GAP, page.y(r) + height / 2, sides[r], ha="right", va="center")
        for c, tile in enumerate(images):
            if tile is not None:
                page.image(tile, page.x(c), page.y(r))
        for c, note in enumerate(notes[r]):
            page.text(page.x(c) + width / 2, page.y(r) + height + 3, note, ha="center", va="top", color=FAINT)
    for c, title in enumerate(titles):
        page.text(page.x(c) + width / 2, page.top - 4, title, ha="center", va="bottom")
    return page.figure


class _Page:
    """A figure laid out in pixels from its top left corner, so that pictures keep their pixels."""

    def __init__(self, *, top: int, left: int, cell_height: int, cell_width: int, below: list[int],
                 columns: int):
        self.top, self.left, self.cell_width = top, left, cell_width
        heights = [cell_height + GAP + text for text in below]
        self.starts = [top + sum(heights[:r]) for r in range(len(heights) + 1)]
        self.width = left + columns * (cell_width + GAP) - GAP
        self.height = self.starts[-1] - GAP
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")

    def x(self, column: int) -> int:
        return self.left + column * (self.cell_width + GAP)

    def y(self, row: int) -> int:
        return self.starts[row]

    def image(self, tile: np.ndarray, x: int, y: int) -> None:
        self.figure.figimage(tile, x, self.height - y - tile.shape[0], origin="upper")

    def text(self, x: float, y: float, text: str, color: str = TEXT, **alignment) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=FONT, color=color,
                         linespacing=1.25, **alignment)


def contact_sheet(images: Sequence, columns: int = 8, *, size: int = TILE // 2) -> Figure:
    """Many pictures, `columns` in a row."""
    images = list(images)
    return grid([images[i:i + columns] for i in range(0, len(images), columns)], size=size)


def overlay(image, heat, *, strength: float = 0.6) -> np.ndarray:
    """Lay a mask or a heat map over a picture.

    Parameters
    ----------
    image : anything that `images.to_array` takes
    heat : array or tensor (h, w)
        Bool: the picture outside the mask is dimmed and the mask outlined. Float: divided by its greatest
        value, enlarged smoothly and drawn hotter and more opaque where it is large; nothing below 0.
    strength : float
        Greatest opacity, between 0 and 1.

    Returns
    -------
    array of uint8, (H, W, 3)
    """
    picture, heat = to_array(image), _as_map(heat)
    if picture.ndim != 3:
        raise ValueError("overlay takes one picture, not a batch")
    height, width = picture.shape[:2]
    if heat.dtype == bool:
        mask = np.asarray(Image.fromarray(heat).resize((width, height), Image.Resampling.NEAREST))
        dimmed = np.where(mask[..., None], picture, picture * (1 - strength) + 255 * strength)
        return np.where(_outline(mask)[..., None], (213, 94, 0), dimmed).round().astype(np.uint8)
    heat = np.clip(heat, 0, None) / max(heat.max(), np.finfo(np.float32).tiny)
    small = Image.fromarray(heat.astype(np.float32))
    heat = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    opacity = strength * np.sqrt(heat)[..., None]
    colors = 255 * colormaps["inferno"](heat)[..., :3]
    return (picture * (1 - opacity) + colors * opacity).round().astype(np.uint8)


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a neighbour outside it."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def heatmap(values, xlabels: Sequence[str] | None = None, ylabels: Sequence[str] | None = None, *,
            title: str = "", xlabel: str = "", ylabel: str = "") -> Figure:
    """A matrix as coloured cells, small ones with their numbers: an alignment, attention between words."""
    values = _as_map(values).astype(float)
    rows, columns = values.shape
    _check_count("xlabels", xlabels, columns, "columns")
    _check_count("ylabels", ylabels, rows, "rows")
    side = max(0.3, min(0.6, 6 / max(rows, columns)))
    figure, axes = _axes(1.6 + side * columns, 1.2 + side * rows, title, xlabel, ylabel)
    drawn = axes.imshow(values, cmap="viridis", aspect="equal")
    figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=FONT - 1)
    if xlabels is not None:
        axes.set_xticks(range(columns), xlabels, rotation=60, ha="right", rotation_mode="anchor")
    if ylabels is not None:
        axes.set_yticks(range(rows), ylabels)
    if values.size <= 100:
        middle = (values.min() + values.max()) / 2
        for (r, c), value in np.ndenumerate(values):
            axes.text(c, r, f"{value:.2g}", ha="center", va="center", fontsize=FONT - 2,
                      color="black" if value > middle else "white")
    return figure


def curve(x, ys: Sequence, labels: Sequence[str] | None = None, xlabel: str = "", ylabel: str = "", *,
          title: str = "", log: bool = False) -> Figure:
    """One or several lines over the same x; `ys` is a list of them, `log` a logarithmic y axis."""
    ys = [np.asarray(y, dtype=float) for y in ys]
    x = np.asarray(x, dtype=float)
    wrong = [y.shape for y in ys if y.shape != x.shape]
    if wrong:
        raise ValueError(f"every line of ys needs the {x.shape} values of x, one has {wrong[0]}; "
                         "a single line is written [y]")
    _check_count("labels", labels, len(ys), "lines")
    figure, axes = _axes(6, 3.4, title, xlabel, ylabel)
    for i, y in enumerate(ys):
        style = ("-", "--", ":")[i // len(COLORS) % 3]
        axes.plot(x, y, color=COLORS[i % len(COLORS)], linewidth=1.8, linestyle=style,
                  label=None if labels is None else labels[i])
    if log:
        axes.set_yscale("log")
    if (x == x.round()).all():
        axes.xaxis.get_major_locator().set_params(integer=True)     # no half steps
    axes.grid(color="#e5e5e5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if labels is not None:
        axes.legend(frameon=False, fontsize=FONT)
    return figure


def show(figure: Figure, *, colors: int | None = 256) -> None:
    """Display a figure in a notebook as one PNG, reduced to `colors` colours so that notebooks stay small."""
    from IPython.display import Image as Png
    from IPython.display import display

    display(Png(data=png(figure, colors=colors)))


def png(figure: Figure, *, colors: int | None = 256) -> bytes:
    """A figure as the bytes of a PNG; with None all colours are kept."""
    drawn, packed = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB")
    if colors is not None:
        image = image.quantize(colors, kmeans=1, dither=Image.Dither.NONE)     # the median cut alone tints dark pixels
    image.save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def _axes(width: float, height: float, title: str, xlabel: str, ylabel: str):
    """A figure with one set of axes in the common style; sizes in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=FONT + 1, color=TEXT)
    axes.set_xlabel(xlabel, fontsize=FONT, color=TEXT)
    axes.set_ylabel(ylabel, fontsize=FONT, color=TEXT)
    axes.tick_params(labelsize=FONT - 1, colors=TEXT)
    return figure, axes


def _picture(image) -> np.ndarray:
    """A picture, mask or map as uint8 (H, W, 3)."""
    if isinstance(image, Image.Image) or np.ndim(image) != 2:
        picture = to_array(image)
        if picture.ndim != 3:
            raise ValueError(f"one place holds one picture, not a batch of {len(picture)}; "
                             "write row(list_of_pictures)")
        return picture
    values = _as_map(image)
    if values.dtype == bool:
        return np.repeat(values[..., None].astype(np.uint8) * 255, 3, axis=2)
    spread = max(values.max() - values.min(), np.finfo(np.float32).tiny)
    return (colormaps["viridis"]((values - values.min()) / spread)[..., :3] * 255).round().astype(np.uint8)


def _as_map(values) -> np.ndarray:
    if hasattr(values, "detach"):                   # a tensor, perhaps on a device, perhaps bfloat16
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    values = np.asarray(values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a mask or map is (H, W), not {values.shape}")
    if values.dtype == bool:
        return values
    if not np.isfinite(values).all():
        raise ValueError("the map holds values that are not finite")
    return values.astype(np.float64)


def _resize(picture: np.ndarray, size: int) -> np.ndarray:
    """Enlarge by a whole factor, pixel by pixel, or make smaller (Lanczos)."""
    longer = max(picture.shape[:2])
    if longer <= size:
        factor = size // longer
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = (max(1, round(side * size / longer)) for side in picture.shape[:2])
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def _check_count(name: str, given: Sequence | None, wanted: int, what: str) -> None:
    if given is not None and len(given) != wanted:
        raise ValueError(f"{name} has {len(given)} entries for {wanted} {what}")


def _wrap(text: str, characters: int) -> str:
    lines = [textwrap.wrap(line, max(characters, 8)) or [""] for line in str(text).split("\n")]
    return "\n".join(part for parts in lines for part in parts)


def _text_height(texts: Sequence[str]) -> int:
    lines = max((text.count("\n") + 1 for text in texts if text), default=0)
    return lines * LINE + (6 if lines else 0)


def _text_width(texts: Sequence[str]) -> int:
    longest = max((len(line) for text in texts for line in text.split("\n")), default=0)
    return int(longest * CHARACTER) + GAP + 4 if longest else 0
