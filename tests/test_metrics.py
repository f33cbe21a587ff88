import math

import numpy as np
import pytest
from PIL import Image

from p2p_helpers.metrics import background_psnr, background_psnr_zero_filled, mask_iou, psnr, ssim

RNG = np.random.default_rng(0)


def picture(seed, shape=(32, 48, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def slow_psnr(a, b, data_range, pixels):
    errors = [(float(a[y, x, c]) - float(b[y, x, c]))**2 for y, x in pixels for c in range(a.shape[2])]
    return 10 * math.log10(data_range**2 / (sum(errors) / len(errors)))


def test_psnr_against_a_loop():
    a, b = picture(0), picture(1)
    everywhere = list(np.ndindex(a.shape[:2]))
    assert psnr(a, b) == pytest.approx(slow_psnr(a, b, 255, everywhere))
    assert psnr(Image.fromarray(a), b) == psnr(a, b)
    assert psnr(a / 255, b / 255, data_range=1) == pytest.approx(psnr(a, b))
    assert psnr(a / 127.5 - 1, b / 127.5 - 1, data_range=2) == pytest.approx(psnr(a, b))


def test_one_grey_level_is_48_db_and_uint8_does_not_wrap():
    a = np.full((16, 16, 3), 100, np.uint8)
    assert psnr(a, a + 1) == psnr(a + 1, a) == pytest.approx(20 * math.log10(255))
    assert psnr(a, a) == float("inf")


def test_ssim():
    a, b = picture(0), picture(1)
    assert ssim(a, a) == pytest.approx(1) and ssim(a, b) < 0.1
    assert ssim(a / 255, b / 255, data_range=1) == pytest.approx(ssim(a, b))
    # a constant shift changes the luminance term alone: (2 m n + c) / (m^2 + n^2 + c), c = (0.01 * 255)^2
    m, n, c = 100, 120, (0.01 * 255)**2
    flat = np.full((16, 16), m, np.uint8)
    assert ssim(flat, flat + 20) == pytest.approx((2 * m * n + c) / (m**2 + n**2 + c))


def test_background_against_loops():
    a, b = picture(0), picture(1)
    mask = np.zeros((32, 48), bool)
    mask[4:20, 10:40] = True
    outside = [(y, x) for y, x in np.ndindex(mask.shape) if not mask[y, x]]
    cropped = background_psnr(a, b, mask)
    assert cropped == pytest.approx(slow_psnr(a, b, 255, outside))
    zeroed = [np.where(mask[..., None], 0, image).astype(np.uint8) for image in (a, b)]
    filled = background_psnr_zero_filled(a, b, mask)
    assert filled == pytest.approx(psnr(*zeroed))
    assert filled - cropped == pytest.approx(-10 * math.log10(len(outside) / mask.size))
    assert background_psnr(a[..., 0], b[..., 0], mask) == pytest.approx(
        background_psnr(a[..., :1], b[..., :1], mask.astype(int)))


def test_background_ignores_the_edit():
    a, mask = picture(0), np.zeros((32, 48), bool)
    mask[:16] = True
    b = np.where(mask[..., None], picture(1), a)
    assert background_psnr(a, b, mask) == background_psnr_zero_filled(a, b, mask) == float("inf")
    assert background_psnr(a, b, ~mask) < 10


def test_mask_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert mask_iou(a, b) == 1
    a[:, :2], b[:, 1:3] = True, True
    assert mask_iou(a, b) == pytest.approx(1 / 3) and mask_iou(a, a) == 1 and mask_iou(a, ~a) == 0
    assert mask_iou(a.astype(np.float32), b) == pytest.approx(1 / 3)


@pytest.mark.parametrize("call, message", [
    (lambda: psnr(picture(0), picture(0, (32, 40, 3))), r"differ in shape: \(32, 48, 3\) and \(32, 40, 3\)"),
    (lambda: psnr(picture(0), picture(0) / 255), "number format: uint8 and float64"),
    (lambda: psnr(picture(0) / 255, picture(1) / 255), "data_range must be given"),
    (lambda: ssim(picture(0, (8, 8, 3)), picture(0, (8, 8, 3))), "11 x 11"),
    (lambda: background_psnr(picture(0), picture(1), np.ones((32, 48), bool)), "covers the whole picture"),
    (lambda: background_psnr(picture(0), picture(1), np.ones((16, 24), bool)), "does not have the size"),
    (lambda: background_psnr(picture(0), picture(1), np.full((32, 48), 0.5)), "put a threshold"),
    (lambda: mask_iou(np.zeros((4, 4)), np.zeros((4, 5))), "differ in shape"),
    (lambda: mask_iou(np.full((4, 4), 2), np.zeros((4, 4))), "put a threshold")])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
