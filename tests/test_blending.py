"""LocalBlend: its mask against loops over pixels, and a whole run against the reference."""
import math

import numpy as np
import pytest
import reference
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from test_attention import distance, noise, paint, painted, self_pixels

from p2p_helpers.attention import control
from p2p_helpers.blending import LocalBlend, blend, blend_mask, given_mask, word_selectors
from p2p_helpers.masks import SoftMask
from p2p_helpers.edits import refine, swap
from p2p_helpers.prompts import read_prompt
from p2p_helpers.sampling import generate

CAT, DOG, OX = "a cat on the beach", "a dog on the beach", "an ox on the beach"


@pytest.fixture(scope="module")
def prompts(tiny_pipe):
    return [read_prompt(tiny_pipe.tokenizer, text) for text in (CAT, DOG, OX)]


def random_maps(count, height, width, seed=0):
    return torch.rand(count, 2, height, width, generator=torch.Generator().manual_seed(seed)) ** 3


def mask_by_hand(maps, size, settings):
    """The reference's mask of maps (P, 2, h, w): as if they were attention to two tokens."""
    grid, count = maps.shape[-2:], len(maps)
    by_hand = reference.Blend([[0]] * count, [[1]] * count, tuple(grid), threshold=settings.threshold,
                              subtract_threshold=settings.subtract_threshold, soft=settings.soft)
    by_hand.seen.append(maps.flatten(2).transpose(1, 2))                    # (P, h w, 2)
    by_hand.apply(0, torch.zeros(count, 1, *size))
    return by_hand.masks[0]


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("grid, size", [((4, 4), (4, 4)), ((4, 6), (8, 12)), ((3, 5), (5, 9))])
def test_a_mask_equals_loops_over_pixels(count, grid, size, soft):
    """With 3 prompts and more Google's stable notebook fails."""
    settings = LocalBlend("cat", subtract="x", threshold=.6, subtract_threshold=.7, soft=soft)
    maps = random_maps(count, *grid)
    mask = blend_mask(maps, size, settings)
    assert mask.shape == (count, 1, *size)
    assert torch.allclose(mask[:, 0], mask_by_hand(maps, size, settings), atol=1e-6)
    assert 0 < mask.mean() < 1


def test_a_mask_by_hand():
    """One spot per prompt: each widens to 3 x 3 where it may blend, stays one pixel where it must not, and the
    source's region joins the target's."""
    maps = torch.zeros(2, 2, 5, 5)
    maps[0, 0, 1, 1], maps[1, 0, 3, 3], maps[1, 1, 3, 3] = .02, .5, .1
    source, target = blend_mask(maps, (5, 5), LocalBlend("cat"))[:, 0]
    expected = torch.zeros(5, 5)
    expected[:3, :3] = 1
    assert torch.equal(source, expected)
    expected[2:, 2:], expected[3, 3] = 1, 0
    assert torch.equal(target, expected)


def test_nothing_to_blend_and_nothing_to_subtract_is_no_nan():
    """Google's code divides 0 by 0 for a word that it did not find."""
    maps = random_maps(2, 4, 4)
    maps[:, 1] = 0
    with_nothing_to_subtract = blend_mask(maps, (4, 4), LocalBlend("cat", subtract_threshold=0))
    assert with_nothing_to_subtract.any()
    assert not blend_mask(torch.zeros(2, 2, 4, 4), (4, 4), LocalBlend("cat")).any()


def test_a_soft_mask_is_a_ramp_around_the_threshold():
    maps = torch.zeros(1, 2, 1, 9)
    maps[0, 0, 0] = torch.tensor([1., 0, 0, .15, 0, 0, .3, 0, 0])       # pooled: 1 1 .15 .15 .15 .3 .3 .3 0
    mask = blend_mask(maps, (1, 9), LocalBlend("cat", threshold=.3, soft=True))
    assert torch.allclose(mask[0, 0, 0], torch.tensor([1, 1, 0, 0, 0, .5, .5, .5, 0]), atol=1e-5)


