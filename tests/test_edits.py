"""Edits as (M, u, v), without a model; "ox" is two tokens and "bus" three in the tiny tokenizer."""
import math

import pytest
import reference
import torch

from p2p_helpers import edits
from p2p_helpers.edits import empty, explain, explain_edit, mix, refine, reweight, swap

CAT, DOG, LENGTH = "a cat on the beach", "a dog on the beach", 32
MOMENTS = [.05, .25, .5, .75, .95]


@pytest.fixture(scope="module")
def tokenizer(tiny_pipe):
    return tiny_pipe.tokenizer


def injected(edit, word, moments=MOMENTS):
    """In which moments a word of the target is injected."""
    positions = list(edit.target.positions(word))
    return [bool(edit.gains(moment)[0][positions].all()) for moment in moments]


def by_formula(edit, source, own, moment):
    """A = P_s M diag(u) + P_t diag(v)."""
    u, v = edit.gains(moment)
    return source @ edit.alignment.matrix @ torch.diag(u) + own @ torch.diag(v)


# ---- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, source, target, pairs, settings", [
    (lambda t: swap(t, CAT, DOG, cross_replace_steps=.5), CAT, DOG, [(i, i) for i in range(5)], {}),
    (lambda t: swap(t, CAT, "a bus on the beach", cross_replace_steps=.5, mode="copy"), CAT, "a bus on the beach",
     [(i, i) for i in range(5)], dict(unequal=reference.copy)),
    (lambda t: refine(t, CAT, "a big cat on the beach", cross_replace_steps=.5), CAT, "a big cat on the beach",
     [(0, 0), (1, 2), (2, 3), (3, 4), (4, 5)], {}),
    (lambda t: refine(t, "a big ox on the beach", "an ox", cross_replace_steps=.5), "a big ox on the beach", "an ox",
     [(2, 1)], {}),
    (lambda t: reweight(refine(t, CAT, "a big cat on the beach", cross_replace_steps=.5), {"big": -2, "cat": 3}),
     CAT, "a big cat on the beach", [(0, 0), (1, 2), (2, 3), (3, 4), (4, 5)], dict(weights=((1, -2.), (2, 3.))))])
def test_the_formula_equals_the_reference_token_by_token(tokenizer, make, source, target, pairs, settings):
    edit = make(tokenizer)
    by_hand = reference.describe(tokenizer, source, target, pairs, steps={0}, **settings)
    source_map, own = torch.rand(2, 3, 7, LENGTH, generator=torch.Generator().manual_seed(0))
    for step, moment in enumerate([.25, .75]):
        expected = reference.edited_cross(source_map, own, by_hand, step)
        assert torch.allclose(by_formula(edit, source_map, own, moment), expected, atol=1e-6)


def test_an_empty_edit_is_never_injected(tokenizer):
    edit = empty(tokenizer, CAT, DOG)
    for moment in [0., *MOMENTS]:
        u, v = edit.gains(moment)
        assert not u.any() and (v == 1).all() and not edit.injects_self(moment)
    assert empty(tokenizer, CAT).target.text == CAT


# ---- when -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window, expected", [
    (.5, [True, True, False, False, False]), (0, [False] * 5), (1, [True] * 5), (1., [True] * 5),
    ((.2, .8), [False, True, True, True, False]), ([.5, 1], [False, False, True, True, True]), ((.3, .3), [False] * 5)])
def test_a_window_is_a_part_of_the_steps(tokenizer, window, expected):
    """An int crashes Google's get_time_words_attention_alpha."""
    edit = swap(tokenizer, CAT, DOG, cross_replace_steps=window, self_replace_steps=window)
    assert injected(edit, "dog") == expected
    assert [edit.injects_self(moment) for moment in MOMENTS] == expected


@pytest.mark.parametrize("tau, steps, expected", [
    (.8, 50, 40), (.4, 50, 20), (1., 50, 50), (.4, 4, 2), (.5, 3, 1), (.1, 4, 0)])
