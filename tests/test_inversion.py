"""Inversions lead back to the picture, as far as their method can, and are kept with what they were made of."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from PIL import Image

from p2p_helpers import inversion as inv
from p2p_helpers.blending import LocalBlend
from p2p_helpers.images import to_pil
from p2p_helpers.inversion import (Inversion, NullText, ddim_trajectory, derive, invert, load_inversion, picture_key,
                                   reconstruct)
from p2p_helpers.metrics import psnr
from p2p_helpers.models import load
from p2p_helpers.prompt_to_prompt import edit_prompt
from p2p_helpers.runtime import Measurement, Runtime
from p2p_helpers.sampling import decode, encode_image, encode_prompt, generate, predict_noise
from p2p_helpers.stickers import parse, render

PROMPT, TARGET, STEPS = "a cat on the grass", "a dog on the grass", 6


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(render(parse(PROMPT, seed=1)).image)


def resampled(pipe, inversion: Inversion, guidance_scale: float) -> torch.Tensor:
    """The latents that sampling with the inversion's prompt gives."""
    return reconstruct(pipe, inversion, guidance_scale).latents


def error(pipe, inversion: Inversion, guidance_scale: float) -> float:
    """Of the latents, against the picture's, in the scale of the latents."""
    goal = inversion.trajectory[:1]
    return ((resampled(pipe, inversion, guidance_scale) - goal).norm() / goal.norm()).item()


def test_the_trajectory_is_that_of_diffusers_inverse_scheduler(sticker_pipe, picture):
    ours = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS).trajectory
    scheduler = DDIMInverseScheduler.from_config(sticker_pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    latents, embeddings = encode_image(sticker_pipe, [picture]), encode_prompt(sticker_pipe, PROMPT)
    assert scheduler.timesteps.tolist() == sticker_pipe.scheduler.timesteps.flip(0).tolist()
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            latents = scheduler.step(predict_noise(sticker_pipe, latents, t, embeddings, 1.), t, latents).prev_sample
        assert (latents - ours[i + 1]).abs().max() < 1e-4 * latents.abs().max()


def test_direct_inversion_returns_the_picture_at_any_guidance(sticker_pipe, picture):
    inversion = invert(sticker_pipe, picture, PROMPT, "direct", steps=STEPS)
    assert error(sticker_pipe, inversion, 7.5) < 1e-4


def test_negative_prompt_inversion_is_ddim_without_guidance(sticker_pipe, picture):
    plain = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS)
    negative = invert(sticker_pipe, picture, PROMPT, "negative-prompt", steps=STEPS)
    expected = resampled(sticker_pipe, plain, 1.)
    for guidance_scale in (1.5, 7.5):
        assert (resampled(sticker_pipe, negative, guidance_scale) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_converged_fixed_point_is_undone_by_sampling(sticker_pipe, picture):
    plain = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS)
    fixed = invert(sticker_pipe, picture, PROMPT, "fixed-point", steps=STEPS, fixed_point_steps=40)
    assert error(sticker_pipe, fixed, 1.) < .01 * error(sticker_pipe, plain, 1.)


def test_null_text_mends_what_guidance_breaks(sticker_pipe, picture):
    plain = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS)
    null = invert(sticker_pipe, picture, PROMPT, "null-text", steps=STEPS, guidance_scale=7.5,
                  null_text=NullText(inner_steps=6, stop_at=0.))
    assert error(sticker_pipe, null, 7.5) < .7 * error(sticker_pipe, plain, 7.5)
    assert null.unconditional.shape == (STEPS, *encode_prompt(sticker_pipe, "").shape[1:])
    assert null.unconditional.dtype == torch.float32


def test_null_text_stops_early_and_leaves_the_unet_as_it_was(tiny_pipe, picture):
    tiny_pipe.unet.requires_grad_(True).zero_grad()         # another test may have left gradients
    inversion = invert(tiny_pipe, picture, PROMPT, "null-text", steps=2, null_text=NullText(stop_at=1e9))
    empty = encode_prompt(tiny_pipe, "")
    assert torch.equal(inversion.unconditional, empty.expand(2, -1, -1))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_pipe.unet.parameters())


