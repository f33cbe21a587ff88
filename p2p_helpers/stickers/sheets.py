"""Sheets of pictures as one array, for files (figures in notebooks are made by viz)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["tile"]


def tile(rows: Sequence[Sequence]) -> np.ndarray:
    """Put rows of equally many pictures (H, W, 3) of one size side by side: uint8 (rows * H, columns * W, 3)."""
    return np.concatenate([np.concatenate([np.asarray(picture) for picture in row], axis=1) for row in rows])
