import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from p2p_helpers import sampling
from p2p_helpers.images import to_pil, to_tensor
from p2p_helpers.sampling import (alpha_bar, ddim_step, decode, encode_image, encode_prompt, generate, guide,
                                  initial_latents, predict_noise, previous_timestep, to_epsilon)

PROMPTS = ["a cat on the beach", "a red dog", "a zebra in the snow"]


@pytest.fixture
def pipe(tiny_pipe):
    """The tiny pipeline with a scheduler of its own, that a test may replace."""
    kept = tiny_pipe.scheduler
    tiny_pipe.scheduler = copy.deepcopy(kept)
    yield tiny_pipe
    tiny_pipe.scheduler = kept


def stock(pipe, prompts, seeds, output_type="latent", **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings["num_inference_steps"] = settings.pop("steps")
    return pipe(prompts, generator=generators, output_type=output_type, **settings).images


@pytest.mark.parametrize("settings", [
    dict(guidance_scale=7.5), dict(guidance_scale=1.0), dict(guidance_scale=7.5, height=96, width=160)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_generate_equals_the_stock_pipeline(pipe, settings, prediction):
    pipe.scheduler.register_to_config(prediction_type=prediction)
    seeds = [1, 2, 3]
    expected = stock(pipe, PROMPTS, seeds, steps=4, negative_prompt=["fog"] * 3, **settings)
    made = generate(pipe, PROMPTS, seeds=seeds, steps=4, negative_prompt="fog", **settings)
    assert (made.latents - expected).abs().max() < 1e-4 * expected.abs().max()
    assert made.images[0].size == (settings.get("width", 128), settings.get("height", 128))


def test_images_equal_the_stock_pipeline(pipe):
    expected = stock(pipe, ["a cat"], [4], output_type="np", steps=3)
    made = generate(pipe, "a cat", seeds=4, steps=3)
    assert np.abs(np.asarray(made.images[0]) / 255 - expected[0]).max() < 0.5 / 255 + 1e-4


def test_generation_remembers_how_it_was_made(pipe):
    made = generate(pipe, ["a cat", "a dog"], seeds=5, steps=2, guidance_scale=3.0, height=64)
    assert made.prompts == ("a cat", "a dog") and made.seeds == (5, 5)
    assert made.settings == {"negative_prompt": "", "steps": 2, "guidance_scale": 3.0,
                             "height": 64, "width": 128}


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = generate(pipe, PROMPTS, seeds=[1, 2, 3], steps=3).latents
    alone = generate(pipe, PROMPTS[1], seeds=2, steps=3).latents
    assert torch.allclose(together[1:2], alone, atol=1e-4 * alone.abs().max().item())


def test_one_prompt_with_several_seeds_and_the_reverse(pipe):
    seeds = generate(pipe, "a cat", seeds=[1, 2], steps=1)
    prompts = generate(pipe, ["a cat", "a dog"], seeds=1, steps=1)
    assert seeds.prompts == ("a cat", "a cat") and not torch.equal(*seeds.latents)
    assert torch.equal(*initial_latents(pipe, prompts.seeds))


def test_guidance_one_runs_the_conditional_branch_alone_and_zero_ignores_the_prompt(pipe):
    batches = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    try:
        for scale in (1, 2):
            generate(pipe, "a cat", seeds=0, steps=1, guidance_scale=scale)
        a, b = (generate(pipe, prompt, seeds=0, steps=2, guidance_scale=0).latents
                for prompt in ("a cat", "a dog"))
    finally:
        handle.remove()
    assert batches[:2] == [1, 2] and torch.allclose(a, b)


def test_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(i, t, latents):
        seen.append((i, int(t)))
        return torch.zeros_like(latents) if i == 2 else None
    made = generate(pipe, "a cat", seeds=0, steps=3, callback=callback)
    assert seen == [(0, 667), (1, 334), (2, 1)] and not made.latents.any()


def test_generate_keeps_no_gradients_but_predict_noise_does(pipe):
    assert not generate(pipe, "a cat", seeds=0, steps=1).latents.requires_grad
    embeddings = encode_prompt(pipe, ["", "a cat"]).clone().requires_grad_()
    predict_noise(pipe, initial_latents(pipe, 0), 500, embeddings, 7.5).sum().backward()
    assert embeddings.grad.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("arguments, message", [
    (dict(prompts=""), "the prompt is empty"), (dict(prompts=["a cat", " "]), "the prompt is empty"),
    (dict(prompts=" ".join(["cat"] * 30 + ["dog"])), "would be cut: 'dog'"),
    (dict(prompts="a cat", negative_prompt=" ".join(["cat"] * 30 + ["fog"])), "would be cut: 'fog'"),
    (dict(prompts="a cat", height=100), "height 100 is not a multiple of 8"),
    (dict(prompts="a cat", steps=0), "steps 0 must lie between 1 and 1000"),
    (dict(prompts=PROMPTS, seeds=[1, 2]), "3 prompts and 2 seeds do not pair"),
    (dict(prompts=[]), "0 prompts and 1 seeds do not pair"),
    (dict(prompts="a cat", seeds=[]), "do not pair")])
def test_bad_input(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"seeds": 0, "steps": 1, **arguments})


def test_another_scheduler_is_refused(pipe):
    kept = pipe.scheduler
    for other in (EulerDiscreteScheduler.from_config(kept.config),
                  DDIMScheduler.from_config(kept.config, clip_sample=True)):
        pipe.scheduler = other
        with pytest.raises(TypeError, match=f"without clipping, this pipeline has {type(other).__name__}"):
            generate(pipe, "a cat", seeds=0, steps=1)


def test_encode_prompt_equals_the_stock_pipeline_and_allows_empty(pipe):
    expected = pipe.encode_prompt(["a cat", ""], "cpu", 1, False)[0]
    assert torch.equal(encode_prompt(pipe, ["a cat", ""]), expected) and expected.shape == (2, 32, 32)
    assert torch.equal(encode_prompt(pipe, "a cat"), encode_prompt(pipe, ["a cat"]))


def test_guide_by_hand():
    uncond, cond = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    assert guide(uncond, cond, 3).tolist() == [4.0, -4.0]


def test_ddim_step_by_hand_and_back():
    x0, eps = torch.tensor([0.6, -1.2]), torch.tensor([1.0, 0.5])
    a_t, a_prev = torch.tensor(0.36), torch.tensor(0.64)
    noisy = 0.6 * x0 + 0.8 * eps
    assert torch.allclose(ddim_step(noisy, eps, a_t, a_prev), 0.8 * x0 + 0.6 * eps)
    assert torch.allclose(ddim_step(ddim_step(noisy, eps, a_t, a_prev), eps, a_prev, a_t), noisy)
    assert torch.allclose(ddim_step(noisy, eps, a_t, torch.tensor(1.0)), x0)


def test_epsilon_from_v(pipe):
    """With x = sqrt(a) x0 + sqrt(1-a) eps, the target is v = sqrt(a) eps - sqrt(1-a) x0."""
    x0, eps, a = torch.randn(4), torch.randn(4), pipe.scheduler.alphas_cumprod[300]
    x, v = a.sqrt() * x0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x0
    assert to_epsilon(pipe.scheduler, eps, x, 300) is eps
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert torch.allclose(to_epsilon(pipe.scheduler, v, x, 300), eps, atol=1e-5)
    pipe.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="prediction_type 'sample' is not handled"):
        to_epsilon(pipe.scheduler, v, x, 300)


def test_alpha_bar_and_previous_timestep(pipe):
    pipe.scheduler.set_timesteps(50)
    assert previous_timestep(pipe.scheduler, torch.tensor(981)) == 961
    assert previous_timestep(pipe.scheduler, 1) == -19
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2
    assert torch.allclose(alpha_bar(pipe.scheduler, torch.tensor(500)), (1 - betas)[:501].prod())
    assert alpha_bar(pipe.scheduler, -19) == pipe.scheduler.alphas_cumprod[0]       # set_alpha_to_one=False


def test_initial_latents(pipe):
    latents = initial_latents(pipe, [3, 4], height=64, width=96)
    assert latents.shape == (2, 4, 8, 12) and latents.dtype == torch.float32
    assert torch.equal(latents[1:], initial_latents(pipe, np.int64(4), 64, 96))
    with pytest.raises(ValueError, match="width 100"):
        initial_latents(pipe, 3, width=100)


def test_predict_noise_needs_both_halves_for_guidance(pipe):
    latents, embeddings = initial_latents(pipe, [1, 2]), encode_prompt(pipe, ["", "", "a cat", "a dog"])
    with torch.no_grad():
        uncond, cond = (pipe.unet(latents, 500, encoder_hidden_states=half).sample
                        for half in embeddings.chunk(2))
        guided = predict_noise(pipe, latents, 500, embeddings, 3.0)
        assert torch.allclose(guided, uncond + 3 * (cond - uncond), atol=1e-4)
        assert torch.allclose(predict_noise(pipe, latents, 500, embeddings, 1.0), cond, atol=1e-5)
        assert torch.allclose(predict_noise(pipe, latents, 500, embeddings[2:], 1.0), cond, atol=1e-5)
    with pytest.raises(ValueError, match="2 x 2 embeddings .* not 2"):
        predict_noise(pipe, latents, 500, embeddings[2:], 3.0)


def test_encode_image_is_the_scaled_mean_and_decode_undoes_the_scale(pipe):
    image = to_pil(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    with torch.no_grad():
        mean = pipe.vae.encode(to_tensor(image)).latent_dist.mean
        decoded = pipe.vae.decode(mean).sample
    latents = encode_image(pipe, image)
    assert latents.shape == (1, 4, 8, 12)
    assert torch.allclose(latents, mean * pipe.vae.config.scaling_factor)
    assert torch.equal(encode_image(pipe, to_tensor(image)), latents)
    assert torch.allclose(decode(pipe, latents), decoded, atol=1e-5)
    with pytest.raises(ValueError, match="height 60"):
        encode_image(pipe, image.resize((96, 60)))


def test_half_precision_keeps_latents_in_float32(tiny_folder):
    from p2p_helpers.models import load
    from p2p_helpers.runtime import Runtime

    pipes = (load(tiny_folder, runtime=Runtime("cpu", dtype, "local", 0))
             for dtype in (torch.float32, torch.bfloat16))
    exact, half = (generate(pipe, "a cat", seeds=1, steps=2) for pipe in pipes)
    assert half.latents.dtype == torch.float32
    assert (half.latents - exact.latents).abs().max() < 0.1 * exact.latents.abs().max()


def test_functions_that_notebooks_show_are_short():
    import inspect

    for function in (encode_prompt, guide, predict_noise, alpha_bar, ddim_step, initial_latents, decode,
                     encode_image):
        assert len(inspect.getsource(function).splitlines()) <= 26, function.__name__
    assert set(sampling.__all__) <= set(vars(sampling))