def test_steps_injected(tokenizer, tau, steps, expected):
    """As Google's code counts them at 50 steps: .8 is 40, .4 is 20."""
    edit = swap(tokenizer, CAT, DOG, cross_replace_steps=tau, self_replace_steps=tau)
    moments = [(step + .5) / steps for step in range(steps)]
    assert sum(injected(edit, "dog", moments)) == sum(map(edit.injects_self, moments)) == expected


def test_windows_per_word(tokenizer):
    edit = swap(tokenizer, CAT, "a bus on the beach",
                cross_replace_steps={"default_": .2, "bus": (.2, .6), "The beach": 1})
    assert injected(edit, "bus") == [False, True, True, False, False]
    assert injected(edit, "the beach") == [True] * 5 and injected(edit, "on") == [True, False, False, False, False]


def test_without_a_default_other_words_are_always_injected(tokenizer):
    edit = swap(tokenizer, CAT, DOG, cross_replace_steps={"dog": .2})
    assert injected(edit, "dog") == [True] + [False] * 4 and injected(edit, "beach") == [True] * 5


def test_the_callers_dict_stays_as_it_is(tokenizer):
    """Google's code adds to it."""
    given, weights = {"dog": .4}, {"dog": 2.}
    reweight(swap(tokenizer, CAT, DOG, cross_replace_steps=given), weights)
    assert given == {"dog": .4} and weights == {"dog": 2.}


@pytest.mark.parametrize("name", ["cross_replace_steps", "self_replace_steps"])
@pytest.mark.parametrize("value", [-.1, 1.1, math.nan, (.6, .4), (-.1, .5), (.5, 2), (math.nan, 1), (0, math.nan)])
def test_a_window_outside_the_run_is_an_error(tokenizer, name, value):
    with pytest.raises(ValueError, match=f"{name} .* is no part of the steps"):
        swap(tokenizer, CAT, DOG, **{name: value})


def test_a_words_window_outside_the_run_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="cross_replace_steps 1.5 is no part of the steps"):
        swap(tokenizer, CAT, DOG, cross_replace_steps={"dog": 1.5})


@pytest.mark.parametrize("words", [{"cat": .4}, {"default_": .4, "dgo": .4}])
def test_a_window_for_an_unknown_word_is_an_error(tokenizer, words):
    """Google's code ignores it; words are those of the target."""
    with pytest.raises(ValueError, match="is not in the prompt 'a dog on the beach'; .*known: a, dog, on, the, beach"):
        swap(tokenizer, CAT, DOG, cross_replace_steps=words)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_every_word_gets_its_own_weight_on_all_its_tokens(tokenizer):
    """Google's get_equalizer lays two words' values across the tokens of one, or crashes."""
    edit = reweight(swap(tokenizer, "a bus and an ox", "a bus and an ox"), {"bus": 2, "ox": -1})
    expected = torch.ones(LENGTH)
    expected[2:5], expected[7:9] = 2, -1
    assert torch.equal(edit.weights, expected)


def test_weights_apply_while_a_word_is_injected(tokenizer):
    edit = reweight(swap(tokenizer, CAT, CAT, cross_replace_steps=.5), {"cat": 3})
    u, v = edit.gains(.2)
    assert u[2] == 3 and v[2] == 0 and u[1] == 1
    u, v = edit.gains(.8)
    assert not u.any() and (v == 1).all()


def test_reweighting_again_replaces_a_words_weight_and_leaves_the_first_edit_alone(tokenizer):
    once = reweight(swap(tokenizer, CAT, CAT), {"cat": 3, "beach": 2})
    twice = reweight(once, {"cat": .5})
    assert once.weights[[2, 5]].tolist() == [3, 2] and twice.weights[[2, 5]].tolist() == [.5, 2]


