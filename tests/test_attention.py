import copy
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler,
                       PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
                       StableDiffusionPipeline, UNet2DConditionModel)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from PIL import Image

from p2p_helpers.attention import attention_layers, control, default_resolution
from p2p_helpers.blending import LocalBlend
from p2p_helpers.edits import empty, mix, refine, reweight, swap
from p2p_helpers.recording import Record
from p2p_helpers.sampling import generate

STEPS = 4
PIPES = ["sticker_pipe", "sd_pipe", "xl_pipe"]
CAT, DOG = "a cat on the beach", "a dog on the beach"


@pytest.fixture(params=PIPES)
def any_pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def pipe(sd_pipe):
    """The pipeline like Stable Diffusion 1.x with a scheduler of its own, that a test may replace."""
    kept = sd_pipe.scheduler
    sd_pipe.scheduler = copy.deepcopy(kept)
    yield sd_pipe
    sd_pipe.scheduler = kept


# ---- small tools ----------------------------------------------------------------------------------------------------


def noise(pipe, count, size=None, seed=0):
    """The same latents for every prompt."""
    height, width = size or (pipe.unet.config.sample_size,) * 2
    one = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return one.repeat(count, 1, 1, 1)


def paint(pipe, prompts, *, latents=None, size=None, seed=0, guidance_scale=7.5, steps=STEPS, **settings):
    """Latents of the stock pipeline, the same noise for every prompt."""
    latents = noise(pipe, len(prompts), size, seed) if latents is None else latents
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    return pipe(list(prompts), latents=latents.clone().to(pipe.unet.dtype), height=height, width=width,
                guidance_scale=guidance_scale, num_inference_steps=steps, output_type="latent", **settings).images


def painted(pipe, edits, *, record=None, blend=None, self_resolution=None, low_memory=False, **settings):
    """Latents and controller of a run under control, with the edits' own prompts."""
    edits = [edits] if not isinstance(edits, list) else edits
    with control(pipe, edits, record=record, blend=blend, self_resolution=self_resolution,
                 low_memory=low_memory) as controller:
        prompts = [prompt.text for prompt in controller.prompts]
        return paint(pipe, prompts, **settings), controller


def distance(left, right):
    """The greatest difference, as a part of the greatest value."""
    return float((left - right).abs().max() / right.abs().max())


def self_pixels(pipe):
    """Pixels of the finest self-attention injected by default: a quarter of the latents' side, or the coarsest."""
    levels = len(pipe.unet.config.block_out_channels)
    return {2: 8 * 8, 3: 4 * 4, 4: 4 * 4}[levels]


# ---- every edit equals the reference --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An edit made by the toolkit, and the same by hand: words paired by number, steps of four."""

    source: str
    target: str
    make: object                    # (pipe, source, target) to Edit
    pairs: tuple
    settings: dict                  # of reference.describe

    def edit(self, pipe):
        return self.make(pipe, self.source, self.target)

    def reference(self, pipe):
        return reference.describe(pipe.tokenizer, self.source, self.target, self.pairs, **self.settings)


HALF = dict(cross_replace_steps=.5, self_replace_steps=.5)
FIRST_TWO = dict(steps={0, 1}, self_steps={0, 1})
RULES = {"average": reference.average, "copy": reference.copy, "sum": reference.total}
BIG_CAT, RIDERS = "a big cat on the beach", "a motorcycle and a dog"
IN_ORDER = tuple((i, i) for i in range(6))


def swapped(source, target, mode):
    pairs = tuple((i, i) for i in range(len(source.split())))
    return Case(source, target, lambda *args: swap(*args, mode=mode, **HALF), pairs,
                dict(FIRST_TWO, unequal=RULES[mode]))


