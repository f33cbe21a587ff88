"""The anatomy of every notebook, as it is stored. Who writes a notebook follows this:

file        notebooks/NN_name.ipynb, at most 500 KB, stored by `make notebooks` (which also writes the badges)
cell 1      markdown, cell tag `badges`; leave it to `make notebooks` to fill
cell 2      markdown: `# NN · Title`, a blank line, the promise in one sentence. The only H1.
code 1      the first code cell of `## Setup`, tag `bootstrap`; leave it to `make notebooks` to fill
H2          `## What you will learn` (3-5 verbs as a list, hardware, "NN minutes"), `## Setup`,
            `## The idea` (an equation between $$), `## By hand`, then topic sections with any names, then
            `## What breaks`, `## Knobs`, `## Exercises`, `## Summary`, `## References` (arXiv:NNNN.NNNNN),
            `## Next`: these and in this order.
first       the first figure is the before/after picture; it stands before `## By hand`
figures     5-10 outputs with a PNG
code        20-35 code cells, median at most 8 lines, none over 25; plain Python (no ! and no %);
            no path of one machine
prose       1000-2500 words of markdown; relative links lead to files that exist
claims      at least 3 cells tagged `nbval-check-output`, which print rounded numbers: nbval compares them
exercises   3-5 times: markdown `### Exercise N`, then a code cell tagged `exercise`, whose stub gives None
            and is handed to a function of `checks` ("not attempted yet"), then a code cell tagged
            `solution`, with metadata {"jupyter": {"source_hidden": true}} and the first line
            `# @title Solution`, which binds the same names and makes the same call of `checks` ("passed")
"""
from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import statistics
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from p2p_helpers import course

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPENING = ["What you will learn", "Setup", "The idea", "By hand"]
CLOSING = ["What breaks", "Knobs", "Exercises", "Summary", "References", "Next"]
MACHINE_PATH = re.compile(r"(?<![\w.:/])(?:/(?:root|work|Users|home(?!/ma-user)|tmp)/|[A-Z]:\\)")

pytestmark = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@lru_cache(maxsize=None)
def read(path: Path):
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list:
    return course.code_cells(read(path))


def markdown(path: Path) -> list:
    return [cell for cell in read(path).cells if cell.cell_type == "markdown"]


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def prose(path: Path) -> str:
    """The markdown without the badges and without fenced code, in which # is no heading."""
    text = "\n\n".join(cell.source for cell in markdown(path) if "badges" not in tags(cell))
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(path: Path, level: int) -> list[str]:
    return re.findall(rf"^{'#' * level} +(.+?)\s*$", prose(path), re.MULTILINE)


def section(path: Path, title: str) -> list:
    """The cells from an H2 to the next, its heading included."""
    cells, inside = [], False
    for cell in read(path).cells:
        heading = cell.cell_type == "markdown" and re.search(r"^## +(.+?)\s*$", cell.source, re.MULTILINE)
        inside = heading[1] == title if heading else inside
        cells += [cell] if inside else []
    return cells


def words_of(path: Path, title: str) -> str:
    return "\n".join(cell.source for cell in section(path, title) if cell.cell_type == "markdown")


def has_figure(cell) -> bool:
    return cell.cell_type == "code" and any("image/png" in output.get("data", {}) for output in cell.outputs)


def printed(cell) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "")
                   for output in cell.outputs)


# --- how it is stored ---------------------------------------------------------------------------------------

def test_outputs_are_one_clean_run(path):
    assert [cell.execution_count for cell in code(path)] == list(range(1, len(code(path)) + 1))


def test_no_error_and_no_warning_is_stored(path):
    bad = [(cell.source, output) for cell in code(path) for output in cell.outputs
           if output.get("name") == "stderr"
           or output.output_type == "error" and "raises-exception" not in tags(cell)]
    assert bad == []


def test_metadata_is_the_same_everywhere(path):
    assert read(path).metadata == course.METADATA
    assert [cell.source for cell in read(path).cells if "execution" in cell.metadata] == []


def test_no_widget_is_stored(path):
    assert course.WIDGET_VIEW not in path.read_text(encoding="utf-8")


def test_size(path):
    assert path.stat().st_size <= 500_000


def test_no_path_of_one_machine(path):
    texts = [cell.source for cell in read(path).cells] + [printed(cell) for cell in code(path)]
    assert [text for text in texts if MACHINE_PATH.search(text)] == []


# --- how it is built ----------------------------------------------------------------------------------------

def test_badges(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and "badges" in tags(first)
    assert first.source == course.badges(path.name, course.repository_url())


def test_bootstrap(path):
    found = [cell.source for cell in code(path) if "bootstrap" in tags(cell)]
    assert found == [course.bootstrap(course.repository_url())]
    assert code(path)[0].source == found[0]


def test_title_and_promise(path):
    assert len(headings(path, 1)) == 1
    second = read(path).cells[1]
    assert second.cell_type == "markdown"
    title = re.match(r"# (\d\d) · \S.*\n\n\S.*[.!?]", second.source)
    assert title, "the second cell reads: # NN · Title, a blank line, the promise"
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) and path.stem[:2] == title[1]


