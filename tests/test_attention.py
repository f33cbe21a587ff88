import copy
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import reference
import torch
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler,
                       HeunDiscreteScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline,
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
def pipe(tiny_pipe):
    """The tiny pipeline with a scheduler of its own, that a test may replace."""
    kept = tiny_pipe.scheduler
    tiny_pipe.scheduler = copy.deepcopy(kept)
    yield tiny_pipe
    tiny_pipe.scheduler = kept


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


def moved(left, right):
    """Whether two results differ by far more than rounding."""
    return distance(left, right) > 1e-2


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
    return Case(source, target, lambda *args: swap(*args, mode=mode, **HALF), pairs, dict(FIRST_TWO, unequal=RULES[mode]))


CASES = {
    "swap": swapped(BIG_CAT, "a big dog on the beach", "average"),
    **{f"swap, split, {mode}": swapped(BIG_CAT, "a big motorcycle on the beach", mode) for mode in RULES},
    **{f"swap, merged, {mode}": swapped(RIDERS, "a car and a dog", mode) for mode in RULES},
    **{f"swap, several to more, {mode}": swapped(RIDERS, "a strawberry and a dog", mode) for mode in RULES},
    "swap of several words": swapped(RIDERS, "the horse and a motorcycle", "average"),
    "swap in windows": Case(
        BIG_CAT, "a big dog on the beach", lambda *args: swap(*args, cross_replace_steps=(.25, 1), self_replace_steps=(.5, .75)),
        IN_ORDER, dict(steps={1, 2, 3}, self_steps={2})),
    "swap with steps per word": Case(
        BIG_CAT, "a big dog on the beach",
        lambda *args: swap(*args, cross_replace_steps={"default_": .5, "dog": .25, "beach": (.5, 1.)}, self_replace_steps=0),
        IN_ORDER, dict(steps={0, 1}, word_steps=((2, {0}), (5, {2, 3})))),
    "refine": Case(
        BIG_CAT, "a big red cat on the beach at night", lambda *args: refine(*args, cross_replace_steps=.75, self_replace_steps=.5),
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


def by_reference(pipe, cases, *, steps_of_calls=None, blend=None, run=None, **settings):
    """What the reference makes of cases of one source, as targets of one batch."""
    targets = [case.reference(pipe) for case in cases]
    prompts = [cases[0].source, *(case.target for case in cases)]
    with reference.reference_control(pipe, targets, self_pixels=self_pixels(pipe), steps_of_calls=steps_of_calls,
                                     blend=blend) as kept:
        step_end = {"callback_on_step_end": kept.on_step_end} if blend else {}
        return (run or paint)(pipe, prompts, **step_end, **settings)


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
