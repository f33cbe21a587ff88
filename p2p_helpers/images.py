"""Pictures: read them from anywhere, bring them to a model's size and number format, save them."""
from __future__ import annotations

import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .runtime import atomic_write

if TYPE_CHECKING:
    import torch

__all__ = ["load_image", "fit", "size_for", "to_tensor", "to_array", "to_pil", "save_image"]

MAX_MEGAPIXELS = 64
MANY_MEGAPIXELS = 24        # from here on, resizing a picture is worth a word
MIN_SIDE = 64               # pixels; less cannot be enlarged into a picture
MAX_RATIO = 2               # of a picture's sides, for models that were trained on squares


def load_image(source: str | os.PathLike | bytes, size: int | tuple[int, int] | None = None) -> Image.Image:
    """Read a picture as RGB, upright and on white.

    Parameters
    ----------
    source : str, path or bytes
        A file, any URL that fsspec opens (https://, s3://, memory:// ...), or the bytes of a picture, for
        instance of an upload widget.
    size : int or (height, width), optional
        Crop and resize the picture to it, see `fit`; `fit(photo, size_for(photo, 512))` keeps a photo's shape.

    Warns
    -----
    UserWarning
        If the picture is animated (its first frame is taken), or many megapixels are resized.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `source`.
    ValueError
        If it is no picture, is cut short, has more than 64 megapixels or 32 bits a pixel; with a size also if a side
        is below 64 pixels.
    """
    name = f"the {len(source)} bytes given" if isinstance(source, bytes) else repr(str(source))
    data = source if isinstance(source, bytes) else _read(str(source))
    try:
        image = Image.open(BytesIO(data))
        _check_megapixels(image.size, name)
        frames = getattr(image, "n_frames", 1)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read; give a PNG, JPEG or WebP "
                         "(a telephone's HEIC has to be exported as JPEG)") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large a picture (more than {MAX_MEGAPIXELS} megapixels)") from error
    except (OSError, SyntaxError, EOFError) as error:   # what Pillow's readers raise in the middle of a file
        raise ValueError(f"{name} is a damaged picture or cut short ({error}); copy or download it again"
                         ) from error
    if frames > 1 and image.format != "MPO":        # in MPO, a camera's JPEG, further frames are previews
        warnings.warn(f"{name} has {frames} frames; the first one is taken", stacklevel=2)
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits a pixel, and nothing tells which value is white; save it as an 8-bit PNG")
    image = _on_white(ImageOps.exif_transpose(image))
    return image if size is None else fit(image, size)