def test_null_text_that_diverges_keeps_the_best_and_says_so(tiny_pipe, picture):
    with pytest.warns(UserWarning, match="did not lower the loss at steps"):
        inversion = invert(tiny_pipe, picture, PROMPT, "null-text", steps=2,
                           null_text=NullText(learning_rate=1e6, stop_at=0.))
    assert inversion.unconditional.isfinite().all()


def test_the_learning_rate_stays_above_zero_in_long_schedules(tiny_pipe, picture, monkeypatch):
    """Google's 1 - i / 100 becomes negative."""
    rates = []
    monkeypatch.setattr(inv, "_optimise", lambda loss_of, start, rate, *rest: (rates.append(rate) or start, True))
    invert(tiny_pipe, picture, PROMPT, "null-text", steps=125)
    assert rates[0] == 1e-2 and rates[50] == pytest.approx(5e-3) and rates[110:] == [pytest.approx(1e-4)] * 15


def test_ctrl_c_in_mid_optimisation_leaves_the_unet_as_it_was(tiny_pipe, picture, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inv, "_optimise", interrupted)
    tiny_pipe.unet.requires_grad_(True)
    with pytest.raises(KeyboardInterrupt):
        invert(tiny_pipe, picture, PROMPT, "null-text", steps=2)
    assert all(parameter.requires_grad for parameter in tiny_pipe.unet.parameters())


def test_evaluations_are_counted(tiny_pipe, picture):
    count = {method: invert(tiny_pipe, picture, PROMPT, method, steps=4, fixed_point_steps=3,
                            null_text=NullText(inner_steps=2, stop_at=0.)).cost["unet_evaluations"]
             for method in ("ddim", "fixed-point", "direct", "null-text")}
    assert count == {"ddim": 4, "fixed-point": 12, "direct": 4, "null-text": 4 + 4 * (1 + 3 + 1)}


@pytest.mark.parametrize("method", ["negative-prompt", "null-text", "direct"])
def test_what_is_derived_is_what_invert_makes_and_costs_both(tiny_pipe, picture, method):
    options = NullText(inner_steps=2, stop_at=0., learning_rate=.02)
    plain = invert(tiny_pipe, picture, PROMPT, "ddim", steps=3, guidance_scale=4.)
    tiny_pipe.scheduler.set_timesteps(7)            # as another run leaves it
    made = derive(tiny_pipe, plain, method, null_text=options)
    whole = invert(tiny_pipe, picture, PROMPT, method, steps=3, guidance_scale=4., null_text=options)
    assert torch.equal(made.trajectory, plain.trajectory) and torch.equal(made.trajectory, whole.trajectory)
    assert (made.method, made.prompt, made.settings) == (whole.method, whole.prompt, whole.settings)
    assert (made.unconditional is None) == (method == "direct")
    assert method == "direct" or torch.equal(made.unconditional, whole.unconditional)
    assert made.cost["unet_evaluations"] == whole.cost["unet_evaluations"]
    assert made.cost["seconds"] > plain.cost["seconds"]


def test_only_ddim_inversions_are_made_into_others(tiny_pipe, picture):
    fixed = invert(tiny_pipe, picture, PROMPT, "fixed-point", steps=2)
    with pytest.raises(ValueError, match="derived from an inversion by 'ddim', not by 'fixed-point'"):
        derive(tiny_pipe, fixed, "direct")
    with pytest.raises(ValueError, match="method 'fixed-point' is not derived"):
        derive(tiny_pipe, fixed, "fixed-point")