CASES = {
    "swap": swapped(BIG_CAT, "a big dog on the beach", "average"),
    **{f"swap, split, {mode}": swapped(BIG_CAT, "a big motorcycle on the beach", mode) for mode in RULES},
    **{f"swap, merged, {mode}": swapped(RIDERS, "a car and a dog", mode) for mode in RULES},
    **{f"swap, several to more, {mode}": swapped(RIDERS, "a strawberry and a dog", mode) for mode in RULES},
    "swap of several words": swapped(RIDERS, "the horse and a motorcycle", "average"),
    "swap in windows": Case(
        BIG_CAT, "a big dog on the beach",
        lambda *args: swap(*args, cross_replace_steps=(.25, 1), self_replace_steps=(.5, .75)),
        IN_ORDER, dict(steps={1, 2, 3}, self_steps={2})),
    "swap with steps per word": Case(
        BIG_CAT, "a big dog on the beach",
        lambda *args: swap(*args, cross_replace_steps={"default_": .5, "dog": .25, "beach": (.5, 1.)},
                           self_replace_steps=0),
        IN_ORDER, dict(steps={0, 1}, word_steps=((2, {0}), (5, {2, 3})))),
    "refine": Case(
        BIG_CAT, "a big red cat on the beach at night",
        lambda *args: refine(*args, cross_replace_steps=.75, self_replace_steps=.5),
        ((0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)), dict(steps={0, 1, 2}, self_steps={0, 1})),
    "deletion": Case(BIG_CAT, "a cat on the beach", lambda *args: refine(*args, **HALF),
                     ((0, 0), (2, 1), (3, 2), (4, 3), (5, 4)), FIRST_TWO),
    "deletion at the end": Case(BIG_CAT, "a big cat", lambda *args: refine(*args, **HALF),
                                ((0, 0), (1, 1), (2, 2)), FIRST_TWO),
    "reweight": Case(BIG_CAT, BIG_CAT, lambda *args: reweight(swap(*args, **HALF), {"beach": 3}), IN_ORDER,
                     dict(FIRST_TWO, weights=((5, 3.),))),
    "reweight several words below zero and to zero": Case(
        BIG_CAT, BIG_CAT, lambda *args: reweight(swap(*args, **HALF), {"beach": -2, "on": 0}), IN_ORDER,
        dict(FIRST_TWO, weights=((5, -2.), (3, 0.)))),
    "refine and reweight": Case(
        BIG_CAT, "a big red cat on the beach", lambda *args: reweight(refine(*args, **HALF), {"cat": 2, "red": -1.5}),
        ((0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)), dict(FIRST_TWO, weights=((3, 2.), (2, -1.5)))),
    "swap, split, and reweight": Case(
        BIG_CAT, "a big motorcycle on the beach",
        lambda *args: reweight(swap(*args, cross_replace_steps={"motorcycle": .5}), {"motorcycle": 2, "beach": .5}),
        IN_ORDER, dict(steps={0, 1, 2, 3}, word_steps=((2, {0, 1}),), self_steps={0, 1}, weights=((2, 2.), (5, .5)))),
    "mix": Case(BIG_CAT, "a small motorcycle on the red beach at night", lambda *args: mix(*args, **HALF),
                ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6)), FIRST_TWO),
}


def cases_of(source):
    return {name: case for name, case in CASES.items() if case.source == source}


def by_reference(pipe, cases, *, steps_of_calls=None, pixels=None, run=paint, **settings):
    """What the reference makes of cases of one source, as targets of one batch."""
    targets = [case.reference(pipe) for case in cases]
    prompts = [cases[0].source, *(case.target for case in cases)]
    with reference.reference_control(pipe, targets, self_pixels=pixels or self_pixels(pipe),
                                     steps_of_calls=steps_of_calls):
        return run(pipe, prompts, **settings)


@pytest.mark.parametrize("source", [BIG_CAT, RIDERS])
@pytest.mark.parametrize("name, guidance_scale", [("sticker_pipe", 1.), ("sd_pipe", 7.5), ("xl_pipe", 7.5)])
def test_every_edit_equals_the_reference(request, name, guidance_scale, source):
    pipe, cases = request.getfixturevalue(name), cases_of(source)
    expected = by_reference(pipe, [*cases.values()], guidance_scale=guidance_scale)
    result, _ = painted(pipe, [case.edit(pipe) for case in cases.values()], guidance_scale=guidance_scale)
    far = {name: distance(row, right) for name, row, right in zip(["source", *cases], result, expected)}
    assert max(far.values()) < 1e-4, far


@pytest.mark.parametrize("source", [BIG_CAT, RIDERS])
def test_every_edit_changes_its_target(sd_pipe, source):
    """Else the comparison with the reference would compare nothing."""
    cases = cases_of(source)
    plain = paint(sd_pipe, [source, *(case.target for case in cases.values())])
    result, _ = painted(sd_pipe, [case.edit(sd_pipe) for case in cases.values()])
    change = {name: distance(row, own) for name, row, own in zip(cases, result[1:], plain[1:])}
    assert min(change.values()) > 5e-3, change