def _read(source: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(source, "rb") as stream:
            return stream.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no picture at {source!r}") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"{source!r} is a folder; give the name of one picture in it") from error


def _check_megapixels(size: tuple[int, int], name: str) -> None:
    megapixels = size[0] * size[1] / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise ValueError(f"{name} has {megapixels:.0f} megapixels ({size[0]}x{size[1]}); "
                         f"make it smaller than {MAX_MEGAPIXELS} megapixels first")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):       # 16-bit grey: Pillow would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fit(image: Image.Image, size: int | tuple[int, int], multiple: int = 8) -> Image.Image:
    """Cut the largest centred part of the wanted shape out of a picture and resize it (Lanczos).

    Parameters
    ----------
    size : int or (height, width)
        In pixels, each a multiple of `multiple`: a latent of Stable Diffusion stands for 8 pixels.

    Warns
    -----
    UserWarning
        If the picture has 24 megapixels or more: what the model sees of it is much smaller.

    Raises
    ------
    ValueError
        If a side of `size` is no multiple, or one of the picture is below 64 pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    for name, side in (("height", height), ("width", width)):
        if side < multiple or side % multiple:
            below = max(side // multiple, 1) * multiple
            raise ValueError(f"{name} {side} is not a multiple of {multiple}; "
                             f"take {below} or {below + multiple}")
    given = f"{image.height} x {image.width}"
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"the picture is {given} pixels (height x width), too small to become {height} x {width}; "
                         f"give one with sides of {MIN_SIDE} pixels or more")
    if image.width * image.height >= MANY_MEGAPIXELS * 1e6:
        warnings.warn(f"the picture of {given} pixels (height x width) was resized to {height} x {width}; "
                      "cut out the part that matters first if it is too small now", stacklevel=2)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def size_for(image: Image.Image, side: int, multiple: int = 64) -> tuple[int, int]:
    """The height and width for `fit` that keep a picture's shape as well as multiples can.

    Parameters
    ----------
    side : int
        About the length of the shorter side in pixels: what the model was trained on, see `models.image_size`.
    multiple : int
        Of both sides. Stable Diffusion's UNet halves latents of 8 pixels three times, and 64 divides evenly; the
        bundled model halves them once, 16 is enough. Any multiple of 8 works, with uneven halves.

    Returns
    -------
    (height, width)
        The longer side is at most twice the shorter one; `fit` cuts off what is over.
    """
    if side < multiple:
        raise ValueError(f"side {side} is less than the multiple {multiple}; take {multiple} or more")
    shorter = round(side / multiple) * multiple
    ratio = min(max(image.size) / min(image.size), MAX_RATIO)
    longer = round(shorter * ratio / multiple) * multiple
    return (longer, shorter) if image.height > image.width else (shorter, longer)


def to_tensor(images) -> torch.Tensor:
    """One or several pictures as float32 (B, 3, H, W) in [-1, 1], on the CPU: what the autoencoder takes."""
    import torch

    array = to_array(images)
    array = array if array.ndim == 4 else array[None]                           # (B, H, W, 3)
    return torch.from_numpy(array.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1   # (B, 3, H, W)


def to_array(images) -> np.ndarray:
    """One picture as uint8 (H, W, 3), several as (B, H, W, 3).

    Takes PIL images, tensors (3, H, W) or (B, 3, H, W) in [-1, 1] (values beyond are clipped, as decoders
    overshoot), arrays (H, W, 3) or (B, H, W, 3), uint8 or float in [0, 1], and lists of these.
    """
    if isinstance(images, Image.Image):
        return np.asarray(images.convert("RGB"))
    if isinstance(images, (list, tuple)):
        arrays = [to_array(image) for image in images]
        if not arrays or len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 3:
            raise ValueError(f"a batch needs pictures of one size, not {[array.shape for array in arrays]}")
        return np.stack(arrays)
    if hasattr(images, "detach"):
        values = images.detach().float().cpu().numpy() / 2 + 0.5
        return _to_bytes(np.moveaxis(values, -3, -1).clip(0, 1))                # channels last
    return _to_bytes(np.asarray(images))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise ValueError(f"a picture has three colours, (H, W, 3) or as a tensor (3, H, W); "
                         f"this has, channels last, the shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"a picture is uint8 or float, not {array.dtype}")
    if not (array.min() >= 0 and array.max() <= 1):         # also wrong for NaN
        raise ValueError(f"a float picture lies in [0, 1]; this one goes from {array.min():.3g} "
                         f"to {array.max():.3g}")
    return (array * 255).round().astype(np.uint8)


def to_pil(images) -> Image.Image | list[Image.Image]:
    """A picture as a PIL image, or a batch as a list of them; takes what `to_array` takes."""
    array = to_array(images)
    return Image.fromarray(array) if array.ndim == 3 else [Image.fromarray(one) for one in array]


def save_image(image, path: str | os.PathLike) -> Path:
    """Save a picture as PNG: complete, or not at all."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"pictures are saved as PNG, without loss; name the file {path.stem + '.png'!r}, "
                         f"not {path.name!r}")
    array = to_array(image)
    if array.ndim != 3:
        raise ValueError(f"save_image saves one picture, not a batch of {len(array)}")
    with atomic_write(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")
    return path