def test_peak_memory_is_told_of_every_method_and_kept(tiny_pipe, picture, tmp_path, monkeypatch):
    class Peaks:
        """`runtime.measure`, with peaks that are known."""
        given = iter([5, 3, 5, 8, None, 8])

        def __init__(self, device):
            self.measurement = Measurement(1., next(self.given), device)

        def __enter__(self):
            return self.measurement

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(inv, "measure", Peaks)
    peaks = [invert(tiny_pipe, picture, PROMPT, method, steps=1) for method in ("direct", "direct", "negative-prompt")]
    assert [inversion.cost["peak_bytes"] for inversion in peaks] == [5, 8, None]        # of both halves
    assert load_inversion(peaks[1].save(tmp_path / "kept")).cost["peak_bytes"] == 8
    monkeypatch.undo()
    assert invert(tiny_pipe, picture, PROMPT, "ddim", steps=1).cost["peak_bytes"] > 2**26   # of this whole process


def test_a_reconstruction_is_measured_against_what_the_autoencoder_makes_of_the_picture(sticker_pipe, picture):
    inversion = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS, guidance_scale=3.)
    made = reconstruct(sticker_pipe, inversion, picture=picture)
    (again,) = to_pil(decode(sticker_pipe, encode_image(sticker_pipe, [picture])))
    assert np.array_equal(made.reachable, again)
    assert made.psnr == psnr(made.image, again) and made.bound == psnr(again, picture)
    assert np.array_equal(made.image, to_pil(decode(sticker_pipe, made.latents))[0])
    assert torch.equal(made.latents, resampled(sticker_pipe, inversion, 3.))            # the inversion's own guidance
    other = reconstruct(sticker_pipe, inversion, 1.)
    assert other.bound is None and other.psnr > made.psnr
    with pytest.raises(ValueError, match="give the picture as it was given to invert"):
        reconstruct(sticker_pipe, inversion, picture=picture.rotate(90))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_null_text_optimises_in_float32_whatever_the_model_computes_in(tiny_folder, picture, dtype):
    pipe = load(tiny_folder, runtime=Runtime("cpu", dtype, "local", 0))
    pipe.set_progress_bar_config(disable=True)
    inversion = invert(pipe, picture, PROMPT, "null-text", steps=2,
                       null_text=NullText(inner_steps=3, stop_at=0.))
    found = inversion.unconditional
    assert pipe.unet.dtype == dtype and found.dtype == torch.float32 and found.isfinite().all()
    assert (found.to(dtype).float() != found).any()         # what the model's own numbers cannot hold


@pytest.mark.parametrize("method", ["direct", "negative-prompt"])
def test_an_inverted_picture_is_edited_in_one_call(sticker_pipe, picture, method):
    inversion = invert(sticker_pipe, picture, PROMPT, method, steps=STEPS)
    result = edit_prompt(sticker_pipe, PROMPT, TARGET, inversion=inversion, blend="cat", weights={"dog": 1.5})
    assert torch.allclose(result.latents[:1], resampled(sticker_pipe, inversion, 7.5), atol=1e-3)
    assert (result.latents[1] - result.latents[0]).abs().max() > .1
    assert result.settings["inversion"] == method and result.settings["steps"] == STEPS


def test_what_is_put_back_reaches_the_blend(sticker_pipe, picture):
    """With a mask of zeros the target is the source, hence the picture itself."""
    inversion = invert(sticker_pipe, picture, PROMPT, "direct", steps=STEPS)
    nowhere = LocalBlend(mask=np.zeros((16, 16), bool), start_blend=0.)
    result = edit_prompt(sticker_pipe, PROMPT, TARGET, inversion=inversion, blend=nowhere)
    assert (result.latents[1] - inversion.trajectory[0]).abs().max() < 1e-4 * inversion.trajectory[0].abs().max()


