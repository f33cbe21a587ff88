"""Words, tokens and alignments. In the tiny tokenizer "ox" is two tokens, "bus" and "pie" three, the words listed in
conftest.py one; prompts are read up to 32 tokens."""
import pytest
import reference
import torch

from p2p_helpers.prompts import (align, common_pairs, legacy_refine, legacy_swap, mixed_pairs, positional_pairs,
                                 read_prompt)

LENGTH = 32


@pytest.fixture(scope="module")
def read(tiny_pipe):
    return lambda text: read_prompt(tiny_pipe.tokenizer, text)


@pytest.fixture(scope="module")
def aligned(read):
    def run(source, target, pairing=positional_pairs, **options):
        before, after = read(source), read(target)
        return align(before, after, pairing(before, after), **options)
    return run


def columns(alignment):
    """What target tokens take, as {target token: {source token: share}}, without those that take nothing."""
    shares = {j: {int(i): float(column[i]) for i in column.nonzero()} for j, column in enumerate(alignment.matrix.T)}
    return {j: taken for j, taken in shares.items() if taken}


def takers(alignment, *positions):
    """The target tokens that take anything from these source tokens."""
    return alignment.matrix[list(positions)].any(0).nonzero().flatten().tolist()


def pair_texts(pairs):
    return [(s.text, t.text) for s, t in pairs]


# ---- reading --------------------------------------------------------------------------------------------------------


def test_a_prompt_is_words_and_tokens(read):
    prompt = read("a big bus")
    assert prompt.tokens[:7] == ("<|startoftext|>", "a", "big", "b", "u", "s", "<|endoftext|>")
    assert len(prompt.tokens) == LENGTH and prompt.end == 6
    assert [(word.text, word.tokens) for word in prompt.words] == [("a", (1,)), ("big", (2,)), ("bus", (3, 4, 5))]


@pytest.mark.parametrize("text", ["a cat on the beach", "an ox and a bus in the snow", "pie"])
def test_tokens_of_words_equal_those_of_words_read_alone(read, tiny_pipe, text):
    prompt = read(text)
    expected = reference.word_tokens(tiny_pipe.tokenizer, text)
    assert [list(word.tokens) for word in prompt.words] + [[prompt.end]] == expected


@pytest.mark.parametrize("text", ["a cat, on the beach!", "A CAT on the beach.", "a 'cat' on  the\nbeach",
                                  "a cat,on the beach"])
def test_punctuation_case_and_spaces_do_not_hide_a_word(read, text):
    """Google's get_word_inds finds nothing for "cat" in "a cat, ..." and says nothing."""
    prompt = read(text)
    found = prompt.positions("cat")
    assert [prompt.tokens[i] for i in found] == ["cat"]
    assert prompt.positions("Cat,") == prompt.positions("CAT") == found
    assert [prompt.tokens[i] for i in prompt.positions("the beach")] == ["the", "beach"]


def test_punctuation_belongs_to_no_word(read):
    assert [word.text for word in read("a cat, a dog ...").words if word.is_mark] == [",", "..."]
    assert [word.text for word in read("children's red-hot pie").words] == ["children's", "red-hot", "pie"]


def test_letters_of_several_bytes_stay_in_their_word(read):
    prompt = read("a café cat")
    assert prompt.positions("café") == (2, 3, 4, 5) and prompt.positions("cat") == (6,)


def test_a_word_stands_wherever_it_occurs(read):
    assert read("a cat and a cat").positions("cat") == (2, 5)
    assert read("a cat and a cat").positions("a cat") == (1, 2, 4, 5)
    assert read("a bus and an ox").positions("bus") == (2, 3, 4)


@pytest.mark.parametrize("word, message", [
    ("cta", "word 'cta' is not in the prompt 'a cat, on the beach'; did you mean 'cat'.*known: a, cat, on, the, beach"),
    ("ca", "not in the prompt"), ("beach cat", "not in the prompt"), ("", "not in the prompt"),
    (",", "not in the prompt")])
def test_an_unknown_word_is_an_error_that_helps(read, word, message):
    with pytest.raises(ValueError, match=message):
        read("a cat, on the beach").positions(word)


@pytest.mark.parametrize("text, message", [
    ("", "empty"), ("  ", "empty"), ("cat " * 30 + "dog", "would be cut: 'dog'")])
