"""DiffEdit: masks against loops over noises and against diffusers, and a background that stays where it was."""
from __future__ import annotations

import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers import diffedit as de
from p2p_helpers.diffedit import Cut, Difference, diffedit, estimate_mask, fast_diffedit
from p2p_helpers.inversion import ddim_trajectory
from p2p_helpers.masks import SoftMask
from p2p_helpers.sampling import (alpha_bar, count_evaluations, ddim_step, encode_image, encode_prompt, generate, guide,
                                  initial_latents, predict_noise, previous_timestep)
from p2p_helpers.stickers import parse, render

SOURCE, TARGET = "a cat on the grass", "a dog on the grass"
FEW = dict(noises=3, steps=4)
LEFT = np.arange(16)[None] < np.full((16, 1), 8)        # (16, 16)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(render(parse(SOURCE, seed=1)).image)


def by_hand(pipe, picture, settings: Difference) -> torch.Tensor:
    """The map noise by noise and caption by caption, not scaled: (h, w)."""
    latents, (empty, source, target) = encode_image(pipe, [picture]), encode_prompt(pipe, ["", SOURCE, TARGET]).split(1)
    pipe.scheduler.set_timesteps(settings.steps)
    timesteps = pipe.scheduler.timesteps[int(settings.steps * (1 - settings.strength)):]

    def eps(x, t, caption):
        return guide(predict_noise(pipe, x, t, empty, 1.), predict_noise(pipe, x, t, caption, 1.),
                     settings.guidance_scale)

    def outcome(x, caption):
        for t in timesteps:
            if settings.method != "denoised":
                return eps(x, t, caption)
            a, b = (alpha_bar(pipe.scheduler, s) for s in (t, previous_timestep(pipe.scheduler, t)))
            x = ddim_step(x, eps(x, t, caption), a, b)
        return x

    total = torch.zeros(latents.shape[-2:])
    a_t = alpha_bar(pipe.scheduler, timesteps[0])
    for k in range(settings.noises):
        x = a_t.sqrt() * latents + (1 - a_t).sqrt() * initial_latents(pipe, settings.seed + k, *picture.size[::-1])
        with torch.no_grad():
            total += (outcome(x, target) - outcome(x, source)).abs().mean(1)[0]
    return total / settings.noises


# ---- the mask -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, strength", [("one_step", .5), ("one_step", .75), ("denoised", .5), ("denoised", .75)])
def test_a_map_equals_loops_over_noises(sticker_pipe, picture, method, strength):
    settings = Difference(method, strength=strength, seed=7, clip=None, **FEW)
    heat = estimate_mask(sticker_pipe, picture, SOURCE, TARGET, settings).values
    expected = by_hand(sticker_pipe, picture, settings)
    assert torch.allclose(heat, expected / expected.max(), atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [2., 7.5])
def test_the_unconditional_branch_cancels(sticker_pipe, picture, guidance_scale):
    """(u + g (q - u)) - (u + g (r - u)) = g (q - r), and scaling removes g."""
    guided, fast = (estimate_mask(sticker_pipe, picture, SOURCE, TARGET,
                                  Difference(method, guidance_scale=guidance_scale, **FEW))
                    for method in ("one_step", "fast"))
    assert torch.allclose(guided.values, fast.values, atol=1e-4)


@pytest.mark.parametrize("method, expected", [("one_step", 4 * 3), ("fast", 2 * 3), ("denoised", 4 * 3 * 2)])
def test_evaluations_of_a_mask(tiny_pipe, picture, method, expected):
    with count_evaluations(tiny_pipe.unet) as counter:
        estimate_mask(tiny_pipe, picture, SOURCE, TARGET, Difference(method, strength=.5, **FEW))
    assert counter.evaluations == expected


def test_a_map_does_not_depend_on_how_its_noises_are_batched(tiny_pipe, picture, monkeypatch):
    """Also where memory suffices for fewer than were asked for."""
    maps = [estimate_mask(tiny_pipe, picture, SOURCE, TARGET, Difference("fast", batch_size=size, **FEW)).values
            for size in (64, 4, 1)]
    plain, sizes = predict_noise, []

    def poor(pipe, latents, *rest):
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(latents))
        return plain(pipe, latents, *rest)

    monkeypatch.setattr(de, "predict_noise", poor)
    maps.append(estimate_mask(tiny_pipe, picture, SOURCE, TARGET, Difference("fast", **FEW)).values)
    assert all(torch.allclose(one, maps[0], atol=1e-5) for one in maps) and sizes == [2, 2, 2]
    monkeypatch.setattr(de, "predict_noise", lambda *arguments: poor(tiny_pipe, range(3)))
    with pytest.raises(torch.OutOfMemoryError):
        estimate_mask(tiny_pipe, picture, SOURCE, TARGET, Difference("fast", **FEW))