def test_saved_and_loaded_is_the_same(tiny_pipe, picture, tmp_path):
    made = invert(tiny_pipe, picture, PROMPT, "negative-prompt", steps=2)
    again = load_inversion(made.save(tmp_path / "kept"), prompt=PROMPT, picture=picture_key(picture), steps=2)
    assert torch.equal(again.trajectory, made.trajectory) and torch.equal(again.unconditional, made.unconditional)
    assert (again.settings, again.cost, again.method) == (made.settings, made.cost, made.method)


@pytest.mark.parametrize("expected, message", [
    ({"prompt": TARGET}, "made with prompt 'a cat on the grass', not 'a dog on the grass'"),
    ({"picture": "0" * 16}, "made with picture"), ({"model": "sd15"}, "made with model"),
    ({"step": 2}, "no setting 'step'; did you mean 'steps'")])
def test_an_inversion_of_something_else_is_refused(tiny_pipe, picture, tmp_path, expected, message):
    folder = invert(tiny_pipe, picture, PROMPT, "ddim", steps=2).save(tmp_path / "kept")
    with pytest.raises(ValueError, match=message):
        load_inversion(folder, **expected)


def test_bad_input(tiny_pipe, picture, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'null-text'"):
        invert(tiny_pipe, picture, PROMPT, "null_text")
    with pytest.raises(ValueError, match="not a multiple of 8"):
        invert(tiny_pipe, picture.resize((100, 100)), PROMPT)
    with pytest.raises(ValueError, match="empty"):
        invert(tiny_pipe, picture, " ")
    with pytest.raises(ValueError, match="made with 'a cat on the grass', not with the source"):
        edit_prompt(tiny_pipe, TARGET, PROMPT, inversion=invert(tiny_pipe, picture, PROMPT, steps=2))
    negative = invert(tiny_pipe, picture, PROMPT, "negative-prompt", steps=2)
    with pytest.raises(ValueError, match="negative_prompt 'fog': an inversion by negative-prompt brings its own"):
        edit_prompt(tiny_pipe, PROMPT, TARGET, inversion=negative, negative_prompt="fog")
    with pytest.raises(ValueError, match="either the seed .* or an inversion"):
        edit_prompt(tiny_pipe, PROMPT, TARGET)
    with pytest.raises(FileNotFoundError, match="settings.json"):
        load_inversion(tmp_path)
    tensors = negative.save(tmp_path / "cut") / "inversion.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(ValueError, match="inversion.safetensors in 'cut' is damaged"):
        load_inversion(tmp_path / "cut")


def test_restoring_keeps_the_picture_where_the_source_has_drifted(sticker_pipe, picture):
    """Outside the mask the source's latents are the picture's, though DDIM under guidance loses it."""
    inversion = invert(sticker_pipe, picture, PROMPT, "ddim", steps=STEPS)
    left = np.arange(16)[None] < np.full((16, 1), 8)
    local = LocalBlend(mask=left, start_blend=0.)
    drifted, restored = (edit_prompt(sticker_pipe, PROMPT, TARGET, inversion=inversion, blend=local, restore=restore)
                         for restore in (False, True))
    goal = inversion.trajectory[0, :, :, 8:]
    assert (restored.latents[:, :, :, 8:] - goal).abs().max() < 1e-4 * goal.abs().max()
    assert (drifted.latents[0, :, :, 8:] - goal).abs().max() > .1
    with pytest.raises(ValueError, match="give inversion and blend"):
        edit_prompt(sticker_pipe, PROMPT, TARGET, inversion=inversion, restore=True)


def test_a_part_of_a_trajectory_is_its_beginning(tiny_pipe, picture):
    whole = invert(tiny_pipe, picture, PROMPT, "ddim", steps=STEPS).trajectory
    latents, embeddings = encode_image(tiny_pipe, [picture] * 2), encode_prompt(tiny_pipe, [PROMPT] * 2)
    part = ddim_trajectory(tiny_pipe, latents, embeddings, STEPS, strength=.5)
    assert part.shape == (4, 2, 4, 16, 16)
    assert (part - whole[:4, None]).abs().max() < 1e-4
