"""Controls for notebooks: an edit that is made again whenever a setting changes, a photo to upload, a mask to draw.

Built of what ipywidgets 7 and 8 share, without a canvas, so that they work on every hosted platform.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable
from html import escape
from io import BytesIO

import ipywidgets as W
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .images import load_image, to_array
from .prompt_to_prompt import EditResult, edit_prompt
from .viz import overlay

__all__ = ["MaskDrawing", "draw_mask", "edit_control", "upload_control"]

SIDE = 256                          # pixels of a picture on the page
SHAPES = ("ellipse", "rectangle")
SHAPE_COLOR = (0, 114, 178)         # viz outlines what is drawn already in another one


def edit_control(pipe, source: str, target: str, *, seed: int = 0, steps: int = 50, guidance_scale: float = 7.5,
                 weight_of: str = "", measure: Callable[[EditResult], str] | None = None) -> W.VBox:
    """Prompt-to-Prompt with its knobs: prompts, both tau, a word's weight, the seed.

    Parameters
    ----------
    weight_of : str, optional
        The word that the weight starts with.
    measure : function, optional
        What it returns about a result stands under the pictures.

    Returns
    -------
    ipywidgets.VBox
        Its children are the knobs, a message, and the two pictures; it works under ipywidgets 7 and 8.
    """
    text = {"layout": W.Layout(width="36em"), "continuous_update": False}
    share = {"min": 0, "max": 1, "step": .05, "continuous_update": False}
    knobs = {
        "source": W.Text(source, description="source", **text),
        "target": W.Text(target, description="target", **text),
        "cross_replace_steps": W.FloatSlider(.8, description="cross τ", **share),
        "self_replace_steps": W.FloatSlider(.4, description="self τ", **share),
        "word": W.Text(weight_of, description="word", placeholder="of the target", continuous_update=False),
        "weight": W.FloatSlider(1, min=-2, max=5, step=.25, description="weight", continuous_update=False),
        "seed": W.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed"),
    }
    pictures = [W.Image(format="png", width=SIDE, height=SIDE) for _ in range(2)]
    message = W.HTML()

    def update(change=None) -> None:
        settings = {name: knob.value for name, knob in knobs.items()}
        word, weight = settings.pop("word").strip(), settings.pop("weight")
        message.value = "working ..."
        try:
            result = edit_prompt(pipe, weights={word: weight} if word else None, steps=steps,
                                 guidance_scale=guidance_scale, record=None, **settings)
        except ValueError as error:         # a person is typing: say it where they look
            message.value = f"<b>{escape(str(error))}</b>"
            return
        for picture, image in zip(pictures, result.images):
            picture.value = _png(image)
        message.value = escape(measure(result)) if measure else "done"

    for knob in knobs.values():
        knob.observe(update, names="value")
    update()
    return W.VBox([*knobs.values(), message, W.HBox(pictures)])


def upload_control(on_picture: Callable[[Image.Image], object], *,
                   size: int | tuple[int, int] | None = None) -> W.VBox:
    """A button that uploads a photo and hands it on, upright and as RGB.

    Parameters
    ----------
    on_picture : function (PIL image)
        Called with every picture that could be read. Why one could not is said under the button, as are warnings.
    size : int or (height, width), optional
        As in `images.load_image`.

    Returns
    -------
    ipywidgets.VBox
        Its children are the button, a message, and the picture; it works under ipywidgets 7 and 8.
    """
    button = W.FileUpload(accept="image/*", multiple=False, description="a photo")
    message, preview = W.HTML(), W.Image(format="png", layout=W.Layout(max_width=f"{SIDE}px", display="none"))

    def update(change) -> None:
        if not change["new"]:               # emptied
            return
        name, content = _uploaded(change["new"])
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                image = load_image(content, size)
        except (ValueError, OSError) as error:      # a person chose the file: say it where they look
            message.value = f"<b>{escape(f'{name}: {error}')}</b>"
            return
        preview.value = _png(ImageOps.contain(image, (2 * SIDE, 2 * SIDE)))
        preview.layout.display = None
        lines = [f"{name}: {image.height} x {image.width} pixels", *(str(warning.message) for warning in warned)]
        message.value = "<br>".join(map(escape, lines))
        on_picture(image)

    button.observe(update, names="value")
    return W.VBox([button, message, preview])


def _uploaded(value) -> tuple[str, bytes]:
    """Name and content of the last file in a FileUpload's value: a dict under ipywidgets 7, a tuple under 8."""
    if isinstance(value, dict):
        name, entry = list(value.items())[-1]
        return name, bytes(entry["content"])
    return value[-1]["name"], bytes(value[-1]["content"])