# ---- edits that change nothing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1., 7.5])
def test_an_empty_edit_equals_the_stock_pipeline(any_pipe, guidance_scale):
    expected = paint(any_pipe, [CAT, DOG], guidance_scale=guidance_scale)
    result, _ = painted(any_pipe, empty(any_pipe, CAT, DOG), guidance_scale=guidance_scale)
    assert distance(result, expected) < 1e-5


@pytest.mark.parametrize("name", ["swap, split, copy", "refine and reweight", "deletion"])
def test_no_edit_touches_the_source(sd_pipe, name):
    case = CASES[name]
    expected = paint(sd_pipe, [case.source, case.target])
    result, _ = painted(sd_pipe, case.edit(sd_pipe))
    assert distance(result[0], expected[0]) < 1e-5 and distance(result[1], expected[1]) > 5e-3


def test_a_full_edit_to_the_same_prompt_returns_the_source(any_pipe):
    edit = swap(any_pipe, CAT, CAT, cross_replace_steps=1, self_replace_steps=1)
    result, _ = painted(any_pipe, edit, self_resolution=16)
    assert distance(result[1], result[0]) < 1e-5


# ---- guidance, batches, sizes, number formats -----------------------------------------------------------------------


def test_without_guidance_the_target_is_edited_and_not_the_source(sd_pipe):
    """Google's controllers edit the second half of the batch, whatever it is."""
    edits = [CASES[name].edit(sd_pipe) for name in ("swap", "deletion", "refine")]
    plain = paint(sd_pipe, [BIG_CAT, *(edit.target.text for edit in edits)], guidance_scale=1)
    result, _ = painted(sd_pipe, edits, guidance_scale=1)
    assert distance(result[0], plain[0]) < 1e-5
    assert all(distance(row, own) > 1e-3 for row, own in zip(result[1:], plain[1:]))


@pytest.mark.parametrize("guidance_scale", [1., 7.5])
def test_targets_of_one_batch_equal_each_alone(sd_pipe, guidance_scale):
    edits = [CASES[name].edit(sd_pipe) for name in ("swap in windows", "deletion", "refine and reweight")]
    together, _ = painted(sd_pipe, edits, guidance_scale=guidance_scale)
    for row, edit in zip(together[1:], edits):
        assert distance(row, painted(sd_pipe, edit, guidance_scale=guidance_scale)[0][1]) < 1e-5


@pytest.mark.parametrize("name", ["sd_pipe", "xl_pipe"])
@pytest.mark.parametrize("guidance_scale", [1., 7.5])
def test_low_memory_changes_nothing_but_the_batch(request, name, guidance_scale):
    pipe, batches = request.getfixturevalue(name), []
    edit, blend = CASES["swap, split, copy"].edit(pipe), LocalBlend("a", resolution=8, soft=True)
    expected, _ = painted(pipe, edit, guidance_scale=guidance_scale, blend=blend)
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda module, arguments: batches.append(len(arguments[0])))
    result, controller = painted(pipe, edit, guidance_scale=guidance_scale, blend=blend, low_memory=True,
                                 record=Record())
    handle.remove()
    assert distance(result, expected) < 1e-5 and set(batches) == {2}
    assert len(batches) == STEPS * (1 if guidance_scale == 1 else 2) and len(controller.maps.layers) > 1


@pytest.mark.parametrize("size, pixels", [((16, 24), 4 * 6), ((24, 24), 6 * 6), ((32, 16), 8 * 4), ((12, 20), 3 * 5)])
def test_other_sizes_equal_the_reference(sd_pipe, size, pixels):
    """Layers are known by their place: at 1.5 times the size the layers of "4" have 6 x 6 pixels."""
    cases = [CASES["swap, split, average"], CASES["refine"]]
    expected = by_reference(sd_pipe, cases, pixels=pixels, size=size)
    result, _ = painted(sd_pipe, [case.edit(sd_pipe) for case in cases], size=size)
    assert distance(result, expected) < 1e-4