def test_an_empty_or_too_long_prompt_is_an_error(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_a_prompt_is_no_list(read):
    with pytest.raises(TypeError, match="a prompt is a string, not list"):
        read(["a cat"])


def test_the_longest_prompt_fits(read):
    prompt = read("cat " * 29 + "dog")
    assert prompt.end == LENGTH - 1 and prompt.positions("dog") == (30,)


# ---- pairs ----------------------------------------------------------------------------------------------------------


def test_a_swap_pairs_words_by_position_and_marks_behind_the_same_word(read):
    pairs = positional_pairs(read("a cat, on the beach."), read("a dog, in the beach!"))
    assert pair_texts(pairs) == [("a", "a"), ("cat", "dog"), ("on", "in"), ("the", "the"), ("beach", "beach"),
                                 (",", ",")]


def test_a_swap_needs_as_many_words(read):
    with pytest.raises(ValueError, match="as many words in both.* source 'a cat' has 2, target 'a big cat' has 3"):
        positional_pairs(read("a cat"), read("a big cat"))


def test_common_pairs_leave_out_what_was_added_deleted_or_replaced(read):
    pairs = common_pairs(read("a big cat on the beach"), read("a dog on the red beach at night"))
    assert pair_texts(pairs) == [("a", "a"), ("on", "on"), ("the", "the"), ("beach", "beach")]


def test_mixed_pairs_also_pair_a_replaced_noun(read):
    source, target = read("a car on the beach"), read("a red bus on the beach")
    assert pair_texts(mixed_pairs(source, target))[:3] == [("a", "a"), ("car", "bus"), ("on", "on")]
    assert ("car", "bus") not in pair_texts(common_pairs(source, target))


def test_a_word_never_pairs_with_a_mark(read):
    pairs = mixed_pairs(read("a cat , red"), read("a cat dog red"))
    assert pair_texts(pairs) == [("a", "a"), ("cat", "cat"), ("red", "red")]


# ---- alignment ------------------------------------------------------------------------------------------------------


def test_equal_prompts_align_to_the_identity(aligned):
    alignment = aligned("a bus on the beach", "a bus on the beach")
    assert torch.equal(alignment.matrix, torch.eye(LENGTH)) and alignment.partnered.all()


@pytest.mark.parametrize("source, target", [
    ("a cat on a cake", "a bus on a cake"), ("a bus on a cake", "a cat on a cake"),
    ("an ox on a cake", "an bus on a cake")])
@pytest.mark.parametrize("mode", ["average", "copy", "sum"])
def test_words_behind_an_unequal_swap_stay_aligned(aligned, read, source, target, mode):
    """In Google's mapper (and diffusers') every later word takes a neighbour's map."""
    alignment = aligned(source, target, mode=mode)
    for word in ("on", "cake"):
        (i,), (j,) = read(source).positions(word), read(target).positions(word)
        assert columns(alignment)[j] == {i: 1.}
    before, after = read(source).end, read(target).end
    assert all(columns(alignment)[after + k] == {before + k: 1.} for k in range(LENGTH - max(before, after)))


@pytest.mark.parametrize("mode, share", [("average", 1 / 3), ("copy", 1.), ("sum", 1.)])
def test_a_split_word(aligned, mode, share):
    taken = columns(aligned("a cat on a cake", "a bus on a cake", mode=mode))
    assert [taken[j] for j in (2, 3, 4)] == [{2: pytest.approx(share)}] * 3


@pytest.mark.parametrize("mode, share", [("average", 1.), ("copy", 1 / 3), ("sum", 1.)])
def test_a_merged_word(aligned, mode, share):
    taken = columns(aligned("a bus on a cake", "a cat on a cake", mode=mode))
    assert taken[2] == {i: pytest.approx(share) for i in (2, 3, 4)}


@pytest.mark.parametrize("mode, share", [("average", 1 / 3), ("copy", 1 / 2), ("sum", 1.)])
def test_two_tokens_to_three(aligned, mode, share):
    taken = columns(aligned("an ox", "an bus", mode=mode))
    assert [taken[j] for j in (2, 3, 4)] == [{i: pytest.approx(share) for i in (2, 3)}] * 3


def test_average_keeps_the_mass_of_every_paired_word(aligned):
    matrix = aligned("a cat on a bus", "an ox on a cake").matrix
    assert torch.allclose(matrix[1:7].sum(1), torch.ones(6))


def test_words_of_equally_many_tokens_align_one_by_one(aligned):
    taken = columns(aligned("a bus", "a pie", mode="sum"))
    assert [taken[j] for j in (2, 3, 4)] == [{2: 1.}, {3: 1.}, {4: 1.}]


def test_an_added_word_has_no_partner(aligned):
    alignment = aligned("a cat on the beach", "a big cat on the beach", common_pairs)
    assert alignment.partnered[2] == 0 and not alignment.matrix[:, 2].any()
    assert alignment.partnered.sum() == LENGTH - 1 and columns(alignment)[3] == {2: 1.}


def test_nobody_takes_the_map_of_a_deleted_word(aligned, read):
    """In Google's refinement padding takes the maps of the source words at its own positions."""
    source = "a big small red cat"
    alignment = aligned(source, "a cat", common_pairs)
    assert takers(alignment, *read(source).positions("big small red")) == []
    assert takers(alignment, *read(source).positions("cat")) == [2]


def test_end_and_padding_align_by_their_distance_from_the_end(aligned):
    deletion = columns(aligned("a big small red cat", "a cat", common_pairs))        # ends at 6 and 3
    assert deletion[3] == {6: 1.} and deletion[28] == {31: 1.} and set(range(29, 32)).isdisjoint(deletion)
    addition = columns(aligned("a cat", "a big small red cat", common_pairs))
    assert addition[6] == {3: 1.} and addition[31] == {28: 1.}


def test_an_alignment_equals_the_loops_of_the_reference(aligned, tiny_pipe):
    source, target = "a bus and an ox on the beach", "a cat and an pie on the snow"
    for mode, rule in [("average", reference.average), ("copy", reference.copy), ("sum", reference.total)]:
        expected = reference.describe(tiny_pipe.tokenizer, source, target, [(i, i) for i in range(8)], unequal=rule)
        assert columns(aligned(source, target, mode=mode)) == {
            j: pytest.approx(dict(taken)) for j, taken in expected.takes.items()}


def test_an_unknown_mode_is_an_error(aligned):
    with pytest.raises(ValueError, match="mode 'averge' is unknown; did you mean 'average'"):
        aligned("a cat", "a dog", mode="averge")


# ---- as Google's code does ------------------------------------------------------------------------------------------


def test_legacy_swap_misaligns_behind_a_split_word(read):
    """peers.md 4.3: target "on" (5) takes the map of source "cake" (5) instead of "on" (3)."""
    source, target = read("a cat on a cake"), read("a bus on a cake")
    taken = columns(legacy_swap(source, target))
    assert source.tokens[5] == "cake" and target.tokens[5] == "on"
    assert [taken[j] for j in (1, 2, 3, 4)] == [{1: 1.}] + [{2: pytest.approx(1 / 3)}] * 3
    assert all(taken[j] == {j: 1.} for j in range(5, LENGTH))


def test_legacy_swap_gives_a_fragment_of_the_removed_word_behind_a_merged_one(read):
    source, target = read("a bus on a cake"), read("a cat on a cake")
    taken = columns(legacy_swap(source, target))
    assert source.tokens[3] == "u" and target.tokens[3] == "on"
    assert taken[2] == {2: 1., 3: 1., 4: 1.} and all(taken[j] == {j: 1.} for j in range(3, LENGTH - 2))
    assert set(taken).isdisjoint({LENGTH - 2, LENGTH - 1})


def test_legacy_swap_is_right_before_the_last_swapped_word_and_for_equal_ones(read, aligned):
    between = columns(legacy_swap(read("a cat on a cake"), read("a bus on a pie")))
    assert between[5] == {3: 1.} and between[6] == {4: 1.} and between[7] == {5: pytest.approx(1 / 3)}
    equal = legacy_swap(read("a cat on a cake"), read("a dog on a ball"))
    assert torch.equal(equal.matrix, aligned("a cat on a cake", "a dog on a ball").matrix)


def test_legacy_swap_counts_words_by_spaces(read):
    with pytest.raises(ValueError, match="source has 2, target 3"):
        legacy_swap(read("a cat"), read("a big cat"))


def test_legacy_refine_leaks_deleted_words_into_the_padding(read):
    """peers.md 4.3: of "a long detailed red cat" to "a cat" the pads 4 and 5 take "red" and "cat"."""
    source, target = read("a big small red cat"), read("a cat")
    legacy = legacy_refine(source, target)
    assert target.end == 3 and source.tokens[4:6] == ("red", "cat")
    assert columns(legacy) == {0: {0: 1.}, 1: {1: 1.}, 2: {5: 1.}, 3: {6: 1.}} | {j: {j: 1.} for j in range(4, LENGTH)}
    assert legacy.partnered.all()


def test_legacy_refine_aligns_an_added_phrase(read, aligned):
    legacy = legacy_refine(read("a cat on the beach"), read("a big cat on the beach"))
    ours = aligned("a cat on the beach", "a big cat on the beach", common_pairs)
    assert torch.equal(legacy.matrix[:, :8], ours.matrix[:, :8])
    assert torch.equal(legacy.partnered, ours.partnered)
    assert columns(legacy)[9] == {9: 1.} and columns(ours)[9] == {8: 1.}


def test_legacy_refine_breaks_ties_as_needleman_wunsch_there(read):
    """Of equal ways left (a gap in the source) comes before up, and up before the pair."""
    legacy = legacy_refine(read("cat dog"), read("dog cat"))
    assert columns(legacy) == {0: {0: 1.}, 1: {2: 1.}, 3: {3: 1.}} | {j: {j: 1.} for j in range(4, LENGTH)}
    assert legacy.partnered[2] == 0
    replaced = legacy_refine(read("a cat"), read("a dog"))
    assert replaced.partnered[:4].tolist() == [1, 1, 0, 1]
