"""Soft masks: thresholds against their definitions, shapes that follow the picture, combinations, formats."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import viz
from p2p_helpers.masks import THRESHOLDS, SoftMask, as_mask, threshold_of
from p2p_helpers.metrics import mask_iou

RAMP = torch.linspace(0, 1, 101)[None]      # (1, 101)


def square(size=9, start=3, stop=6) -> SoftMask:
    """A square of ones."""
    values = torch.zeros(size, size)
    values[start:stop, start:stop] = 1
    return SoftMask(values, "a square")


# ---- thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, value, kept", [
    ("absolute", .3, 70), ("absolute", None, 50), ("quantile", .9, 10), ("quantile", None, 20), ("mean-ratio", 1.5, 63),
    ("mean-ratio", None, 25)])
def test_a_threshold_keeps_what_lies_above_it(method, value, kept):
    hard = SoftMask(RAMP, "a ramp").threshold(value, method)
    assert hard.is_hard and hard.values.sum() == kept
    assert torch.equal(hard.values, hard.values.sort().values)      # the upper end of the ramp


def test_mean_ratio_is_the_rule_of_diffusers():
    """There: divide by ratio times the mean, cut at 1, and keep what exceeds a half."""
    heat = torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) ** 4
    limit = 3 * heat.mean()
    theirs = (heat.clamp(0, limit) / limit) > .5
    assert torch.equal(SoftMask.scaled(heat, "noise").threshold(3., "mean-ratio").values.bool(), theirs)


def test_otsu_parts_two_heaps():
    heat = torch.cat([torch.full((8, 8), .2), torch.full((8, 4), .7)], 1)
    heat += .05 * torch.rand(heat.shape, generator=torch.Generator().manual_seed(0))
    assert SoftMask(heat, "heaps").threshold(method="otsu").values.mean(0).tolist() == [0] * 8 + [1] * 4
    assert not SoftMask(torch.zeros(2, 2)).threshold(method="otsu").values.any()


def test_outliers_are_cut_before_a_map_is_scaled():
    heat = torch.ones(10, 10)
    heat[0, 0] = 100.
    assert SoftMask.scaled(heat, "an outlier").values[5, 5] == pytest.approx(1 / 100)
    assert SoftMask.scaled(heat, "an outlier", clip=3).values[5, 5] == pytest.approx(1 / (3 * heat.mean().item()))


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_growing_and_shrinking_by_a_disc():
    grown = square().grow(2)
    assert grown.values[1, 2] == 1 and grown.values[1, 1] == 0 and grown.values[0, 4] == 0     # rounded corners
    assert square().grow(-1).values.sum() == 1 and square().grow(0).values.sum() == 9
    full = SoftMask(torch.ones(5, 5))
    assert full.grow(-2).share == 1                                 # the picture's edge is no edge of the mask


def test_closing_fills_holes_and_opening_removes_specks():
    holed = square(11, 2, 9).values.clone()
    holed[5, 5] = 0
    assert torch.equal(SoftMask(holed).close(1).values, SoftMask(holed).grow(1).grow(-1).values)
    assert SoftMask(holed).close(1).values[5, 5] == 1
    speck = square(11, 2, 7).values.clone()
    speck[9, 9] = 1
    opened = SoftMask(speck).open(1).values
    assert opened[9, 9] == 0 and opened[4, 4] == 1


def test_smoothing_is_a_gaussian_that_keeps_the_mean():
    values = torch.zeros(21, 21)
    values[10, 10] = 1
    smooth = SoftMask(values).smooth(2.).values
    distance = ((torch.arange(21) - 10.)[:, None] ** 2 + (torch.arange(21) - 10.)[None] ** 2)
    expected = torch.exp(-distance / 8)
    assert torch.allclose(smooth, expected / expected.sum(), atol=1e-4)
    assert torch.equal(SoftMask(values).smooth(0).values, values)


# ---- combinations and formats ---------------------------------------------------------------------------------------


def test_combinations():
    left, right = SoftMask([[1., .4, 0.]], "left"), SoftMask([[0., .5, 1.]], "right")
    assert (left | right).values.tolist() == [[1, .5, 1]]
    assert (left & right).values[0].tolist() == pytest.approx([0, .4, 0])
    assert (left - right).values[0].tolist() == pytest.approx([1, .4, 0])
    assert (~left).values[0].tolist() == pytest.approx([0, .6, 1])
    assert (left | right).origin == "left or right"


def test_masks_of_one_picture_combine_at_any_scale():
    assert torch.equal((square() | SoftMask(torch.zeros(18, 18))).values, square().values)
    with pytest.raises(ValueError, match="9 x 12 has not the shape of the picture, whose latents are 9 x 9"):
        square() | SoftMask(torch.zeros(9, 12))


def test_there_and_back_as_a_picture():
    mask = SoftMask(torch.arange(12.).reshape(3, 4) / 15, "steps")
    image = mask.to_pil(scale=5)
    assert image.size == (20, 15) and image.mode == "L"
    assert torch.allclose(as_mask(image, (3, 4)).values, mask.values, atol=.5 / 255)
    assert np.asarray(square().threshold()).dtype == bool and np.asarray(mask).dtype == np.float32
    assert mask_iou(square(), square().grow(1)) == pytest.approx(9 / 25)


def test_a_hard_mask_stays_hard_when_it_is_made_smaller():
    mask = np.zeros((4, 8), bool)
    mask[:2, :3] = True
    assert as_mask(mask, (2, 4)).values.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert as_mask(Image.fromarray(mask), (2, 4)).values.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert as_mask(.5 * mask, (2, 4)).values.tolist() == [[.5, .25, 0, 0], [0, 0, 0, 0]]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, message", [
    (torch.ones(2, 2, 2), r"\(h, w\), not \(2, 2, 2\)"), (torch.ones(0, 3), r"\(0, 3\)"),
    (2 * torch.ones(2, 2), r"lie in \[0, 1\], not from 2 to 2"), (torch.full((2, 2), torch.nan), "lie in")])
def test_what_is_no_mask(values, message):
    with pytest.raises(ValueError, match=message):
        SoftMask(values)


def test_bad_settings():
    with pytest.raises(ValueError, match="did you mean 'mean-ratio'"):
        threshold_of(RAMP, 3., "mean_ratio")
    assert set(THRESHOLDS) == {"absolute", "quantile", "mean-ratio", "otsu"}
    for method, value in (("absolute", 1.5), ("quantile", -.1), ("mean-ratio", -1.)):
        with pytest.raises(ValueError, match=f"value {value} of a threshold by {method}"):
            threshold_of(RAMP, value, method)
    with pytest.raises(ValueError, match="sigma -1 must be 0 or more"):
        square().smooth(-1)
    with pytest.raises(ValueError, match="0 everywhere"):
        SoftMask.scaled(torch.zeros(2, 2), "nothing")


def test_an_empty_or_full_mask_is_told_of():
    with pytest.warns(UserWarning, match="a drawing is empty: draw"):
        SoftMask(torch.zeros(2, 2), "a drawing").check("draw something")
    with pytest.warns(UserWarning, match="covers 100% of the picture"):
        SoftMask(torch.ones(2, 2)).check("draw less")


def test_figures_take_masks():
    picture = np.full((72, 72, 3), 200, np.uint8)
    hard, soft = viz.overlay(picture, square()), viz.overlay(picture, square().smooth(1.))
    assert np.array_equal(hard, viz.overlay(picture, square().values.bool())) and not np.array_equal(hard, soft)
    assert np.array_equal(soft, viz.overlay(picture, square().smooth(1.).values))