def test_blend_keeps_the_source_outside_the_mask():
    latents, mask = torch.randn(3, 4, 2, 2), torch.zeros(3, 1, 2, 2)
    mask[1, 0, 0, 0], mask[2, 0, 1] = 1, .25
    blended = blend(latents, mask)
    assert torch.equal(blended[0], latents[0]) and torch.equal(blended[1, :, 1], latents[0, :, 1])
    assert torch.allclose(blended[1, :, 0, 0], latents[1, :, 0, 0])
    assert torch.allclose(blended[2, :, 1], .75 * latents[0, :, 1] + .25 * latents[2, :, 1])


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_of_every_prompt_pick_their_tokens(prompts):
    settings = LocalBlend(("cat", ("dog", "beach"), "ox"), subtract=("", "the", ["on", "the"]))
    selectors = word_selectors(settings, prompts)
    picked = [[selectors[p, :, column].nonzero().flatten().tolist() for column in (0, 1)] for p in range(3)]
    assert picked == [[[2], []], [[2, 5], [4]], [[2, 3], [4, 5]]]
    assert set(selectors.unique().tolist()) == {0., 1.}


def test_one_word_serves_all_prompts(prompts):
    selectors = word_selectors(LocalBlend("beach"), prompts)
    assert [row.nonzero().flatten().tolist() for row in selectors[..., 0]] == [[5], [5], [6]]
    assert not selectors[..., 1].any()


@pytest.mark.parametrize("arguments, message", [
    (dict(words="cat"), "word 'cat' is not in the prompt 'a dog on the beach'"),
    (dict(words=("cat", "dog")), "LocalBlend words has 2 entries for 3 prompts; give one for each: .*'a cat on"),
    (dict(words=("cat", "", "ox")), "LocalBlend words has no word for the prompt 'a dog on the beach'"),
    (dict(words=("cat", (), "ox")), "LocalBlend words has no word for the prompt 'a dog on the beach'"),
    (dict(words="beach", subtract=("the",)), "LocalBlend subtract has 1 entries for 3 prompts"),
    (dict(words="beach", subtract="sea"), "word 'sea' is not in the prompt")])
def test_words_that_do_not_fit_the_prompts(prompts, arguments, message):
    """diffusers' README passes a word too many and one that is not in the source; zip drops it silently."""
    with pytest.raises(ValueError, match=message):
        word_selectors(LocalBlend(**arguments), prompts)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "either words or a mask"), (dict(words="cat", mask=np.ones((2, 2))), "either words or a mask"),
    *((dict([("words", "cat"), (name, value)]), f"{name} .* lies outside")
      for name in ("threshold", "subtract_threshold", "start_blend") for value in (-.1, 1.1, math.nan))])
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalBlend(**arguments)


# ---- a mask that is given -------------------------------------------------------------------------------------------