def test_the_mask_of_diffusers(sticker_pipe, picture, monkeypatch):
    """The same noises and settings give the same mask."""
    kind = getattr(diffusers, "StableDiffusionDiffEditPipeline", None)
    if kind is None:
        pytest.skip("this version of diffusers has no DiffEdit pipeline")
    scheduler = diffusers.DDIMInverseScheduler.from_config(sticker_pipe.scheduler.config)
    parts = {name: part for name, part in sticker_pipe.components.items() if name != "image_encoder"}
    theirs = kind(**parts, inverse_scheduler=scheduler, requires_safety_checker=False)
    settings = Difference("one_step", noises=4, steps=20, clip=None)
    noise = initial_latents(sticker_pipe, range(settings.noises))
    monkeypatch.setattr(sys.modules[kind.__module__], "randn_tensor", lambda *arguments, **options: noise)
    mask = theirs.generate_mask(encode_image(sticker_pipe, [picture]), target_prompt=TARGET, source_prompt=SOURCE,
                                num_maps_per_mask=settings.noises, mask_encode_strength=settings.strength,
                                num_inference_steps=settings.steps, mask_thresholding_ratio=3.)
    ours = estimate_mask(sticker_pipe, picture, SOURCE, TARGET, settings).threshold(3., "mean-ratio")
    assert np.array_equal(mask[0].astype(bool), np.asarray(ours)) and 0 < ours.share < .5


# ---- the edit -------------------------------------------------------------------------------------------------------


def test_outside_the_mask_the_latents_are_the_pictures(sticker_pipe, picture):
    result = diffedit(sticker_pipe, picture, SOURCE, TARGET, mask=LEFT, steps=6, strength=.7)
    latents = encode_image(sticker_pipe, [picture])
    assert (result.latents - latents)[..., 8:].abs().max() < 1e-5 * latents.abs().max()
    assert (result.latents - latents)[..., :8].abs().max() > .1
    assert np.array_equal(np.asarray(result.mask), LEFT) and not result.maps


def test_the_background_is_put_back_at_the_level_of_each_step(sticker_pipe, picture):
    """A whole mask decodes freely; with an empty one every step's latents are the trajectory's."""
    trajectory = ddim_trajectory(sticker_pipe, encode_image(sticker_pipe, [picture]),
                                 encode_prompt(sticker_pipe, SOURCE), 5, strength=.6)
    keep = de._keeping(trajectory, [SoftMask(np.zeros((16, 16)))])
    seen = []
    generate(sticker_pipe, TARGET, latents=trajectory[-1], steps=5, strength=.6,
             callback=lambda i, t, x: seen.append(keep(i, t, x)) or seen[-1])
    assert len(trajectory) == 4 and torch.equal(torch.stack(seen), trajectory.flip(0)[1:])
    free = generate(sticker_pipe, TARGET, latents=trajectory[-1], steps=5, strength=.6).latents
    whole = diffedit(sticker_pipe, picture, SOURCE, TARGET, mask=np.ones((16, 16), bool), steps=5, strength=.6)
    assert torch.allclose(whole.latents, free, atol=1e-4)


@pytest.mark.parametrize("edit", [diffedit, fast_diffedit])
def test_far_from_the_mask_the_pixels_are_the_pictures(tiny_pipe, picture, edit):
    pasted, decoded = (edit(tiny_pipe, picture, SOURCE, TARGET, mask=LEFT, steps=2, paste=paste)
                       for paste in (True, False))
    before, after, plain = (np.asarray(image) for image in (picture, pasted.edited, decoded.edited))
    assert np.array_equal(after[:, 64 + 24:], before[:, 64 + 24:]) and np.array_equal(after[:, :56], plain[:, :56])
    assert not np.array_equal(plain[:, 64 + 24:], before[:, 64 + 24:])
    assert torch.equal(pasted.latents, decoded.latents) and pasted.settings["paste"] and not decoded.settings["paste"]


@pytest.mark.parametrize("edit", [diffedit, fast_diffedit])
def test_pictures_in_a_batch_are_edited_as_alone(sticker_pipe, picture, edit):
    pictures = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    targets = [TARGET, "a red cat on the grass"]
    cuts = [Cut(.3), Cut(.8, "quantile", grow=1)]
    options = dict(difference=Difference("fast", **FEW), steps=4, strength=.8)
    together = edit(sticker_pipe, pictures, SOURCE, targets, cut=cuts, **options)
    for i in range(2):
        alone = edit(sticker_pipe, pictures[i], SOURCE, targets[i], cut=cuts[i], **options | ({"seed": i} if edit is
                     fast_diffedit else {}))
        assert torch.allclose(alone.latents, together.latents[i:i + 1], atol=1e-3)
        assert torch.equal(alone.mask.values, together.masks[i].values) and alone.mask.origin.startswith(repr(SOURCE))
    assert together.masks[0].share != together.masks[1].share