@pytest.mark.parametrize("resolution", [2, 8, 16])
def test_self_attention_is_injected_up_to_a_resolution(sd_pipe, resolution):
    case = CASES["swap"]
    expected = by_reference(sd_pipe, [case], pixels=resolution ** 2)
    result, _ = painted(sd_pipe, case.edit(sd_pipe), self_resolution=resolution)
    default, _ = painted(sd_pipe, case.edit(sd_pipe))
    assert distance(result, expected) < 1e-4 < distance(result, default)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, .02), (torch.bfloat16, .1)])
def test_half_precision_is_finite_and_close(tiny_folder, tiny_pipe, dtype, tolerance):
    from p2p_helpers.models import load
    from p2p_helpers.runtime import Runtime

    case, blend = CASES["refine and reweight"], LocalBlend("cat", soft=True)
    half = load(tiny_folder, runtime=Runtime("cpu", dtype, "local", 0))
    exact, _ = painted(tiny_pipe, case.edit(tiny_pipe), blend=blend, steps=2)
    result, controller = painted(half, case.edit(half), blend=blend, record=Record(), steps=2)
    assert result.dtype == dtype and result.isfinite().all() and controller.maps.cross().isfinite().all()
    assert distance(result.float(), exact) < tolerance


# ---- schedulers and pipelines ---------------------------------------------------------------------------------------


SCHEDULERS = {      # to the step of every call of the UNet, for four steps
    "ddim": (DDIMScheduler, {}, [0, 1, 2, 3]),
    "ddim, v-prediction": (DDIMScheduler, {"prediction_type": "v_prediction"}, [0, 1, 2, 3]),
    "ddim, trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}, [0, 1, 2, 3]),
    "euler": (EulerDiscreteScheduler, {}, [0, 1, 2, 3]),
    "dpm++": (DPMSolverMultistepScheduler, {}, [0, 1, 2, 3]),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}, [0, 1, 1, 2, 3]),
    "heun": (HeunDiscreteScheduler, {}, [0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_equals_the_reference(pipe, name):
    kind, settings, steps_of_calls = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **settings)
    cases = [CASES["swap in windows"], CASES["swap with steps per word"]]
    expected = by_reference(pipe, cases, steps_of_calls=steps_of_calls)
    result, controller = painted(pipe, [case.edit(pipe) for case in cases], record=Record(keep=("step",)))
    assert distance(result, expected) < 1e-4
    assert controller.maps.steps == (0, 1, 2, 3)


def image(pipe):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def generators(prompts):
    return [torch.Generator().manual_seed(3) for _ in prompts]


def from_image(pipe, prompts, **settings):
    """Half of eight steps: four, that the edit's windows divide."""
    return StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)(
        prompts, image=image(pipe), strength=.5, num_inference_steps=8, output_type="latent",
        generator=generators(prompts), **settings).images


def inpainted(pipe, prompts, **settings):
    mask = Image.new("L", image(pipe).size, 0)
    mask.paste(255, (0, 0, mask.width // 2, mask.height))
    return StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)(
        prompts, image=image(pipe), mask_image=mask, num_inference_steps=4, strength=1., output_type="latent",
        generator=generators(prompts), **settings).images


@pytest.mark.parametrize("run", [from_image, inpainted])
def test_other_pipelines_equal_the_reference(pipe, run):
    pipe.set_progress_bar_config(disable=True)
    case = CASES["swap in windows"]
    expected = by_reference(pipe, [case], run=run)
    with control(pipe, case.edit(pipe)):
        result = run(pipe, [case.source, case.target])
    plain = run(pipe, [case.source, case.target])
    assert distance(result, expected) < 1e-4 < distance(result, plain)


def test_generate_equals_the_stock_pipeline_under_control(sticker_pipe):
    edit = swap(sticker_pipe, CAT, DOG, cross_replace_steps=.5, self_replace_steps=.5)
    blend = LocalBlend(("cat", "dog"), soft=True)
    expected, _ = painted(sticker_pipe, edit, blend=blend, latents=noise(sticker_pipe, 2, seed=5))
    with control(sticker_pipe, edit, blend=blend) as controller, warnings.catch_warnings():
        warnings.simplefilter("error")
        result = generate(sticker_pipe, [CAT, DOG], seeds=5, steps=STEPS, callback=controller.callback)
    assert distance(result.latents, expected) < 1e-4


def test_a_second_run_in_one_block_starts_again(sd_pipe):
    edit = CASES["swap in windows"].edit(sd_pipe)
    expected, _ = painted(sd_pipe, edit, steps=3)
    with control(sd_pipe, edit):
        paint(sd_pipe, [edit.source.text, edit.target.text], steps=5)
        again = paint(sd_pipe, [edit.source.text, edit.target.text], steps=3)
    assert distance(again, expected) < 1e-6


def test_attention_is_controlled_with_gradients(sd_pipe):
    """Null-text optimisation differentiates through the UNet."""
    edit = CASES["refine"].edit(sd_pipe)
    embeddings = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sd_pipe.scheduler.set_timesteps(STEPS)
    with control(sd_pipe, edit):
        sd_pipe.unet(noise(sd_pipe, 2), 751, encoder_hidden_states=embeddings).sample[1].sum().backward()
    assert embeddings.grad.isfinite().all() and (embeddings.grad.abs().sum((1, 2)) > 0).all()


# ---- the layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, resolutions", [
    ("sticker_pipe", {"down": [16, 8], "mid": [8], "up": [8, 8, 16, 16]}),
    ("sd_pipe", {"down": [16, 16, 8, 8, 4, 4], "mid": [2], "up": [4] * 3 + [8] * 3 + [16] * 3}),
    ("xl_pipe", {"down": [8] * 4 + [4] * 6, "mid": [4] * 3, "up": [4] * 9 + [8] * 6})])