def draw_mask(image, *, size: int = SIDE) -> MaskDrawing:
    """Controls that draw a mask on a picture out of ellipses and rectangles; see `MaskDrawing`.

    Parameters
    ----------
    image : one picture, anything that `images.to_array` takes
    size : int
        Pixels of the longer side of the preview on the page.

    Examples
    --------
    >>> drawing = draw_mask(photo)
    >>> drawing                         # in a cell of its own: draw
    >>> LocalBlend(mask=drawing.mask)
    """
    return MaskDrawing(image, size)


class MaskDrawing(W.VBox):
    """Knobs for a shape, buttons that add it to a mask or remove it, and a preview; `mask` is the result."""

    def __init__(self, image, size: int = SIDE):
        picture = to_array(image)
        if picture.ndim != 3:
            raise ValueError(f"draw_mask takes one picture, not a batch of {len(picture)}")
        self._mask = np.zeros(picture.shape[:2], bool)                              # (H, W)
        self._picture = ImageOps.contain(Image.fromarray(picture), (size, size))
        percent = {"max": 100, "layout": W.Layout(width="24em")}
        self._knobs = {
            "shape": W.Dropdown(options=SHAPES, description="shape"),
            "x": W.IntSlider(50, description="centre x %", **percent),
            "y": W.IntSlider(50, description="centre y %", **percent),
            "width": W.IntSlider(40, min=1, description="width %", **percent),
            "height": W.IntSlider(40, min=1, description="height %", **percent),
        }
        actions = {"add": lambda mask, shape: mask | shape, "remove": lambda mask, shape: mask & ~shape,
                   "clear": lambda mask, shape: np.zeros_like(mask)}
        buttons = [self._button(name, action) for name, action in actions.items()]
        self._preview = W.Image(format="png", width=self._picture.width, height=self._picture.height)
        self._message = W.HTML()
        super().__init__([*self._knobs.values(), W.HBox(buttons), self._preview, self._message])
        for knob in self._knobs.values():
            knob.observe(self._show, names="value")
        self._show()

    @property
    def mask(self) -> np.ndarray:
        """What has been drawn so far: bool (H, W) in pixels of the picture."""
        return self._mask.copy()

    def _button(self, name: str, action: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> W.Button:
        def change(button) -> None:
            settings = {name: knob.value for name, knob in self._knobs.items()}
            self._mask = action(self._mask, _shape_mask(self._mask.shape, **settings))
            self._show()

        button = W.Button(description=name)
        button.on_click(change)
        return button

    def _show(self, change=None) -> None:
        """Draw the mask, and the outline of the shape that the knobs describe."""
        shown = overlay(self._picture, self._mask) if self._mask.any() else to_array(self._picture)
        shown = Image.fromarray(shown)
        _outline(shown, **{name: knob.value for name, knob in self._knobs.items()})
        self._preview.value = _png(shown)
        self._message.value = (f"{self._mask.mean():.1%} of the picture" if self._mask.any()
                               else "nothing is drawn yet: move the outline, then press add")


def _shape_mask(size: tuple[int, int], shape: str, x: float, y: float, width: float, height: float) -> np.ndarray:
    """The pixels of a picture of a size (H, W) whose centres lie in an ellipse or a rectangle: bool (H, W).

    The centre x, y is measured from the top left corner, in percent of the picture's width (x, width) and height.
    """
    rows, columns = ((np.arange(side) + .5) / side * 100 for side in size)          # percent
    across = np.abs(columns - x)[None] / (width / 2)                                # (1, W), 1 on the edge
    down = np.abs(rows - y)[:, None] / (height / 2)                                 # (H, 1)
    return across**2 + down**2 <= 1 if shape == "ellipse" else (across <= 1) & (down <= 1)


def _outline(picture: Image.Image, shape: str, x: float, y: float, width: float, height: float) -> None:
    """Draw the outline of a shape on a picture; the numbers as in `_shape_mask`."""
    across, down = picture.width / 100, picture.height / 100
    box = [(x - width / 2) * across, (y - height / 2) * down, (x + width / 2) * across, (y + height / 2) * down]
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "ellipse" else draw.rectangle)(box, outline=SHAPE_COLOR, width=2)


def _png(image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
