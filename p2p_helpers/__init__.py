"""Text-driven image editing with diffusion models: the toolkit behind the course's notebooks.

The names that the lessons use are loaded on first use, so that importing the package costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

_HOMES = {"setup": "runtime", "measure": "runtime", "load": "models", "load_image": "images", "generate": "sampling",
          "initial_latents": "sampling", "invert": "inversion", "reconstruct": "inversion",
          "SoftMask": "masks", "estimate_mask": "diffedit", "fast_diffedit": "diffedit",
          "swap": "edits", "refine": "edits", "mix": "edits", "reweight": "edits", "explain_edit": "edits",
          "control": "attention", "Record": "recording", "LocalBlend": "blending", "edit_prompt": "prompt_to_prompt",
          "Scene": "stickers", "Thing": "stickers", "caption": "stickers", "parse": "stickers", "render": "stickers",
          "replace": "stickers", "changed_mask": "stickers", "read": "stickers.oracle",
          "agreement": "stickers.agreement", "knows": "stickers.agreement",
          "score": "stickers.agreement"}

__all__ = list(_HOMES)

try:
    __version__ = version("p2p-helpers")
except PackageNotFoundError:        # a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