def test_a_weight_works_on_a_word_with_a_mark(tokenizer):
    edit = reweight(swap(tokenizer, "a cat, a dog", "a cat, a dog"), {"cat": 2})
    assert edit.weights[:5].tolist() == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_must_be_finite(tokenizer, weight):
    with pytest.raises(ValueError, match="weight .* of 'cat' is not finite"):
        reweight(swap(tokenizer, CAT, CAT), {"cat": weight})


def test_a_weight_for_an_unknown_word_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="word 'cta' is not in the prompt .* did you mean 'cat'"):
        reweight(swap(tokenizer, CAT, CAT), {"cta": 2})


# ---- which edit -----------------------------------------------------------------------------------------------------


def test_a_swap_needs_as_many_words(tokenizer):
    with pytest.raises(ValueError, match="as many words .* has 5, .* has 6; use refine"):
        swap(tokenizer, CAT, "a big cat on the beach")


@pytest.mark.parametrize("make", [swap, refine, mix, empty])
@pytest.mark.parametrize("source, target, message", [("", DOG, "empty"), (CAT, " ", "empty"),
                                                     (CAT, "cat " * 30 + "dog", "would be cut: 'dog'")])
def test_an_empty_or_too_long_prompt_is_an_error(tokenizer, make, source, target, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, source, target)


def test_refine_takes_a_replaced_word_for_a_new_one_and_mix_does_not(tokenizer):
    target = "a red bus on the beach"
    refined, mixed = (make(tokenizer, CAT, target) for make in (refine, mix))
    assert refined.alignment.partnered[3:6].tolist() == [0, 0, 0]
    assert mixed.alignment.partnered[3:6].tolist() == [1, 1, 1] and mixed.alignment.partnered[2] == 0


def test_legacy_changes_only_the_alignment(tokenizer):
    target = "a bus on the beach"
    ours, legacy = (swap(tokenizer, CAT, target, cross_replace_steps={"bus": .4}, legacy=legacy)
                    for legacy in (False, True))
    assert torch.equal(ours.windows, legacy.windows) and not torch.equal(ours.alignment.matrix, legacy.alignment.matrix)
    ours, legacy = (refine(tokenizer, "a big red cat", "a cat", legacy=legacy) for legacy in (False, True))
    assert ours.alignment.matrix[1:, 4].nonzero().flatten().tolist() == [5]       # source end + 1 is no word
    assert legacy.alignment.matrix[:, 4].nonzero().flatten().tolist() == [4]      # "cat"


# ---- explained ------------------------------------------------------------------------------------------------------


def test_an_explanation_says_what_every_token_takes(tokenizer):
    edit = reweight(swap(tokenizer, CAT, "a bus on the beach", cross_replace_steps={"bus": .4, "default_": .8},
                         self_replace_steps=(.2, .6)), {"beach": -2})
    lines = str(explain(edit)).splitlines()
    assert lines[:3] == ["source: a cat on the beach", "target: a bus on the beach", "self-attention injected: 20-60 %"]
    assert [line.split() for line in lines[5:10]] == [
        ["1", "a", "1", "a", "0-80", "%", "1"],
        *(["%d" % j, piece, "0.333", "x", "2", "cat", "0-40", "%", "1"] for j, piece in zip((2, 3, 4), "bus")),
        ["5", "on", "3", "on", "0-80", "%", "1"]]
    assert lines[11].split() == ["7", "beach", "5", "beach", "0-80", "%", "-2"]


def test_an_explanation_names_what_is_gone_and_what_is_new(tokenizer):
    said = explain_edit(tokenizer, "a big cat", "a cat at night", cross_replace_steps=0)
    assert "gone from the source: big" in str(said)
    assert [row[2:4] for row in said.rows if row[1] == "night"] == [("itself", "never")]


def test_an_explanation_is_safe_in_a_notebook(tokenizer):
    assert "<b>" not in explain(empty(tokenizer, "a <b> cat"))._repr_html_()


def test_all_names_exist():
    assert set(edits.__all__) <= set(vars(edits))