def test_a_given_mask_is_brought_to_the_latents_size():
    mask = np.zeros((4, 8))
    mask[:2, :3] = .8
    soft = given_mask(LocalBlend(mask=mask), 2, (2, 4))
    assert soft.shape == (2, 1, 2, 4) and torch.allclose(soft[1, 0], torch.tensor([[.8, .4, 0, 0], [0, 0, 0, 0]]))
    for hard in (mask > 0, SoftMask(mask > 0), SoftMask(mask > 0).to_pil(scale=3)):
        assert given_mask(LocalBlend(mask=hard), 2, (2, 4))[0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    each = given_mask(LocalBlend(mask=torch.stack([torch.zeros(2, 4), torch.ones(2, 4)])), 2, (2, 4))
    assert each.mean((1, 2, 3)).tolist() == [0, 1]


@pytest.mark.parametrize("mask, message", [
    (np.ones((3, 2, 2)), "3 masks for 2 prompts"), (np.ones((2, 3)), "2 x 3 has not the shape of the picture"),
    (2 * np.ones((2, 2)), "lie in"), (-np.ones((2, 2)), "lie in"), (np.full((2, 2), np.nan), "lie in")])
def test_a_given_mask_that_does_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        given_mask(LocalBlend(mask=mask), 2, (2, 2))


# ---- under a pipeline -----------------------------------------------------------------------------------------------


SETTINGS = {
    "hard": dict(words=("cat", "dog", "cat"), threshold=.93),
    "soft": dict(words=("cat", "dog", "cat"), threshold=.7, soft=True),
    "subtract": dict(words=("cat", "dog", "cat"), subtract="beach", threshold=.72, subtract_threshold=.92),
    "late": dict(words=("cat", "dog", ("big", "cat")), threshold=.93, start_blend=.5),
}
TARGETS = [DOG, "a big cat on the beach"]
PLACES = {"cat": ([2], [2], [3]), "beach": ([5], [5], [6])}


def runs(pipe, settings, *, resolution=None, grid=(16, 16), **options):
    """A swap and an addition in one batch under LocalBlend, by the toolkit and by the reference."""
    half = dict(cross_replace_steps=.5, self_replace_steps=.5)
    edits = [swap(pipe, CAT, TARGETS[0], **half), refine(pipe, CAT, TARGETS[1], **half)]
    result, controller = painted(pipe, edits, blend=LocalBlend(**settings, resolution=resolution), **options)
    words = [[2], [2], [2, 3] if settings["words"][2] == ("big", "cat") else [3]]
    subtract = [[5], [5], [6]] if "subtract" in settings else [[], [], []]
    by_hand = reference.Blend(words, subtract, grid, settings.get("threshold"), settings.get("subtract_threshold", .3),
                              first_step=2 if settings.get("start_blend") == .5 else 1, soft="soft" in settings)
    pairs = [[(i, i) for i in range(5)], [(0, 0), (1, 2), (2, 3), (3, 4), (4, 5)]]
    targets = [reference.describe(pipe.tokenizer, CAT, text, pair, steps={0, 1}, self_steps={0, 1})
               for text, pair in zip(TARGETS, pairs)]
    with reference.reference_control(pipe, targets, self_pixels=self_pixels(pipe), blend=by_hand) as run:
        expected = paint(pipe, [CAT, *TARGETS], callback_on_step_end=run.on_step_end, **options)
    return result, controller, expected, by_hand


def decided_runs(pipe, settings, **options):
    """`runs` with a threshold on which no pixel lies, since a hard mask may fall there either way."""
    for more in (0, .007, .016, .027):      # the bundled model's weights change, and with them its maps
        found = runs(pipe, {**settings, "threshold": settings["threshold"] + more}, **options)
        if found[-1].margin > 1e-5:
            return found
    raise AssertionError("a pixel lies on every threshold")


@pytest.mark.parametrize("name", ["sticker_pipe", "sd_pipe", "xl_pipe"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_local_blend_equals_the_reference(request, name, kind):
    pipe = request.getfixturevalue(name)
    where = dict(resolution=8, grid=(8, 8)) if name == "xl_pipe" else {}
    result, controller, expected, by_hand = decided_runs(pipe, SETTINGS[kind], guidance_scale=2., **where)
    assert 0 < controller.mask.mean() < 1
    assert torch.allclose(controller.mask[1:, 0], by_hand.masks[-1][1:], atol=1e-3)
    assert len(by_hand.masks) == (2 if kind == "late" else 3) and distance(result, expected) < 1e-4


def test_local_blend_at_other_sizes_equals_the_reference(sd_pipe):
    """Google's code reshapes 768-pixel maps of 24 x 24 to 16 x 16 and scrambles the mask silently."""
    result, controller, expected, by_hand = runs(sd_pipe, SETTINGS["hard"], grid=(12, 20), size=(12, 20),
                                                 self_resolution=2, guidance_scale=2.)
    assert controller.mask.shape == (3, 1, 12, 20) and by_hand.margin > 1e-5
    assert torch.equal(controller.mask[1:, 0], by_hand.masks[-1][1:])


def test_the_source_stays_outside_the_mask_and_the_edit_inside(sd_pipe):
    edit, mask = swap(sd_pipe, CAT, DOG), np.zeros((16, 16), bool)
    mask[:, :8] = True
    result, _ = painted(sd_pipe, edit, blend=LocalBlend(mask=mask, start_blend=0))
    assert torch.allclose(result[1][:, :, 8:], result[0][:, :, 8:], atol=1e-4)
    assert distance(result[1][:, :, :8], result[0][:, :, :8]) > 1e-2


def test_a_mask_of_everything_changes_nothing(sd_pipe):
    edit = swap(sd_pipe, CAT, DOG)
    expected, _ = painted(sd_pipe, edit)
    result, _ = painted(sd_pipe, edit, blend=LocalBlend(mask=torch.ones(4, 4)))
    assert distance(result, expected) < 1e-5


@pytest.mark.parametrize("kind, settings", [(EulerAncestralDiscreteScheduler, {}), (DDIMScheduler, {"eta": 1.})])
def test_blending_leaves_a_schedulers_random_numbers_alone(sd_pipe, monkeypatch, kind, settings):
    """Pipelines ask the signature of scheduler.step whether it takes eta and a generator."""
    monkeypatch.setattr(sd_pipe, "scheduler", kind.from_config(sd_pipe.scheduler.config))
    edit, mask = swap(sd_pipe, CAT, DOG), LocalBlend(mask=torch.ones(4, 4))
    expected, result = (painted(sd_pipe, edit, blend=given, generator=torch.Generator().manual_seed(0), **settings)[0]
                        for given in (None, mask))
    assert distance(result, expected) < 1e-5


def test_a_resolution_that_no_layer_has_is_an_error(sd_pipe):
    with pytest.raises(ValueError, match=r"resolution 5: no cross-attention layer has it; there are \[2, 4, 8, 16\]"):
        painted(sd_pipe, swap(sd_pipe, CAT, DOG), blend=LocalBlend("beach", resolution=5))


def test_blend_words_are_checked_before_anything_runs(sd_pipe):
    before = dict(sd_pipe.unet.attn_processors)
    with pytest.raises(ValueError, match="word 'cat' is not in the prompt 'a dog"):
        with control(sd_pipe, swap(sd_pipe, CAT, DOG), blend=LocalBlend("cat")):
            pytest.fail("the block was entered")
    assert dict(sd_pipe.unet.attn_processors) == before


def test_a_blend_that_generate_never_applied_is_an_error(tiny_pipe):
    with pytest.raises(RuntimeError, match="never applied: with sampling.generate pass callback=controller.callback"):
        with control(tiny_pipe, swap(tiny_pipe, CAT, DOG), blend=LocalBlend("beach")):
            generate(tiny_pipe, [CAT, DOG], seeds=0, steps=1)


def test_a_blend_without_a_run_is_no_error(tiny_pipe):
    with control(tiny_pipe, swap(tiny_pipe, CAT, DOG), blend=LocalBlend("beach")) as controller:
        assert controller.mask is None


def test_a_new_run_forgets_the_maps_of_the_last(sd_pipe):
    edit, settings = swap(sd_pipe, CAT, DOG), LocalBlend("beach", threshold=.8)
    with control(sd_pipe, edit, blend=settings):
        paint(sd_pipe, [CAT, DOG], seed=1)
        second = paint(sd_pipe, [CAT, DOG], latents=noise(sd_pipe, 2))
    assert distance(second, painted(sd_pipe, edit, blend=settings)[0]) < 1e-5
