import numpy as np
import pytest
import torch
from PIL import Image

from p2p_helpers.checks import check, check_function, equal


def double(x):
    return 2 * x


@pytest.mark.parametrize("attempt, expected", [
    (2, 2.00001), (2.0, 2), ("cat", "cat"), (True, True), (np.bool_(True), True),
    (torch.eye(2), np.eye(2)), (np.eye(2), torch.eye(2, dtype=torch.bfloat16)), ([1, 2], (1, 2)),
    ([1.0, 2.0], torch.tensor([1, 2])), (["a", [1, torch.ones(2)]], ["a", [1, np.ones(2)]]),
    ({"a": 1, "b": "x"}, {"b": "x", "a": 1}), (np.nan, np.nan), (float("inf"), float("inf")),
    (Image.new("RGB", (2, 2)), np.zeros((2, 2, 3))), (torch.ones(2, requires_grad=True), [1, 1]),
    (lambda: 3, 3)])
def test_right_answers(capsys, attempt, expected):
    assert check("Exercise 1", attempt, expected, hint="secret") is True
    assert capsys.readouterr().out == "Exercise 1: passed\n"


def unfinished():
    """A stub as notebooks have it."""


def raising():
    raise NotImplementedError


@pytest.mark.parametrize("attempt", [None, ..., unfinished, raising, lambda: ...])
def test_not_attempted(capsys, attempt):
    assert check("Exercise 1", attempt, 3, hint="secret") is False
    assert capsys.readouterr().out == "Exercise 1: not attempted yet\n"


@pytest.mark.parametrize("attempt, expected, message", [
    (3, 2, "3 instead of 2"), (np.nan, 2, "nan instead of 2"), ("dog", "cat", "'dog' instead of 'cat'"),
    (1, True, "1 instead of True"), (False, True, "False instead of True"),
    ("2", 2, "'2' (type str) where numbers"),
    (object(), 2, "(type object) where numbers"),
    (torch.ones(2, 3), torch.ones(3, 2), "shape (2, 3) instead of (3, 2)"),
    (np.array([[1, 2], [3, 5]]), [[1, 2], [3, 4]], "5 instead of 4 at [1, 1] (1 of 4 values differ)"),
    ([1, 2, 3], [1, 2], "shape (3,) instead of (2,)"), (["a", "c"], ["a", "b"], "'c' instead of 'b' at [1]"),
    (["a"], ["a", "b"], "1 entries instead of a list of 2 entries"),
    ({"a": 1}, {"b": 1}, "['a'] instead of the keys ['b']"),
    ({"a": [1, "x"]}, {"a": [1, "y"]}, "'x' instead of 'y' at ['a'][1]"),
    (["a", 3], ["a", torch.ones(2)], "shape () instead of (2,) at [1]"), (5, "cat", "5 instead of 'cat'"),
    ([[1, 2], [3]], np.ones((2, 2)), "(type list) where numbers were expected")])
def test_wrong_answers_show_the_first_difference_and_the_hint(capsys, attempt, expected, message):
    assert check("Exercise 1", attempt, expected, hint="look at the shape") is False
    out = capsys.readouterr().out
    assert out.startswith("Exercise 1: not right yet: ") and out.endswith("\n  Hint: look at the shape\n")
    assert message in out


def test_tolerance_is_absolute_and_relative():
    assert check("x", 1e-5, 0.0) and not check("x", 1e-3, 0.0)
    assert check("x", 10000.5, 10000.0) and not check("x", 10002.0, 10000.0)
    assert not check("x", 1e-5, 0.0, tolerance=1e-6)


def test_function_on_inputs(capsys):
    cases = [((1,), 2), ((torch.ones(2),), [2, 2])]
    assert check_function("Exercise 2", double, cases) is True
    assert check_function("Exercise 2", lambda x: x + 1, [*cases, ((5,), 10)], hint="times") is False
    assert capsys.readouterr().out == ("Exercise 2: passed\n"
                                       "Exercise 2: not right yet: <lambda>(5): 6 instead of 10\n"
                                       "  Hint: times\n")


def test_errors_of_a_learner_are_shown_not_raised(capsys):
    def divide(x):
        return x / 0
    assert check_function("Exercise 2", divide, [((1,), 2)], hint="think") is False
    out = capsys.readouterr().out
    assert "divide(1) raised ZeroDivisionError: division by zero" in out and "return x / 0" in out
    assert check_function("Exercise 2", lambda: 1, [((1,), 2)]) is False        # wrong number of arguments
    assert "raised TypeError" in capsys.readouterr().out
    assert check_function("Exercise 2", 7, [((1,), 2)]) is False
    assert "a function was expected, this is a int" in capsys.readouterr().out


@pytest.mark.parametrize("function", [None, ..., lambda x: None])
def test_function_not_attempted(capsys, function):
    assert check_function("Exercise 2", function, [((1,), 2)]) is False
    assert capsys.readouterr().out == "Exercise 2: not attempted yet\n"


def test_equal_prints_one_stable_line(capsys):
    equal(torch.ones(2) + 1e-7, torch.ones(2), 1e-6, "guidance by hand and guide()")
    assert capsys.readouterr().out == "checkpoint passed: guidance by hand and guide() agree to 1e-06\n"


def test_equal_says_what_to_read_again(capsys):
    with pytest.raises(AssertionError, match=r"by hand and guide\(\) do not agree: 1 instead of 2 at \[1\] .*"
                                             r"Re-read the cells above that compute guidance by hand"):
        equal([1, 1], [1, 2], 1e-6, "guidance by hand and guide()")
    assert capsys.readouterr().out == ""