def test_layers_come_in_the_order_of_their_calls_with_their_resolution(request, name, resolutions):
    pipe, called = request.getfixturevalue(name), []
    layers = attention_layers(pipe.unet)

    def spy(name):
        def hook(module, args):
            called.append((name, args[0].shape[1]))
        return hook
    handles = [pipe.unet.get_submodule(layer.name).register_forward_pre_hook(spy(layer.name)) for layer in layers]
    paint(pipe, [CAT], steps=1)
    for handle in handles:
        handle.remove()
    assert [(layer.name, layer.resolution ** 2) for layer in layers] == called
    assert len(layers) == len(pipe.unet.attn_processors)
    for place, expected in resolutions.items():
        for cross in (True, False):
            assert [layer.resolution for layer in layers if layer.place == place and layer.cross == cross] == expected
    side = pipe.unet.config.sample_size
    assert all(layer.resolution * layer.scale == side for layer in layers)


def sized(sample_size, levels):
    """What is asked of a UNet with attention on all levels but the last, or on both of two."""
    last = 1 if levels > 2 else 0
    blocks = ["mid_block", *(f"down_blocks.{i}" for i in range(levels - last)),
              *(f"up_blocks.{i}" for i in range(last, levels))]
    names = [f"{block}.attentions.0.transformer_blocks.0.attn{k}.processor" for block in blocks for k in (1, 2)]
    config = SimpleNamespace(sample_size=sample_size, block_out_channels=(8,) * levels)
    return SimpleNamespace(config=config, attn_processors=dict.fromkeys(names))


@pytest.mark.parametrize("sample_size, levels, self_attention, maps", [
    (64, 4, 16, 16), (96, 4, 24, 24), (128, 3, 32, 32), (16, 2, 8, 16)])
def test_default_resolutions(sample_size, levels, self_attention, maps):
    """16 in Stable Diffusion 1.x, as Google; 32 in XL; on the bundled model self-attention stops at 8."""
    unet = sized(sample_size, levels)
    assert default_resolution(unet, self_attention=True) == self_attention
    assert default_resolution(unet) == maps


# ---- the UNet is left as it was -------------------------------------------------------------------------------------


def state(pipe):
    return (dict(pipe.unet.attn_processors), "forward" in vars(pipe.unet), "step" in vars(pipe.scheduler),
            len(pipe.unet._forward_pre_hooks), len(pipe.unet._forward_hooks))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("stop"), KeyboardInterrupt()])
def test_the_unet_and_the_scheduler_are_restored(pipe, low_memory, error):
    """Google's and diffusers' processors stay installed."""
    def stop(pipe, step, timestep, kwargs):
        assert state(pipe) != before
        if error is not None and step == 1:
            raise error
        return {}

    before, plain = state(pipe), paint(pipe, [CAT, DOG])
    with pytest.raises(type(error)) if error else warnings.catch_warnings():
        painted(pipe, swap(pipe, CAT, DOG), blend=LocalBlend("a"), low_memory=low_memory, callback_on_step_end=stop)
    assert state(pipe) == before and torch.equal(paint(pipe, [CAT, DOG]), plain)


