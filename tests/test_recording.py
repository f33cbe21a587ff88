"""Recorded attention maps against explicit softmax, and what a recorder refuses."""
import warnings

import pytest
import reference
import torch
from test_attention import distance, paint, painted, self_pixels

from p2p_helpers.attention import attention_layers, control
from p2p_helpers.edits import empty, refine, reweight, swap
from p2p_helpers.prompts import read_prompt
from p2p_helpers.recording import AttentionMaps, Layer, Record

CAT, TARGET = "a cat on the beach", "a big bus on the beach"
COARSE = Layer("mid_block.attentions.0.transformer_blocks.0.attn2", "mid", True, 2, 8)
FINE = Layer("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "up", True, 4, 4)


@pytest.fixture(scope="module")
def runs(sd_pipe):
    """One run of an edit in two steps, recorded in both ways, and the reference's own record of it."""
    edit = reweight(refine(sd_pipe, CAT, TARGET, cross_replace_steps=.5, self_replace_steps=.5), {"beach": 3})
    made = {edited: painted(sd_pipe, edit, steps=2, guidance_scale=2.,
                            record=Record(self_attention=True, keep=("step", "head"), edited=edited))[1].maps
            for edited in (True, False)}
    target = reference.describe(sd_pipe.tokenizer, CAT, TARGET, [(0, 0), (2, 3), (3, 4), (4, 5)], steps={0},
                                self_steps={0}, weights=((5, 3.),))
    with reference.reference_control(sd_pipe, [target], self_pixels=self_pixels(sd_pipe)) as run:
        paint(sd_pipe, [CAT, TARGET], steps=2, guidance_scale=2.)
    return made, run


# ---- what is recorded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", [True, False])
def test_maps_equal_an_explicit_softmax(runs, edited):
    made, run = runs
    maps, expected = made[edited], run.maps if edited else run.own
    assert len(maps.layers) == 32 and maps.steps == (0, 1)
    for layer in maps.layers:
        for step in (0, 1):
            for prompt in (0, 1):
                for head in (0, 1):
                    where = dict(prompt=prompt, layer=layer.name, step=step, head=head)
                    kept = maps.cross(**where).flatten(0, 1) if layer.cross else maps.self_attention(**where)
                    own = expected[f"{layer.name}.processor", step][prompt, head]
                    assert torch.allclose(kept, own, atol=2e-4), layer


def test_edited_maps_are_those_that_the_layers_use(runs):
    """Google's store keeps a view of what the edit writes: the edited maps."""
    made, _ = runs
    layer = next(layer for layer in made[True].layers if layer.cross)
    after, before, source = (made[edited].cross(prompt, layer=layer.name, step=0)
                             for edited, prompt in ((True, 1), (False, 1), (False, 0)))
    assert torch.allclose(after[..., 12], source[..., 9], atol=1e-6)              # padding, 3 behind the end mark
    assert torch.allclose(after[..., 8], 3 * source[..., 5], atol=1e-6)           # beach
    assert not torch.allclose(before[..., 8], after[..., 8], atol=1e-3)
    assert torch.allclose(after[..., 2], before[..., 2], atol=1e-6)               # big is new


def test_maps_without_an_edit_sum_to_one(runs):
    made, _ = runs
    for prompt in (0, 1):
        whole = made[False].cross(prompt)
        assert whole.shape == (16, 16, 32) and torch.allclose(whole.sum(-1), torch.ones(16, 16), atol=1e-5)
        assert torch.allclose(made[False].self_attention(prompt).sum(-1), torch.ones(256), atol=1e-5)
    assert not torch.allclose(made[True].cross(1, step=0).sum(-1), torch.ones(16, 16), atol=1e-2)


def test_averages_equal_the_mean_of_what_is_kept_apart(sd_pipe, runs):
    made, _ = runs
    edit = reweight(refine(sd_pipe, CAT, TARGET, cross_replace_steps=.5, self_replace_steps=.5), {"beach": 3})
    averaged = painted(sd_pipe, edit, steps=2, guidance_scale=2., record=Record())[1].maps
    assert averaged.steps == () and all(layer.cross for layer in averaged.layers)
    for where in (dict(resolution=8), dict(resolution=4, place="up"), dict(layer=averaged.layers[0].name)):
        apart = [made[True].cross(step=step, head=head, **where) for step in (0, 1) for head in (0, 1)]
        assert torch.allclose(averaged.cross(**where), torch.stack(apart).mean(0), atol=1e-5)


def test_a_resolution_averages_its_layers_alone(runs):
    maps = runs[0][True]
    names = [layer.name for layer in maps.layers if layer.cross and layer.resolution == 8 and layer.place == "up"]
    layers = [maps.cross(layer=name) for name in names]
    assert len(layers) == 3
    assert torch.allclose(maps.cross(resolution=8, place="up"), torch.stack(layers).mean(0), atol=1e-6)
    assert torch.allclose(maps.cross(), maps.cross(resolution=16))                  # the finest by default


def test_the_map_of_a_word_is_the_sum_of_its_tokens(runs):
    maps = runs[0][True]
    whole = maps.cross(resolution=4)
    assert torch.allclose(maps.of("bus", resolution=4), whole[..., 3:6].sum(-1)) and whole.shape == (4, 4, 32)
    assert torch.allclose(maps.of("big bus", resolution=4), whole[..., 2:6].sum(-1))
    assert torch.allclose(maps.of("cat", prompt=0), maps.cross(0)[..., 2])


def test_recording_changes_no_picture(sd_pipe):
    edit = swap(sd_pipe, CAT, "a dog on the beach")
    plain, recorded = (painted(sd_pipe, edit, steps=2, record=record)[0]
                       for record in (None, Record(self_attention=True, resolution=16)))
    assert torch.equal(plain, recorded)


def test_prompts_are_recorded_without_an_edit(sd_pipe):
    plain = paint(sd_pipe, [CAT, TARGET], steps=2)
    with control(sd_pipe, prompts=[CAT, TARGET], record=Record(resolution=8)) as controller:
        assert distance(paint(sd_pipe, [CAT, TARGET], steps=2), plain) < 1e-5
    assert controller.maps.of("cat", prompt=0).shape == controller.maps.of("bus").shape == (8, 8)
    assert max(layer.resolution for layer in controller.maps.layers) == 8


@pytest.mark.parametrize("size", [(16, 24), (12, 20)])
def test_maps_of_a_picture_that_is_not_square(sd_pipe, size):
    with control(sd_pipe, prompts=[CAT], record=Record()) as controller:
        paint(sd_pipe, [CAT], size=size, steps=1)
    assert controller.maps.of("cat").shape == size
    assert controller.maps.of("cat", resolution=4).shape == (-(-size[0] // 4), -(-size[1] // 4))


def test_a_map_lies_the_right_way_round(sd_pipe):
    """Rows are rows: the map's entry at row 3, column 7 belongs to that pixel of the layer's input."""
    layer = next(layer for layer in attention_layers(sd_pipe.unet) if layer.cross and layer.resolution == 8)
    module, kept = sd_pipe.unet.get_submodule(layer.name), []
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with control(sd_pipe, prompts=[CAT], record=Record(keep=("head",))) as controller:
        paint(sd_pipe, [CAT], size=(16, 24), steps=1, guidance_scale=1.)
    handle.remove()
    tokens = sd_pipe.encode_prompt(CAT, "cpu", 1, False)[0]
    pixel = module.to_q(kept[0])[0, 3 * 12 + 7].chunk(2)[0]             # row 3, column 7 of 8 x 12, head 0
    scores = module.to_k(tokens)[0].chunk(2, dim=-1)[0] @ pixel / len(pixel) ** .5
    assert torch.allclose(controller.maps.cross(layer=layer.name, head=0)[3, 7], scores.softmax(-1), atol=1e-5)


# ---- limits and messages --------------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny_pipe):
    def make(**settings):
        return AttentionMaps([read_prompt(tiny_pipe.tokenizer, CAT)], Record(**settings))
    return make


def maps_of(layer, value=1.):
    side = 16 // layer.scale
    return torch.full((1, 2, side * side, 32), value)


def test_the_mean_of_several_steps(small):
    maps = small()
    for step, value in enumerate([1., 2., 6.]):
        maps.add(FINE, step, (4, 4), maps_of(FINE, value))
    assert torch.allclose(maps.cross(), torch.full((4, 4, 32), 3.)) and maps.bytes == 16 * 32 * 4


def test_memory_is_limited_and_what_is_dropped_is_said_once(small):
    maps = small(max_bytes=16 * 32 * 4)
    maps.add(FINE, 0, (4, 4), maps_of(FINE))
    with pytest.warns(UserWarning, match="max_bytes; dropped: mid_block.*attn2") as caught:
        maps.add(COARSE, 0, (2, 2), maps_of(COARSE))
        maps.add(COARSE, 1, (2, 2), maps_of(COARSE))
    assert len(caught) == 1 and maps.dropped == [COARSE.name] and maps.bytes <= 16 * 32 * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps.add(FINE, 1, (4, 4), maps_of(FINE, 3.))
    assert maps.layers == (FINE,) and torch.allclose(maps.cross(), torch.full((4, 4, 32), 2.))


def test_a_dropped_step_is_named(small):
    maps = small(max_bytes=2 * 16 * 32 * 4, keep=("step",))
    with pytest.warns(UserWarning, match="step 2 and what follows"):
        for step in range(4):
            maps.add(FINE, step, (4, 4), maps_of(FINE))
    assert maps.steps == (0, 1) and maps.dropped == [f"{FINE.name}, step 2", f"{FINE.name}, step 3"]


def test_memory_of_a_run_stays_within_the_limit(sd_pipe):
    with pytest.warns(UserWarning, match="dropped"):
        _, controller = painted(sd_pipe, empty(sd_pipe, CAT), steps=1, record=Record(max_bytes=100_000))
    assert 0 < controller.maps.bytes <= 100_000 and controller.maps.dropped


@pytest.mark.parametrize("ask, message", [
    (dict(step=0), r"steps were averaged; record with keep=\('step',\)"),
    (dict(head=0), r"heads were averaged; record with keep=\('head',\)"),
    (dict(place="down"), "no cross-attention was recorded for place='down'.*there is: mid 2, up 4"),
    (dict(resolution=16), "no cross-attention was recorded for resolution=16.*there is: mid 2, up 4"),
    (dict(layer="mid_block"), "layer 'mid_block' was not recorded")])
def test_what_was_not_recorded_is_said(small, ask, message):
    maps = small()
    maps.add(COARSE, 0, (2, 2), maps_of(COARSE))
    maps.add(FINE, 0, (4, 4), maps_of(FINE))
    with pytest.raises(ValueError, match=message):
        maps.of("cat", **ask)


def test_a_step_or_head_that_is_not_there_is_said(small):
    maps = small(keep=("step", "head"))
    maps.add(FINE, 0, (4, 4), maps_of(FINE))
    with pytest.raises(ValueError, match=r"step=7.*steps: \(0,\)"):
        maps.of("cat", step=7)
    with pytest.raises((ValueError, IndexError), match="head|out of bounds"):
        maps.of("cat", head=2)
    assert torch.equal(maps.of("cat", head=-1), maps.of("cat", head=1))


def test_a_word_that_is_not_in_the_prompt_is_said(small):
    maps = small()
    maps.add(FINE, 0, (4, 4), maps_of(FINE))
    with pytest.raises(ValueError, match="word 'dog' is not in the prompt 'a cat on the beach'"):
        maps.of("dog")


def test_nothing_recorded_is_said(small):
    with pytest.raises(ValueError, match="no self-attention was recorded for anything; there is: nothing"):
        small().self_attention()


@pytest.mark.parametrize("keep", ["step", ("steps",), ("step", "layer")])
def test_unknown_axes_are_an_error(keep):
    with pytest.raises(ValueError, match=r"keep .* is a tuple with some of \('step', 'head'\)"):
        Record(keep=keep)