def test_encoding_with_the_empty_caption(tiny_pipe, picture):
    kept = [diffedit(tiny_pipe, picture, SOURCE, TARGET, mask=LEFT, steps=4, encode_with=caption).latents
            for caption in ("source", "empty")]
    empty = diffedit(tiny_pipe, picture, "", TARGET, mask=LEFT, steps=4).latents
    assert torch.equal(kept[1], empty) and not torch.equal(kept[0], empty)


def test_what_an_edit_costs(tiny_pipe, picture):
    full = diffedit(tiny_pipe, picture, SOURCE, TARGET, difference=Difference("fast", **FEW), steps=5, strength=.8)
    fast = fast_diffedit(tiny_pipe, picture, SOURCE, TARGET, difference=Difference("fast", **FEW), steps=5)
    assert full.cost["unet_evaluations"] == 6 + 4 + 2 * 4 and fast.cost["unet_evaluations"] == 6 + 2 * 5
    assert full.settings["mask"]["method"] == "fast" and full.settings["mask"]["cut"][0]["value"] is None


def test_inpainting_with_four_and_with_nine_channels(tiny_pipe, picture):
    """Four keep the background's latents; nine are given mask and masked picture, and keep what they like."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    latents = encode_image(tiny_pipe, [picture])
    four = fast_diffedit(tiny_pipe, picture, SOURCE, TARGET, mask=LEFT, steps=2).latents
    assert (four - latents)[..., 8:].abs().max() < 1e-5 and (four - latents)[..., :8].abs().max() > .1
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, in_channels=9).eval()
    nine = StableDiffusionInpaintPipeline(**tiny_pipe.components | {"unet": unet}, requires_safety_checker=False)
    nine.set_progress_bar_config(disable=True)
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    result = fast_diffedit(tiny_pipe, picture, SOURCE, TARGET, inpainting=nine, steps=2,
                           difference=Difference("fast", **FEW))
    hook.remove()
    assert seen[0].shape == (2, 9, 16, 16) and torch.equal(seen[0][0, 4], result.mask.values)
    assert result.cost["unet_evaluations"] == 6 + 2 * 2


def test_pictures_that_are_not_square(tiny_pipe):
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    for edit in (diffedit, fast_diffedit):
        result = edit(tiny_pipe, wide, SOURCE, TARGET, difference=Difference("fast", **FEW), steps=3)
        assert result.mask.size == (8, 12) and result.edited.size == (96, 64)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    (dict(strength=0), "strength 0 of 4 steps is 0 steps"), (dict(strength=1.5), "it lies in"),
    (dict(target=[TARGET] * 2), "target: 2 entries for 1 pictures"), (dict(target=" "), "empty"),
    (dict(mask=np.ones((16, 24))), "16 x 24 has not the shape of the picture, whose latents are 16 x 16"),
    (dict(mask=3 * np.ones((16, 16))), r"lie in \[0, 1\]"), (dict(target=SOURCE), "lead to the same prediction"),
    (dict(encode_with="targett"), "encode_with 'targett' is unknown")])
def test_bad_input(tiny_pipe, picture, options, message):
    arguments = dict(source=SOURCE, target=TARGET, steps=4, difference=Difference("fast", **FEW)) | options
    with pytest.raises(ValueError, match=message):
        diffedit(tiny_pipe, picture, **arguments)


@pytest.mark.parametrize("settings, message", [
    (dict(strength=0), "strength 0 of the mask"), (dict(strength=1), "in noise alone nothing of the picture"),
    (dict(noises=0), "noises 0"), (dict(guidance_scale=0), "leaves both captions out"),
    (dict(method="onestep"), "did you mean 'one_step'")])
def test_bad_settings_of_a_mask(settings, message):
    with pytest.raises(ValueError, match=message):
        Difference(**settings)


def test_strength_one_of_the_edit_begins_in_noise(tiny_pipe, picture):
    result = diffedit(tiny_pipe, picture, SOURCE, TARGET, mask=LEFT, steps=4, strength=1.)
    assert result.cost["unet_evaluations"] == 4 + 2 * 4


@pytest.mark.parametrize("cut, message", [(Cut(1.), "is empty: lower or raise the threshold"),
                                          (Cut(0.), "covers 100% of the picture: lower or raise")])
def test_a_mask_of_nothing_or_everything_is_told_of(tiny_pipe, picture, cut, message):
    with pytest.warns(UserWarning, match=message):
        diffedit(tiny_pipe, picture, SOURCE, TARGET, cut=cut, difference=Difference("fast", **FEW), steps=3)