def test_processors_of_another_kind_come_back(pipe):
    kept = dict(pipe.unet.attn_processors)
    explicit = {name: AttnProcessor() for name in kept}
    pipe.unet.set_attn_processor(dict(explicit))
    painted(pipe, swap(pipe, CAT, DOG), steps=1)
    left = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(kept)
    assert left == explicit


def test_a_second_control_of_the_same_unet_is_refused_and_the_first_goes_on(pipe):
    edit, before = swap(pipe, CAT, DOG), state(pipe)
    expected, _ = painted(pipe, edit)
    with control(pipe, edit):
        with pytest.raises(RuntimeError, match="under control already"):
            with control(pipe, edit):
                pass
        assert torch.equal(paint(pipe, [CAT, DOG]), expected)
    assert state(pipe) == before


# ---- bad input ------------------------------------------------------------------------------------------------------


def with_processors(pipe, processors):
    kept = dict(pipe.unet.attn_processors)
    pipe.unet.set_attn_processor(processors)
    return lambda: pipe.unet.set_attn_processor(kept)


def test_sliced_attention_is_refused(pipe):
    restore = with_processors(pipe, SlicedAttnProcessor(1))
    try:
        with pytest.raises(TypeError, match="has a SlicedAttnProcessor; control knows .*disable_attention_slicing"):
            with control(pipe, swap(pipe, CAT, DOG)):
                pass
    finally:
        restore()


@pytest.mark.parametrize("settings", [
    dict(cross_attention_norm="layer_norm", down_block_types=("CrossAttnDownBlock2D",) * 2,
         up_block_types=("CrossAttnUpBlock2D",) * 2),
    dict(down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
         up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"))])
def test_attention_that_is_not_plain_is_refused(tiny_pipe, settings):
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                cross_attention_dim=32, attention_head_dim=2, **settings)
    if "cross_attention_norm" in settings:
        for layer in attention_layers(unet):
            module = unet.get_submodule(layer.name)
            module.norm_cross = torch.nn.LayerNorm(32) if layer.cross else None
    parts = {**tiny_pipe.components, "unet": unet}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(TypeError, match="is no plain attention"):
        with control(pipe, swap(pipe, CAT, DOG)):
            pass


def test_processors_replaced_inside_the_block_are_noticed(pipe):
    with pytest.raises(RuntimeError, match="0 of 32 attention layers ran under control"):
        with control(pipe, swap(pipe, CAT, DOG)):
            pipe.unet.set_attn_processor(AttnProcessor2_0())
            paint(pipe, [CAT, DOG], steps=1)


@pytest.mark.parametrize("prompts, guidance_scale", [
    ([CAT], 1.), ([CAT, DOG, DOG], 1.), ([CAT, DOG, DOG], 7.5), ([CAT] * 4, 7.5)])
def test_a_batch_of_another_length_is_refused(pipe, prompts, guidance_scale):
    with pytest.raises(ValueError, match=r"a batch of \d+ for 2 prompts .*'a dog on the beach'"):
        with control(pipe, swap(pipe, CAT, DOG)):
            paint(pipe, prompts, guidance_scale=guidance_scale, steps=1)


def test_different_noise_per_prompt_warns(pipe):
    """diffusers' community pipeline gives every prompt its own and says nothing."""
    latents = torch.cat([noise(pipe, 1, seed=0), noise(pipe, 1, seed=1)])
    with pytest.warns(UserWarning, match="start from different noise.*initial_latents"):
        painted(pipe, swap(pipe, CAT, DOG), latents=latents, steps=1)


@pytest.mark.parametrize("make", [swap, empty])
def test_the_same_noise_or_no_edit_does_not_warn(pipe, make):
    latents = noise(pipe, 2) if make is swap else torch.randn(2, 4, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        painted(pipe, make(pipe, CAT, DOG), latents=latents, steps=1)


def test_edits_must_share_a_source(pipe):
    with pytest.raises(ValueError, match="different sources: .*'a cat on the beach'.*'a dog on the beach'"):
        with control(pipe, [swap(pipe, CAT, DOG), swap(pipe, DOG, CAT)]):
            pass


def test_control_needs_an_edit_or_prompts(pipe):
    with pytest.raises(ValueError, match="needs edits, or the prompts"):
        with control(pipe):
            pass
