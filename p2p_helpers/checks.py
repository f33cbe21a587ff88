"""Exercise checks, which survive "Run all" with exercises undone, and checkpoints, which stop a lesson."""
from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["check", "check_function", "equal"]

NOT_ATTEMPTED = "not attempted yet"


def check(name: str, attempt: Any, expected: Any, *, hint: str = "", tolerance: float = 1e-4) -> bool:
    """Compare a learner's answer with the right one, print the verdict and return whether it is right.

    Parameters
    ----------
    name : str
        "Exercise 1".
    attempt
        The answer: a number, string, array, tensor, picture, or lists and dictionaries of these. None and
        `...` are exercises not attempted yet. A function is called without arguments; see `check_function`.
    hint : str
        Printed after the first thing that is wrong.
    tolerance : float
        Absolute, and relative to the right value.
    """
    if callable(attempt):
        return check_function(name, attempt, [((), expected)], hint=hint, tolerance=tolerance)
    if attempt is None or attempt is Ellipsis:
        return _verdict(name, NOT_ATTEMPTED)
    return _verdict(name, _first_difference(attempt, expected, tolerance), hint)


def check_function(name: str, function: Callable | None, cases: Sequence[tuple[tuple, Any]], *,
                   hint: str = "", tolerance: float = 1e-4) -> bool:
    """Call a learner's function on inputs and compare what it returns; its errors are shown, not raised.

    Parameters
    ----------
    cases : list of (arguments, expected)
        `arguments` is a tuple, `expected` what the function should return for them.
    """
    if function is None or function is Ellipsis:
        return _verdict(name, NOT_ATTEMPTED)
    if not callable(function):
        return _verdict(name, f"a function was expected, this is a {type(function).__name__}", hint)
    for arguments, expected in cases:
        try:
            result = function(*arguments)
        except NotImplementedError:
            return _verdict(name, NOT_ATTEMPTED)
        except Exception as error:
            return _verdict(name, f"{_call(function, arguments)} raised {_where(error)}", hint)
        if result is None or result is Ellipsis:
            return _verdict(name, NOT_ATTEMPTED)
        difference = _first_difference(result, expected, tolerance)
        if difference:
            return _verdict(name, f"{_call(function, arguments)}: {difference}", hint)
    return _verdict(name, None)


def equal(a: Any, b: Any, tolerance: float = 1e-4, what: str = "the two results") -> None:
    """A lesson's checkpoint: print one line if two results agree, raise an AssertionError if they do not.

    Parameters
    ----------
    what : str
        What was computed twice, as a plural: "guidance by hand and guide()".
    """
    difference = _first_difference(a, b, tolerance)
    if difference:
        raise AssertionError(f"checkpoint: {what} do not agree: {difference}. "
                             f"Re-read the cells above that compute {what}, and run them again from the top")
    print(f"checkpoint passed: {what} agree to {tolerance:.0e}")


def _verdict(name: str, problem: str | None, hint: str = "") -> bool:
    if problem is None:
        print(f"{name}: passed")
        return True
    print(f"{name}: {problem}" if problem == NOT_ATTEMPTED else f"{name}: not right yet: {problem}")
    if hint:
        print(f"  Hint: {hint}")
    return False


def _first_difference(a: Any, b: Any, tolerance: float, where: str = "") -> str | None:
    """What differs first between an answer and the right one, in words, or None."""
    at = f" at {where}" if where else ""
    if isinstance(b, str) or b is None or isinstance(b, (bool, np.bool_)):
        same = isinstance(a, type(b)) or isinstance(b, (bool, np.bool_)) and isinstance(a, (bool, np.bool_))
        return None if same and a == b else f"{_short(a)} instead of {_short(b)}{at}"
    if isinstance(b, Mapping):
        if not isinstance(a, Mapping) or a.keys() != b.keys():
            keys = sorted(map(str, a)) if isinstance(a, Mapping) else _short(a)
            return f"{keys} instead of the keys {sorted(map(str, b))}{at}"
        pairs = [(a[key], b[key], f"{where}[{key!r}]") for key in b]
    elif isinstance(b, (list, tuple)) and not _is_array(b):
        if not isinstance(a, (list, tuple)) or len(a) != len(b):
            given = f"{len(a)} entries" if isinstance(a, (list, tuple)) else _short(a)
            return f"{given} instead of a list of {len(b)} entries{at}"
        pairs = [(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(a, b))]
    else:
        return _array_difference(a, b, tolerance, where)
    return next(filter(None, (_first_difference(*pair[:2], tolerance, pair[2]) for pair in pairs)), None)


def _array_difference(a: Any, b: Any, tolerance: float, where: str) -> str | None:
    b = _to_numpy(b)
    try:
        a_array = _to_numpy(a)
    except Exception:                               # whatever a learner's object raises
        a_array = np.array(None)
    at = f" at {where}" if where else ""
    if a_array.dtype.kind != "f":
        return f"{_short(a)} (type {type(a).__name__}) where numbers were expected{at}"
    if a_array.shape != b.shape:
        return f"shape {a_array.shape} instead of {b.shape}{at}"
    wrong = ~np.isclose(a_array, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    if not wrong.any():
        return None
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = where + (f"[{', '.join(map(str, index))}]" if index else "")
    count = f" ({np.count_nonzero(wrong)} of {wrong.size} values differ)" if wrong.size > 1 else ""
    return f"{a_array[index]:.6g} instead of {b[index]:.6g}" + (f" at {place}" if place else "") + count


def _is_array(values: Sequence) -> bool:
    """Whether a list, however nested, is an array of numbers."""
    try:
        return np.asarray(values).dtype.kind in "biuf"
    except (ValueError, TypeError, RuntimeError):   # ragged, or holding tensors with gradients
        return False


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):                    # a tensor, perhaps on a device, perhaps bfloat16
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    array = np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind in "biuf" else array


def _call(function: Callable, arguments: tuple) -> str:
    return f"{getattr(function, '__name__', 'the function')}({', '.join(map(_short, arguments))})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and len(value.shape):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _where(error: Exception) -> str:
    """An error with the line of the learner's function that raised it."""
    frames = traceback.extract_tb(error.__traceback__)[1:]     # the first is check_function itself
    line = f", line {frames[0].lineno}: {frames[0].line}" if frames and frames[0].line else ""
    return f"{type(error).__name__}: {error}{line}"
