"""Controls for notebooks: an edit that is made again whenever a setting changes."""
from __future__ import annotations

from collections.abc import Callable
from html import escape
from io import BytesIO

import ipywidgets as W

from .prompt_to_prompt import EditResult, edit_prompt

__all__ = ["edit_control"]

SIDE = 256      # pixels of a picture on the page


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


def _png(image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