def test_sections_in_order(path):
    found = headings(path, 2)
    assert found[:len(OPENING)] == OPENING
    assert found[-len(CLOSING):] == CLOSING
    assert len(found) == len(set(found))


def test_objectives_and_minutes(path):
    text = words_of(path, "What you will learn")
    assert 3 <= len(re.findall(r"^[-*] ", text, re.MULTILINE)) <= 5
    assert re.search(r"\b\d+ minutes\b", text)


def test_the_idea_has_an_equation(path):
    assert "$$" in words_of(path, "The idea")


def test_references_are_by_arxiv_id(path):
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", words_of(path, "References"))


def test_first_figure_stands_before_the_hand_work(path):
    cells = read(path).cells
    first = next(i for i, cell in enumerate(cells) if has_figure(cell))
    hand = next(i for i, cell in enumerate(cells)
                if cell.cell_type == "markdown" and re.search("^## By hand", cell.source, re.MULTILINE))
    assert first < hand


def test_figures(path):
    assert 5 <= sum("image/png" in output.get("data", {}) for cell in code(path) for output in cell.outputs) <= 10


def test_code_cells_are_many_and_short(path):
    lines = [len(cell.source.splitlines()) for cell in code(path)]
    assert 20 <= len(lines) <= 35
    assert statistics.median(lines) <= 8
    assert [cell.source for cell in code(path) if len(cell.source.splitlines()) > 25] == []


def test_words(path):
    assert 1000 <= len(prose(path).split()) <= 2500


def test_links_lead_to_files(path):
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)|(?:src|href)=\"([^\"#]+)", prose(path))
    relative = [a or b for a, b in targets if not re.match(r"[a-z]+:", a or b)]
    assert [target for target in relative if not (path.parent / target).exists()] == []


# --- what it says and asks ----------------------------------------------------------------------------------

def test_claims_are_compared_by_nbval(path):
    marked = [cell for cell in code(path) if "nbval-check-output" in tags(cell)]
    assert len(marked) >= 3
    assert [cell.source for cell in marked if not re.search(r"\d", printed(cell))] == []


def calls_of_checks(cell) -> list[str]:
    return [ast.unparse(node) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)
            and ast.unparse(node.func).startswith("checks.")]


def test_exercises_have_a_check_and_a_solution(path):
    cells = section(path, "Exercises")
    found = re.findall(r"^### Exercise (\d+)", words_of(path, "Exercises"), re.MULTILINE)
    numbers = [int(number) for number in found]
    assert 3 <= len(numbers) <= 5 and numbers == list(range(1, len(numbers) + 1))
    asked = [cell for cell in cells if cell.cell_type == "code"]
    kinds = [next((tag for tag in tags(cell) if tag in ("exercise", "solution")), None) for cell in asked]
    assert kinds == ["exercise", "solution"] * len(numbers), "a stub and a solution for each"
    for stub, solution in zip(asked[::2], asked[1::2]):
        assert calls_of_checks(stub), stub.source
        assert calls_of_checks(stub) == calls_of_checks(solution), solution.source
        assert solution.source.startswith("# @title Solution\n")
        assert solution.metadata.get("jupyter", {}).get("source_hidden") is True
        assert "not attempted" in printed(stub), stub.source
        assert "passed" in printed(solution), solution.source


def imported(tree: ast.AST):
    """(module, name, bound as) of what comes from p2p_helpers; name is None for a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "p2p_helpers":
                    module = alias.name if alias.asname else "p2p_helpers"
                    yield module, None, alias.asname or "p2p_helpers"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "p2p_helpers":
            for alias in node.names:
                yield node.module, alias.name, alias.asname or alias.name


def resolve(module: str, name: str | None):
    """The object that an import gives, or None where there is no such name."""
    owner = importlib.import_module(module)
    if name is None or hasattr(owner, name):
        return owner if name is None else getattr(owner, name)
    inside = hasattr(owner, "__path__") and importlib.util.find_spec(f"{module}.{name}")
    return importlib.import_module(f"{module}.{name}") if inside else None


def test_code_is_plain_python_and_its_helpers_exist(path):
    tree = ast.parse("\n".join(cell.source for cell in code(path)))     # a magic or a ! is no Python
    bound, missing = {}, []
    for module, name, alias in imported(tree):
        bound[alias] = resolve(module, name)
        missing += [f"{module}.{name}"] if bound[alias] is None else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = bound.get(node.value.id)
            if isinstance(owner, ModuleType) and resolve(owner.__name__, node.attr) is None:
                missing.append(f"{owner.__name__}.{node.attr}")
    assert bound, "a notebook imports p2p_helpers"
    assert missing == []
