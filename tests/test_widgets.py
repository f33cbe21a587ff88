"""The control of an edit makes it again when a knob moves."""
import ipywidgets as W
import pytest

from p2p_helpers.widgets import edit_control


@pytest.fixture
def box(tiny_pipe):
    return edit_control(tiny_pipe, "a cat on the grass", "a dog on the grass", steps=2, weight_of="dog",
                        measure=lambda result: f"seed {result.settings['seed']}")


def knob(box, description):
    return next(child for child in box.children if getattr(child, "description", None) == description)


def message(box):
    return next(child for child in box.children if isinstance(child, W.HTML)).value


def pictures(box):
    return [picture.value for picture in box.children[-1].children]


def test_it_starts_with_an_edit(box):
    source, edited = pictures(box)
    assert source[:4] == edited[:4] == b"\x89PNG" and source != edited
    assert message(box) == "seed 0"


@pytest.mark.parametrize("description, value, source_changes", [
    ("seed", 5, True), ("weight", 4., False), ("cross τ", 0., False), ("self τ", 1., False),
    ("target", "a big dog on the grass", False)])
def test_every_knob_makes_it_again(box, description, value, source_changes):
    before = pictures(box)
    knob(box, description).value = value
    after = pictures(box)
    assert before[1] != after[1]
    assert (before[0] != after[0]) == source_changes


def test_a_wrong_word_is_said_and_the_pictures_stay(box):
    before = pictures(box)
    knob(box, "word").value = "dgo"
    assert "did you mean &#x27;dog&#x27;" in message(box)
    assert pictures(box) == before
