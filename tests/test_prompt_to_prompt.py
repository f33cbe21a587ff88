"""One call makes an edit, and what it returns can be kept."""
import json

import pytest
import torch

from p2p_helpers.attention import control
from p2p_helpers.blending import LocalBlend
from p2p_helpers.edits import mix, refine, reweight
from p2p_helpers.prompt_to_prompt import edit_prompt, load_result
from p2p_helpers.recording import Record
from p2p_helpers.sampling import initial_latents

SOURCE, TARGET = "a cat on the grass", "a dog on the grass"
FAST = {"steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def result(tiny_pipe):
    return edit_prompt(tiny_pipe, SOURCE, TARGET, blend="cat", weights={"grass": 2.}, **FAST)


def test_one_call_is_the_pipeline_under_control(tiny_pipe):
    result = edit_prompt(tiny_pipe, SOURCE, TARGET, **FAST)
    latents = initial_latents(tiny_pipe, [1, 1])
    with control(tiny_pipe, mix(tiny_pipe, SOURCE, TARGET)):
        expected = tiny_pipe([SOURCE, TARGET], latents=latents, num_inference_steps=3, output_type="latent").images
    assert torch.equal(result.latents, expected)


def test_both_pictures_start_from_the_same_noise(tiny_pipe):
    """The community pipeline draws noise for each prompt (peers.md 4.6): nothing injected must mean equal pictures."""
    same = edit_prompt(tiny_pipe, SOURCE, SOURCE, cross_replace_steps=0., self_replace_steps=0., **FAST)
    assert torch.equal(same.latents[0], same.latents[1])


def test_edits_built_by_hand_and_prompts_mix(tiny_pipe):
    by_hand = reweight(refine(tiny_pipe, SOURCE, "a small cat on the grass"), {"small": 3.})
    both = edit_prompt(tiny_pipe, SOURCE, [by_hand, TARGET], **FAST)
    alone = edit_prompt(tiny_pipe, SOURCE, TARGET, **FAST)
    assert both.settings["targets"] == ["a small cat on the grass", TARGET]
    assert torch.allclose(both.latents[2], alone.latents[1], atol=1e-4)


def test_an_edit_of_another_source_is_refused(tiny_pipe):
    with pytest.raises(ValueError, match="another source than 'a cat on the grass'"):
        edit_prompt(tiny_pipe, SOURCE, mix(tiny_pipe, TARGET, SOURCE), **FAST)


def test_weights_alone_edit_the_source(tiny_pipe):
    plain, strong = (edit_prompt(tiny_pipe, SOURCE, weights={"grass": c}, self_replace_steps=1.,
                                 cross_replace_steps=1., **FAST) for c in (1., 4.))
    assert torch.allclose(plain.latents[1], plain.latents[0], atol=1e-4)
    assert (strong.latents[1] - strong.latents[0]).abs().max() > 1e-3


def test_a_weight_counts_in_the_targets_that_have_the_word(tiny_pipe):
    result = edit_prompt(tiny_pipe, SOURCE, [TARGET, "a horse on the grass"], weights={"dog": 2.}, **FAST)
    assert [edit.weights.max().item() for edit in result.edits] == [2, 1]


def test_a_blend_word_of_the_source_finds_what_takes_its_place(result):
    entries = result.settings["blend"]["words"]
    assert entries == [["cat"], ["dog"]]
    assert result.mask.shape == (2, 1, 16, 16)


def test_unknown_words_are_named(tiny_pipe):
    with pytest.raises(ValueError, match="'gras'.*did you mean 'grass'"):
        edit_prompt(tiny_pipe, SOURCE, TARGET, weights={"gras": 2.}, **FAST)
    for blend in ("gras", ["cat", "gras"]):
        with pytest.raises(ValueError, match="'gras'.*did you mean 'grass'"):
            edit_prompt(tiny_pipe, SOURCE, TARGET, blend=blend, **FAST)


@pytest.mark.parametrize("source, target, message", [("", TARGET, "empty"), (SOURCE, "cat " * 40, "would be cut")])
def test_bad_prompts(tiny_pipe, source, target, message):
    with pytest.raises(ValueError, match=message):
        edit_prompt(tiny_pipe, source, target, **FAST)


def test_a_bad_negative_prompt_is_refused(tiny_pipe):
    with pytest.raises(ValueError, match="would be cut"):
        edit_prompt(tiny_pipe, SOURCE, TARGET, negative_prompt="cat " * 40, **FAST)


def test_saved_and_loaded_is_the_same(result, tmp_path):
    again = load_result(result.save(tmp_path / "kept"))
    assert torch.equal(again.latents, result.latents) and torch.equal(again.mask, result.mask)
    assert [image.tobytes() for image in again.images] == [image.tobytes() for image in result.images]
    assert torch.equal(again.attention.of("dog"), result.attention.of("dog"))
    assert torch.equal(again.attention.of("cat", 0), result.attention.of("cat", 0))
    assert again.settings == json.loads(json.dumps(result.settings))


def test_a_result_without_maps_is_kept_too(tiny_pipe, tmp_path):
    result = edit_prompt(tiny_pipe, SOURCE, TARGET, record=None, **FAST)
    again = load_result(result.save(tmp_path / "kept"))
    assert again.attention is None and again.mask is None and len(again.images) == 2


def test_a_given_mask_and_kept_steps_are_saved(tiny_pipe, tmp_path):
    result = edit_prompt(tiny_pipe, SOURCE, TARGET, blend=LocalBlend(mask=torch.ones(16, 16, dtype=torch.bool)),
                         record=Record(keep=("step",)), **FAST)
    again = load_result(result.save(tmp_path / "kept"))
    assert torch.equal(again.attention.of("dog", step=2), result.attention.of("dog", step=2))
    assert again.settings["blend"]["mask"] == "given"


def test_a_folder_without_a_result(tmp_path):
    with pytest.raises(FileNotFoundError, match="settings.json"):
        load_result(tmp_path)
