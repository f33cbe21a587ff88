"""How far apart two pictures, or two masks, are."""
from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

__all__ = ["psnr", "ssim", "background_psnr", "background_psnr_zero_filled", "mask_iou"]


def psnr(a, b, *, data_range: float | None = None) -> float:
    """Peak signal-to-noise ratio, 10 log10(data_range^2 / MSE).

    Parameters
    ----------
    a, b : array, PIL image
        Of the same shape and number format.
    data_range : float, optional
        The distance between black and white. 255 for uint8; must be given for floats.

    Returns
    -------
    float
        In dB; infinite for equal pictures.

    Raises
    ------
    ValueError
        If the shapes or number formats differ, or floats come without a data_range.
    """
    a, b, data_range = _checked(a, b, data_range)
    return _psnr(a, b, data_range)


def ssim(a, b, *, data_range: float | None = None) -> float:
    """Mean structural similarity with the Gaussian window of Wang et al. 2004, averaged over the colours.

    Parameters are those of `psnr`; colours are last. Needs 11 x 11 pixels at least. 1 for equal pictures.
    """
    a, b, data_range = _checked(a, b, data_range)
    if a.ndim not in (2, 3) or min(a.shape[:2]) < 11:
        raise ValueError(f"ssim needs pictures (H, W) or (H, W, C) of 11 x 11 pixels at least, not {a.shape}")
    return float(structural_similarity(a, b, data_range=data_range, channel_axis=-1 if a.ndim == 3 else None,
                                       gaussian_weights=True, sigma=1.5, use_sample_covariance=False))


def background_psnr(a, b, mask, *, data_range: float | None = None) -> float:
    """PSNR over the pixels outside a mask alone: how well an edit kept what it should not touch.

    Parameters
    ----------
    a, b : array (H, W, C) or (H, W), PIL image
    mask : array (H, W) of bool
        True where the edit was meant to happen.

    Raises
    ------
    ValueError
        Also if the mask covers the whole picture, so that there is no background.
    """
    a, b, data_range = _checked(a, b, data_range)
    background = ~_mask_for(mask, a)
    if not background.any():
        raise ValueError("the mask covers the whole picture: there is no background to compare")
    return _psnr(a[background], b[background], data_range)                      # (pixels, C)


def background_psnr_zero_filled(a, b, mask, *, data_range: float | None = None) -> float:
    """The variant that papers report: the masked pixels are black in both pictures and count as equal.

    Its MSE is taken over the full image, hence it exceeds `background_psnr` by -10 log10(share of
    background) dB: 3 dB for a mask of half the picture. Parameters are those of `background_psnr`.
    """
    a, b, data_range = _checked(a, b, data_range)
    background = ~_mask_for(mask, a)
    background = background.reshape(background.shape + (1,) * (a.ndim - 2))     # (H, W, 1)
    return _psnr(a * background, b * background, data_range)


def mask_iou(a, b) -> float:
    """Intersection over union of two bool masks (H, W); 1 if both are empty."""
    a, b = _as_mask(a), _as_mask(b)
    if a.shape != b.shape:
        raise ValueError(f"the masks differ in shape: {a.shape} and {b.shape}")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def _psnr(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float(10 * np.log10(data_range**2 / mse)) if mse > 0 else float("inf")


def _checked(a, b, data_range: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        raise ValueError(f"the pictures differ in shape: {a.shape} and {b.shape}")
    if a.dtype != b.dtype:
        raise ValueError(f"the pictures differ in number format: {a.dtype} and {b.dtype}")
    if data_range is None and a.dtype != np.uint8:
        raise ValueError(f"data_range must be given for pictures of {a.dtype}: 1 for [0, 1], 2 for [-1, 1]")
    return a, b, 255.0 if data_range is None else float(data_range)


def _as_mask(mask) -> np.ndarray:
    mask = np.asarray(mask)
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"a mask is True and False alone; this one goes from {mask.min():.3g} to "
                         f"{mask.max():.3g}: put a threshold on it first")
    return mask.astype(bool)


def _mask_for(mask, picture: np.ndarray) -> np.ndarray:
    mask = _as_mask(mask)
    if mask.shape != picture.shape[:2]:
        raise ValueError(f"the mask {mask.shape} does not have the size of the pictures {picture.shape[:2]}")
    return mask
